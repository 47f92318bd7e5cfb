"""What may go from the disk, and going: files that nothing needs, and checkpoints that retention lets go.

Nothing that a run stands on goes, nothing pinned, no origin, no best; and nothing of a run that a live session trains.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onthefly import fsck, keeping, repairs, sample_values
from onthefly.checkpoints import sidecar
from onthefly.errors import CheckpointError, CommandError, OnTheFlyError, StoreBusyError
from onthefly.fsck import Finding, Report
from onthefly.runs import manifest
from onthefly.runs.lineage import Lineage
from onthefly.runs.references import describe
from onthefly.store import catalog, queries
from onthefly.store.queries import CheckpointRow
from onthefly.store.store import Store

_FRESH = 60.0
"""Seconds: a younger file without a row may still be on its way into the list."""
_SPARE = ("leftover", "litter", "stray")


@dataclass(frozen=True)
class Removal:
    """A file that goes. `size` is in bytes."""

    kind: fsck.Kind | Literal["retention", "cache"]
    path: Path
    size: int
    message: str
    run: str | None = None
    step: int | None = None
    hash: str | None = None


@dataclass(frozen=True)
class Left:
    """What stays though it looks as if it could go, and why."""

    what: str
    reason: str


@dataclass(frozen=True)
class Collection:
    """What went, or would go in a `dry_run`, and what was left. `freed` is in bytes."""

    removed: tuple[Removal, ...]
    left: tuple[Left, ...]
    freed: int
    dry_run: bool


def collect(store: Store, *, keep: int | None = None, dry_run: bool = False) -> Collection:
    """Remove what nothing needs, and what retention lets go: of each run by its own settings, or with `keep` that many.

    A checkpoint's row becomes a tombstone before its file goes. What cannot be removed is said, and the rest goes on. Raises
    `ValueError` for a `keep` below 1: the newest is where an unfinished run goes on.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"at least 1 checkpoint is kept, not {keep}")
    report = fsck.check(store, full=False)
    removed: list[Removal] = []
    left: list[Left] = []
    for found in (*_unneeded(store, report), *_let_go(store, report, keep), *_again(store)):
        refused = found if isinstance(found, Left) else None if dry_run else _remove(store, found)
        if refused is not None:
            left.append(refused)
        elif not isinstance(found, Left):
            removed.append(found[0])
    return Collection(tuple(removed), tuple(left), sum(one.size for one in removed), dry_run)


Going = tuple[Removal, Finding | CheckpointRow | None]
"""A file that shall go, and what is known of it: what fsck found, or its row; None of what can be computed again."""


def _unneeded(store: Store, report: Report) -> Iterator[Going | Left]:
    """Files that no live row knows."""
    for finding in report.findings:
        if finding.kind == "unrecorded":
            reason = _why_left(store, report, finding)
            yield _going(finding) if reason is None else Left(str(finding.path), reason)
        elif finding.kind in _SPARE:
            advice = finding.advice or ""
            yield _going(finding) if finding.remedy is not None else Left(str(finding.path), advice)


def _is_fresh(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime < _FRESH
    except FileNotFoundError:
        return True


def _why_left(store: Store, report: Report, finding: Finding) -> str | None:
    """Why a checkpoint that is not in the list stays, or None when it may go."""
    if finding.path.parent != store.checkpoints_dir.resolve():
        return "it is not in the store's own folder"
    if finding.run is None:
        return "its name is not one that OnTheFly gives: somebody put it there"
    if any(row.ended is None and row.run == finding.run for row in queries.sessions(store)):
        return finding.advice
    if any(other.kind == "journal" and other.run == finding.run for other in report.findings):
        return "a journal of its run is damaged, and may have told of it"
    if _is_fresh(finding.path):
        return "it is younger than a minute, and may be on its way into the list"
    rows = queries.checkpoints(store, evicted=True)
    live, gone = [row for row in rows if row.evicted is None], [row for row in rows if row.evicted is not None]
    if fsck.is_only_copy(live, gone, Lineage(queries.runs(store)), finding.hash or ""):
        return "a run stands on this content; `onthefly checkpoint import` brings it back"
    return None


def _going(finding: Finding) -> Going:
    where = (finding.run, finding.step, finding.hash)
    size = finding.size + fsck.size_of(sidecar.path_of(finding.path))
    return Removal(finding.kind, finding.path, size, finding.message, *where), finding


def _let_go(store: Store, report: Report, keep: int | None) -> Iterator[Going | Left]:
    """Checkpoints that retention knows no reason to keep."""
    rows, runs, sessions = queries.checkpoints(store), queries.runs(store), queries.sessions(store)
    kept = keeping.kept_because(rows, runs, queries.configs(store), keep)
    unsound = {finding.run for finding in report.errors}
    live = {row.run: row for row in sessions if row.ended is None}
    for run in runs:
        going = [row for row in rows if row.run == run.name and not kept.get(row.id)]
        if going and run.name in live:
            yield Left(run.name, f"session {live[run.name].id} trains it, and removes its checkpoints itself")
        elif going and run.name in unsound:
            yield Left(run.name, "some of its checkpoints are lost or damaged: see `onthefly fsck` first")
        else:
            for row in going:
                size = fsck.size_of(row.path) + fsck.size_of(sidecar.path_of(row.path))
                yield Removal("retention", row.path, size, describe(row), row.run, row.step, row.hash), row


def _again(store: Store) -> Iterator[Going | Left]:
    """What is computed again when it is asked for."""
    measured = "measured of a checkpoint that is gone, for a merge"
    looks = "what samples look like; it is made again when it is asked for"
    found: list[tuple[Literal["statistics", "cache"], Path, str]]
    found = [("cache", path, looks) for path in sample_values.caches(store)]
    try:
        found += [("statistics", path, measured) for path in _statistics(store)]
    except OnTheFlyError as e:
        yield Left(str(store.statistics_dir), f"a manifest that may name what is in it cannot be read: {e}")
    for kind, path, message in found:
        if not _is_fresh(path):  # whoever asked for a young one may be about to read it
            yield Removal(kind, path, fsck.size_of(path), message), None


def _statistics(store: Store) -> list[Path]:
    """What was measured of a merge's parents, where neither the checkpoint is left to merge again nor a merge to verify."""
    files = sorted(store.statistics_dir.glob("*.safetensors"))
    if not files:
        return []
    of = {row.hash[:16] for row in queries.checkpoints(store)}
    needed: set[str] = set()
    for run in keeping.lasting(queries.runs(store)):
        if run.manifest is not None:
            merge = manifest.read(store.manifests_dir / f"{run.manifest[:16]}.json").merge or {}
            needed |= {told["file"] for told in merge.get("statistics", ())}
    return [path for path in files if path.name not in needed and path.name.partition("-")[0] not in of]


def _remove(store: Store, going: Going) -> Left | None:
    """Remove it, or say why it stays."""
    removal, known = going
    try:
        if isinstance(known, CheckpointRow):
            catalog.bury(store, known, "retention")
            repairs.remove(store, known.path, run=known.run, content=known.hash)
        elif known is None:
            removal.path.unlink(missing_ok=True)
        elif known.kind == "unrecorded":
            assert known.run is not None
            assert known.hash is not None
            repairs.remove(store, known.path, run=known.run, content=known.hash)
        elif not (done := repairs.apply(store, known)).done:
            return Left(str(known.path), done.message)
    except StoreBusyError:
        raise
    except (CommandError, CheckpointError, OSError) as e:
        return Left(str(removal.path), str(e))
    return None
