"""What comes of a merge, judged before it is committed: a score for each model on each slice of data. Values in, values out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from onthefly.errors import InvalidCommandError

Metric = Literal["loss", "accuracy"]

CLASSES = 32
"""More classes than these have no row each."""


@dataclass(frozen=True)
class Score:
    """Of one model on one slice: the mean loss, the accuracy of a classifier, and on how many samples."""

    loss: float
    accuracy: float | None
    samples: int

    def badness(self, metric: Metric) -> tuple[float, float]:
        """What is smaller is better. Where accuracies are equal the loss decides; what is NaN is worse than anything."""
        first = -self.accuracy if metric == "accuracy" and self.accuracy is not None else self.loss
        return _comparable(first), _comparable(self.loss)


Scores = Mapping[str, Score]
"""Of one model, by slice."""


@dataclass(frozen=True)
class Preview:
    """The scores of parents and candidates, and how the best of them is told: by `metric`, on the slice `judge`."""

    parents: tuple[str, ...]
    candidates: tuple[str, ...]
    scores: Mapping[str, Scores]
    """By column: a parent, a candidate, or the current model."""
    judge: str
    metric: Metric

    def __post_init__(self) -> None:
        columns = (*self.parents, *self.candidates)
        if len(set(columns)) != len(columns):  # or the floor would hold one against itself
            raise InvalidCommandError(f"parents and candidates must have different names, not {', '.join(columns)}")

    @property
    def best_parent(self) -> str:
        return self.best(self.parents)

    def best(self, among: Sequence[str], slice: str | None = None) -> str:
        """The column that is best on a slice, by default the one that decides; of equals the first."""
        return min(among, key=lambda column: self._badness(column, slice or self.judge))

    def falls_short(self, candidate: str, slice: str | None = None) -> bool:
        """Whether a candidate is worse than the best parent on a slice, by default the one that decides.

        By accuracy, an equal one does not fall short, whatever its loss; by loss a larger one does. One whose loss is NaN or
        infinite always does.
        """
        slice = slice or self.judge
        mine, theirs = (self._badness(c, slice) for c in (candidate, self.best(self.parents, slice)))
        return mine[0] > theirs[0] or math.inf in mine

    def told(self) -> dict[str, Any]:
        """As JSON: scores by column and slice, the best column of each slice, and where each candidate falls short."""
        slices = list(next(iter(self.scores.values())))
        return {
            "slices": slices,
            "columns": list(self.scores),
            "parents": list(self.parents),
            "candidates": list(self.candidates),
            "scores": {
                column: {name: _told(score) for name, score in scores.items()} for column, scores in self.scores.items()
            },
            "best": {name: self.best(list(self.scores), name) for name in slices},
            "worse": {c: [name for name in slices if self.falls_short(c, name)] for c in self.candidates},
            "judge": self.judge,
            "metric": self.metric,
        }

    def _badness(self, column: str, slice: str) -> tuple[float, float]:
        return self.scores[column][slice].badness(self.metric)


def score(columns: Mapping[str, np.ndarray], rows: np.ndarray | None = None) -> Score:
    """The score of a model, of the columns of a scan by it (`onthefly.samples.scan`), on all samples or some rows.

    An ignored sample, whose loss is NaN because its label is none, does not count; any other NaN makes the mean one.
    """
    losses = _of(columns["loss"], rows).astype(np.float64)
    labels = None if "label" not in columns else _of(columns["label"], rows)
    counts = np.ones(len(losses), bool) if labels is None else labels >= 0
    if not counts.any():
        raise InvalidCommandError("a slice without a single sample that counts cannot be judged: choose others")
    accuracy = float(_of(columns["correct"], rows)[counts].mean()) if "correct" in columns else None
    return Score(float(losses[counts].mean()), accuracy, int(np.count_nonzero(counts)))


def class_rows(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows of each class, by the name of their slice; none for what is no classifier's, or has too many classes."""
    if "label" not in columns:
        return {}
    classes = np.unique(columns["label"][columns["label"] >= 0])
    if len(classes) > CLASSES:
        return {}
    return {f"class {number}": np.flatnonzero(columns["label"] == number) for number in classes}


def _of(column: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
    return column if rows is None else column[rows]


def _comparable(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _told(score: Score) -> dict[str, Any]:
    """NaN and infinity have no form in JSON."""
    told: dict[str, Any] = {"loss": score.loss if math.isfinite(score.loss) else None, "samples": score.samples}
    return told if score.accuracy is None else {**told, "accuracy": score.accuracy}
