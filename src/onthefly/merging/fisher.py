"""The diagonal of the Fisher information: how much each parameter matters to what a model says of some samples."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from onthefly.errors import CommandError, InvalidCommandError, MissingPartError, OnTheFlyError
from onthefly.samples.embeddings import eager
from onthefly.samples.loading import SEED, device_of, narrow, pairs
from onthefly.samples.scan import LossFunction, PerSampleLoss, is_classifier
from onthefly.state.parts import plain_names, unwrapped
from onthefly.state.undisturbed import undisturbed

Kind = Literal["empirical", "true"]
Parameters = Mapping[str, torch.Tensor]
Autocast = Callable[[], AbstractContextManager[Any]]

SUMMED_CLASSES = 32
"""With more classes than these, the true Fisher draws a label for each sample instead of summing over all."""


@dataclass(frozen=True)
class Fisher:
    """The diagonal of a Fisher information matrix, and how it was computed."""

    diagonal: dict[str, torch.Tensor]
    """float32, one tensor in the shape of each floating parameter, by name; tied parameters under their first name."""
    kind: Kind
    samples: int
    """Samples it is the mean of: those that had a loss."""
    path: Literal["vmap", "loop"]
    """Whether gradients were computed for several samples at once (in the end), or for one after the other."""
    reason: str
    """Why this path."""


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    per_sample: LossFunction | None = None,
    *,
    kind: Kind = "empirical",
    samples: int = 256,
    budget: int = 1 << 30,
    seed: int = 0,
    device: torch.device | str | None = None,
    autocast: Autocast | None = None,
) -> Fisher:
    """The mean, over the first so many samples, of the squared gradient of each sample's loss.

    `batches` are (inputs, targets) pairs, as `samples.loading.batches` gives them: hand it a random choice of indices
    where the data are in any order. Frozen parameters count, too.

    - ``"empirical"``: gradients of the loss with the labels of the data, by `per_sample` (see `per_sample_loss`). It is what
      most merges use, and works for every model, but is no estimate of curvature (Kunstner et al. 2019, "Limitations of the
      empirical Fisher approximation"). A sample whose targets are all ignored does not count.
    - ``"true"``: gradients of the log-likelihood of labels from the model's own distribution, for classifiers whose outputs are
      logits [N, C] (Matena & Raffel 2022, "Merging Models with Fisher-Weighted Averaging"). The expectation over labels is an exact sum up to
      32 classes; with more, one label is drawn for each sample, from a generator of its own with this `seed`.

    Gradients are computed for as many samples at once as `budget` bytes hold, by an estimate from one sample, and one by one where the
    model does not allow more: the result says which and why, and but for rounding does not depend on it. The model runs
    in evaluation mode, as it runs in training otherwise (`autocast` makes the context of a forward pass). Nothing of it is
    changed, gradients in flight included.

    Raises `MissingPartError` for an empirical Fisher without a loss, and for batches that are not pairs; `InvalidCommandError` for a
    true Fisher of what is no classifier; `CommandError` for gradients that are not finite.
    """
    if kind not in ("empirical", "true"):
        raise InvalidCommandError(f"a Fisher is 'empirical' or 'true', not {kind!r}")
    if kind == "empirical" and per_sample is None:
        raise MissingPartError(
            "an empirical Fisher needs the loss of each sample: pass per_sample=, or kind='true' for a classifier"
        )
    bare = unwrapped(model)
    plain = plain_names(bare)
    parameters = {name: p.detach() for name, p in bare.named_parameters() if p.is_floating_point()}
    gradients = _Gradients(bare, parameters, _objective(kind, per_sample), autocast or nullcontext)
    draw = torch.Generator().manual_seed(seed)
    totals = {name: _zeros_like(p) for name, p in parameters.items()}
    chunks: _Chunks | None = None
    counted = 0
    on = torch.device(device) if device is not None else device_of(bare)
    with undisturbed(bare), eager(model):
        for count, inputs, targets in pairs(batches, samples, on):
            if chunks is None:
                chunks = _Chunks.fitting(gradients, narrow(inputs, 0, 1), narrow(targets, 0, 1), kind, budget)
            # One number a sample, drawn whether it is used or not: labels do not depend on the chunks.
            chances = torch.rand(count, generator=draw).to(on)
            for squares, losses in chunks.of(count, inputs, targets, chances):
                for name, total in totals.items():
                    total += squares.pop(name).sum(0)
                counted += int((~losses.isnan().any(1)).sum())
    assert chunks is not None  # `pairs` gives some, or raises
    diagonal = {plain(name): (total / max(1, counted)).float() for name, total in totals.items()}
    for name, value in diagonal.items():
        if not value.isfinite().all():
            raise CommandError(
                f"the Fisher information of {name} is not finite: the model's weights, its inputs or its loss are not"
            )
    if not counted:
        raise MissingPartError("no sample has a target that counts, so there is no loss to take gradients of")
    return Fisher(diagonal, kind, counted, "vmap" if chunks.size > 1 else "loop", chunks.reason)


# -- what gradients are taken of -----------------------------------------------------------------------------------

_Objective = Callable[[Any, Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(outputs, targets, chance) of one sample -> losses [K] and their weights [K]."""


def _objective(kind: Kind, per_sample: LossFunction | None) -> _Objective:
    if kind == "true":
        return _own_labels
    assert per_sample is not None
    losses_of = per_sample if isinstance(per_sample, PerSampleLoss) else PerSampleLoss(per_sample)

    def true_label(outputs: Any, targets: Any, chance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        losses = losses_of(outputs, targets)
        if losses.shape != (1,):
            raise InvalidCommandError(
                f"the per-sample loss gave {len(losses)} losses for a single sample: it must give one for each, of shape [N]"
            )
        return losses, torch.ones_like(losses)

    return true_label


def _own_labels(outputs: torch.Tensor, targets: Any, chance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every class by its probability, or a single one that `chance`, uniform in [0, 1), falls on."""
    losses = -outputs.float().log_softmax(1).squeeze(0)
    probabilities = torch.exp(-losses).detach()
    if len(losses) <= SUMMED_CLASSES:
        return losses, probabilities
    below = (probabilities.cumsum(0) <= chance).sum().clamp(max=len(losses) - 1)
    return losses.gather(0, below.unsqueeze(0)), torch.ones_like(losses[:1])


# -- squared gradients ---------------------------------------------------------------------------------------------

_Squares = tuple[dict[str, torch.Tensor], torch.Tensor]
"""Weighted squared gradients by name, [N, ...] in float32, and the losses [N, K]."""


@dataclass(frozen=True)
class _Gradients:
    """Squared per-sample gradients. They are taken at stand-ins for the parameters: the live ones get none."""

    model: nn.Module
    parameters: Parameters
    objective: _Objective
    autocast: Autocast

    def at_once(self, inputs: Any, targets: Any, chances: torch.Tensor) -> _Squares:
        def of_one(inputs: Any, targets: Any, chance: torch.Tensor) -> _Squares:
            def losses_at(parameters: Parameters) -> tuple[torch.Tensor, torch.Tensor]:
                return self._losses(parameters, _as_batch(inputs), _as_batch(targets), chance)

            found: Any = vjp(losses_at, self.parameters, has_aux=True)  # its stub knows no has_aux
            losses, pull, weights = found
            # The root of its weight pulled back makes a weighted square.
            return _squared(pull(root)[0] for root in weights.sqrt().diag()), losses

        with _vmapping():
            found: _Squares = vmap(of_one)(inputs, targets, chances)
        return found

    def of_one(self, inputs: Any, targets: Any, chances: torch.Tensor) -> _Squares:
        leaves = self.leaves()
        losses, weights = self._losses(leaves, inputs, targets, chances[0])

        def gradients(loss: torch.Tensor) -> Parameters:
            if not loss.requires_grad:
                return {name: torch.zeros_like(p) for name, p in self.parameters.items()}
            found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
            # One that the loss does not depend on has none, and that of a sparse embedding is sparse.
            return {
                name: torch.zeros_like(p) if gradient is None else gradient.to_dense()
                for (name, p), gradient in zip(self.parameters.items(), found, strict=True)
            }

        squares = _squared(gradients(loss) for loss in losses * weights.sqrt())
        return {name: square.unsqueeze(0) for name, square in squares.items()}, losses.detach().unsqueeze(0)

    def leaves(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().requires_grad_() for name, p in self.parameters.items()}

    def outputs(self, parameters: Parameters, inputs: Any) -> Any:
        return functional_call(self.model, dict(parameters), (inputs,))

    @torch.enable_grad()
    def _losses(
        self, parameters: Parameters, inputs: Any, targets: Any, chance: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with self.autocast():
            return self.objective(self.outputs(parameters, inputs), targets, chance)


def _squared(gradients: Iterator[Parameters]) -> dict[str, torch.Tensor]:
    """The sum of squares, with one gradient in memory at a time."""
    total: dict[str, torch.Tensor] = {}
    for gradient in gradients:
        for name, value in gradient.items():
            square = value.float().square()
            total[name] = total[name] + square if name in total else square
    return total


@contextmanager
def _vmapping() -> Iterator[None]:
    # Fused attention has no batching rule, and would go through samples one by one with a warning. So do some others
    # (recurrent layers): slower, and right.
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "There is a performance drop because we have not yet implemented the batching"
        )
        yield


# -- how many at once ----------------------------------------------------------------------------------------------


@dataclass
class _Chunks:
    """Takes squared gradients of as many samples at once as fit; of one, from the first time on that more cannot be had."""

    gradients: _Gradients
    size: int
    reason: str
    done: int = 0

    @classmethod
    def fitting(cls, gradients: _Gradients, inputs: Any, targets: Any, kind: Kind, budget: int) -> _Chunks:
        """As many as fit into so many bytes, by what the first sample takes. Raises what `kind` cannot do without."""
        kept: dict[int, int] = {}  # bytes by storage

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        torch.default_generator.manual_seed(SEED)
        leaves = gradients.leaves()
        with (
            torch.enable_grad(),
            gradients.autocast(),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved),
        ):
            outputs = gradients.outputs(leaves, inputs)
        if kind == "true" and not is_classifier(1, outputs, targets):
            raise InvalidCommandError(
                "a true Fisher needs a classifier, with logits [N, C] and targets that are classes or probabilities, to know "
                "what the model's own labels are: use kind='empirical' for this model"
            )
        for leaf in leaves.values():  # the same for all samples
            kept.pop(leaf.untyped_storage().data_ptr(), None)
        # What the forward pass keeps, and as much for the backward pass; a gradient, its square and the sum of such.
        each = 2 * sum(kept.values()) + sum(leaf.nbytes + 8 * leaf.numel() for leaf in leaves.values())
        size = max(1, budget // max(1, each))
        return cls(gradients, size, f"a sample takes about {_size(each)}, of {_size(budget)}: room for {size} at once")

    def of(self, count: int, inputs: Any, targets: Any, chances: torch.Tensor) -> Iterator[_Squares]:
        place = 0
        while place < count:
            stop = min(place + self.size, count)
            found = self._some(narrow(inputs, place, stop), narrow(targets, place, stop), chances[place:stop])
            if found is not None:
                yield found
                self.done += stop - place
                place = stop

    def _some(self, inputs: Any, targets: Any, chances: torch.Tensor) -> _Squares | None:
        """Those of a chunk; None when it has to be made smaller."""
        if self.size == 1:
            torch.default_generator.manual_seed(SEED + self.done)  # a model may draw, too
            return self.gradients.of_one(inputs, targets, chances)
        try:
            return self.gradients.at_once(inputs, targets, chances)
        except OnTheFlyError:
            raise
        except Exception as e:  # noqa: BLE001  the model's own code; what is wrong with it alone is raised by `of_one`
            self.size, self.reason = 1, f"the model does not run under vmap: {type(e).__name__}: {_first_line(e)}"
            return None


def _size(size: int) -> str:
    return f"{size / (1 << 20):.3g} MiB"


def _first_line(error: Exception) -> str:
    return textwrap.shorten(str(error).strip().partition("\n")[0], 160, placeholder=" ...")


def _zeros_like(parameter: torch.Tensor) -> torch.Tensor:
    """float64, where the device has it: what is added to it comes in chunks, whose size should not show."""
    return torch.zeros_like(parameter, dtype=torch.float32 if parameter.device.type == "mps" else torch.float64)


def _as_batch(value: Any) -> Any:
    """One sample as a batch of one."""
    if isinstance(value, torch.Tensor):
        return value.unsqueeze(0)
    if isinstance(value, dict):
        return {key: _as_batch(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_as_batch(item) for item in value))
    return type(value)(_as_batch(item) for item in value)
