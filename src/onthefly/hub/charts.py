"""Few points of many: the series of a chart, at about two points a pixel. Only `Charts` reads a store; the rest takes arrays."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tsdownsample import MinMaxLTTBDownsampler

from onthefly.hub import epochs
from onthefly.hub.epochs import Epochs
from onthefly.runs.lineage import Lineage
from onthefly.store import charts, queries
from onthefly.store.charts import Extent
from onthefly.store.points import RESOLUTIONS
from onthefly.store.queries import Series

if TYPE_CHECKING:
    from onthefly.client import Client

X = Literal["step", "epoch", "time", "relative"]
Pair = tuple[str, str]
"""A run and a metric."""

_CACHED = 64 << 20  # bytes
_STRANGE = 1000  # values that are not numbers, of one series, that are shown


@dataclass(frozen=True)
class Question:
    """What a chart asks for; see docs/api.md, `/series`."""

    series: tuple[Pair, ...]
    points: int = 2000
    x: X = "step"
    low: float | None = None
    high: float | None = None
    grid: bool = True
    joined: bool = False


@dataclass(frozen=True, eq=False)
class Drawn:
    """The columns of a chart, and what they are. `version` is another one when they might be others."""

    columns: Mapping[str, np.ndarray]
    series: list[dict[str, Any]]
    version: str

    @property
    def size(self) -> int:
        return sum(column.nbytes for column in self.columns.values())


@dataclass(frozen=True)
class _Stretch:
    """Steps of one run on the line that leads to another's head."""

    run: str
    after: int | None
    last: int | None


@dataclass(frozen=True)
class About:
    """What a chart is made from, as it is now. `version` is another one when that is. `epochs` are there if x needs them."""

    paths: Mapping[str, tuple[_Stretch, ...]]
    extents: Mapping[Pair, Extent]
    epochs: Mapping[str, Epochs]
    version: str


@dataclass(frozen=True)
class _Reading:
    """How a series is read."""

    resolution: int
    generations: tuple[int, ...]
    first: int | None
    last: int | None


@dataclass(frozen=True)
class _Places:
    """What the x of a run's points is: their step, epoch, or time since `begin`."""

    x: X
    epochs: Epochs = Epochs()  # noqa: RUF009  it is a value
    begin: float = 0.0

    def of(self, series: Series) -> np.ndarray:
        """x of each point; NaN where the epoch is not known."""
        match self.x:
            case "step":
                return series.steps.astype(np.float64)
            case "epoch":
                return self.epochs.at(series.steps)
            case _:
                return series.times - self.begin


