"""Retention: which checkpoints of a run may go. A pure function of what is known about them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

ORIGIN = "origin"
"""The `reason` of the checkpoint that a run began from. It is what makes every later step reachable by replay."""

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


def evict(candidates: Iterable[Candidate[Id]], keep: int = 3) -> list[Candidate[Id]]:
    """The candidates that may be deleted, oldest first.

    Kept are the newest `keep` by their order, the one with the lowest finite metric (the newest of several), every
    pinned one, every needed one, and every origin. Raises `ValueError` for a negative `keep`.
    """
    if keep < 0:
        raise ValueError(f"retention keeps at least 0 checkpoints, not {keep}")
    oldest_first = sorted(candidates, key=lambda c: c.order)
    newest = oldest_first[len(oldest_first) - keep :] if keep < len(oldest_first) else oldest_first
    best = _best(oldest_first)
    kept = {id(c) for c in (*newest, *best)}
    return [c for c in oldest_first if not (id(c) in kept or c.pinned or c.needed or c.reason == ORIGIN)]


def _best(oldest_first: list[Candidate[Id]]) -> list[Candidate[Id]]:
    measured = [c for c in oldest_first if c.metric is not None and math.isfinite(c.metric)]
    return [min(reversed(measured), key=lambda c: c.metric or 0.0)] if measured else []
