"""Projection: what a session's journal says, in the tables.

The rows and the journal's offset are committed together, so a record is projected once however often, and in
however many processes, it is tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from sqlalchemy import Connection, delete, func, insert, select, update

from onthefly.errors import NoLiveSessionError, StoreError
from onthefly.store import journal, points, schema
from onthefly.store.journal import FactRecord, MetricsRecord
from onthefly.store.points import Points

if TYPE_CHECKING:
    from onthefly.store.store import Store

BATCH = 20_000
"""Records in one transaction: it holds the write lock for about a tenth of a second."""
MERGED = 64
"""As many chunks of one level become one of the next."""
FULL = 8192
"""Points of a full chunk, which is never touched again."""

Key = tuple[str, int, str]
"""A series: run, generation, name."""


def project(store: Store, session: int) -> int:
    """Bring all complete new records of a session's journal into the tables; gives their number.

    Raises `StoreError` if there is no such session, and `OSError` if its journal cannot be read.
    """
    total = 0
    while (count := _project_batch(store, session)) is not None:
        total += count
    return total


def fail_queued(connection: Connection, session: int, time: float) -> None:
    """Answer the commands that a session has left behind."""
    reason = f"session {session} ended before it came to this command; `onthefly resume` starts its run again"
    error = {"type": "NoLiveSessionError", "message": reason, "exit_code": NoLiveSessionError.exit_code}
    table = schema.command
    queued = update(table).where(table.c.session == session, table.c.status == "queued")
    connection.execute(queued.values(status="failed", error=error, finished=time))


def _project_batch(store: Store, session: int) -> int | None:
    """How many records were brought in; None when there are none to bring."""
    path = store.journal_path(session)
    this = schema.session.c.id == session
    known = select(schema.session.c.journal_offset, schema.session.c.metric_names, schema.session.c.run).where(this)
    with store.read() as connection:
        before = connection.execute(known).one_or_none()
    if before is None:
        raise StoreError(f"there is no session {session} in {store.root}")
    if not path.exists() or path.stat().st_size <= before.journal_offset:
        return None
    records, offset = journal.read(path, before.journal_offset, BATCH)  # not while nobody else can write
    if not records:
        return None
    with store.begin() as connection:
        row = connection.execute(known).one()
        if row.journal_offset != before.journal_offset:
            return 0  # another process was faster: on from where it is
        tables = _Tables(store, connection, session, row.run, dict(row.metric_names))
        for record in records:
            try:
                tables.take(record)
            except (KeyError, TypeError, ValueError) as e:
                raise StoreError(f"{path}: record {record.seq} makes no sense ({type(e).__name__}: {e})") from e
        tables.finish()
        connection.execute(
            update(schema.session).where(this).values(journal_offset=offset, metric_names=tables.metric_names)
        )
    return len(records)


class _Tables:
    """Puts the records of one transaction into the tables."""

    def __init__(
        self, store: Store, connection: Connection, session: int, run: str, metric_names: dict[str, list[Any]]
    ) -> None:
        self.metric_names = metric_names
        self._store = store
        self._connection = connection
        self._session = session
        self._run = run
        self._events: list[dict[str, Any]] = []
        self._points: dict[Key, list[tuple[int, float, float]]] = {}

    def take(self, record: journal.Record) -> None:
        if isinstance(record, MetricsRecord):
            for number, value in record.values:
                run, generation, name = self.metric_names[str(number)]
                self._points.setdefault((run, generation, name), []).append((record.step, value, record.time))
            return
        match record.kind:
            case "series":
                data = record.data
                self.metric_names[str(data["id"])] = [data["run"], data["generation"], data["name"]]
            case "event":
                self._event(record, record.data["event"], record.data, record.data.get("data") or {})
            case "checkpoint":
                self._checkpoint(record)
            case "evicted":
                self._evicted(record)
            case "pinned":
                self._pinned(record)
            case "result":
                self._result(record.data)
            case "scan":
                self._scan(record)
            case "run":
                self._run_changed(record.data)
            case "session":
                self._session_changed(record.data)
            case other:  # a newer OnTheFly's: nothing that was recorded is left out
                self._event(record, other, {"time": 0.0, **record.data}, record.data)

    def finish(self) -> None:
        if self._events:
            self._connection.execute(insert(schema.event), self._events)
        by_run: dict[tuple[str, int], dict[str, Points]] = {}
        for (run, generation, name), rows in self._points.items():
            by_run.setdefault((run, generation), {})[name] = np.array(rows, points.POINT)
        for (run, generation), new in by_run.items():
            _append(self._connection, run, generation, new)

    def _event(self, record: FactRecord, kind: str, where: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        row = {key: where.get(key) for key in ("run", "generation", "step", "epoch")}
        self._events.append(
            {**row, "session": self._session, "seq": record.seq, "time": where["time"], "kind": kind, "data": data}
        )

    def _checkpoint(self, record: FactRecord) -> None:
        data = {**record.data, "path": self._store.stored_path(record.data["path"])}
        table = schema.checkpoint
        before = update(table).where(table.c.path == data["path"], table.c.evicted.is_(None))
        self._connection.execute(before.values(evicted=data["time"], evicted_reason="replaced"))
        row = {key: data[key] for key in data.keys() & table.c.keys()}
        self._connection.execute(insert(table).values({**row, "session": self._session}))
        told = ("path", "hash", "size", "reason", "pinned", "metrics")
        self._event(record, "checkpointSaved", data, {key: data[key] for key in told})

    def _evicted(self, record: FactRecord) -> None:
        reason = record.data["reason"]
        data, where = self._of_live_checkpoint(record, evicted=record.data["time"], evicted_reason=reason)
        self._event(record, "checkpointEvicted", where, {**data, "reason": reason})

    def _of_live_checkpoint(self, record: FactRecord, **values: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Change the row of the live checkpoint that a fact is about; gives what names it, and where in its run it stands."""
        named = {"path": self._store.stored_path(record.data["path"]), "hash": record.data["hash"]}
        table = schema.checkpoint
        this = (table.c.path == named["path"]) & (table.c.hash == named["hash"]) & table.c.evicted.is_(None)
        row = self._connection.execute(select(table).where(this)).mappings().first()
        self._connection.execute(update(table).where(this).values(values))
        return named, {**(row or {"run": self._run}), "time": record.data["time"]}

    def _pinned(self, record: FactRecord) -> None:
        pinned = record.data["pinned"]
        data, where = self._of_live_checkpoint(record, pinned=pinned)
        self._event(record, "checkpointPinned" if pinned else "checkpointUnpinned", where, data)

    def _scan(self, record: FactRecord) -> None:
        data = record.data
        row = {key: data[key] for key in data.keys() & schema.scan.c.keys()}
        row |= {"path": self._store.stored_path(data["path"]), "session": self._session}
        self._connection.execute(insert(schema.scan).values(row))
        told = ("checkpoint", "data", "columns", "length", "path", "seconds")
        self._event(record, "scanned", data, {key: row[key] for key in told})

    def _result(self, data: Mapping[str, Any]) -> None:
        table = schema.command
        values = {key: data.get(key) for key in ("status", "result", "error", "run", "step", "epoch")}
        this = table.c.id == data["command"]
        self._connection.execute(update(table).where(this).values(**values, finished=data["time"]))

    def _run_changed(self, data: Mapping[str, Any]) -> None:
        values = {key: data[key] for key in ("status", "generation", "base", "manifest") if key in data}
        if base := values.get("base"):
            values["base"] = {**base, "path": self._store.stored_path(base["path"])}
        if values:
            self._connection.execute(update(schema.run).where(schema.run.c.name == data["run"]).values(values))
        for position, content in enumerate(data.get("parents", ())):
            table = schema.run_parent
            edge = (table.c.run == data["run"]) & (table.c.position == position)
            self._connection.execute(update(table).where(edge).values(hash=content))

    def _session_changed(self, data: Mapping[str, Any]) -> None:
        values = {key: data[key] for key in ("status", "outcome", "ended", "run", "inexact") if key in data}
        self._connection.execute(update(schema.session).where(schema.session.c.id == self._session).values(values))
        if data.get("ended") is not None:
            fail_queued(self._connection, self._session, data["ended"])


