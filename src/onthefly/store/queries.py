"""What can be read from a store: rows, and series of numbers.

Every function is one short read. Paths come absolute. What is not there comes as None, or empty.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, RowMapping, Select, func, select, tuple_

from onthefly.store import schema

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from onthefly.store.points import Points
    from onthefly.store.store import Store


@dataclass(frozen=True, slots=True)
class SessionRow:
    """A live or past training process. Times are Unix seconds."""

    id: int
    project: str
    run: str
    pid: int
    host: str
    status: str
    outcome: str | None
    step: int
    epoch: int
    loss: float | None
    started: float
    heartbeat: float
    ended: float | None
    launch: dict[str, Any] | None
    environment: dict[str, Any]
    inexact: list[Any]
    config: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RunRow:
    """A node of the lineage graph. `parents` are its parents' names, each with the hash of its checkpoint."""

    name: str
    project: str
    kind: str
    created: float
    status: str
    generation: int
    base: dict[str, Any] | None
    manifest: str | None
    archived: float | None
    parents: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    """A checkpoint, or what is left to say of one that was evicted: then `evicted` is when, and the file may be gone."""

    id: int
    run: str
    generation: int
    step: int
    epoch: int
    time: float
    path: Path
    hash: str
    size: int
    reason: str
    pinned: bool
    metrics: dict[str, float]
    session: int
    captured: int
    evicted: float | None
    evicted_reason: str | None


@dataclass(frozen=True, slots=True)
class ScanRow:
    """Per-sample values of one data set under one state: the `columns` in the file at `path`. `checkpoint` is the state's hash."""

    id: int
    run: str
    generation: int
    step: int
    epoch: int
    time: float
    checkpoint: str
    data: str
    columns: list[str]
    length: int
    path: Path
    hash: str
    seconds: float
    session: int


@dataclass(frozen=True, slots=True)
class EventRow:
    """A fact of a session. All facts of a store are ordered by (session, seq)."""

    session: int
    seq: int
    run: str | None
    generation: int | None
    step: int | None
    epoch: int | None
    time: float
    kind: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class CommandRow:
    """A request to a session, and its result or error. `number` is its place in the order of arrival."""

    id: str
    number: int
    session: int
    kind: str
    arguments: dict[str, Any]
    created: float
    status: str
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    step: int | None
    epoch: int | None
    finished: float | None
    door: str | None = None
    """`cli`, `python`, `dashboard` or `api`; None where it was not recorded."""
    asker: str | None = None
    run: str | None = None
    """The run that the session was on when it carried it out."""


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """Points of one metric, in the order of their steps."""

    steps: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    times: npt.NDArray[np.float64]


def sessions(store: Store, *, alive: bool | None = None) -> list[SessionRow]:
    """All sessions, oldest first; with `alive`, those whose process runs, or those whose process does not."""
    with store.read() as connection:
        rows = connection.execute(select(*_SESSION).order_by(schema.session.c.id)).mappings()
        found = [SessionRow(**row) for row in rows]
    return [row for row in found if alive is None or store.is_alive(row) == alive]


def session(store: Store, id: int) -> SessionRow | None:
    with store.read() as connection:
        row = connection.execute(select(*_SESSION).where(schema.session.c.id == id)).mappings().one_or_none()
    return SessionRow(**row) if row else None


def runs(store: Store) -> list[RunRow]:
    """All runs, oldest first."""
    with store.read() as connection:
        return _runs(store, connection, select(schema.run).order_by(schema.run.c.created, schema.run.c.name))


def run(store: Store, name: str) -> RunRow | None:
    with store.read() as connection:
        found = _runs(store, connection, select(schema.run).where(schema.run.c.name == name))
    return found[0] if found else None


def checkpoints(store: Store, run: str | None = None, *, evicted: bool = False) -> list[CheckpointRow]:
    """Checkpoints in the order in which they were captured; those evicted too if `evicted`."""
    table = schema.checkpoint
    wanted = select(table).order_by(table.c.session, table.c.captured, table.c.id)
    if run is not None:
        wanted = wanted.where(table.c.run == run)
    if not evicted:
        wanted = wanted.where(table.c.evicted.is_(None))
    with store.read() as connection:
        return [_checkpoint(store, row) for row in connection.execute(wanted).mappings()]


def trainers(store: Store) -> dict[str, int]:
    """For every run, the newest session that has been on it: one session may have been on several."""
    table = schema.event
    newest = select(table.c.run, func.max(table.c.session)).where(table.c.run.is_not(None)).group_by(table.c.run)
    with store.read() as connection:
        return {row[0]: row[1] for row in connection.execute(newest)}


