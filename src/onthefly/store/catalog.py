"""The list of checkpoints, changed by a door while no session is on the run: a pin, a tombstone, a new row, a scan of one.

A live session owns the rows of its run, and is asked by a command instead. Each change is one transaction with its
event, so that the history stays whole. The event stands behind the last fact of the run's newest session: that one has
ended, and its journal adds nothing to it any more.
"""

from __future__ import annotations

import time as clock
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, func, insert, select, update

from onthefly.errors import CommandError
from onthefly.store import schema

if TYPE_CHECKING:
    from onthefly.store.queries import CheckpointRow
    from onthefly.store.store import Store


def pin(store: Store, row: CheckpointRow, pinned: bool) -> None:
    """Pin a checkpoint, so that it is never evicted, or let go of it. Nothing happens if it is so already.

    Raises `CommandError` if a session is on its run, or if the checkpoint was removed meanwhile.
    """
    table = schema.checkpoint
    with store.begin() as connection:
        place = _next_place(connection, row.run)
        now = connection.execute(select(table.c.pinned, table.c.evicted).where(table.c.id == row.id)).one_or_none()
        if now is None or now.evicted is not None:
            raise CommandError(f"{row.run}@{row.step} {row.hash[:12]} was removed; there is nothing left to pin")
        if now.pinned == pinned:
            return
        connection.execute(update(table).where(table.c.id == row.id).values(pinned=pinned))
        kind = "checkpointPinned" if pinned else "checkpointUnpinned"
        told = {"path": store.stored_path(row.path), "hash": row.hash}
        _tell(connection, place, kind, _where(row), told)


def bury(store: Store, row: CheckpointRow, reason: str) -> None:
    """Make a checkpoint's row a tombstone: when it went, and why. Its file is not touched. Nothing happens if it is one.

    Raises `CommandError` if a session is on its run.
    """
    table = schema.checkpoint
    where = _where(row)
    with store.begin() as connection:
        place = _next_place(connection, row.run)
        this = update(table).where(table.c.id == row.id, table.c.evicted.is_(None))
        if connection.execute(this.values(evicted=where["time"], evicted_reason=reason)).rowcount:
            told = {"path": store.stored_path(row.path), "hash": row.hash, "reason": reason}
            _tell(connection, place, "checkpointEvicted", where, told)


def record(
    store: Store,
    *,
    run: str,
    generation: int,
    step: int,
    epoch: int,
    path: Path,
    hash: str,
    size: int,
    reason: str,
    pinned: bool,
    metrics: Mapping[str, float],
) -> None:
    """Add a checkpoint whose file is in place, as the newest of its run. A live row of the same path becomes `replaced`.

    Raises `CommandError` if a session is on the run, or if none ever was.
    """
    table = schema.checkpoint
    told: dict[str, Any] = {"path": store.stored_path(path), "hash": hash, "size": size, "reason": reason}
    told |= {"pinned": pinned, "metrics": dict(metrics)}
    where: dict[str, Any] = {"run": run, "generation": generation, "step": step, "epoch": epoch, "time": clock.time()}
    with store.begin() as connection:
        session, seq = place = _next_place(connection, run)
        before = update(table).where(table.c.path == told["path"], table.c.evicted.is_(None))
        connection.execute(before.values(evicted=where["time"], evicted_reason="replaced"))
        connection.execute(insert(table).values({**where, **told, "session": session, "captured": seq}))
        _tell(connection, place, "checkpointSaved", where, told)


def scanned(store: Store, *, run: str, path: str, **about: Any) -> None:
    """Add a scan of a checkpoint of the run, whose file is in place: what `schema.scan` has, but for time and session.

    Raises `CommandError` if a session is on the run, or if none ever was.
    """
    row = {**about, "run": run, "path": store.stored_path(path), "time": clock.time()}
    where = {key: row[key] for key in ("run", "generation", "step", "epoch", "time")}
    told = {key: row[key] for key in ("checkpoint", "data", "columns", "length", "path", "seconds")}
    with store.begin() as connection:
        place = _next_place(connection, run)
        connection.execute(insert(schema.scan).values({**row, "session": place[0]}))
        _tell(connection, place, "scanned", where, told)


def archive(store: Store, run: str, archived: float | None) -> None:
    """Mark a run as archived at that time, or (None) as one to be listed."""
    with store.begin() as connection:
        connection.execute(update(schema.run).where(schema.run.c.name == run).values(archived=archived))


def remove_run(store: Store, run: str, now: float) -> None:
    """Mark a run as removed. Its rows stay: history, name and edges. Raises `CommandError` if a session is on it."""
    with unattended(store, run) as connection:
        values = {"status": "removed", "archived": now}
        connection.execute(update(schema.run).where(schema.run.c.name == run).values(values))


@contextmanager
def unattended(store: Store, run: str) -> Iterator[Connection]:
    """Inside, no session is on the run, and none can begin: it is a write transaction, so keep it short.

    Raises `CommandError` if a session is on it.
    """
    with store.begin() as connection:
        _refuse_live(connection, run)
        yield connection


def _refuse_live(connection: Connection, run: str) -> None:
    table = schema.session
    live = connection.execute(select(table).where(table.c.run == run, table.c.ended.is_(None))).first()
    if live is not None:
        raise CommandError(
            f"session {live.id} (pid {live.pid} on {live.host}) is on {run!r} and owns its checkpoints: "
            "ask it by a command, or wait until it has ended"
        )


def _next_place(connection: Connection, run: str) -> tuple[int, int]:
    """Session and number for the next fact of a run that nobody trains. Raises `CommandError` if somebody does."""
    table, event, checkpoint = schema.session, schema.event, schema.checkpoint
    _refuse_live(connection, run)
    # A session that went over to another run has facts of this one, too.
    of_run = (table.c.run == run) | table.c.id.in_(select(event.c.session).where(event.c.run == run))
    session = connection.scalar(select(func.max(table.c.id)).where(of_run, table.c.ended.is_not(None)))
    if session is None:
        raise CommandError(f"no session of {run!r} has ended, so its history has no place for a change of a checkpoint")
    last = connection.scalar(select(func.max(event.c.seq)).where(event.c.session == session)) or 0
    captured = connection.scalar(select(func.max(checkpoint.c.captured)).where(checkpoint.c.session == session)) or 0
    return session, max(last, captured) + 1


def _where(row: CheckpointRow) -> dict[str, Any]:
    return {"run": row.run, "generation": row.generation, "step": row.step, "epoch": row.epoch, "time": clock.time()}


def _tell(
    connection: Connection, place: tuple[int, int], kind: str, where: Mapping[str, Any], data: Mapping[str, Any]
) -> None:
    session, seq = place
    connection.execute(insert(schema.event).values(**where, session=session, seq=seq, kind=kind, data=data))
