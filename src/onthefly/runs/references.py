"""REF: the one notation by which a checkpoint is named, at every door.

    RUN          its latest own checkpoint      RUN@latest   the same
    RUN@STEP     the one at that step           RUN@best     the one with the lowest val_loss
    3f9a2c       the start of a content hash    ./x.safetensors   a file

Everything here takes values and returns values: `parse` reads the notation, `resolve` finds what it names among the
rows it is given.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from onthefly.errors import AmbiguousError, UnknownReferenceError

NOTATION = "RUN, RUN@STEP, RUN@latest, RUN@best, the start of a hash (6 digits or more), or a file"
IMPORTED = "import"
"""The `reason` of a checkpoint that was brought in from outside. Its run was never in that state."""
_HASH = re.compile(r"[0-9a-f]{6,64}")
_SUFFIX = ".safetensors"
_WORDS: dict[str, Literal["latest", "best"]] = {"latest": "latest", "best": "best"}
_LISTED = 12


@dataclass(frozen=True)
class Reference:
    """A REF as it was written: either `path` is set, or `name`.

    `name` is a run, or, when `at` is None and it looks like one, the start of a content hash; only the rows can tell.
    """

    text: str
    name: str | None = None
    at: int | Literal["latest", "best"] | None = None
    path: Path | None = None

    @property
    def may_be_hash(self) -> bool:
        return self.at is None and self.name is not None and _HASH.fullmatch(self.name.lower()) is not None


class RunLike(Protocol):
    """What `resolve` reads of a run's row. `base` tells the `step` that its generation began from, if it is not the first."""

    @property
    def name(self) -> str: ...
    @property
    def generation(self) -> int: ...
    @property
    def base(self) -> Mapping[str, Any] | None: ...


