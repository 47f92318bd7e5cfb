"""How the training dynamics of samples are laid out, and how they are read. Without torch.

One row of ten float32 a sample, 40 bytes: what a running statistic needs to go on, and no more. Counts are exact up to 2**24.
"""

from __future__ import annotations

import numpy as np

from onthefly.errors import StateMismatchError

SEEN, COUNTED, LAST, MAX, CHANGES = range(5)
"""Recordings; those with a finite loss; the last loss; the largest finite one; how often `known` changed. It began as
unknown, so an odd number of changes means known, and every second change was a forgetting event."""

MEANS = slice(5, 8)
"""The running means of loss, confidence and margin."""

SQUARES = slice(8, 10)
"""The sums of squared differences from the mean, of loss and confidence (Welford 1962)."""

WIDTH = 10


def blank(length: int) -> np.ndarray:
    """The rows of `length` samples that were never recorded, float32 [length, 10], in memory that is there already.

    Pages that come only when they are written would cost the first epoch several microseconds a sample.
    """
    values = np.empty((length, WIDTH), np.float32)
    values[:] = 0
    values[:, MAX] = -np.inf
    return values


def read_columns(values: np.ndarray) -> dict[str, np.ndarray]:
    """The training dynamics as columns, from the rows as they are stored (float32 [N, 10], as in ``dynamics/values``).

    `seen` and `forgotten` are int64, `known` is bool, all else float32: `last_loss`, `mean_loss`, `variability` (population
    standard deviation of the loss), `max_loss`, `mean_confidence`, `confidence_variability`, `mean_margin`. A sample that
    was never recorded has 0, False and NaN. Raises `StateMismatchError` for an array of another form.
    """
    if values.ndim != 2 or values.shape[1] != WIDTH or values.dtype != np.float32:
        raise StateMismatchError(f"training dynamics are float32[N, {WIDTH}], not {values.dtype}{list(values.shape)}")
    seen, counted, last, largest, changes = values.T[: CHANGES + 1]
    with np.errstate(all="ignore"):  # a row can hold anything, if a stranger wrote it
        measured = counted > 0
        means = np.where(measured, values.T[MEANS], np.float32(np.nan))
        deviations = np.sqrt(values.T[SQUARES] / np.where(measured, counted, np.float32(np.nan)))
        flips = changes.astype(np.int64)
        return {
            "seen": seen.astype(np.int64),
            "last_loss": np.where(seen > 0, last, np.float32(np.nan)),
            "mean_loss": means[0],
            "variability": deviations[0],
            "max_loss": np.where(measured, largest, np.float32(np.nan)),
            "forgotten": flips // 2,
            "known": flips % 2 == 1,
            "mean_confidence": means[1],
            "confidence_variability": deviations[1],
            "mean_margin": means[2],
        }
