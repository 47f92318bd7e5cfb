"""Epochs as an axis: which epoch, with its fraction, a step of a run lies in. Values in, values out."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from onthefly.runs.lineage import Segment
from onthefly.store.charts import EpochBegin

_Knot = tuple[float, float]
_FAR = 1 << 20  # epochs: no run gets there
_CLOSE = 1e-9  # part of an epoch, or of their number, by which interpolation may miss a whole one


@dataclass(frozen=True)
class Epochs:
    """The line of steps that led to a run's head, as epochs. Each of `knots` is a step and the epoch there.

    Neither steps nor epochs fall from knot to knot; in between an epoch passes evenly. Without knots nothing is known.
    """

    knots: tuple[_Knot, ...] = ()

    @cached_property
    def version(self) -> str:
        """Another one for other epochs."""
        return f"{zlib.crc32(repr(self.knots).encode()):x}"

    def at(self, steps: np.ndarray) -> np.ndarray:
        """The epoch of each step: 2.5 is the middle of the third one. NaN where nothing is known."""
        if not self.knots:
            return np.full(len(steps), np.nan)
        known, epochs = self._columns
        found: np.ndarray = np.interp(steps, known, epochs)
        return found

    def steps(self, low: float | None, high: float | None) -> tuple[float | None, float | None]:
        """The steps between which all lies that is between two epochs; None is no bound."""
        if not self.knots:
            return None, None
        _, epochs = self._columns
        first = None if low is None or low <= epochs[0] else self._step(low, "left")
        last = None if high is None or high >= epochs[-1] else self._step(high, "right")
        return first, last

    def _step(self, epoch: float, side: Literal["left", "right"]) -> float:
        """The first or the last step of an epoch, which is not before all."""
        known, epochs = self._columns
        at = int(np.searchsorted(epochs, epoch, side))
        if at == len(epochs):
            return float(known[-1])
        share = (epoch - epochs[at - 1]) / (epochs[at] - epochs[at - 1])
        return float(known[at - 1] + share * (known[at] - known[at - 1]))

    @cached_property
    def _columns(self) -> np.ndarray:
        return np.array(self.knots, np.float64).T


def along(path: Sequence[Segment], begins: Mapping[str, Sequence[EpochBegin]]) -> Epochs:
    """The epochs of the line `path`, from what each run has recorded of its epochs.

    A run's line is its parent's up to where it branched off, even in the middle of an epoch of which the rest is shorter.
    Epochs that have not ended take as long as they have batches; where that is not known, as long as the one before.
    Those before the first that is recorded are taken to be of one length, from step 0 on.
    """
    line = Epochs()
    for segment in path:
        line = _onward(line, segment.first_step, begins.get(segment.run, ()))
    return line


def _onward(line: Epochs, branch: int, begins: Sequence[EpochBegin]) -> Epochs:
    """The line of a run that branched off another at a step."""
    knots = [knot for knot in line.knots if knot[0] < branch]
    length, end = None, 0.0  # of the epoch under way, and the epoch up to which others are taken to be as long
    if line.knots:
        knots.append((branch, _whole(float(line.at(np.array([branch]))[0]))))
        length, end = _length(line, branch), line.knots[-1][1]
    for begin in begins:
        if begin.step < branch or (knots and begin.epoch < knots[-1][1]):
            continue
        if not knots and begin.epoch > 0 and begin.step > 0:  # an older version, which recorded none, began the run
            knots.append((0, 0))
        if not knots:
            knots.append((begin.step, begin.epoch))
        elif begin.epoch > knots[-1][1]:
            length = _pass(knots, begin, length)
        elif begin.step > knots[-1][0]:  # its parent's guess of where this epoch would begin was too early
            knots.append((begin.step, begin.epoch))
        length, end = (begin.batches, begin.epoch + _FAR) if begin.batches else (length, begin.epoch + 1)
    if not knots:
        return Epochs()
    step, epoch = knots[-1]
    if length is not None and epoch < end:
        knots.append((step + (end - epoch) * length, end))
    return Epochs(tuple(knots) if len(knots) > 1 else ())


def _whole(epoch: float) -> float:
    """The whole number that an epoch is but for rounding: a bit above it, the epoch that begins there would seem to be over."""
    near = float(round(epoch))
    return near if abs(epoch - near) <= _CLOSE * max(1.0, near) else epoch


def _pass(knots: list[_Knot], begin: EpochBegin, length: float | None) -> float:
    """Go on to a later epoch; gives the length of the last one before it, which may have been left early."""
    step, epoch = knots[-1]
    if length is not None and begin.epoch - 1 > epoch:
        whole = step + (begin.epoch - 1 - epoch) * length
        if step < whole < begin.step:
            knots.append((whole, begin.epoch - 1))
    step, epoch = knots[-1]
    knots.append((begin.step, begin.epoch))
    return max(1.0, (begin.step - step) / (begin.epoch - epoch))


def _length(line: Epochs, step: float) -> float | None:
    """How many steps an epoch takes there."""
    for (begin, first), (end, last) in zip(line.knots, line.knots[1:], strict=False):
        if begin < step <= end and first < last:
            return (end - begin) / (last - first)
    return None
