"""What a chart reads from a store: how many points its series have, and a stretch of them at a resolution.

It is apart from `queries.series` because a page asks for hundreds of series at once: those of one run are read by one statement.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from sqlalchemy import and_, case, func, null, or_, select

from onthefly.store import points, queries, schema
from onthefly.store.points import Points

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


def extents(store: Store, runs: Collection[str] | None = None) -> dict[tuple[str, str], Extent]:
    """The extent of every series of some runs, or of all, by run and name. It reads an index alone."""
    table = schema.metric_chunk
    wanted = select(table.c.run, table.c.name, table.c.generation, func.sum(table.c.count), func.max(table.c.id))
    wanted = wanted.group_by(table.c.run, table.c.generation, table.c.name)
    if runs is not None:
        wanted = wanted.where(table.c.run.in_(sorted(runs)))
    now = select(schema.run.c.name, schema.run.c.generation)
    found: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
    with store.read() as connection:
        for run, name, generation, count, newest in connection.execute(wanted):
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
    run: str,
    names: Collection[str],
    *,
    generations: Collection[int],
    resolution: int = 1,
    first: int | None = None,
    last: int | None = None,
) -> dict[str, Series]:
    """Some metrics of a run, between two steps, at a resolution as in `queries.series`. What there is not is not in the answer.

    `generations` are those that have points of them. A run that was reset is read series by series: one generation hides
    parts of another.
    """
    if len(set(generations)) > 1:
        whole = {name: queries.series(store, run, name, resolution=resolution) for name in names}
        return {name: _between(series, first, last) for name, series in whole.items()}
    table = schema.metric_chunk
    rollup = table.c[f"rollup_{resolution}"] if resolution > 1 else null()
    columns = [case((rollup.is_(None), table.c[name])) for name in ("steps", "values", "times")]
    place = []
    if first is not None:
        place.append(table.c.last_step >= first)
    if last is not None:
        place.append(table.c.first_step <= last)
    parts: dict[str, list[Points]] = {}
    rest: dict[str, list[Points]] = {}
    ordered = sorted(names)
    with store.read() as connection:
        for start in range(0, len(ordered), _SOME):
            of_run = and_(table.c.run == run, table.c.name.in_(ordered[start : start + _SOME]), *place)
            present = or_(*(table.c.generation == number for number in generations))
            wanted = select(table.c.name, rollup, *columns).where(of_run, present).order_by(table.c.id)
            for name, rolled, steps, values, times in connection.execute(wanted):
                if rolled is not None:
                    parts.setdefault(name, []).append(np.frombuffer(rolled, points.POINT))
                else:
                    rest.setdefault(name, []).append(points.unpacked(steps, values, times))
    found = {}
    for name in {*parts, *rest}:
        fine = points.join(rest.get(name, []))
        if resolution > 1 and len(fine):
            fine = points.extremes(fine, resolution)
        joined = points.join([*parts.get(name, []), fine])
        steps = np.ascontiguousarray(joined["step"])
        order = steps.argsort(kind="stable") if np.any(steps[1:] < steps[:-1]) else slice(None)
        series = queries.Series(
            steps[order], np.ascontiguousarray(joined["value"])[order], np.ascontiguousarray(joined["time"])[order]
        )
        found[name] = _between(series, first, last)
    return found


def _between(series: Series, first: int | None, last: int | None) -> Series:
    """The points between two steps, and one more at each end, so that a line goes on to the edge of the picture."""
    if first is None and last is None:
        return series
    low = 0 if first is None else max(0, int(np.searchsorted(series.steps, first, "left")) - 1)
    high = len(series.steps) if last is None else int(np.searchsorted(series.steps, last, "right")) + 1
    return queries.Series(series.steps[low:high], series.values[low:high], series.times[low:high])
