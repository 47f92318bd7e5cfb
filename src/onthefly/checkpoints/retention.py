"""Retention: which checkpoints of a run stay, and why. Pure functions of what is known about them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

ORIGIN = "origin"
"""The `reason` of the checkpoint that a run began from. It is what makes every later step reachable by replay."""

UNDO = "undo"
"""The `reason` of a checkpoint that was saved so that a command can be taken back."""

Id = TypeVar("Id")


@dataclass(frozen=True)
class Candidate(Generic[Id]):
    """One checkpoint, as far as retention needs to know it."""

    id: Id  # whatever the caller knows it by
    step: int
    order: Any  # anything that sorts, later is newer: a number, or a tuple such as (session, seq)
    reason: str
    metric: float | None = None  # lower is better
    pinned: bool = False
    needed: bool = False  # a lineage needs it: a fork's origin, a merge's parent
    foreign: bool = False  # brought in from outside: the run never was in this state, and does not go on from it


def evict(candidates: Iterable[Candidate[Id]], keep: int = 3, every: int | None = None) -> list[Candidate[Id]]:
    """The candidates that may be deleted, oldest first: those that `reasons` knows no reason to keep."""
    return [candidate for candidate, words in reasons(candidates, keep, every) if not words]


def reasons(
    candidates: Iterable[Candidate[Id]], keep: int = 3, every: int | None = None
) -> list[tuple[Candidate[Id], tuple[str, ...]]]:
    """Every candidate, oldest first, with the words that say why it is kept; without a word, it may go.

    Kept are the `keep` last ones of the run's own by their order (``newest``), with `every` each one whose step is a positive multiple of
    it (``every 1000``), the one with the lowest finite metric, the newest of several (``best``), the last one that was saved for
    an ``undo``, which does not count among the newest, and what is ``pinned``, ``needed``, or an ``origin``. Raises `ValueError` for a negative `keep`, and for an `every` that is not positive.
    """
    if keep < 0:
        raise ValueError(f"retention keeps at least 0 checkpoints, not {keep}")
    if every is not None and every < 1:
        raise ValueError(f"retention keeps what lies 1 step apart or more, not {every}")
    oldest_first = sorted(candidates, key=lambda c: c.order)
    own = [candidate for candidate in oldest_first if not candidate.foreign and candidate.reason != UNDO]
    newest = {id(candidate) for candidate in own[max(0, len(own) - keep) :]}
    undo = [candidate for candidate in oldest_first if candidate.reason == UNDO][-1:]
    best = _best(oldest_first)
    found = []
    for candidate in oldest_first:
        holds = {
            "newest": id(candidate) in newest,
            f"every {every}": every is not None and candidate.step > 0 and candidate.step % every == 0,
            "best": candidate is best,
            UNDO: candidate in undo,
            "pinned": candidate.pinned,
            "needed": candidate.needed,
            ORIGIN: candidate.reason == ORIGIN,
        }
        found.append((candidate, tuple(word for word, true in holds.items() if true)))
    return found


def _best(oldest_first: list[Candidate[Id]]) -> Candidate[Id] | None:
    measured = [c for c in oldest_first if c.metric is not None and math.isfinite(c.metric)]
    return min(reversed(measured), key=lambda c: c.metric or 0.0) if measured else None
