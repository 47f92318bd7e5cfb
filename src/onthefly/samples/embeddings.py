"""Embeddings: what a model's last layer sees of each sample, taken while the model runs anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from onthefly.errors import InvalidCommandError, MissingPartError
from onthefly.state.train_state import unwrapped

Embed = Callable[[nn.Module, Any], torch.Tensor]
"""A user's own: (model, inputs) -> [N, D]."""

WIDEST = 4096
"""The most values in the embedding of a sample: a million of them are 16 GB then."""

_INSTEAD = "pass embed=, a function (model, inputs) -> [N, D], to say what the embedding of a sample is"


class Penultimate:
    """The input of the last `nn.Linear` of a model, or, in a model without one, of its last layer with parameters.

    Inside ``with Penultimate.of(model) as layer``, each `layer.take(samples)` gives what the last forward pass fed to
    that layer. The last one is the one that ran last in the first pass: all layers are watched in that pass, and only
    it from then on. Outside of the block no hook is left on the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._linear: tuple[nn.Module, torch.Tensor] | None = None
        self._other: tuple[nn.Module, torch.Tensor] | None = None
        self._input: torch.Tensor | None = None
        self._found: nn.Module | None = None
        self._hooks = [
            module.register_forward_pre_hook(self._watch, with_kwargs=True)
            for module in model.modules()
            if next(module.parameters(recurse=False), None) is not None
        ]

    @classmethod
    @contextmanager
    def of(cls, model: nn.Module) -> Iterator[Penultimate]:
        layer = cls(unwrapped(model))
        try:
            with eager(model):
                yield layer
        finally:
            layer._unhook()

    def take(self, samples: int) -> torch.Tensor:
        """The embeddings [N, D] of the batch that ran last, in float32, on the model's device.

        Raises `MissingPartError` for a model with no such layer, or one that did not run in this pass, and for an input
        that is too wide; `InvalidCommandError` for one whose first dimension is not the batch.
        """
        if self._found is None:
            self._settle()
        found, self._input = self._input, None
        if found is None:
            raise MissingPartError(f"the layer whose input is the embedding did not run in this pass; {_INSTEAD}")
        return checked(found, samples, f"the input of the last layer ({type(self._found).__name__})")

    def _settle(self) -> None:
        """Keep to the layer that ran last in the first pass."""
        self._unhook()
        last = self._linear or self._other
        self._linear = self._other = None
        if last is None:
            raise MissingPartError(f"no layer with parameters ran in the model, so there is none before it; {_INSTEAD}")
        self._found, self._input = last
        self._hooks = [self._found.register_forward_pre_hook(self._keep, with_kwargs=True)]

    def _watch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = _first_tensor(args, kwargs)
        if value is not None and isinstance(module, nn.Linear):
            self._linear = (module, value)
        elif value is not None:
            self._other = (module, value)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._input = _first_tensor(args, kwargs)

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def checked(embedding: Any, samples: int, source: str) -> torch.Tensor:
    """An embedding of so many samples as [N, D] in float32, from [N, ...] in any dtype."""
    if not isinstance(embedding, torch.Tensor):
        raise InvalidCommandError(
            f"{source} is a {type(embedding).__name__}: embeddings are a tensor of shape [{samples}, D]"
        )
    if embedding.dim() < 2 or len(embedding) != samples:
        raise InvalidCommandError(
            f"{source} has shape {list(embedding.shape)} for a batch of {samples} samples: embeddings are [{samples}, D]; {_INSTEAD}"
        )
    flat = embedding.flatten(1)
    if not 0 < flat.shape[1] <= WIDEST:
        raise MissingPartError(
            f"{source} has {flat.shape[1]} values a sample, and an embedding has 1 to {WIDEST}; {_INSTEAD}, such as a mean over positions"
        )
    return flat.to(torch.float32)


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value.detach().clone()  # what comes after the layer may write into it: `x += layer(x)`
    return None


def eager(model: nn.Module) -> Any:
    """A compiled model runs as it was written, inside: compiled code does not see hooks that come after it."""
    compiled = any(
        getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
