"""Reports: those that sessions have made, and what is recorded of a run. Reading them asks no session and executes nothing."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query
from pydantic import Field

from onthefly.errors import UnknownReferenceError
from onthefly.health.findings import Report
from onthefly.hub.api.common import LARGEST, Here, RunName, View
from onthefly.reports import KeptReport
from onthefly.store import queries

router = APIRouter(prefix="/stores/{store}", tags=["reports"])

Kind = Literal["health", "numerics", "activations", "gradients", "determinism", "throughput", "distribution"]
Severity = Literal["note", "warning", "error"]


class FindingView(View):
    """One thing that was found. A number that is not finite is a text."""

    report: str
    severity: Severity
    what: str
    where: str
    since: int | None
    before: bool = Field(description="It was so in the first step that was looked at.")
    evidence: dict[str, int | float | str | None]
    advice: str


class ColumnView(View):
    name: str
    unit: str


class TableView(View):
    """What was measured by layer, parameter or part; the first column names the row."""

    title: str
    columns: list[ColumnView]
    rows: list[list[int | float | str | None]]
    drawn: str
    left_out: int


class ReportView(View):
    """What was looked at, and what was found, the worst first."""

    kind: str
    run: str
    generation: int
    step: int
    epoch: int
    live: bool
    first_step: int | None
    last_step: int | None
    checkpoint: str | None
    checkpoint_step: int | None
    findings: list[FindingView]
    facts: list[str]
    missing: list[str]
    latest: dict[str, list[tuple[int, float | str]]]
    tables: list[TableView]
    worst: Severity | None


class Counts(View):
    error: int
    warning: int
    note: int


class ReportHead(View):
    """A report that a session has made, without its evidence."""

    id: str
    number: int
    session: int
    time: float
    door: str | None
    asker: str | None
    kind: str
    run: str
    generation: int
    step: int
    epoch: int
    first_step: int | None
    last_step: int | None
    counts: Counts
    worst: Severity | None
    first: FindingView | None = Field(description="The worst finding.")


class SavedState(View):
    """A checkpoint that was saved for a double run: `POST /verify` from the first hash to the second one makes it."""

    hash: str
    step: int


class WholeReport(ReportHead):
    report: ReportView
    checkpoints: list[SavedState]


@router.get("/reports")
def get_reports(
    store: Here,
    run: Annotated[str | None, Query(max_length=100)] = None,
    kind: Kind | None = None,
    before: Annotated[int | None, Query(ge=0, le=LARGEST, description="Those with a lower number.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> list[ReportHead]:
    """Reports that sessions have made, the newest first, each with what the store had recorded of its run until then."""
    rows = queries.reports(store.client.store, run=run, kind=kind, before=before, limit=limit)
    return [ReportHead(**_head(kept)) for kept in store.reports(rows)]


@router.get("/reports/{report}")
def get_report(store: Here, report: Annotated[str, Path(max_length=100)]) -> WholeReport:
    """One of them, whole. Its id is that of the command that asked for it."""
    row = queries.command(store.client.store, report)
    if row is None or row.kind != "report" or row.status != "done" or row.result is None:
        raise UnknownReferenceError(f"there is no report {report!r}")
    (kept,) = store.reports([row])
    states = [SavedState(hash=str(one["hash"]), step=int(one["step"])) for one in kept.checkpoints]
    return WholeReport(**_head(kept), report=_view(kept.report), checkpoints=states)


@router.get("/runs/{run}/report")
def get_recorded(store: Here, run: RunName, kind: Kind = "health") -> ReportView:
    """What is recorded of a run, judged, with what its last live report of this kind saw. No session is asked."""
    return _view(store.client.recorded_report(kind, run))


def _view(report: Report) -> ReportView:
    return ReportView.model_validate(report.to_json())


def _head(kept: KeptReport) -> dict[str, Any]:
    report = kept.report
    own = {name: getattr(kept, name) for name in ("id", "number", "session", "time", "door", "asker")}
    where = ("kind", "run", "generation", "step", "epoch", "first_step", "last_step")
    severities = [finding.severity.value for finding in report.findings]
    view = _view(report)
    return {
        **own,
        **{name: getattr(report, name) for name in where},
        "counts": Counts(**{name: severities.count(name) for name in Counts.model_fields}),
        "worst": report.worst,
        "first": next(iter(view.findings), None),
    }
