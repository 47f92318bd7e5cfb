"""A scan: one pass over a data set that computes, for every sample, what a model makes of it now.

What is drawn while a sample is loaded depends on its index alone (see `loading`). So equal weights give an equal scan, also
of a data set with random augmentation.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Subset

from onthefly.errors import InvalidCommandError, MissingPartError
from onthefly.samples.embeddings import Embed, Penultimate, checked
from onthefly.samples.loading import SEED, Source, device_of, each_batch, moved, pair
from onthefly.state.subsets import Indices
from onthefly.state.train_state import unwrapped

LossFunction = Callable[[Any, Any], torch.Tensor]

_BLOCK = 1 << 20  # values that wait on the device until they are worked up and fetched together: 4 MiB


class ScanStopped(Exception):
    """Raised by `on_batch` to end a scan early."""


def scan(
    model: nn.Module,
    loader: Any,
    per_sample: LossFunction,
    *,
    indices: Indices | None = None,
    embed: Embed | None = None,
    embeddings: bool = False,
    device: torch.device | str | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] | None = None,
    on_batch: Callable[[int, int], object] | None = None,
) -> dict[str, np.ndarray]:
    """The columns of per-sample values of a loader's whole data set, in the order of its indices.

    With `indices`, of these samples alone, in the order given: each is loaded as it is for the whole.

    `per_sample` gives a loss for each sample, as `per_sample_loss` makes it. Of the loader, the data set, the workers, the
    collate function and the batch size are used, never the sampler. The model runs as it does in training (`autocast`
    makes the context of a forward pass), but in evaluation mode and without gradients, on the device of its first
    parameter unless one is given. `on_batch(done, total)` is told how many samples are done after each batch; what it
    raises, `ScanStopped` for one, ends the pass and its workers, and comes out of here.

    Always there is `loss` (float32); the rest where it applies:

    - `correct` (bool), `prediction`, `label` (int64), `confidence`, `margin`, `el2n` (float32) for a classifier: outputs
      [N, C] with targets that are classes [N], or one-hot or probabilities [N, C]. `margin` is the logit of the label
      minus the largest other one; `el2n` the norm of softmax minus one-hot (Paul et al. 2021, "Deep Learning on a Data
      Diet"). An ignored sample has label -1, NaN, and is not correct.
    - `embedding` (float32 [N, D]) with `embeddings`: what `embed` gives, or without it what `Penultimate` finds.
    - `name` (strings), where the data set can name its samples: see `names`.

    The caller wraps this in `undisturbed(model, loader)`: the pass leaves the model in evaluation mode, and moves the
    process-wide random state.

    Raises `UnsupportedLoaderError` for a loader whose samples have no index, `MissingPartError` for batches that are
    not (inputs, targets) pairs and for an embedding that cannot be had, `InvalidCommandError` for losses or embeddings of
    a wrong shape, and for indices that are not of the data set, or given twice.
    """
    source = Source.of(loader, indices)
    if device is None:
        device = device_of(model)
    losses_of = per_sample if isinstance(per_sample, PerSampleLoss) else PerSampleLoss(per_sample)
    named = names(source.dataset, source.indices)
    values = _Values(source.length, losses_of)
    unwrapped(model).eval()
    with ExitStack() as stack:
        layer = stack.enter_context(Penultimate.of(model)) if embeddings and embed is None else None
        for done, batch in stack.enter_context(closing(each_batch(loader, source))):
            inputs, targets = moved(pair(batch), torch.device(device))
            count = done - values.done
            torch.default_generator.manual_seed(SEED + done)  # a model may draw, too
            with torch.no_grad(), autocast() if autocast is not None else nullcontext():
                outputs = model(inputs)
                losses = losses_of.positions(outputs, targets)
                embedding = layer.take(count) if layer is not None else None
                if embeddings and embed is not None:
                    embedding = checked(embed(model, inputs), count, "what embed gave")
                values.add(count, outputs, targets, losses, embedding)
            if on_batch is not None:
                on_batch(done, source.length)
    return values.columns() if named is None else {**values.columns(), "name": named}


# -- the loss of each sample ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PerSampleLoss:
    """A loss for each sample of a batch, [N] in float32, from a function that gives [N] or [N, ...].

    Losses of positions (of a sequence, of an image) become their mean. Positions whose target is `ignore_index` do not
    count. Where that is not known, and the targets are integers, one for each position, those whose loss is exactly zero
    do not: a criterion leaves zeros where it ignores. (One loss a sample that is zero counts, unless its target is negative.)
    A sample without any position that counts is NaN.

    Raises `InvalidCommandError` for a function that gives anything but a loss for each sample.
    """

    function: LossFunction
    ignore_index: int | None = None

    def __call__(self, outputs: Any, targets: Any) -> torch.Tensor:
        return self.mean(self.positions(outputs, targets), targets)

    def positions(self, outputs: Any, targets: Any) -> torch.Tensor:
        """What the function gives, [N] or [N, ...]: ignored positions are not taken out yet."""
        losses = self.function(outputs, targets)
        if not isinstance(losses, torch.Tensor):
            raise InvalidCommandError(
                f"the per-sample loss is a {type(losses).__name__}, and must be a tensor of shape [N]"
            )
        if losses.dim() == 0:
            raise InvalidCommandError(
                "the per-sample loss is one number for the whole batch, of shape [], and must be one for each sample, [N]: "
                'compute it with reduction="none"'
            )
        return losses

    def mean(self, losses: torch.Tensor, targets: Any) -> torch.Tensor:
        """The mean loss of each sample, [N], over the positions that count. Changes nothing where it is one already."""
        losses = losses.float()
        counts = self._counts(losses, targets)
        if losses.dim() == 1:
            return losses if counts is None else losses.where(counts, torch.nan)
        losses = losses.flatten(1)
        if counts is None:
            return losses.mean(1)
        counts = counts.flatten(1)
        return losses.where(counts, 0).sum(1) / counts.sum(1)

    def _counts(self, losses: torch.Tensor, targets: Any) -> torch.Tensor | None:
        """Which positions count; None for all."""
        if not _is_integer(targets) or targets.shape != losses.shape:
            return None
        own: torch.Tensor = targets
        if self.ignore_index is not None:
            return own != self.ignore_index
        return (losses != 0) | (own >= 0) if losses.dim() == 1 else losses != 0


def per_sample_loss(loss_fn: Any, given: LossFunction | None = None) -> PerSampleLoss:
    """A loss for each sample: the one that was `given`, else `loss_fn` itself with ``reduction="none"``.

    `loss_fn` may be a module with a `reduction`, such as `nn.CrossEntropyLoss()` (it is copied, not changed), or a
    function with a `reduction` argument, such as `F.cross_entropy`, or a `functools.partial` of one. Raises
    `MissingPartError` for any other.
    """
    if given is not None:
        return PerSampleLoss(given)
    if isinstance(loss_fn, nn.Module) and isinstance(getattr(loss_fn, "reduction", None), str):
        alone: Any = copy.copy(loss_fn)
        alone.reduction = "none"
        return PerSampleLoss(alone, _ignore_index(getattr(alone, "ignore_index", None)))
    arguments = {} if isinstance(loss_fn, nn.Module) else _arguments_of(loss_fn)
    if "reduction" in arguments:
        return PerSampleLoss(_Unreduced(loss_fn), _ignore_index(arguments.get("ignore_index")))
    what = (
        "attach was given no loss_fn" if loss_fn is None else "this loss_fn cannot be asked for the loss of each sample"
    )
    raise MissingPartError(
        f"{what}: pass per_sample_loss= to attach, a function (outputs, targets) -> losses of shape [N], "
        'or a loss_fn with a `reduction` that can be "none", such as nn.CrossEntropyLoss() or F.cross_entropy'
    )


@dataclass(frozen=True)
class _Unreduced:
    function: Callable[..., torch.Tensor]

    def __call__(self, outputs: Any, targets: Any) -> torch.Tensor:
        return self.function(outputs, targets, reduction="none")


def _arguments_of(function: Any) -> dict[str, Any]:
    """The arguments that can be given to a function by name, with their defaults."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # not a function, or one that does not tell
        return {}
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind in by_name}


