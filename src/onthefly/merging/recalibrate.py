"""Batch-norm statistics of a merged model: those of its parents are not its own."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from onthefly.errors import MissingPartError
from onthefly.samples.embeddings import eager
from onthefly.samples.loading import SEED, device_of, moved, pair, samples_in
from onthefly.state.parts import plain_names, unwrapped
from onthefly.state.undisturbed import undisturbed


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    limit: int | None = None,
    device: torch.device | str | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] | None = None,
) -> list[str]:
    """Estimate batch-norm statistics anew on training data; the names of the buffers that are new.

    As `torch.optim.swa_utils.update_bn` does (Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima"): each batch, an
    (inputs, targets) pair, up to `limit` of them, counts the same. But only batch norms run in training mode, not dropout; a batch
    norm that did not run keeps what it had; a last batch of a single sample, which many batch norms refuse, is left out;
    and a `SyncBatchNorm` sees this process alone, without waiting for others. Nothing else of the model is changed.

    Without batch norms that keep statistics, no batch is loaded. Raises `MissingPartError` when there is no batch.
    """
    bare = unwrapped(model)
    norms = {
        name: module
        for name, module in bare.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not norms:
        return []
    on = torch.device(device) if device is not None else device_of(bare)
    estimated: list[tuple[str, torch.Tensor, torch.Tensor]] = []  # name, live buffer, its new value
    with undisturbed(bare), eager(model), ExitStack() as undo:
        for module in norms.values():
            _begin(module, undo)
        done = largest = 0
        for batch in islice(batches, limit):
            inputs, targets = moved(pair(batch), on)
            count = samples_in(targets)
            if count == 1 < largest:
                continue
            torch.default_generator.manual_seed(SEED + done)  # a model may draw, too
            with torch.no_grad(), (autocast or nullcontext)():
                bare(inputs)
            done, largest = done + count, max(largest, count)
        if not done:
            raise MissingPartError("there was no batch, so batch-norm statistics cannot be estimated")
        plain = plain_names(bare)
        for name, module in norms.items():
            if module.num_batches_tracked:
                estimated += [
                    (plain(f"{name}.{buffer}" if name else buffer), live, live.clone())
                    for buffer, live in module.named_buffers(recurse=False)
                ]
    with torch.no_grad():
        for _, live, value in estimated:
            live.copy_(value)
    return [name for name, _, _ in estimated]


def _begin(module: _BatchNorm, undo: ExitStack) -> None:
    """Let a batch norm average over all the batches to come, instead of following the last ones."""
    undo.callback(setattr, module, "momentum", module.momentum)
    module.momentum = None
    module.reset_running_stats()
    module.training = True
    if isinstance(module, nn.SyncBatchNorm) and "forward" not in vars(module):
        undo.callback(vars(module).pop, "forward")
        vars(module)["forward"] = types.MethodType(_BatchNorm.forward, module)
