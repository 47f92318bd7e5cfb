"""Merges in memory: models or state dicts in, a new state dict out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from onthefly.merging.parents import Model, held_parent
from onthefly.merging.plan import Plan, planned


def stochastic_weight_averaging(models: Sequence[Model]) -> dict[str, Tensor]:
    """The average of models (Izmailov et al. 2018): of the last checkpoints of a run, or of fine-tunings of one model."""
    return merge_state_dicts(models, "swa")


def fisher_soup_merge(
    models: Sequence[Model], fishers: Sequence[Mapping[str, Tensor]] | None = None
) -> dict[str, Tensor]:
    """The average weighted by the diagonal Fisher information (Matena & Raffel 2022), one mapping by names for each model.

    Without any it is the plain average, and warns.
    """
    if fishers is None:
        warnings.warn("fisher_soup_merge was given no Fisher information: this is the plain average", stacklevel=2)
        return stochastic_weight_averaging(models)
    return merge_state_dicts(models, "fisher", statistics=fishers)


def adapter_fuse_merge(models: Sequence[Model]) -> dict[str, Tensor]:
    """The first model, with every tensor whose name contains ``adapter`` or ``lora`` averaged over all."""
    return merge_state_dicts(models, "adapter")


def weighted_average_merge(models: Sequence[Model], weights: Sequence[float]) -> dict[str, Tensor]:
    """The average of models by weights, which need not sum to one."""
    return merge_state_dicts(models, "weighted", weights=weights)


def merge_state_dicts(
    models: Sequence[Model],
    strategy: str,
    options: Mapping[str, Any] | None = None,
    *,
    weights: Sequence[float] | None = None,
    base: Model | None = None,
    statistics: Sequence[Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Merge models or state dicts, which stay as they are, into a new state dict: names, order, dtypes and devices of the first.

    `statistics` are what the strategy needs of each model, by names: Fisher information, or Gram matrices. Tied tensors stay tied.
    Raises `InvalidCommandError` for wrong arguments, `StateMismatchError` for models that do not fit each other, and
    `UnsupportedValueError` for entries that are no tensors.
    """
    plan = planned(
        [held_parent(model, f"model {number}") for number, model in enumerate(models)],
        strategy,
        options or {},
        weights=weights,
        base=None if base is None else held_parent(base, "the base"),
        statistics=None
        if statistics is None
        else [held_parent(one, f"the statistics of model {number}") for number, one in enumerate(statistics)],
    )
    for warning in plan.warnings:
        warnings.warn(warning, stacklevel=2)
    return _computed(plan)


def _computed(plan: Plan) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for name, first in plan.firsts.items():
        merged[name] = merged[first] if first in merged else _filled(plan, name)
    return merged


def _filled(plan: Plan, name: str) -> Tensor:
    form = plan.form(name)
    result = torch.empty(form.shape, dtype=form.dtype)
    numbers = (torch.view_as_real(result) if form.is_complex() and name not in plan.kept else result).view(-1)
    begin = 0
    for piece in plan.pieces(name):
        numbers[begin : begin + piece.numel()] = piece
        begin += piece.numel()
    return result.to(plan.parents[0].tensors[name].device)