def _ignore_index(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _is_integer(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and not value.is_floating_point()
        and not value.is_complex()
        and value.dtype != torch.bool
    )


# -- the values of a pass ---------------------------------------------------------------------------------------------


class _Values:
    """The columns of a pass while they are filled.

    What a batch gives is copied into a block of some thousand samples on its device. A full block is worked up and fetched
    at once: an accelerator is not waited for after each batch, and a CPU spends no time on many small calls.
    """

    def __init__(self, length: int, losses_of: PerSampleLoss) -> None:
        self.done = 0
        self._length = length
        self._losses_of = losses_of
        self._classifies = False
        self._by_index = False  # targets are classes, not probabilities
        self._columns: dict[str, torch.Tensor] = {}
        self._block: dict[str, torch.Tensor] = {}
        self._places: dict[str, tuple[torch.Tensor, ...]] = {}  # of each batch in the block
        self._batch = 0  # the next in the block
        self._begun = 0  # the first sample of the block

    def add(self, count: int, outputs: Any, targets: Any, losses: torch.Tensor, embedding: torch.Tensor | None) -> None:
        """Take what a batch of `count` samples gave. Raises `InvalidCommandError` for what does not fit."""
        if self.done == 0:
            self._classifies = is_classifier(count, outputs, targets)
            self._by_index = self._classifies and targets.dim() == 1
        if not self._classifies or losses.dim() > 1:
            losses = self._losses_of.mean(losses, targets)
        if losses.shape != (count,):
            raise InvalidCommandError(
                f"the per-sample loss gave {len(losses)} losses for a batch of {count} samples: it must give one for each, "
                f"of shape [{count}], or [{count}, ...] with positions to take the mean of"
            )
        given = {"loss": losses}
        if self._classifies:
            given["logits"] = outputs
            given["labels"] = targets if self._by_index else _likeliest(targets)
        if embedding is not None:
            given["embedding"] = embedding
        if self.done == 0:
            self._begin(given)
        for name, value in given.items():
            place = self._places[name][self._batch]
            if value.shape != place.shape:
                place = place[:count]  # the last batch is shorter
                if value.shape != place.shape:
                    raise InvalidCommandError(f"{name}: its shape differs between batches, so it makes no column")
            place.copy_(value)
        self.done += count
        self._batch += 1
        if self._batch == len(self._places["loss"]) or self.done == self._length:
            self._fetch()

    def columns(self) -> dict[str, np.ndarray]:
        return {name: column.numpy() for name, column in self._columns.items()}

    def _begin(self, given: Mapping[str, torch.Tensor]) -> None:
        """Make the columns and the block, once."""
        batch = len(given["loss"])
        width = sum(value[0].numel() for value in given.values())
        rows = batch * max(1, min(_BLOCK // (width * batch), -(-self._length // batch)))
        for name, value in given.items():
            dtype = torch.int64 if name == "labels" else torch.float32
            self._block[name] = torch.empty((rows, *value.shape[1:]), dtype=dtype, device=value.device)
            self._places[name] = torch.split(self._block[name], batch)
        made = {"loss": torch.float32} | (_CLASSIFIER if self._classifies else {})
        self._columns = {name: torch.empty(self._length, dtype=dtype) for name, dtype in made.items()}
        if "embedding" in given:
            self._columns["embedding"] = torch.empty(self._length, given["embedding"].shape[1])

    def _fetch(self) -> None:
        """Work the block up, and begin the next."""
        filled = {name: block[: self.done - self._begun] for name, block in self._block.items()}
        if self._classifies:
            logits, labels = filled.pop("logits"), filled.pop("labels")
            ignored = labels < 0
            if self._by_index:
                filled["loss"] = self._losses_of.mean(filled["loss"], labels)
                if self._losses_of.ignore_index is not None:
                    ignored |= labels == self._losses_of.ignore_index
            if bool((ignored | (labels < logits.shape[1])).all()):
                filled |= _judged(logits, labels, ignored)
            else:  # targets that are no classes: counts, times, several labels at once
                self._classifies = False
                del self._block["logits"], self._block["labels"]
                self._columns = {name: column for name, column in self._columns.items() if name not in _CLASSIFIER}
        for name, values in filled.items():
            self._columns[name][self._begun : self.done] = values
        self._begun, self._batch = self.done, 0


_CLASSIFIER = {
    "correct": torch.bool,
    "confidence": torch.float32,
    "margin": torch.float32,
    "el2n": torch.float32,
    "prediction": torch.int64,
    "label": torch.int64,
}


def _judged(logits: torch.Tensor, labels: torch.Tensor, ignored: torch.Tensor) -> dict[str, torch.Tensor]:
    """The columns of a classifier, from logits [N, C] and labels [N]."""
    label = labels.where(~ignored, 0)
    at = label.unsqueeze(1)
    own = logits.gather(1, at).squeeze(1)
    others = logits.scatter(1, at, -torch.inf)
    best, rival = others.max(1)
    largest = torch.maximum(own, best)
    # Softmax in two parts: 1 - p of the label is then the sum of the others, and loses no digits where p is nearly 1.
    odds = (own - largest).exp_()
    rest = others.sub_(largest.unsqueeze(1)).exp_()
    missed = rest.sum(1)
    total = odds + missed
    prediction = label.where((own > best) | ((own == best) & (label < rival)), rival)
    return {
        "correct": (prediction == labels) & ~ignored,
        "confidence": (odds / total).where(~ignored, torch.nan),
        "margin": (own - best).where(~ignored, torch.nan),
        "el2n": (torch.hypot(rest.norm(dim=1), missed) / total).where(~ignored, torch.nan),
        "prediction": prediction,
        "label": labels.where(~ignored, -1),
    }


def is_classifier(count: int, outputs: Any, targets: Any) -> bool:
    if not (_is_real(outputs) and outputs.dim() == 2 and len(outputs) == count and outputs.shape[1] >= 2):
        return False
    if _is_integer(targets):
        return bool(targets.shape == (count,))
    return _is_real(targets) and targets.shape == outputs.shape and bool((_likeliest(targets) < targets.shape[1]).all())


def _likeliest(targets: torch.Tensor) -> torch.Tensor:
    """The class of each row of probabilities [N, C]; C, which is none, where a row is no probabilities."""
    proper = (targets >= 0).all(1) & ((targets.sum(1) - 1).abs() < 1e-2)
    return targets.argmax(1).where(proper, targets.shape[1])


def _is_real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


# -- names ------------------------------------------------------------------------------------------------------------


def names(dataset: Any, indices: torch.Tensor | None = None) -> np.ndarray | None:
    """The name of every sample of a data set (or of those at some indices), as an array of strings; None where it has none.

    A data set names its samples by a method `sample_name(index)`, or, as torchvision's `ImageFolder` does, by
    `samples` or `imgs`, a list of (path, class). A `Subset` and a `ConcatDataset` have the names of what is in them.
    """
    found = _named(dataset, np.arange(len(dataset)) if indices is None else indices.numpy())
    if found is None:
        return None
    # A path may hold bytes that are no Unicode, which no file format takes.
    return np.array([str(name).encode("utf-8", "backslashreplace").decode() for name in found], dtype=object)


def _named(dataset: Any, indices: np.ndarray) -> Sequence[Any] | np.ndarray | None:
    if callable(of := getattr(dataset, "sample_name", None)):
        return [of(index) for index in indices.tolist()]
    if isinstance(dataset, Subset):
        return _named(dataset.dataset, np.asarray(dataset.indices, dtype=np.int64)[indices])
    if isinstance(dataset, ConcatDataset):
        ends = np.asarray(dataset.cumulative_sizes)
        part = np.searchsorted(ends, indices, side="right")
        starts = np.concatenate([[0], ends[:-1]])
        found: list[Any] = [None] * len(indices)
        for number, inner in enumerate(dataset.datasets):
            of_it = np.flatnonzero(part == number)
            named = _named(inner, indices[of_it] - starts[number])
            if named is None:
                return None
            for place, name in zip(of_it.tolist(), named, strict=True):
                found[place] = name
        return found
    for files in (getattr(dataset, "samples", None), getattr(dataset, "imgs", None)):
        if isinstance(files, list) and files and len(files) == len(dataset) and _is_file(files[0]):
            return [files[index][0] for index in indices.tolist()]
    return None


def _is_file(entry: Any) -> bool:
    return isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str | os.PathLike)
