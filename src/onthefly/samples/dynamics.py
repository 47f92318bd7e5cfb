"""Training dynamics: running statistics of every sample, from the losses that training computes anyway."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from onthefly.errors import InvalidCommandError, StateMismatchError
from onthefly.samples.dynamics_columns import MEANS, SQUARES, WIDTH, blank, read_columns

Numbers = torch.Tensor | np.ndarray | Sequence[float]

_HELD = 16  # batches; see `Dynamics`
_HALF = math.log(2)
_ROW = np.dtype((np.void, WIDTH * 4))  # rows are gathered three times as fast as so many numbers each


@dataclass(frozen=True, eq=False, slots=True)
class _Batch:
    """One recording."""

    indices: np.ndarray
    losses: Any
    correct: Any
    margins: Any

    @property
    def form(self) -> tuple[bool, bool]:
        return self.correct is not None, self.margins is not None


class Dynamics:
    """What training has seen of each sample of a data set of `length` samples.

    Batch by batch `record` takes their losses; `columns` gives what became of them. It is part of the train state: with
    `state_dict` and `load_state_dict` recording goes on bit for bit. Nothing is allocated before the first recording, 40
    bytes a sample then. One thread at a time may use it.

    Batches are copied where they are, and applied 16 at a time, or when somebody asks: that is half the work, and an accelerator
    is waited for once in 16 steps. When they are applied makes no difference to what they amount to.

    A loss that is not finite counts as seen, is the last loss, and is left out of mean, variability, maximum, confidence and
    margin. Confidence is ``exp(-loss)``: what the model gave the true class, if the loss is a cross-entropy without label
    smoothing or class weights (and 1 for a negative loss). Without `correct` a sample is known when its loss is below log 2: the true
    class then has more than half of the probability. A forgetting event is a sample that was known at its last recording and is not
    at this one (Toneva et al. 2019, "An Empirical Study of Example Forgetting"). Mean and variability of the confidence are
    those of Swayamdipta et al. 2020, "Dataset Cartography"; the mean margin is that of Pleiss et al. 2020, "Identifying
    Mislabeled Data using the Area Under the Margin Ranking", and NaN unless every recording of the sample had a margin.

    Raises `InvalidCommandError` for a length that is none.
    """

    def __init__(self, length: int) -> None:
        if length < 0:
            raise InvalidCommandError(f"a data set has 0 samples or more, not {length}")
        self._length = length
        self._values: np.ndarray | None = None  # float32 [length, 10], as `dynamics_columns` says
        self._held: list[_Batch] = []

    def __len__(self) -> int:
        """The number of samples of the data set."""
        return self._length

    @property
    def recorded(self) -> bool:
        """Whether anything was recorded yet."""
        return self._values is not None or bool(self._held)

    def record(
        self,
        indices: np.ndarray | torch.Tensor | Sequence[int],
        losses: Numbers,
        correct: torch.Tensor | np.ndarray | Sequence[bool] | None = None,
        margins: Numbers | None = None,
    ) -> None:
        """Take the losses of one batch, in the order of the batch: a sample that is in it twice counts twice.

        `indices` are positions in the data set, int [N]; `losses` float [N], of any dtype, on any device; `correct` bool [N], whether
        the model was right; `margins` float [N], the logit of the true class minus the largest other one. Raises
        `InvalidCommandError`, with nothing changed, for other lengths, shapes or types, and for indices out of range.
        """
        where = _indices(indices)
        # A negative one is very large as an unsigned one.
        if where.size and where.view(np.uint64).max() >= self._length:
            raise InvalidCommandError(
                f"samples {where.min()} to {where.max()} were recorded of a data set that has {self._length}; "
                "pass their positions in the data set of the train loader"
            )
        _check(losses, "losses", where.size)
        if correct is not None:
            _check(correct, "correct", where.size, "b")
        if margins is not None:
            _check(margins, "margins", where.size)
        batch = _Batch(where, _kept(losses), _kept(correct), _kept(margins))
        if self._held and self._held[-1].form != batch.form:
            self.flush()
        if where.size:
            self._held.append(batch)
        if len(self._held) >= _HELD:
            self.flush()

    @np.errstate(all="ignore")  # a float64 may be too large for a float32, and the user may have made warnings errors
    def flush(self) -> None:
        """Apply the batches that are held. Waits for the accelerator that they are on."""
        if not self._held:
            return
        held, self._held = self._held, []
        loss = _joined([batch.losses for batch in held])
        with_correct, with_margins = held[0].form
        known = _joined([batch.correct for batch in held]) if with_correct else loss < _HALF
        margin = _joined([batch.margins for batch in held]) if with_margins else np.full_like(loss, np.nan)
        if self._values is None:
            self._values = blank(self._length)
        rows = self._values.view(_ROW).reshape(-1)
        for samples, places in _rounds(np.concatenate([batch.indices for batch in held])):
            rows[samples] = _updated(rows.take(samples), loss[places], known[places], margin[places])

    def columns(self) -> dict[str, np.ndarray]:
        """The statistics as columns, which are copies; see `read_columns`."""
        self.flush()
        return read_columns(blank(self._length) if self._values is None else self._values)

    def state_dict(self) -> dict[str, Any]:
        """The length, and the rows as a tensor that is a view of them: copy or write it before the next recording."""
        self.flush()
        return {"length": self._length, "values": None if self._values is None else torch.from_numpy(self._values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state. Raises `StateMismatchError` for that of a data set of another length, with nothing changed."""
        length, values = state["length"], state["values"]
        if length != self._length:
            raise StateMismatchError(
                f"the training dynamics are those of a data set of {length} samples, this one has {self._length}; "
                "go on with the data set that they were recorded of"
            )
        if values is not None:
            form = (torch.float32, (length, WIDTH))
            if not isinstance(values, torch.Tensor) or (values.dtype, tuple(values.shape)) != form:
                raise StateMismatchError(f"the training dynamics of {length} samples are a float32[{length}, {WIDTH}]")
            values = np.array(values.detach().cpu().numpy(), order="C")
        self._held = []
        self._values = values