class CheckpointLike(Protocol):
    """What `resolve` reads of a checkpoint's row."""

    @property
    def run(self) -> str: ...
    @property
    def generation(self) -> int: ...
    @property
    def step(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def hash(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def reason(self) -> str: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...
    @property
    def session(self) -> int: ...
    @property
    def captured(self) -> int: ...
    @property
    def evicted(self) -> float | None: ...
    @property
    def evicted_reason(self) -> str | None: ...


C = TypeVar("C", bound=CheckpointLike)


def parse(text: str) -> Reference:
    """Read a REF. Raises `UnknownReferenceError` for what is none."""
    if not text or text != text.strip():
        raise UnknownReferenceError(f"{text!r} names nothing; a REF is {NOTATION}")
    if "/" in text or text.startswith("~") or text.endswith(_SUFFIX):
        return Reference(text, path=Path(os.path.expanduser(text)))
    name, mark, at = text.rpartition("@")
    if not mark:
        return Reference(text, name=text)
    if not name:
        raise UnknownReferenceError(f"{text!r} does not say which run; a REF is {NOTATION}")
    if at in _WORDS:
        return Reference(text, name=name, at=_WORDS[at])
    if re.fullmatch(r"[0-9]{1,18}", at):
        return Reference(text, name=name, at=int(at))
    raise UnknownReferenceError(f"{text!r}: after the @ stands a step, `latest` or `best`, not {at!r}")


def resolve(
    reference: Reference, runs: Sequence[RunLike], checkpoints: Sequence[C], *, best_by: str = "val_loss"
) -> C | Path:
    """The checkpoint that a reference names, or the path that it is, when no row has that very path.

    Evicted rows may be among `checkpoints`: they are never returned, but the error then says what became of them.
    Of several generations with a checkpoint at that step the newest counts. Raises `UnknownReferenceError` or
    `AmbiguousError`, which list what there is.
    """
    if reference.path is not None:
        return _by_path(reference.path, checkpoints)
    assert reference.name is not None
    by_hash = _by_hash(reference.name.lower(), checkpoints) if reference.may_be_hash else []
    run = next((run for run in runs if run.name == reference.name), None)
    if run is None:
        if by_hash:
            return _one_content(reference, by_hash)
        raise UnknownReferenceError(_unknown_name(reference, runs, checkpoints))
    if by_hash:
        raise AmbiguousError(
            f"{reference.name!r} is a run, and the start of the hash {by_hash[0].hash[:16]}; "
            f"write {reference.name}@latest, or more digits"
        )
    return _of_run(reference, run, checkpoints, best_by)


def in_order(checkpoints: Iterable[C]) -> list[C]:
    """Oldest first, in the order in which they were captured, which is the order of facts and not of steps."""
    return sorted(checkpoints, key=lambda row: (row.session, row.captured))


def best(checkpoints: Iterable[C], metric: str) -> C | None:
    """The one with the lowest finite value of a metric, or None when none has one. Of equals, the oldest."""
    judged = [
        (row.metrics[metric], row)
        for row in in_order(checkpoints)
        if row.evicted is None and math.isfinite(row.metrics.get(metric, math.nan))
    ]
    return min(judged, key=lambda pair: pair[0])[1] if judged else None


def stands(row: CheckpointLike, run: RunLike) -> bool:
    """Whether a checkpoint is of the line that the run is on, and not of one that it was taken back from."""
    return row.generation >= run.generation or run.base is None or row.step <= run.base["step"]


def describe(checkpoint: CheckpointLike) -> str:
    """A checkpoint in a few words, for messages: ``baseline@120 3f9a2c1b04de``."""
    generation = f" (generation {checkpoint.generation})" if checkpoint.generation else ""
    return f"{checkpoint.run}@{checkpoint.step}{generation} {checkpoint.hash[:12]}"


def listed(items: Iterable[str]) -> str:
    """Items in one line, the first few of many."""
    words = list(items)
    more = [f"and {len(words) - _LISTED} more"] if len(words) > _LISTED else []
    return ", ".join(words[:_LISTED] + more)


def _by_path(path: Path, checkpoints: Sequence[C]) -> C | Path:
    found = in_order(row for row in checkpoints if row.evicted is None and row.path == path)
    return found[-1] if found else path


def _by_hash(digits: str, checkpoints: Sequence[C]) -> list[C]:
    return [row for row in checkpoints if row.hash.startswith(digits)]


def _one_content(reference: Reference, found: list[C]) -> C:
    """Several checkpoints may share a hash: then they hold the same, and any of them will do."""
    live = in_order(row for row in found if row.evicted is None)
    if len({row.hash for row in live}) > 1:
        raise AmbiguousError(f"{reference.text!r} is the start of several hashes: {listed(map(describe, live))}")
    if not live:
        raise UnknownReferenceError(_tombstone(found[-1]))
    return live[-1]


def _of_run(reference: Reference, run: RunLike, checkpoints: Sequence[C], best_by: str) -> C:
    name = run.name
    mine = in_order(row for row in checkpoints if row.run == name)
    live = [row for row in mine if row.evicted is None]
    if not live:
        raise UnknownReferenceError(f"the run {name!r} has no checkpoint yet; `onthefly save` makes one")
    own = [row for row in live if row.reason != IMPORTED]
    if reference.at is None or reference.at == "latest":
        return (own or live)[-1]
    if reference.at == "best":
        if (found := best((row for row in live if stands(row, run)), best_by)) is None:
            raise UnknownReferenceError(
                f"no checkpoint of {name!r} has a {best_by}; the best is the one with the lowest"
            )
        return found
    at_step = [row for row in own if row.step == reference.at] or [row for row in live if row.step == reference.at]
    if at_step:
        return max(at_step, key=lambda row: (row.generation, row.session, row.captured))
    gone = [row for row in mine if row.step == reference.at]
    if gone:
        raise UnknownReferenceError(f"{_tombstone(gone[-1])}; {name!r} has: {_steps(live)}")
    raise UnknownReferenceError(f"{name!r} has no checkpoint at step {reference.at}; it has: {_steps(live)}")


def _steps(rows: Sequence[CheckpointLike]) -> str:
    return listed(str(step) for step in sorted({row.step for row in rows}, reverse=True))


def _tombstone(row: CheckpointLike) -> str:
    return f"the checkpoint {describe(row)} was removed ({row.evicted_reason or 'evicted'})"


def _unknown_name(reference: Reference, runs: Sequence[RunLike], checkpoints: Sequence[CheckpointLike]) -> str:
    there_are = listed(run.name for run in runs) or "none yet"
    if not reference.may_be_hash:
        return f"there is no run {reference.name!r}; there are: {there_are}"
    hashes = listed(row.hash[:12] for row in reversed(in_order(checkpoints)) if row.evicted is None) or "none yet"
    return f"{reference.text!r} is neither a run (there are: {there_are}) nor the start of a hash (there are: {hashes})"
