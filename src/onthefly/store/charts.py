"""What a chart reads from a store: how many points its series have, and a stretch of them at a resolution.

It is apart from `queries.series` because a page asks for hundreds of series at once: those of one resolution are read by one statement.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from sqlalchemy import ColumnElement, Select, case, func, null, select

from onthefly.store import points, queries, schema

if TYPE_CHECKING:
    from onthefly.store.queries import Series
    from onthefly.store.store import Store

_SOME = 500  # names in one statement: SQLite takes at most 32,766 variables


@dataclass(frozen=True, slots=True)
class Extent:
    """How much there is of a series. `version` is another one whenever the series has changed."""

    points: int
    generations: tuple[int, ...]
    version: str


def extents(store: Store, runs: Collection[str], names: Collection[str]) -> dict[tuple[str, str], Extent]:
    """The extent of some metrics of some runs, by run and name. It reads an index alone."""
    table = schema.metric_chunk
    wanted = select(table.c.run, table.c.name, table.c.generation, func.sum(table.c.count), func.max(table.c.id))
    wanted = wanted.group_by(table.c.run, table.c.generation, table.c.name)
    now = select(schema.run.c.name, schema.run.c.generation)
    found: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
    with store.read() as connection:
        for some in _batches(sorted(runs)):
            for others in _batches(sorted(names)):
                these = wanted.where(table.c.run.in_(some), table.c.name.in_(others))
                for run, name, generation, count, newest in connection.execute(these):
                    found.setdefault((run, name), []).append((int(generation), int(count), int(newest)))
        standing: dict[str, int] = {row.name: row.generation for row in connection.execute(now)}
    return {
        key: Extent(
            points=sum(count for _, count, _ in rows),
            generations=tuple(generation for generation, _, _ in rows),
            version=".".join(map(str, (standing.get(key[0], 0), sum(r[1] for r in rows), max(r[2] for r in rows)))),
        )
        for key, rows in found.items()
    }


def spans(store: Store, run: str | None = None) -> dict[tuple[str, str], tuple[int, int, int]]:
    """For every series, its number of points, its first and its last step."""
    table = schema.metric_chunk
    measured = (func.sum(table.c.count), func.min(table.c.first_step), func.max(table.c.last_step))
    wanted = select(table.c.run, table.c.name, *measured).group_by(table.c.run, table.c.name)
    if run is not None:
        wanted = wanted.where(table.c.run == run)
    with store.read() as connection:
        return {(row[0], row[1]): (int(row[2]), int(row[3]), int(row[4])) for row in connection.execute(wanted)}


@dataclass(frozen=True, slots=True)
class EpochBegin:
    """The step that an epoch of a run began at, and of how many batches it and those after it are, if that is known."""

    step: int
    epoch: int
    batches: int | None


def epoch_begins(store: Store) -> dict[str, list[EpochBegin]]:
    """For every run, what its sessions have recorded of its epochs, in the order of steps, on its trajectory as it now stands.

    Of a run from before they recorded it, the checkpoints at ends of epochs tell where the next ones began.
    """
    table = schema.event
    wanted = select(table.c.run, table.c.generation, table.c.kind, table.c.step, table.c.epoch, table.c.data)
    wanted = wanted.where(table.c.run.in_(select(schema.run.c.name)))  # what leads SQLite to its index
    wanted = wanted.where(table.c.kind.in_(("epochLength", "generation")))
    with store.read() as connection:
        rows = connection.execute(wanted).all()
        names = set(connection.execute(select(schema.run.c.name)).scalars())
        older = sorted(names - {row.run for row in rows if row.kind == "epochLength"})
        ended = [row for some in _batches(older) for row in connection.execute(_epoch_checkpoints(some))]
    resets: dict[str, list[tuple[int, int]]] = {}
    for row in rows:
        if row.kind == "generation":
            resets.setdefault(row.run, []).append((row.generation, int(row.data["from"])))
    begins = [(row, row.data.get("batches")) for row in rows if row.kind == "epochLength"]
    found: dict[str, list[tuple[int, int, int, int | None]]] = {}
    for row, batches in [*begins, *((row, None) for row in ended)]:
        if not any(row.generation < newer and row.step > last for newer, last in resets.get(row.run, ())):
            found.setdefault(row.run, []).append((row.step, row.epoch, row.generation, batches))
    return {
        run: [EpochBegin(step, epoch, batches) for step, epoch, _, batches in sorted(of, key=lambda begin: begin[:3])]
        for run, of in found.items()
    }


def _epoch_checkpoints(runs: Sequence[str]) -> Select[Any]:
    """Checkpoints that were saved between two epochs, those that are gone from disk too. Others lie anywhere in an epoch."""
    table = schema.checkpoint
    wanted = select(table.c.run, table.c.generation, table.c.step, table.c.epoch)
    return wanted.where(table.c.run.in_(runs), table.c.reason == "epoch")


def positions(store: Store) -> tuple[tuple[int, int], ...]:
    """The number of the last event of every session that has any: another one whenever something has happened."""
    event, session = schema.event, schema.session
    newest = select(func.max(event.c.seq)).where(event.c.session == session.c.id).scalar_subquery()
    with store.read() as connection:
        rows = connection.execute(select(session.c.id, newest).order_by(session.c.id))
        return tuple((int(id), int(seq)) for id, seq in rows if seq is not None)


def last_values(store: Store, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """For every run, the last value of each of those metrics that it has."""
    table = schema.metric_chunk
    newest = (
        select(func.max(table.c.id))
        .where(table.c.name.in_(names))
        .group_by(table.c.run, table.c.generation, table.c.name)
    )
    wanted = (
        select(table.c.run, table.c.name, table.c["values"]).where(table.c.id.in_(newest)).order_by(table.c.generation)
    )
    found: dict[str, dict[str, float]] = {}
    with store.read() as connection:
        for run, name, values in connection.execute(wanted):
            found.setdefault(run, {})[name] = float(np.frombuffer(values, "<f8", 1, len(values) - 8)[0])
    return found


def read(
    store: Store,
    runs: Collection[str],
    names: Collection[str],
    *,
    generations: Collection[int],
    resolution: int = 1,
    first: int | None = None,
    last: int | None = None,
    timed: bool = True,
) -> dict[tuple[str, str], Series]:
    """Some metrics of some runs, between two steps, at a resolution as in `queries.series`. What there is not is not in the answer.

    Without `timed` times are not read, where that saves anything, and are NaN there.
    `generations` are those that have points of them. Runs that were reset are read series by series: one generation hides
    parts of another.
    """
    if len(set(generations)) > 1:
        whole = {(run, name): queries.series(store, run, name, resolution=resolution) for run in runs for name in names}
        return {key: _between(series, first, last) for key, series in whole.items()}
    rows: dict[tuple[str, str], list[Any]] = {}
    with store.read() as connection:
        for some in _batches(sorted(runs)):
            for others in _batches(sorted(names)):
                wanted = _wanted(some, others, generations, resolution, first, last, timed)
                for row in connection.execute(wanted).all():
                    rows.setdefault((row[0], row[1]), []).append(row[2:])
    return {key: _between(_series(found, resolution), first, last) for key, found in rows.items()}


def _wanted(
    runs: Sequence[str],
    names: Sequence[str],
    generations: Collection[int],
    resolution: int,
    first: int | None,
    last: int | None,
    timed: bool,
) -> Select[Any]:
    """Of each chunk its run, name, id, and its rollup or else its points. They come in any order: SQLite would sort blobs."""
    table = schema.metric_chunk
    columns: list[ColumnElement[Any]] = [table.c.steps, table.c["values"], table.c.times if timed else null()]
    rollup: ColumnElement[Any] = null()
    if resolution > 1:
        rollup = table.c[f"rollup_{resolution}"]
        columns = [case((rollup.is_(None), column)) for column in columns]
    wanted = select(table.c.run, table.c.name, table.c.id, rollup, *columns)
    wanted = wanted.where(table.c.run.in_(runs), table.c.name.in_(names), table.c.generation.in_(sorted(generations)))
    if first is not None:
        wanted = wanted.where(table.c.last_step >= first)
    if last is not None:
        wanted = wanted.where(table.c.first_step <= last)
    return wanted


def _series(rows: list[Any], resolution: int) -> Series:
    """The points of one series, from its chunks."""
    rows.sort(key=lambda row: row[0])
    coarse = np.frombuffer(b"".join(row[1] for row in rows if row[1] is not None), points.POINT)
    fine = [
        np.frombuffer(b"".join(row[place] for row in rows if row[place] is not None), kind)
        for place, kind in ((2, "<i8"), (3, "<f8"), (4, "<f8"))
    ]
    if len(fine[2]) < len(fine[1]):  # they were not read
        fine[2] = np.broadcast_to(np.nan, len(fine[1]))
    if resolution > 1 and len(fine[1]):
        places = points.extreme_places(fine[1], resolution)
        fine = [column[places] for column in fine]
    # Full chunks, which alone have rollups, come first in a series.
    steps, values, times = (
        np.concatenate((coarse[name], column)) for name, column in zip(("step", "value", "time"), fine, strict=True)
    )
    if np.any(steps[1:] < steps[:-1]):
        order = steps.argsort(kind="stable")
        steps, values, times = steps[order], values[order], times[order]
    return queries.Series(steps, values, times)


def _batches(names: Sequence[str]) -> Iterator[Sequence[str]]:
    return (names[start : start + _SOME] for start in range(0, len(names), _SOME))


def _between(series: Series, first: int | None, last: int | None) -> Series:
    """The points between two steps, and one more at each end, so that a line goes on to the edge of the picture."""
    if first is None and last is None:
        return series
    low = 0 if first is None else max(0, int(np.searchsorted(series.steps, first, "left")) - 1)
    high = len(series.steps) if last is None else int(np.searchsorted(series.steps, last, "right")) + 1
    return queries.Series(series.steps[low:high], series.values[low:high], series.times[low:high])
