"""Changes: what became of single samples between two scans of one data set. Pure functions of arrays; loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onthefly.errors import UnknownReferenceError
from onthefly.samples.table import Columns

_HALVED = 0.5  # of the loss before, where it is not known which samples are right


@dataclass(frozen=True, eq=False)
class Changes:
    """Two scans of N samples, the later one seen from the one before.

    `by` is how it is told that a sample was learned or forgotten: ``correct``, whether it is classified right, or ``loss``,
    whether its loss was halved or doubled. `before` and `after` are losses, float64 [N]; `learned` and `forgotten` bool [N].
    """

    by: str
    before: np.ndarray
    after: np.ndarray
    learned: np.ndarray
    forgotten: np.ndarray

    def moved(self) -> np.ndarray:
        """How far each sample's loss has moved, float64 [N]; zero where one of the two is not finite."""
        with np.errstate(invalid="ignore"):  # infinite in both
            found: np.ndarray = np.nan_to_num(np.abs(self.after - self.before), posinf=0.0)
        return found


def changes(before: Columns, after: Columns) -> Changes:
    """What changed between two scans. Raises `UnknownReferenceError` for data sets of different lengths."""
    one, other = before["loss"].astype(np.float64), after["loss"].astype(np.float64)
    if len(one) != len(other):
        raise UnknownReferenceError(f"the scans are of data sets of {len(one)} and {len(other)} samples")
    if "correct" in before and "correct" in after:
        was, is_now = before["correct"].astype(bool), after["correct"].astype(bool)
        return Changes("correct", one, other, learned=~was & is_now, forgotten=was & ~is_now)
    # Of what can be negative, such as a likelihood of densities, half is no measure: it is neither learned nor forgotten.
    both = (one >= 0) & (other >= 0)
    return Changes("loss", one, other, learned=both & (other < one * _HALVED), forgotten=both & (one < other * _HALVED))
