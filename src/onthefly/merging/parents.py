"""Parents: what is merged, opened. A file's tensors are views of it: nothing is read before it is used."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onthefly.checkpoints.format import open_checkpoint
from onthefly.checkpoints.header import recorded_hash
from onthefly.checkpoints.weights import entry, few, form, is_plain, model_of, read_state_dict, value_in
from onthefly.errors import (
    CorruptCheckpointError,
    InvalidCommandError,
    StateMismatchError,
    UnsupportedValueError,
)
from onthefly.merging.registry import Strategy
from onthefly.merging.strategies import SLICE
from onthefly.state.parts import plain_names, unwrapped

Model = nn.Module | Mapping[str, Any]
"""A module, or its state dict."""


@dataclass(frozen=True)
class Parent:
    """One model's tensors by name. `label` is what errors call it; `hash` is that of a checkpoint of OnTheFly, which was verified."""

    label: str
    tensors: dict[str, Tensor]
    path: Path | None = None
    hash: str | None = None


def open_parent(path: str | os.PathLike[str], *, only: str | None = None) -> Parent:
    """The model in a checkpoint of OnTheFly, or `only`, another part of it; or a state dict in ``.safetensors`` or ``.pt``.

    Every byte of a checkpoint is checked against its hash. Raises `CheckpointNotFoundError`, `CorruptCheckpointError`, and
    `InvalidCommandError` for a file of another kind, or a part that there is not.
    """
    path = Path(path)
    if not _is_checkpoint(path):
        return Parent(str(path), read_state_dict(path), path)
    file = open_checkpoint(path)
    value = value_in(file)
    part = only or model_of(value, path)
    stored = entry(value, part)
    if not isinstance(stored, dict) or not stored:
        raise InvalidCommandError(f"{path} has no state dict {part!r}; it has: {few(map(str, value))}")
    if other := [str(name) for name, item in stored.items() if not is_plain(item)]:
        raise UnsupportedValueError(
            f"{path}: {part} has entries that are no plain tensors, and cannot be merged: {few(other)}"
        )
    return Parent(str(path), {str(name): tensor.detach() for name, tensor in stored.items()}, path, file.hash)


def held_parent(model: Model, label: str) -> Parent:
    """A module, by the names in the user's own module, or a state dict, in memory. Raises `UnsupportedValueError`."""
    if isinstance(model, nn.Module):
        module = unwrapped(model)
        plain = plain_names(module)
        state: Mapping[str, Any] = {plain(name): item for name, item in module.state_dict().items()}
    else:
        state = model
    for name, item in state.items():
        if not isinstance(item, Tensor) or item.layout is not torch.strided or item.is_quantized or item.is_meta:
            raise UnsupportedValueError(f"{label}: {name} is no plain tensor, and cannot be merged")
    return Parent(label, {name: tensor.detach() for name, tensor in state.items()})


def check_compatible(parents: Sequence[Parent], strategy: Strategy) -> None:
    """Raises `StateMismatchError`, with the first differences of each, unless all have the same names, shapes and dtypes."""
    first = parents[0]
    problems = [
        f"{parent.label} does not fit {first.label}: {'; '.join(wrong)}"
        for parent in parents[1:]
        if (wrong := list(_misfits(first.tensors, parent.tensors, strategy)))
    ]
    if problems:
        raise StateMismatchError("; ".join(problems))


def check_different(parents: Sequence[Parent]) -> None:
    """Raises `InvalidCommandError` for two parents of equal content. Two that differ are read up to where they do."""
    for one, other in combinations(parents, 2):
        if all(_equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items()):
            raise InvalidCommandError(f"{one.label} and {other.label} have the same content: merge different parents")


def first_names(parents: Sequence[Parent], base: Parent | None = None) -> dict[str, str]:
    """Under which name each tensor is merged: of those that share memory in a parent, the first.

    In the others, where they may stand apart (a plain ``.safetensors`` file has no ties), they must be equal. Raises
    `StateMismatchError`.
    """
    names = list(parents[0].tensors)
    firsts = {name: name for name in names}
    for tie in (_ties(parent, names) for parent in parents):
        for name, first in tie.items():
            one, other = sorted((firsts[name], firsts[first]), key=names.index) if name != first else (name, name)
            if one != other:
                firsts = {key: one if value == other else value for key, value in firsts.items()}
    for parent in (*parents, *([] if base is None else [base])):
        tie = _ties(parent, names)
        for name, first in firsts.items():
            if tie[name] != tie[first] and not torch.equal(parent.tensors[name], parent.tensors[first]):
                raise StateMismatchError(f"{name} and {first} are tied in a parent, and differ in {parent.label}")
    return firsts


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, without a look at the rest of those that differ early."""
    if one.shape != other.shape:
        return False
    first, second = one.reshape(-1), other.reshape(-1)
    return all(torch.equal(first[i : i + SLICE], second[i : i + SLICE]) for i in range(0, len(first), SLICE))


def _is_checkpoint(path: Path) -> bool:
    try:
        recorded_hash(path)
    except CorruptCheckpointError:
        return False
    return True


def _misfits(first: Mapping[str, Tensor], other: Mapping[str, Tensor], strategy: Strategy) -> Iterator[str]:
    if missing := [name for name in first if name not in other]:
        yield f"it lacks {few(missing)}"
    if extra := [name for name in other if name not in first]:
        yield f"it has {few(extra)} besides"
    unequal = [
        f"{name} is {form(other[name])}, not {form(first[name])}"
        for name in first
        if name in other and _bound(first[name], name, strategy) != _bound(other[name], name, strategy)
    ]
    if unequal:
        yield few(unequal)


def _bound(tensor: Tensor, name: str, strategy: Strategy) -> tuple[Any, ...]:
    """What must be the same in all parents."""
    axis = strategy.free_axis(name)
    return (tensor.dtype, *(None if i == axis else length for i, length in enumerate(tensor.shape)))


def _ties(parent: Parent, names: Sequence[str]) -> dict[str, str]:
    """The first name of each tensor's memory."""
    seen: dict[Any, str] = {}
    found = {}
    for name in names:
        tensor = parent.tensors[name]
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        found[name] = seen.setdefault(place, name) if tensor.numel() else name
    return found