def heads(store: Store) -> dict[str, tuple[int, int]]:
    """For every run, the last step and epoch of its present generation that an event, a session or a metric tells of."""
    event, run, chunk = schema.event, schema.run, schema.metric_chunk
    present = (event.c.run == run.c.name) & (event.c.generation == run.c.generation)
    told = select(event.c.run, func.max(event.c.step), func.max(event.c.epoch)).join(run, present).group_by(event.c.run)
    same = (chunk.c.run == run.c.name) & (chunk.c.generation == run.c.generation)
    logged = select(chunk.c.run, func.max(chunk.c.last_step)).join(run, same).group_by(chunk.c.run)
    with store.read() as connection:
        steps = {row[0]: row[1] for row in connection.execute(logged)}
        found = {row[0]: (max(row[1] or 0, steps.get(row[0], 0)), row[2] or 0) for row in connection.execute(told)}
    for session in sessions(store):
        if session.run in found:
            step, epoch = found[session.run]
            found[session.run] = (
                (max(step, session.step), max(epoch, session.epoch)) if session.ended else (step, epoch)
            )
    return found


def configs(store: Store) -> dict[str, dict[str, Any]]:
    """For every run, the settings of the newest session that has been on it."""
    by_id = {row.id: row.config for row in sessions(store)}
    last = {row.run: row.id for row in sessions(store)}
    return {run: by_id[id] for run, id in {**last, **trainers(store)}.items() if id in by_id}


def scans(store: Store, *, run: str | None = None, checkpoint: str | None = None) -> list[ScanRow]:
    """Scans, oldest first: of a run, of a state."""
    table = schema.scan
    wanted = select(table).order_by(table.c.id)
    for column, value in ((table.c.run, run), (table.c.checkpoint, checkpoint)):
        if value is not None:
            wanted = wanted.where(column == value)
    with store.read() as connection:
        rows = connection.execute(wanted).mappings().all()
    return [ScanRow(**{**row, "path": store.full_path(row["path"])}) for row in rows]


def newest_checkpoint(store: Store, run: str) -> CheckpointRow | None:
    """The live checkpoint of a run that was captured last."""
    found = checkpoints(store, run)
    return found[-1] if found else None


def events(
    store: Store,
    run: str | None = None,
    *,
    generation: int | None = None,
    session: int | None = None,
    after: tuple[int, int] | None = None,
    kinds: Collection[str] | None = None,
    limit: int | None = None,
) -> list[EventRow]:
    """Events in their order, from behind the one with (session, seq) `after`."""
    table = schema.event
    wanted = select(table).order_by(table.c.session, table.c.seq).limit(limit)
    for column, value in ((table.c.run, run), (table.c.generation, generation), (table.c.session, session)):
        if value is not None:
            wanted = wanted.where(column == value)
    if after is not None:
        wanted = wanted.where(tuple_(table.c.session, table.c.seq) > after)
    if kinds is not None:
        wanted = wanted.where(table.c.kind.in_(kinds))
    with store.read() as connection:
        return [EventRow(**row) for row in connection.execute(wanted).mappings()]


def command(store: Store, id: str) -> CommandRow | None:
    with store.read() as connection:
        row = connection.execute(select(schema.command).where(schema.command.c.id == id)).mappings().one_or_none()
    return CommandRow(**row) if row else None


def reports(
    store: Store,
    *,
    run: str | None = None,
    kind: str | None = None,
    before: int | None = None,
    limit: int | None = None,
) -> list[CommandRow]:
    """Commands that were answered with a report, the newest first; `before` is the number of one."""
    table = schema.command
    wanted = select(table).where(table.c.kind == "report", table.c.status == "done", table.c.result.is_not(None))
    if run is not None:
        wanted = wanted.where(table.c.result["run"].as_string() == run)
    if kind is not None:
        wanted = wanted.where(table.c.result["kind"].as_string() == kind)
    if before is not None:
        wanted = wanted.where(table.c.number < before)
    with store.read() as connection:
        rows = connection.execute(wanted.order_by(table.c.number.desc()).limit(limit)).mappings()
        return [CommandRow(**row) for row in rows]


def metric_names(store: Store, run: str) -> list[str]:
    """The metrics that a run has points of."""
    name = schema.metric_chunk.c.name
    with store.read() as connection:
        return list(connection.scalars(select(name).distinct().where(schema.metric_chunk.c.run == run).order_by(name)))