def _append(connection: Connection, run: str, generation: int, new: Mapping[str, Points]) -> None:
    """Add points to series of one generation.

    The chunks of a series, by id, are its points in their order: first the full ones, then a tail of others whose
    levels never rise. So what is merged is always the end of a series, and its place in the order is the end again.
    """
    table = schema.metric_chunk
    of_run = (table.c.run == run) & (table.c.generation == generation) & (table.c.count < FULL)
    found = select(table.c.name, table.c.level, func.count(), func.sum(table.c.count)).where(
        of_run, table.c.name.in_(new)
    )
    tails: dict[str, dict[int, tuple[int, int]]] = {}
    for name, level, chunks, size in connection.execute(found.group_by(table.c.name, table.c.level)):
        tails.setdefault(name, {})[level] = (chunks, size)
    rows = []
    for name, added in new.items():
        tail = tails.get(name, {})
        level = _absorbed(tail, len(added))
        if level > 0:
            old = (of_run, table.c.name == name, table.c.level < level)
            columns = select(table.c.steps, table.c["values"], table.c.times)
            chunks = connection.execute(columns.where(*old).order_by(table.c.id)).all()
            connection.execute(delete(table).where(*old))
            added = points.join([*(points.unpacked(*chunk) for chunk in chunks), added])
        key = {"run": run, "generation": generation, "name": name}
        rows += [{**key, **chunk} for chunk in _chunks(added, level)]
    connection.execute(insert(table), rows)


def _absorbed(tail: Mapping[int, tuple[int, int]], added: int) -> int:
    """All chunks of the tail below this level become one with what is added."""
    if sum(size for _, size in tail.values()) + added >= FULL:
        return max(tail, default=0) + 1
    level = 0
    while tail.get(level, (0, 0))[0] >= MERGED - 1:
        level += 1
    return level


def _chunks(added: Points, level: int) -> Iterator[dict[str, Any]]:
    for start in range(0, len(added), FULL):
        part = added[start : start + FULL]
        full = len(part) == FULL
        rollups = {f"rollup_{n}": points.extremes(part, n).tobytes() if full else None for n in points.RESOLUTIONS}
        yield {**points.packed(part), **rollups, "level": level}
