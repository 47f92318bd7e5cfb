"""Lineage: which run comes from which, and what of their checkpoints may not go. Values in, values out."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from onthefly.errors import StoreError, UnknownReferenceError
from onthefly.runs.references import listed

START = -1
"""The `first_step` of a run that began from nothing: step 0 comes after it."""


class RunLike(Protocol):
    """What a lineage reads of a run's row.

    `parents` are names, each with the hash of the checkpoint that the run began from, or "" while that is on its way.
    `base` is the checkpoint that the run goes on from, with its `path`, `hash` and `step`; None for one from nothing.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def created(self) -> float: ...
    @property
    def parents(self) -> Sequence[tuple[str, str]]: ...
    @property
    def base(self) -> Mapping[str, Any] | None: ...


class CheckpointLike(Protocol):
    """What a lineage reads of a checkpoint's row."""

    @property
    def hash(self) -> str: ...
    @property
    def path(self) -> Path: ...


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of steps of one run: those after `first_step`, up to and with `last_step`. None is the run's head."""

    run: str
    first_step: int
    last_step: int | None


class Lineage:
    """The graph of runs. It is a value: nothing changes it, and the order of the rows it is made from plays no part.

    A parent that is not among the rows is in no answer; `check` names it. Every method that is given the name of a run
    raises `UnknownReferenceError` if there is none.

    `Lineage(runs)` takes rows as they are, so that a damaged store can be looked into; `of` refuses what is no history.
    """

    def __init__(self, runs: Iterable[RunLike]) -> None:
        self._rows = tuple(sorted(runs, key=lambda run: (run.created, run.name)))
        self._runs = {run.name: run for run in reversed(self._rows)}
        self._parents = {run.name: tuple(p for p in _parents(run) if p in self._runs) for run in self._rows}
        children: dict[str, list[str]] = {name: [] for name in self._parents}
        for name, parents in self._parents.items():
            for parent in parents:
                children[parent].append(name)
        self._children = {name: tuple(found) for name, found in children.items()}
        self._by_hash: dict[str, str] = {}
        self._by_path: dict[str, str] = {}
        for run in self._rows:
            base = run.base or {}
            for content in (*(content for _, content in run.parents), base.get("hash")):
                if content:  # one that is on its way has none yet
                    self._by_hash.setdefault(content, run.name)
            if base.get("path"):
                self._by_path.setdefault(str(base["path"]), run.name)

    @classmethod
    def of(cls, runs: Iterable[RunLike]) -> Lineage:
        """The lineage of these runs. Raises `StoreError` when one comes from itself, or when two have the same name."""
        lineage = cls(runs)
        if problems := [*lineage._doubles(), *lineage._circles()]:
            raise _no_history(problems)
        return lineage

    def check(self) -> list[tuple[str, str]]:
        """Every fault of the graph, as a run and what is wrong with it: parents that are not there, circles, doubles."""
        findings = []
        for run in self._rows:
            missing = [parent for parent in _parents(run) if parent not in self._runs]
            findings += [(run.name, f"its parent {parent!r} is not there") for parent in missing]
            if run.kind != "root" and not run.parents and run.base is None:
                findings.append((run.name, f"it is a {run.kind}, and nothing tells from which run"))
        return [*findings, *self._doubles(), *self._circles()]

    @property
    def names(self) -> tuple[str, ...]:
        """All runs, the oldest first."""
        return tuple(self._parents)

    def parents(self, name: str) -> tuple[str, ...]:
        """The runs that a run comes from, in the order of the merge. One of which it takes two checkpoints comes once."""
        self._demand(name)
        return self._parents[name]

    def children(self, name: str) -> tuple[str, ...]:
        """The runs that come from a run, the oldest first."""
        self._demand(name)
        return self._children[name]

    def ancestors(self, name: str) -> tuple[str, ...]:
        """The runs that a run comes from, and those that they come from, the nearest first."""
        self._demand(name)
        return tuple(_distances(name, self._parents))[1:]

    def descendants(self, name: str) -> tuple[str, ...]:
        """The runs that come from a run, and those that come from them, the nearest first."""
        self._demand(name)
        return tuple(_distances(name, self._children))[1:]

    def common_ancestor(self, a: str, b: str) -> str | None:
        """The nearest run that both come from, where a run counts as its own ancestor, as in ``git merge-base``.

        None of its descendants is a common ancestor. After merges there may be several such: the one with the fewest
        runs on the ways to both is taken, and of those the newest.
        """
        self._demand(a)
        self._demand(b)
        from_a, from_b = _distances(a, self._parents), _distances(b, self._parents)
        common = from_a.keys() & from_b.keys()
        nearest = [name for name in common if not common.intersection(self._children[name])]
        return min(
            nearest, key=lambda name: (from_a[name] + from_b[name], -self._runs[name].created, name), default=None
        )

    def nearest_common(self, names: Sequence[str]) -> str | None:
        """The nearest run that all of these come from, where a run counts as its own ancestor."""
        nearest: str | None = names[0]
        for name in names[1:]:
            nearest = None if nearest is None else self.common_ancestor(nearest, name)
        return nearest

    def departures(self, name: str, ancestor: str) -> tuple[str, ...]:
        """The hashes of the checkpoints of an ancestor at which the lines that lead to a run left it."""
        line = {name, *self.ancestors(name)}
        edges = (edge for run in self._rows if run.name in line for edge in run.parents)
        return tuple(dict.fromkeys(content for parent, content in edges if parent == ancestor))

    def path(self, name: str) -> tuple[Segment, ...]:
        """The line of steps that led to the head of a run, from the root on, one segment for each run on it.

        The segments meet: each begins where the one before ends. Behind a merge the line is that of the first parent.
        One is empty if a run was left at the step where it began. A run whose `base` is not recorded begins the line.
        """
        self._demand(name)
        segments: list[Segment] = []
        last, passed = None, {name}
        while (parents := self._parents[name]) and (base := self._runs[name].base) is not None:
            first = int(base["step"]) if last is None else min(int(base["step"]), last)
            segments.append(Segment(name, first, last))
            name, last = parents[0], first
            if name in passed:
                raise _no_history(self._circles())
            passed.add(name)
        segments.append(Segment(name, START, last))
        return tuple(reversed(segments))

    def needed(self) -> Mapping[str, str]:
        """The hash of every checkpoint that a run stands on, with the oldest run that does. Retention leaves them."""
        return MappingProxyType(self._by_hash)

    def stands_on(self, hash: str, path: Path | str) -> str | None:
        """A run that stands on a checkpoint of this content, or on the file at this path."""
        return self._by_hash.get(hash) or self._by_path.get(str(path))

    def run_on(self, row: CheckpointLike) -> str | None:
        """A run that stands on this checkpoint."""
        return self.stands_on(row.hash, row.path)

    def needs(self, row: CheckpointLike) -> bool:
        """Whether a run stands on this checkpoint."""
        return self.run_on(row) is not None

    def needs_content(self, hash: str) -> bool:
        """Whether a run stands on a checkpoint of this content."""
        return hash in self._by_hash

    def _demand(self, name: str) -> None:
        if name not in self._runs:
            raise UnknownReferenceError(f"there is no run {name!r}; there are: {listed(self._parents) or 'none yet'}")

    def _doubles(self) -> list[tuple[str, str]]:
        times = Counter(run.name for run in self._rows)
        return [(name, f"there are {count} runs of this name") for name, count in times.items() if count > 1]

    def _circles(self) -> list[tuple[str, str]]:
        """Circles of which every run that comes from itself has a part: take one edge from each, and none is left.

        A depth-first search that does not recurse: `trail` holds the runs from where it began to where it is.
        """
        found = []
        done: set[str] = set()
        for start in self._parents:
            trail: dict[str, Iterator[str]] = {} if start in done else {start: iter(self._parents[start])}
            while trail:
                here, rest = next(reversed(trail.items()))
                parent = next(rest, None)
                if parent is None:
                    done.add(here)
                    del trail[here]
                elif parent in trail:
                    names = list(trail)
                    circle = [*names[names.index(parent) :], parent]
                    found.append((parent, f"it comes from itself: {' from '.join(circle)}"))
                elif parent not in done:
                    trail[parent] = iter(self._parents[parent])
        return found


def _parents(run: RunLike) -> Iterable[str]:
    return dict.fromkeys(parent for parent, _ in run.parents)


def _distances(name: str, next_to: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """How many edges away each run is that can be reached, the nearest first, beginning with the run itself."""
    found = {name: 0}
    waiting = deque([name])
    while waiting:
        here = waiting.popleft()
        for other in next_to[here]:
            if other not in found:
                found[other] = found[here] + 1
                waiting.append(other)
    return found


def _no_history(problems: Iterable[tuple[str, str]]) -> StoreError:
    told = "; ".join(f"{name}: {problem}" for name, problem in problems)
    return StoreError(f"the runs of the store are no history ({told}); `onthefly fsck` lists what is damaged")