class Charts:
    """Answers questions about the series of one store. What it has drawn it keeps, so that it is made once for all pages.

    Threads may share it.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._drawn: OrderedDict[Question, Drawn] = OrderedDict()
        self._size = 0
        self._epochs: tuple[object, Mapping[str, Epochs]] | None = None
        self._lock = threading.Lock()  # guards the three above

    def warm(self) -> None:
        """Make ready what the first chart would otherwise wait for: a connection, and the statements. Raises `StoreError`."""
        self.look([Question((("", ""),))])
        for resolution in (1, *RESOLUTIONS):
            charts.read(self._client.store, [""], [""], generations=[0], resolution=resolution, timed=False)

    def look(self, questions: Sequence[Question]) -> list[About]:
        """What each chart would be made from now, at the price of a look at an index for all of them."""
        runs = {run for question in questions for run, _ in question.series}
        joined = self._paths(runs) if any(question.joined for question in questions) else {}
        involved = runs | {stretch.run for path in joined.values() for stretch in path}
        names = {name for question in questions for _, name in question.series}
        extents = charts.extents(self._client.store, involved, names)
        by_run = self.epochs() if any(question.x == "epoch" for question in questions) else {}
        return [self._about(question, joined if question.joined else {}, extents, by_run) for question in questions]

    def draw(self, question: Question, about: About | None = None) -> Drawn:
        """The chart as it is now, or as `look` has found it."""
        about = about or self.look([question])[0]
        with self._lock:
            kept = self._drawn.get(question)
            if kept is not None and kept.version == about.version:
                self._drawn.move_to_end(question)
                return kept
        made = self._make(question, about)
        with self._lock:
            old = self._drawn.pop(question, None)
            self._size += made.size - (old.size if old is not None else 0)
            self._drawn[question] = made
            while self._size > _CACHED and len(self._drawn) > 1:
                self._size -= self._drawn.popitem(last=False)[1].size
        return made

    def epochs(self) -> Mapping[str, Epochs]:
        """For every run, the epochs of the line of steps that led to its head."""
        at = charts.positions(self._client.store)
        with self._lock:
            if self._epochs is not None and self._epochs[0] == at:
                return self._epochs[1]
        lineage = Lineage(self._client.runs())
        begins = charts.epoch_begins(self._client.store)
        found = {name: epochs.along(lineage.path(name), begins) for name in lineage.names}
        with self._lock:
            self._epochs = (at, found)
        return found

    def _paths(self, runs: Set[str]) -> dict[str, tuple[_Stretch, ...]]:
        """For each of the runs that there are, the line that leads to its head."""
        rows = self._client.runs()
        lineage, known = Lineage(rows), {row.name for row in rows}
        return {
            run: tuple(
                _Stretch(s.run, s.first_step if s.first_step >= 0 else None, s.last_step) for s in lineage.path(run)
            )
            for run in runs & known
        }

    def _about(
        self,
        question: Question,
        joined: Mapping[str, tuple[_Stretch, ...]],
        extents: Mapping[Pair, Extent],
        by_run: Mapping[str, Epochs],
    ) -> About:
        paths = {run: joined.get(run, (_Stretch(run, None, None),)) for run, _ in question.series}
        said = []
        for run, name in question.series:
            if question.x == "epoch" and run in by_run:
                said.append(by_run[run].version)
            for stretch in paths[run]:
                extent = extents.get((stretch.run, name))
                said.append(extent.version if extent is not None else "")
        return About(paths, extents, by_run, ",".join(said))

    def _make(self, question: Question, about: About) -> Drawn:
        places = self._places(question, about)
        read = self._read(question, about, places)
        found = [read.get(pair, (_EMPTY, 1)) for pair in question.series]
        lines = [
            _line(series, question, places[run]) for (run, _), (series, _) in zip(question.series, found, strict=True)
        ]
        columns = gridded(lines, question) if question.grid else apart(lines, question.points)
        told = []
        for (run, name), (_, resolution) in zip(question.series, found, strict=True):
            there = [e for s in about.paths[run] if (e := about.extents.get((s.run, name))) is not None]
            points, version = sum(e.points for e in there), ",".join(e.version for e in there)
            told.append({"run": run, "name": name, "points": points, "resolution": resolution, "version": version})
        return Drawn(columns, told, about.version)

    def _places(self, question: Question, about: About) -> dict[str, _Places]:
        """For each run, what its points' x is. `relative` counts from when the first run on a line was made."""
        if question.x != "relative":
            return {run: _Places(question.x, about.epochs.get(run, Epochs())) for run in about.paths}
        created = {row.name: row.created for row in self._client.runs()}
        return {run: _Places("time", begin=created.get(path[0].run, 0.0)) for run, path in about.paths.items()}

    def _read(
        self,
        question: Question,
        about: About,
        places: Mapping[str, _Places],
    ) -> dict[Pair, tuple[Series, int]]:
        """Every series that is asked for, fine enough for its chart, and at which resolution it was read."""
        parts: dict[Pair, list[tuple[Series, int]]] = {}
        heads: dict[str, int] = {}
        if question.low is not None or question.high is not None or question.joined:
            for (run, _), (_, _, last) in charts.spans(self._client.store).items():
                heads[run] = max(heads.get(run, 1), last)
        wanted: dict[str, list[str]] = {}
        for run, name in question.series:
            wanted.setdefault(run, []).append(name)
        readings: dict[_Reading, dict[str, set[str]]] = {}
        pieces: list[tuple[Pair, _Stretch, _Reading]] = []
        for run, names in wanted.items():
            for stretch in about.paths[run]:
                there = {
                    name: extent for name in names if (extent := about.extents.get((stretch.run, name))) is not None
                }
                if not there:
                    continue
                low, high = self._bounds(question, stretch, there, places[run])
                share = _share(heads.get(stretch.run, 1), low, high)
                for name, extent in there.items():
                    resolution = coarseness(int(extent.points * share), question.points)
                    # Few points are read all, so that a line goes on to the edges of the picture however far the next one is.
                    edges = (low, high) if extent.points > question.points else (None, None)
                    reading = _Reading(resolution, extent.generations, *edges)
                    readings.setdefault(reading, {}).setdefault(name, set()).add(stretch.run)
                    pieces.append(((run, name), stretch, reading))
        timed = question.x in ("time", "relative")
        got = {reading: self._all(reading, by_name, timed) for reading, by_name in readings.items()}
        for (run, name), stretch, reading in pieces:
            series = got[reading].get((stretch.run, name))
            if series is not None:
                parts.setdefault((run, name), []).append((_cut(series, stretch), reading.resolution))
        return {
            pair: (_joined([series for series, _ in found]), max(resolution for _, resolution in found))
            for pair, found in parts.items()
        }

    def _all(self, reading: _Reading, by_name: Mapping[str, set[str]], timed: bool = True) -> dict[Pair, Series]:
        """Series that are read in the same way; metrics of the same runs by one statement."""
        together: dict[frozenset[str], list[str]] = {}
        for name, runs in by_name.items():
            together.setdefault(frozenset(runs), []).append(name)
        found: dict[Pair, Series] = {}
        for of, names in together.items():
            found |= charts.read(
                self._client.store,
                of,
                names,
                generations=reading.generations,
                resolution=reading.resolution,
                first=reading.first,
                last=reading.last,
                timed=timed,
            )
        return found

    def _bounds(
        self, question: Question, stretch: _Stretch, there: Mapping[str, Extent], places: _Places
    ) -> tuple[int | None, int | None]:
        """The steps between which a run is read. Those of a time are found in a coarse copy of its longest series."""
        low, high = question.low, question.high
        if question.x == "epoch":
            low, high = places.epochs.steps(low, high)
        elif question.x != "step" and (low is not None or high is not None):
            name = max(there, key=lambda name: there[name].points)
            coarse = coarseness(there[name].points, question.points)
            reading = _Reading(coarse, there[name].generations, None, None)
            probe = self._all(reading, {name: {stretch.run}})[stretch.run, name]
            x, steps = places.of(probe), probe.steps
            before = np.flatnonzero(x < low) if low is not None else np.empty(0, np.int64)
            behind = np.flatnonzero(x > high) if high is not None else np.empty(0, np.int64)
            low = float(steps[before[-1]]) if len(before) else None
            high = float(steps[behind[0]]) if len(behind) else None
        lows = [int(np.floor(edge)) for edge in (low, stretch.after) if edge is not None]
        highs = [int(np.ceil(edge)) for edge in (high, stretch.last) if edge is not None]
        return max(lows, default=None), min(highs, default=None)


