"""Findings, and the report that holds them: as text that reads like a note to a colleague, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

KINDS = ("health", "numerics", "activations", "gradients", "determinism", "throughput", "distribution")
"""Every report."""

PARTS = KINDS[1:]
"""Those that `health` sums up."""

_SHOWN_IN_SUMMARY = 12  # findings: one screen
_LATEST = 5


class Severity(StrEnum):
    """How bad it is. A `note` is worth knowing; a `warning` costs quality or time; with an `error` the run is not what it is meant to be."""

    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"

    @property
    def rank(self) -> int:
        return list(Severity).index(self)


Evidence = Mapping[str, float | int | str]


@dataclass(frozen=True)
class Finding:
    """One thing that was found: what is wrong, where, since when, how that is known, and what to do."""

    report: str
    """The report that it belongs to: one of `PARTS`, or `health` for the course of the run as a whole."""
    severity: Severity
    what: str
    where: str = ""
    """A layer, a parameter, an input, an optimizer."""
    since: int | None = None
    """The first bad step."""
    before: bool = False
    """Whether it was so in the first step that was looked at: it began at `since` or earlier."""
    evidence: Evidence = field(default_factory=dict)
    advice: str = ""


Cell = float | int | str | None


@dataclass(frozen=True)
class Column:
    """One of a table's. `unit`: `s` for seconds, `share` for a part of 1, or nothing."""

    name: str
    unit: str = ""


