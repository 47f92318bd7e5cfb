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