def _share(head: int, low: int | None, high: int | None) -> float:
    """Which part of a run's points lies between two steps, about."""
    if low is None and high is None:
        return 1.0
    return min(1.0, max(0.0, (head if high is None else min(high, head)) - max(low or 0, 0)) / head)


_EMPTY = Series(np.empty(0, np.int64), np.empty(0), np.empty(0))


def coarseness(stored: int, points: int) -> int:
    """The coarsest resolution that still gives a chart as many points as it shows: two of each so many are left."""
    return max((r for r in RESOLUTIONS if 2 * stored // r >= points), default=1)


def gridded(lines: Sequence[tuple[np.ndarray, np.ndarray]], question: Question) -> dict[str, np.ndarray]:
    """One x column for all lines: every x that occurs when they are few, otherwise buckets with two places each."""
    longest = max((len(x) for x, _ in lines), default=0)
    every = _sorted_once(np.concatenate([x for x, _ in lines])) if longest <= question.points else None
    if every is not None and len(every) <= question.points:
        columns = {"x": every.astype(np.float64)}
        for number, (x, y) in enumerate(lines):
            column = np.full(len(every), np.nan)
            column[np.searchsorted(every, x)] = y
            columns[str(number)] = column
        return columns
    count = question.points // 2
    low = min(float(x[0]) for x, _ in lines if len(x))
    high = max(float(x[-1]) for x, _ in lines if len(x))
    if high == low:  # all lie at one place, such as behind the last epoch that is known: buckets need a width
        high = low + max(1.0, abs(low) * 1e-9)
    columns = {"x": low + (high - low) * (np.arange(2 * count) + 0.5) / (2 * count)}
    for number, (x, y) in enumerate(lines):
        columns[str(number)] = bucketed(x, y, low, high, count)
    return columns


def bucketed(x: np.ndarray, y: np.ndarray, low: float, high: float, count: int) -> np.ndarray:
    """For each bucket of x, which is sorted, the first and the second of its lowest and highest value: [2 * count], NaN where
    there is nothing."""
    found = np.full(2 * count, np.nan)
    there = ~np.isnan(y)
    x, y = x[there], y[there]
    if not len(x):
        return found
    bucket = np.minimum(((x - low) * (count / (high - low))).astype(np.int64), count - 1)
    starts = np.flatnonzero(np.concatenate(([True], bucket[1:] != bucket[:-1])))
    lengths = np.diff(np.append(starts, len(x)))
    lowest, highest = np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
    first_low = _first(y == np.repeat(lowest, lengths), starts)
    first_high = _first(y == np.repeat(highest, lengths), starts)
    falling = first_high < first_low
    at = bucket[starts]
    found[2 * at] = np.where(falling, highest, lowest)
    found[2 * at + 1] = np.where(falling, lowest, highest)
    return found


def apart(lines: Sequence[tuple[np.ndarray, np.ndarray]], points: int) -> dict[str, np.ndarray]:
    """Each line with an x column of its own."""
    columns = {}
    for number, (x, y) in enumerate(lines):
        kept = downsampled(x, y, points)
        columns[f"{number}.x"], columns[f"{number}.y"] = x[kept], y[kept]
    return columns


def downsampled(x: np.ndarray, y: np.ndarray, points: int) -> np.ndarray:
    """The places of at most so many points that look like all, x being sorted; and of some that are not finite."""
    if len(x) <= points:
        return np.arange(len(x))
    good = np.flatnonzero(np.isfinite(y))
    strange = np.flatnonzero(~np.isfinite(y))
    kept = good
    if len(good) > points:
        # It panics if all x but the ends are one; then points are told apart by their number.
        by = (x[good],) if x[good[1]] != x[good[-2]] else ()
        kept = good[
            MinMaxLTTBDownsampler().downsample(  # type: ignore[no-untyped-call]
                *by, y[good], n_out=points
            )
        ]
    return np.union1d(kept, strange[:: max(1, len(strange) // _STRANGE)])


def _sorted_once(values: np.ndarray) -> np.ndarray:
    """As `np.unique`, which would first load what a hub never needs."""
    values = np.sort(values)
    found: np.ndarray = values[np.append(True, values[1:] != values[:-1])] if len(values) else values
    return found


def _first(where: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """In each of the groups that begin at `starts`, the first place that is true; there is one."""
    places = np.flatnonzero(where)
    found: np.ndarray = places[np.searchsorted(places, starts)]
    return found


def _line(series: Series, question: Question, places: _Places) -> tuple[np.ndarray, np.ndarray]:
    """x and y, sorted by x, without what lies outside, but for one point at each end. Of equal x the last one counts."""
    x, y = places.of(series), series.values
    if len(x) and np.isnan(x[0]):  # of a run whose epochs are not known
        return _EMPTY.values, _EMPTY.values
    if np.any(x[1:] < x[:-1]):
        order = x.argsort(kind="stable")
        x, y = x[order], y[order]
    low = 0 if question.low is None else max(0, int(np.searchsorted(x, question.low)) - 1)
    high = len(x) if question.high is None else int(np.searchsorted(x, question.high, "right")) + 1
    return x[low:high], y[low:high]


def _cut(series: Series, stretch: _Stretch) -> Series:
    """The points of one stretch alone: those at its edges belong to one run only."""
    keep = np.ones(len(series.steps), bool)
    if stretch.after is not None:
        keep &= series.steps > stretch.after
    if stretch.last is not None:
        keep &= series.steps <= stretch.last
    if keep.all():
        return series
    return queries.Series(series.steps[keep], series.values[keep], series.times[keep])


def _joined(parts: Sequence[Series]) -> Series:
    if len(parts) == 1:
        return parts[0]
    columns = [np.concatenate([getattr(part, name) for part in parts]) for name in ("steps", "values", "times")]
    return Series(*columns)
