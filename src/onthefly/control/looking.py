"""Looking at a model: an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from onthefly.errors import MissingPartError
from onthefly.samples.loading import device_of, moved, samples_in


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
    device = device or device_of(model)
    functions = {"loss": loss_fn, **(metrics or {})}
    totals = dict.fromkeys(functions, 0.0)
    samples = 0
    for batch in loader:
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            raise MissingPartError(
                f"a test needs batches that are (inputs, targets) pairs; this loader gives a {type(batch).__name__}"
            )
        inputs, targets = moved(batch[0], device), moved(batch[1], device)
        outputs = model(inputs)
        count = samples_in(targets)
        for name, function in functions.items():
            totals[name] += float(function(outputs, targets)) * count
        samples += count
    if not samples:
        raise MissingPartError("the loader gave no batch, so there is nothing to evaluate")
    return {**{name: total / samples for name, total in totals.items()}, "samples": samples}
