"""Looking at a model without a trace: what must be put back after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from onthefly.state import rng
from onthefly.state.parts import unwrapped


@contextmanager
def same_randomness(loader: Any = None) -> Iterator[None]:
    """Load samples inside: the process-wide random state, and private generators that the loader reaches, are put back."""
    generators = rng.find_generators({"loader": loader})
    states = {path: rng.generator_state(generator) for path, generator in generators.items()}
    with rng.preserved():
        try:
            yield
        finally:
            for path, generator in generators.items():
                rng.set_generator_state(generator, states[path])


@contextmanager
def undisturbed(model: nn.Module, loader: Any = None, loss: Any = None) -> Iterator[None]:
    """Evaluate inside: the model is in evaluation mode, and afterwards everything is as it was.

    Modes and buffers of the model, and of the loss if it is a module, the process-wide random state, and private generators that the
    loader reaches are put back.
    """
    modules = [unwrapped(model), *([loss] if isinstance(loss, nn.Module) else [])]
    modes = {module: module.training for root in modules for module in root.modules()}
    buffers = [{name: buffer.detach().clone() for name, buffer in root.named_buffers()} for root in modules]
    with same_randomness(loader):
        modules[0].eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            with torch.no_grad():
                for root, before in zip(modules, buffers, strict=True):
                    live = dict(root.named_buffers())
                    for name, buffer in before.items():
                        live[name].copy_(buffer)
