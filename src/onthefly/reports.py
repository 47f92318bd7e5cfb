"""Reports as a door gives them: what a live session sees in its steps, with what the store has recorded. Loads no torch."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from onthefly.errors import (
    CheckpointError,
    InvalidCommandError,
    OnTheFlyError,
    ResumeError,
    UnknownReferenceError,
    said,
)
from onthefly.health import determinism, health, numerics
from onthefly.health.findings import KINDS, Finding, Report, Table, in_order, number
from onthefly.store import queries
from onthefly.store.queries import Series

if TYPE_CHECKING:
    from onthefly.client import Client
    from onthefly.store.queries import CommandRow, EventRow, RunRow, SessionRow

_MOST_POINTS = 20_000  # of a loss that are judged one by one: the last ones; the first bad one is found in all
_LATEST = 5
_SCALES = ("loss_scale", "scale", "health/loss_scale")
_SEEN_IN_STEPS = ("numerics", "activations", "gradients", "throughput", "distribution")
_PATIENCE = 10.0  # seconds for the session's checkpoints to come to the store


@dataclass(frozen=True)
class KeptReport:
    """A report that a session has made, with what the store tells of its run until then."""

    id: str
    """Of the command that asked for it."""
    number: int
    session: int
    time: float
    door: str | None
    asker: str | None
    report: Report
    checkpoints: tuple[Mapping[str, Any], ...] = ()
    """The two that were saved for a double run, each with its hash and step."""


@dataclass(frozen=True)
class _Past:
    """What is recorded of a run: its events, and every point of its losses."""

    events: Sequence[EventRow]
    series: Mapping[str, Series]

    def until(self, step: int, when: float) -> _Past:
        """What was recorded then."""
        series = {}
        for name, points in self.series.items():
            length = int(points.steps.searchsorted(step, "right"))
            if length:
                series[name] = Series(points.steps[:length], points.values[:length], points.times[:length])
        return _Past([event for event in self.events if event.time <= when], series)

    def losses(self) -> tuple[dict[str, list[tuple[int, float]]], list[float]]:
        """The last points of each loss as (step, value), with its first bad one, and when those of `loss` were logged."""
        import numpy as np

        losses: dict[str, list[tuple[int, float]]] = {}
        times: list[float] = []
        for name, points in self.series.items():
            first = np.flatnonzero(~np.isfinite(points.values))[:1]
            begin = max(len(points.values) - _MOST_POINTS, 0)
            kept = [*first[first < begin].tolist(), *range(begin, len(points.values))]
            losses[name] = [(int(points.steps[i]), float(points.values[i])) for i in kept]
            if name == "loss":
                times = points.times[begin:].tolist()
        return losses, times


@dataclass(frozen=True)
class _Recorded:
    """What the store tells of a run."""

    findings: Sequence[Finding]
    facts: Sequence[str]
    latest: Mapping[str, Sequence[tuple[int, float]]]


def report(client: Client, kind: str, run: str | None, *, steps: int, double_run: bool, timeout: float) -> Report:
    """See `Client.report`."""
    if kind not in KINDS:
        raise InvalidCommandError(f"there is no report {kind!r}; there are: {', '.join(KINDS)}")
    session = _live(client, run)
    if session is None:
        return _ended(client, kind, client.run(run) if run is not None else _newest(client))
    twice = double_run and kind == "determinism"
    answer = client.command("report", session.id, timeout=timeout, report=kind, steps=steps, double_run=twice)
    found = Report.from_json(answer)
    row = client.run(found.run)
    recorded = _recorded(client, kind, row, session)
    found = found.with_more(recorded.findings, recorded.facts, latest=recorded.latest)
    return _with_double_run(client, found, answer, timeout) if "checkpoints" in answer else found


def recorded(client: Client, kind: str, run: str | None) -> Report:
    """See `Client.recorded_report`."""
    if kind not in KINDS:
        raise InvalidCommandError(f"there is no report {kind!r}; there are: {', '.join(KINDS)}")
    return _ended(client, kind, client.run(run) if run is not None else _newest(client))


def kept(client: Client, rows: Sequence[CommandRow]) -> list[KeptReport]:
    """The reports that these commands were answered with: see `Client.reports`."""
    runs = {run.name: run for run in client.runs()}
    pasts: dict[str, _Past] = {}
    found = []
    for row in rows:
        answer = row.result or {}
        report = Report.from_json(answer)
        when = row.finished or row.created
        run = runs.get(report.run)
        if run is None or run.generation != report.generation:
            gone = "its run was reset since" if run is not None else "its run is not in this store"
            report = report.with_more(missing=[f"the course of the run: {gone}"])
        else:
            if run.name not in pasts:
                pasts[run.name] = _past(client, run)
            session = queries.session(client.store, row.session)
            then = _judged(report.kind, run, pasts[run.name].until(report.step, when), session)
            report = report.with_more(then.findings, then.facts, latest=then.latest)
        checkpoints = tuple(answer.get("checkpoints") or ())
        found.append(
            KeptReport(row.id, row.number, row.session, when, row.door, row.asker, report, checkpoints),
        )
    return found


def _live(client: Client, run: str | None) -> SessionRow | None:
    alive = client.sessions(alive=True)
    if run is None:
        return client.session() if alive else None
    client.run(run)
    return next((row for row in alive if row.run == run), None)


def _newest(client: Client) -> RunRow:
    rows = client.runs()
    if not rows:
        raise UnknownReferenceError("there is no run in this store to report on")
    trainers = queries.trainers(client.store)
    return max(rows, key=lambda row: trainers.get(row.name, 0))


def _ended(client: Client, kind: str, row: RunRow) -> Report:
    """A report on a run that no session is on: what is recorded, and what its last live report of that kind found."""
    session = queries.session(client.store, queries.trainers(client.store).get(row.name, 0))
    recorded = _recorded(client, kind, row, session)
    step, epoch = client.heads().get(row.name, (0, 0))
    saved = queries.newest_checkpoint(client.store, row.name)
    found = Report(
        kind=kind,
        run=row.name,
        generation=row.generation,
        step=step,
        epoch=epoch,
        live=False,
        checkpoint=saved.hash if saved is not None else None,
        checkpoint_step=saved.step if saved is not None else None,
        findings=in_order(recorded.findings),
        facts=tuple(recorded.facts),
        latest=recorded.latest,
    )
    needed = kind in _SEEN_IN_STEPS or kind == "health"
    last = next((e for e in reversed(client.events(row.name, kinds=["report"])) if e.data.get("kind") == kind), None)
    if last is not None:
        before = Report.from_json(last.data)
        looked = f"steps {before.first_step} to {before.last_step}" if before.last_step else f"step {before.step}"
        return replace(found, tables=_tables(client, before)).with_more(
            before.findings, [f"from its last live report, of {looked}:", *before.facts] if before.facts else []
        )
    if needed:
        return found.with_more(missing=[f"{_what(kind)}: seen only while a session trains, and none is on this run"])
    return found


def _tables(client: Client, before: Report) -> tuple[Table, ...]:
    """Those of a report whose event this is: the command's answer has them."""
    for row in queries.reports(client.store, run=before.run, kind=before.kind, limit=1):
        answer = Report.from_json(row.result or {})
        if (answer.generation, answer.step, answer.last_step) == (before.generation, before.step, before.last_step):
            return answer.tables
    return ()