def series(store: Store, run: str, name: str, generation: int | None = None, resolution: int = 1) -> Series:
    """The points of one metric of a run.

    By default those of its trajectory as it now stands: a generation hides what older ones have after the
    step that it began from. With `generation`, all of that one. At a `resolution` of `points.RESOLUTIONS` only the lowest and the
    highest of each so many consecutive points.
    """
    from onthefly.store import points  # brings NumPy, which a list of rows does without

    if resolution not in (1, *points.RESOLUTIONS):
        raise ValueError(f"resolution is one of {(1, *points.RESOLUTIONS)}, not {resolution}")
    table = schema.metric_chunk
    of_series = [table.c.run == run, table.c.name == name]
    with store.read() as connection:
        shown: dict[int, int | None] = {} if generation is None else {generation: None}
        if generation is None:
            there = connection.scalars(select(table.c.generation).distinct().where(*of_series))
            shown = _shown_to(connection, run, sorted(there))
        parts = [
            _points(connection, [*of_series, table.c.generation == number], last, resolution)
            for number, last in shown.items()
        ]
    return _series(points.join(parts))


def recorded(store: Store, run: str, generation: int, name: str, after_step: int) -> Series:
    """The points of one generation after a step, to compare a replay with."""
    from onthefly.store import points

    table = schema.metric_chunk
    wanted = select(*_POINTS).where(
        table.c.run == run, table.c.generation == generation, table.c.name == name, table.c.last_step > after_step
    )
    with store.read() as connection:
        found = points.join([points.unpacked(*row) for row in connection.execute(wanted.order_by(table.c.id))])
    return _series(found[found["step"] > after_step])


_POINTS = [schema.metric_chunk.c[name] for name in ("steps", "values", "times")]
_SESSION = [schema.session.c[name] for name in SessionRow.__dataclass_fields__]


def _runs(store: Store, connection: Connection, wanted: Select[Any]) -> list[RunRow]:
    table = schema.run_parent
    parents: dict[str, list[tuple[str, str]]] = {}
    for row in connection.execute(select(table).order_by(table.c.run, table.c.position)):
        parents.setdefault(row.run, []).append((row.parent, row.hash))
    rows = connection.execute(wanted).mappings().all()
    return [
        RunRow(**{**row, "base": _located(store, row["base"])}, parents=tuple(parents.get(row["name"], ())))
        for row in rows
    ]


def _located(store: Store, base: dict[str, Any] | None) -> dict[str, Any] | None:
    return base if base is None else {**base, "path": str(store.full_path(base["path"]))}


def _checkpoint(store: Store, row: RowMapping) -> CheckpointRow:
    return CheckpointRow(**{**row, "path": store.full_path(row["path"])})


def _shown_to(connection: Connection, run: str, generations: list[int]) -> dict[int, int | None]:
    """For each generation, the last step that no newer one hides, or None."""
    table = schema.event
    begun = connection.execute(
        select(table.c.generation, table.c.data).where(table.c.run == run, table.c.kind == "generation")
    )
    starts = [(number, int(data["from"])) for number, data in begun]
    return {g: min((step for number, step in starts if number > g), default=None) for g in generations}


def _points(connection: Connection, of_series: list[Any], last: int | None, resolution: int) -> Points:
    """The points of one generation of a series, in their order, up to and with the step `last`."""
    import numpy as np

    from onthefly.store import points

    table = schema.metric_chunk
    rollup = table.c[f"rollup_{resolution}"] if resolution > 1 else None
    parts: list[Points] = []
    whole = []
    if rollup is not None:
        # Full chunks come first in a series. Those that a newer generation cuts are read whole, like the rest.
        whole = [*of_series, rollup.is_not(None)]
        if last is not None:
            whole.append(table.c.last_step <= last)
        blobs = connection.scalars(select(rollup).where(*whole).order_by(table.c.id))
        parts = [np.frombuffer(blob, points.POINT) for blob in blobs]
        of_series = [*of_series, table.c.id.not_in(select(table.c.id).where(*whole))]
    if last is not None:
        of_series = [*of_series, table.c.first_step <= last]
    rows = connection.execute(select(*_POINTS).where(*of_series).order_by(table.c.id))
    rest = points.join([points.unpacked(*row) for row in rows])
    if last is not None:
        rest = rest[rest["step"] <= last]
    return points.join([*parts, points.extremes(rest, resolution) if resolution > 1 else rest])


def _series(found: Points) -> Series:
    # Steps that were done again and came out differently stand behind those of before.
    found = found[found["step"].argsort(kind="stable")]
    return Series(found["step"].copy(), found["value"].copy(), found["time"].copy())