@dataclass(frozen=True)
class Table:
    """What was measured of many layers, parameters or parts: what findings stand on, to be read or drawn.

    `drawn` says how: `log` and `bars` as a bar for the first number of a row, `parts` as parts of a whole, `range` from
    the first number to the second.
    """

    title: str
    columns: tuple[Column, ...]
    """The first one names the row."""
    rows: tuple[tuple[Cell, ...], ...]
    drawn: str = "bars"
    left_out: int = 0
    """Rows in the middle that are not here."""

    def at_most(self, rows: int) -> Table:
        """With the first and the last of so many rows."""
        if len(self.rows) <= rows:
            return self
        first = rows - rows // 2
        kept = (*self.rows[:first], *self.rows[len(self.rows) - rows // 2 :])
        return replace(self, rows=kept, left_out=self.left_out + len(self.rows) - len(kept))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Table:
        columns = tuple(Column(**column) for column in value["columns"])
        rows = tuple(tuple(row) for row in value["rows"])
        return cls(**{**value, "columns": columns, "rows": rows})


@dataclass(frozen=True)
class Report:
    """What was looked at, and what was found."""

    kind: str
    run: str
    generation: int
    step: int
    epoch: int
    live: bool
    """Whether it looked at a live session, or at what is recorded."""
    first_step: int | None = None
    last_step: int | None = None
    """The steps that were looked into; None where only recorded history was."""
    checkpoint: str | None = None
    """The hash of the newest checkpoint then, and its step."""
    checkpoint_step: int | None = None
    findings: tuple[Finding, ...] = ()
    facts: tuple[str, ...] = ()
    """What was measured, in words, whether or not anything is wrong."""
    missing: tuple[str, ...] = ()
    """What could not be looked at, and why."""
    latest: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    """The last logged values: name to (step, value)."""
    tables: tuple[Table, ...] = ()
    """What was measured, by layer, parameter or part."""

    @property
    def worst(self) -> Severity | None:
        return max((f.severity for f in self.findings), key=lambda s: s.rank, default=None)

    def of(self, part: str) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.report == part)

    def to_json(self) -> dict[str, Any]:
        """In JSON's types. What is not finite becomes text."""
        return {**_plain(asdict(self)), "worst": self.worst}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Report:
        """What `to_json` gave."""
        known = {name: value[name] for name in cls.__dataclass_fields__ if name in value}
        findings = tuple(Finding(**{**one, "severity": Severity(one["severity"])}) for one in value.get("findings", ()))
        latest = {
            name: tuple((int(s), float(v)) for s, v in points) for name, points in value.get("latest", {}).items()
        }
        texts = {name: tuple(value.get(name, ())) for name in ("facts", "missing")}
        tables = tuple(map(Table.from_json, value.get("tables", ())))
        return cls(**{**known, "findings": findings, "latest": latest, "tables": tables, **texts})

    def with_more(
        self,
        findings: Iterable[Finding] = (),
        facts: Iterable[str] = (),
        missing: Iterable[str] = (),
        latest: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    ) -> Report:
        """This report with what was found elsewhere, the worst first."""
        return replace(
            self,
            findings=in_order((*self.findings, *findings)),
            facts=(*self.facts, *facts),
            missing=(*self.missing, *missing),
            latest=self.latest if latest is None else latest,
        )


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The worst first; among equals, what began first. The same thing is not said twice."""
    unique = {(f.report, f.what, f.where): f for f in findings}
    return tuple(sorted(unique.values(), key=lambda f: (-f.severity.rank, math.inf if f.since is None else f.since)))


# -- as text -------------------------------------------------------------------------------------------------------

Line = tuple[str, str]
"""A style (`title`, `dim`, `plain`, or a severity) and a line of text."""


def lines(report: Report) -> list[Line]:
    """The page, line by line."""
    found: list[Line] = [("title", f"{report.kind}: {report.run}, {_where(report)}")]
    if report.checkpoint is not None:
        at = "" if report.checkpoint_step is None else f" of step {report.checkpoint_step}"
        found.append(("dim", f"newest checkpoint{at}: {report.checkpoint[:12]}"))
    for name, points in report.latest.items():
        words = ", ".join(f"{step}: {number(value)}" for step, value in points[-_LATEST:])
        found.append(("dim", f"latest {name}, by step: {words}"))
    found.append(("plain", ""))
    if report.kind == "health":
        found += _summary(report)
    elif report.findings or report.facts or not report.missing:
        found += _findings(report.findings)
    if report.facts:
        found += [("plain", ""), *(("plain", line) for line in report.facts)]
    if report.missing:
        found += [("plain", ""), *(("dim", f"not looked at: {reason}") for reason in report.missing)]
    return found


def text(report: Report) -> str:
    """The page without colours."""
    return "\n".join(line for _, line in lines(report))


def number(value: float | int | str) -> str:
    """Three digits: ``0.123``, ``1.2e-05``; whole numbers as they are."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def verdict(findings: Sequence[Finding]) -> str:
    """``1 error, 2 warnings``, or ``nothing wrong``."""
    counts = [(sum(f.severity == s for f in findings), s) for s in (Severity.ERROR, Severity.WARNING, Severity.NOTE)]
    words = [f"{n} {s}{'s' if n > 1 else ''}" for n, s in counts if n]
    return ", ".join(words) if words else "nothing wrong"


def _where(report: Report) -> str:
    if report.live and report.first_step is not None and report.last_step is not None:
        steps = report.last_step - report.first_step + 1
        looked = f"steps {report.first_step} to {report.last_step} ({steps} looked into)"
    else:
        looked = f"at step {report.step}" if report.live else f"as recorded up to step {report.step}"
    again = f", generation {report.generation}" if report.generation else ""
    return f"{looked}, epoch {report.epoch}{again}"


def _summary(report: Report) -> list[Line]:
    found: list[Line] = []
    for part in ("health", *PARTS):
        of_it = report.of(part)
        style = max((f.severity for f in of_it), key=lambda s: s.rank, default=None)
        found.append((style or "plain", f"{'course' if part == 'health' else part:<14}{verdict(of_it)}"))
    # Of the course of the run there is no report of its own: its notes are shown here.
    bad = [f for f in report.findings if f.severity != Severity.NOTE]
    own = [f for f in report.of("health") if f.severity == Severity.NOTE]
    if bad or own:
        found.append(("plain", ""))
        found += _findings([*bad[:_SHOWN_IN_SUMMARY], *own])
    if len(bad) > _SHOWN_IN_SUMMARY:
        found.append(("dim", f"and {len(bad) - _SHOWN_IN_SUMMARY} more: ask for a single report"))
    notes = len(report.findings) - len(bad) - len(own)
    if notes:
        found += [("plain", ""), ("dim", f"{notes} note{'s' if notes > 1 else ''}, in the single reports")]
    return found


def _findings(findings: Sequence[Finding]) -> list[Line]:
    if not findings:
        return [("plain", "nothing wrong was found")]
    found: list[Line] = []
    for f in findings:
        place = f"{f.where}: " if f.where else ""
        since = ""
        if f.since is not None:
            since = f", at or before step {f.since}" if f.before else f", since step {f.since}"
        found.append((f.severity, f"{f.severity}: {place}{f.what}{since}"))
        if f.evidence:
            found.append(("plain", "    " + ", ".join(f"{name} {number(value)}" for name, value in f.evidence.items())))
        if f.advice:
            found.append(("plain", f"    -> {f.advice}"))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