def _what(kind: str) -> str:
    return "layers, gradients and the parts of a step" if kind == "health" else kind


# -- what is recorded ------------------------------------------------------------------------------------------


def _recorded(client: Client, kind: str, row: RunRow, session: SessionRow | None) -> _Recorded:
    past = _past(client, row)
    found = _judged(kind, row, past, session)
    if _is_alive(client, session):
        return found
    findings, facts = list(found.findings), list(found.facts)
    if kind in ("health", "numerics"):
        findings += numerics.judge(_scales(client, row.name))
    if kind == "determinism":
        facts += determinism.facts(_exactness(past.events, session, row.generation))
    return replace(found, findings=findings, facts=facts)


def _past(client: Client, row: RunRow) -> _Past:
    names = [name for name in client.metric_names(row.name) if name == "loss" or name.endswith("_loss")]
    return _Past(client.events(row.name), {name: client.series(row.name, name) for name in names})


def _judged(kind: str, row: RunRow, past: _Past, session: SessionRow | None) -> _Recorded:
    """What the past tells, besides what a session sees in its steps."""
    events, (losses, times) = past.events, past.losses()
    latest = {name: points[-_LATEST:] for name, points in losses.items() if points}
    findings: list[Finding] = []
    facts: list[str] = []
    course = health.judge(_course(row, events, losses, times))
    findings += [f for f in course if kind == "health" or f.report == kind]
    if kind == "numerics":  # a loss that broke says since when
        findings += [f for f in course if f.severity == "error" and "NaN" in f.what]
    if kind in ("health", "determinism"):
        findings += determinism.judge(_exactness(events, session, row.generation))
    if kind == "throughput" and len(times) > 1:
        gaps = sorted(after - before for before, after in itertools.pairwise(times) if after > before)
        if gaps:
            facts.append(f"between logged steps, as recorded: {number(gaps[len(gaps) // 2])} s in the median")
    return _Recorded(findings, facts, latest)


