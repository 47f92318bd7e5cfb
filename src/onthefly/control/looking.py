"""Looking at a model without a trace: an evaluation, and what must be put back after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from onthefly.errors import MissingPartError
from onthefly.state import rng
from onthefly.state.train_state import unwrapped


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Any,
    loss_fn: Callable[[Any, Any], torch.Tensor],
    metrics: Mapping[str, Callable[[Any, Any], Any]] | None = None,
    device: torch.device | None = None,
) -> dict[str, float]:
    """The mean loss (and mean metrics) over a loader of (inputs, targets) batches, weighted by batch size.

    The model must be in evaluation mode. Batches go to the device of the model's first parameter unless one is given.
    Raises `MissingPartError` for batches that are not pairs, and for a loader without a batch.
    """
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    functions = {"loss": loss_fn, **(metrics or {})}
    totals = dict.fromkeys(functions, 0.0)
    samples = 0
    for batch in loader:
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            raise MissingPartError(
                f"a test needs batches that are (inputs, targets) pairs; this loader gives a {type(batch).__name__}"
            )
        inputs, targets = to_device(batch[0], device), to_device(batch[1], device)
        outputs = model(inputs)
        count = _batch_size(targets)
        for name, function in functions.items():
            totals[name] += float(function(outputs, targets)) * count
        samples += count
    if not samples:
        raise MissingPartError("the loader gave no batch, so there is nothing to evaluate")
    return {**{name: total / samples for name, total in totals.items()}, "samples": samples}


def _batch_size(value: Any) -> int:
    """Samples in a batch: the length of the first tensor in it."""
    if isinstance(value, torch.Tensor):
        return len(value) if value.dim() else 1
    items = list(value.values()) if isinstance(value, dict) else value
    if isinstance(items, list | tuple) and items and isinstance(items[0], torch.Tensor | dict | list | tuple):
        return _batch_size(items[0])
    return len(items) if hasattr(items, "__len__") else 1


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors, and lists, tuples and dicts of them, on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(item, device) for item in value)
    return value


@contextmanager
def undisturbed(model: nn.Module, loader: Any = None) -> Iterator[None]:
    """Evaluate inside: the model is in evaluation mode, and afterwards everything is as it was.

    Modes, buffers, the process-wide random state, and private generators that the loader reaches are put back.
    """
    bare = unwrapped(model)
    modes = {module: module.training for module in bare.modules()}
    buffers = {name: buffer.detach().clone() for name, buffer in bare.named_buffers()}
    generators = rng.find_generators({"loader": loader})
    states = {path: rng.generator_state(generator) for path, generator in generators.items()}
    with rng.preserved():
        bare.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            live = dict(bare.named_buffers())
            with torch.no_grad():
                for name, buffer in buffers.items():
                    live[name].copy_(buffer)
            for path, generator in generators.items():
                rng.set_generator_state(generator, states[path])