def _updated(rows: np.ndarray, loss: np.ndarray, known: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """The rows of samples after one more recording of each. Computed in float64, and rounded once."""
    columns = rows.view(np.float32).reshape(-1, WIDTH).T.astype(np.float64, order="C")
    seen, counted, last, largest, changes = columns[:5]
    means, squares = columns[MEANS], columns[SQUARES]
    new = np.array([loss, np.exp(-np.maximum(loss, 0)), margin], np.float64)
    highest = new[0]
    finite = np.isfinite(loss)
    if not finite.all():
        highest = np.where(finite, loss, -np.inf)
        new = np.where(finite, new, means)  # as if it had been the mean: nothing moves
    difference = new - means
    seen += 1
    counted += finite
    last[:] = loss
    np.maximum(largest, highest, out=largest)
    changes += (changes.astype(np.int64) & 1) != known
    means += difference / np.maximum(counted, 1)
    squares += difference[:2] * (new[:2] - means[:2])
    return columns.T.astype(np.float32, order="C").view(_ROW).reshape(-1)


def _rounds(where: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(samples, their places) in rounds, no sample twice in one: first each sample's first place, then its second, ...

    A round is in the order of the samples, which is the one in which memory is read fastest.
    """
    bits = where.size.bit_length()
    left = (where << bits) | np.arange(where.size)
    left.sort()  # whole numbers that differ: three times as fast as a stable argsort
    while left.size:
        samples = left >> bits
        first = np.ones(left.size, np.bool_)
        np.not_equal(samples[1:], samples[:-1], out=first[1:])
        yield samples[first], left[first] & ((1 << bits) - 1)
        left = left[~first]


def _indices(indices: Any) -> np.ndarray:
    """As int64 [N], a copy."""
    array = indices.detach().cpu().numpy() if isinstance(indices, torch.Tensor) else np.asarray(indices)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InvalidCommandError(
            f"indices are whole numbers in one dimension, the positions of the samples, not {array.dtype}{list(array.shape)}"
        )
    return array.astype(np.int64)


def _check(values: Any, name: str, length: int, kinds: str = "fiub") -> None:
    """That these are so many numbers, without reading them: they may be on a device."""
    shape: tuple[int, ...]
    dtype: Any
    if isinstance(values, torch.Tensor):
        shape, dtype = tuple(values.shape), values.dtype
        kind = "b" if dtype == torch.bool else "c" if dtype.is_complex or values.is_meta else "f"
    else:
        array = np.asarray(values)
        shape, dtype, kind = array.shape, array.dtype, array.dtype.kind
    if shape == (length,) and (kind in kinds or not length):
        return
    wanted = "one boolean" if kinds == "b" else "one number"
    hint = '; a criterion gives them with reduction="none"' if name == "losses" and shape != (length,) else ""
    raise InvalidCommandError(
        f"{name} are {wanted} for each of the {length} samples, not "
        f"{str(dtype).removeprefix('torch.')}{list(shape)}{hint}"
    )


def _kept(values: Any) -> Any:
    if isinstance(values, torch.Tensor):
        return values.detach().clone()
    return values if values is None else np.array(values)


def _joined(several: list[Any]) -> np.ndarray:
    """The values of several batches in one float32 array. What is on one device comes from there in one piece."""
    if all(isinstance(values, torch.Tensor) for values in several) and len({values.device for values in several}) == 1:
        return np.asarray(torch.cat(several).to("cpu", torch.float32))
    return np.concatenate(
        [np.asarray(v.cpu().float() if isinstance(v, torch.Tensor) else v, np.float32) for v in several]
    )
