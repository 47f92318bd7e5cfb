"""What can be put right in a store without losing anything: the remedies of what `fsck` found.

Sidecars are written again, litter is cleared away, rows without a file become tombstones. A checkpoint that could be the
only one of its content is never deleted or altered, and runs that a live session trains are left to it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select

from onthefly import fsck
from onthefly.checkpoints import durable, sidecar
from onthefly.checkpoints.header import Header, read_header
from onthefly.errors import CheckpointError, CommandError, CorruptCheckpointError, StoreError, UnknownReferenceError
from onthefly.fsck import Finding, Report
from onthefly.runs import replay
from onthefly.store import catalog, queries, schema
from onthefly.store.queries import CheckpointRow
from onthefly.store.store import Store


@dataclass(frozen=True)
class Repair:
    """What became of a finding: whether it is repaired, and if it is not, why."""

    finding: Finding
    done: bool
    message: str


def repair(store: Store, report: Report) -> tuple[Repair, ...]:
    """Do what the report's remedies say, each after another look. What cannot be done says why, and the rest goes on."""
    return tuple(apply(store, finding) for finding in report.findings if finding.remedy is not None)


def remove(store: Store, path: Path, *, run: str, content: str) -> int:
    """Delete the file of a checkpoint that is not recorded any more, and its sidecar; gives the bytes.

    Raises `CommandError` if a session is on the run, or if the file is recorded, or of another content; or `OSError`.
    """
    with catalog.unattended(store, run) as connection:
        table = schema.checkpoint
        recorded = connection.scalars(select(table.c.path).where(table.c.evicted.is_(None)))
        if any(fsck.place(store.full_path(stored)) == fsck.place(path) for stored in recorded):
            raise CommandError(f"{path}: a checkpoint is recorded there again")
        if not os.path.lexists(path):
            return 0
        if not fsck.has(path, content):
            raise CommandError(f"{path}: it is not {content[:12]} any more")
        size = fsck.size_of(path)
        path.unlink()
        sidecar.path_of(path).unlink(missing_ok=True)
    return size


def apply(store: Store, finding: Finding) -> Repair:
    """Do what one finding's remedy says, after another look."""
    try:
        return Repair(finding, True, _REMEDIES[finding.kind](store, finding))
    except (CommandError, CheckpointError, StoreError, UnknownReferenceError, OSError) as e:
        return Repair(finding, False, str(e))


def _bury(store: Store, finding: Finding) -> str:
    row = _row(store, finding)
    if os.path.lexists(row.path):
        raise CommandError(f"{row.path}: its file is back; check again")
    catalog.bury(store, row, fsck.LOST)
    sidecar.path_of(row.path).unlink(missing_ok=True)
    return f"its row is a tombstone ({fsck.LOST})"


def _write_sidecar(store: Store, finding: Finding) -> str:
    row = _row(store, finding)
    header = read_header(row.path)
    if header.hash != row.hash:
        raise CorruptCheckpointError(f"{row.path}: its content is not {row.hash[:12]} any more")
    told = sidecar.Sidecar(
        path=row.path,
        run=row.run,
        generation=row.generation,
        step=row.step,
        epoch=row.epoch,
        time=row.time,
        size=header.size,
        hash=row.hash,
        reason=row.reason,
        counters=_counters(header),
    )
    with catalog.unattended(store, row.run):
        sidecar.write_sidecar(row.path, told)
    return "its sidecar is written"


def _counters(header: Header) -> dict[str, sidecar.Number]:
    """The counters of the state, but for those that JSON has no number for."""
    found = header.tree.get("counters") if isinstance(header.tree, dict) else None
    counters = found if isinstance(found, dict) else {}
    return {name: value if isinstance(value, int | float) else None for name, value in counters.items()}


def _remove_leftover(store: Store, finding: Finding) -> str:
    assert finding.run is not None
    assert finding.hash is not None
    remove(store, finding.path, run=finding.run, content=finding.hash)
    return "removed"


def _remove_litter(store: Store, finding: Finding) -> str:
    checkpoint = finding.path.with_name(finding.path.name.removesuffix(".meta.json"))
    with catalog.unattended(store, finding.run or ""):
        if os.path.lexists(checkpoint):
            raise CommandError(f"{finding.path}: its checkpoint is there again")
        finding.path.unlink(missing_ok=True)
    return "removed"


def _remove_stray(store: Store, finding: Finding) -> str:
    if finding.path.is_dir():
        if not replay.remove_workroom(finding.path):
            raise CommandError(f"{finding.path}: somebody uses it")
        return "removed"
    durable.remove_stray(finding.path.parent)
    if os.path.lexists(finding.path):
        raise CommandError(f"{finding.path}: somebody writes it")
    return "removed"


_REMEDIES: dict[fsck.Kind, Callable[[Store, Finding], str]] = {
    "lost": _bury,
    "sidecar": _write_sidecar,
    "leftover": _remove_leftover,
    "litter": _remove_litter,
    "stray": _remove_stray,
}


def _row(store: Store, finding: Finding) -> CheckpointRow:
    for row in queries.checkpoints(store, finding.run):
        if row.id == finding.checkpoint:
            return row
    raise UnknownReferenceError(f"{finding.path}: its row is a tombstone already")