def _is_alive(client: Client, session: SessionRow | None) -> bool:
    return session is not None and session.ended is None and client.store.is_alive(session)


def _scales(client: Client, run: str) -> numerics.Numbers:
    """What the script, or a report, has logged of a gradient scaler's scale."""
    names = [name for name in _SCALES if name in client.metric_names(run)]
    points = client.series(run, names[0]) if names else None
    if points is None or not len(points.steps):
        return numerics.Numbers(0, 0)
    scales = list(zip(points.steps.tolist(), points.values.tolist(), strict=True))[-_MOST_POINTS:]
    return numerics.Numbers(scales[0][0], scales[-1][0], scales=scales)


def _course(
    row: RunRow,
    events: Sequence[EventRow],
    losses: Mapping[str, Sequence[tuple[int, float]]],
    times: Sequence[float],
) -> health.Numbers:
    own = [event for event in events if event.generation in (None, row.generation)]
    failed = [event for event in own if event.kind == "checkpointFailed"]
    saved = [event for event in own if event.kind == "checkpointSaved"]
    return health.Numbers(
        losses=losses,
        times=times,
        failed_saves=[(event.step or 0, str(event.data.get("message", ""))) for event in failed],
        saved_since=not failed or any((e.session, e.seq) > (failed[-1].session, failed[-1].seq) for e in saved),
        waited=[float(e.data.get("seconds") or 0) for e in own if e.kind == "checkpointWaited"],
        lost=sum(int(e.data.get("metrics") or 0) for e in own if e.kind == "lost"),
        outages=sum(event.kind == "storeUnavailable" for event in own),
    )


def _exactness(events: Sequence[EventRow], session: SessionRow | None, generation: int) -> determinism.Numbers:
    own = [event for event in events if event.generation in (None, generation)]
    return determinism.Numbers(
        environment=session.environment if session is not None else {},
        inexact=[str(reason) for reason in session.inexact] if session is not None else [],
        differences=[(e.step or 0, str(e.data.get("metric", ""))) for e in own if e.kind == "inexact"],
        changes=[(e.step or 0, e.data) for e in own if e.kind == "environmentChanged"],
    )


# -- the double run --------------------------------------------------------------------------------------------


def _with_double_run(client: Client, found: Report, answer: Mapping[str, Any], timeout: float) -> Report:
    """Train the steps between the two checkpoints that the session saved for it again, in a fresh process."""
    start, end = answer["checkpoints"]
    try:
        _await(client, found.run, [start["hash"], end["hash"]])
        proof = client.verify(start["hash"], end["hash"], timeout=timeout)
    except (ResumeError, CheckpointError, UnknownReferenceError) as e:
        return found.with_more(missing=[f"a double run: {_first_line(e)}"])
    run = determinism.DoubleRun(
        first_step=proof.start.step + 1,
        last_step=proof.end.step,
        equal=proof.equal,
        recorded=proof.recorded_hash,
        replayed=proof.replayed_hash,
        differences=proof.differences,
        causes=proof.causes,
    )
    return found.with_more(determinism.judge_double_run(run), determinism.double_run_facts(run))


def _await(client: Client, run: str, hashes: Sequence[str]) -> None:
    """A checkpoint is in its file before it is in the store."""
    deadline = time.monotonic() + _PATIENCE
    while not set(hashes) <= {row.hash for row in client.checkpoints(run)} and time.monotonic() < deadline:
        time.sleep(0.02)


def _first_line(e: OnTheFlyError) -> str:
    return said(e).splitlines()[0]
