"""`onthefly fsck`: whether everything that the store promises is there."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onthefly.cli import options, render
from onthefly.errors import CheckpointError

if TYPE_CHECKING:
    from onthefly.fsck import Finding, Progress, Report
    from onthefly.repairs import Repair


@click.command("fsck", short_help="Check every checkpoint, byte by byte.")
@click.option("--quick", is_flag=True, help="Read only the headers of checkpoints and what is new in journals.")
@click.option("--repair", "repairing", is_flag=True, help="Do what can be done without losing anything.")
@options.store
@options.as_json
def fsck_command(quick: bool, repairing: bool, store: Path | None, as_json: bool) -> None:
    """Check that every recorded checkpoint is there with the content that was recorded, and what else lies beside them.

    Each finding says what it is, what --repair does about it, or what you can do. --repair writes sidecars again, removes
    litter, and makes tombstones of rows whose file is lost; it never deletes or alters a checkpoint that may be needed, and it
    leaves runs that are being trained alone. The exit code is 4 while anything that was saved is lost or damaged.
    """
    with options.connect(store) as client:
        with _progress(as_json) as progress:
            report = client.fsck(full=not quick, progress=progress)
        if not as_json:
            _say(findings_text(report))
        repairs = client.repair(report) if repairing else ()
    remaining = _remaining(report, repairs)
    if as_json:
        errors, notes = _counts(remaining)
        done = {"repairs": repairs if repairing else None, "errors": errors, "notes": notes, "sound": not errors}
        click.echo(render.document({**render.jsonable(report), **render.jsonable(done)}))
    else:
        _say(repairs_text(report, repairs))
        click.echo(summary(report, remaining))
    if any(finding.severity == "error" for finding in remaining):
        click.get_current_context().exit(CheckpointError.exit_code)


def findings_text(report: Report) -> str:
    """Every finding: what and where it is, and what can be done about it."""
    lines = []
    for finding in report.findings:
        colour = "red" if finding.severity == "error" else "yellow"
        where = f"{finding.run}@{finding.step}" if finding.step is not None else finding.run or ""
        head = [click.style(finding.kind, fg=colour, bold=True), where, render.dim(near(finding.path, report.store))]
        lines += ["  ".join(word for word in head if word), f"    {finding.message}"]
        if finding.remedy is not None:
            lines.append(f"    --repair: {finding.remedy}")
        if finding.advice is not None:
            lines.append(f"    {render.dim(finding.advice)}")
    return "\n".join(lines)


def repairs_text(report: Report, repairs: Iterable[Repair]) -> str:
    """What became of each repair."""
    words = {True: click.style("repaired", fg="green"), False: click.style("not repaired", fg="red")}
    return "\n".join(
        f"{words[done.done]}  {done.finding.kind}  {render.dim(near(done.finding.path, report.store))}: {done.message}"
        for done in repairs
    )


def summary(report: Report, remaining: list[Finding]) -> str:
    """``12 checkpoints, 3.4 GB, every byte checked: all sound``."""
    errors, notes = _counts(remaining)
    how = "every byte checked" if report.full else "headers checked"
    verdict = click.style(_counted(errors, "error"), fg="red", bold=True) if errors else ""
    verdict = verdict or click.style("all sound", fg="green", bold=True)
    noted = f", {_counted(notes, 'note')}" if notes else ""
    given_up = sum(one.kind == "lost" for one in report.findings) - sum(one.kind == "lost" for one in remaining)
    return (
        f"{_counted(report.checkpoints - given_up, 'checkpoint')}, {render.size(report.size)}, {how}: {verdict}{noted}"
    )


def near(path: Path, store: Path) -> str:
    """A path as short as it can be: relative to the store, where it lies in it."""
    return str(path.relative_to(store)) if path.is_relative_to(store) else str(path)


def _remaining(report: Report, repairs: Iterable[Repair]) -> list[Finding]:
    done = {id(repair.finding) for repair in repairs if repair.done}
    return [finding for finding in report.findings if id(finding) not in done]


def _counts(findings: Iterable[Finding]) -> tuple[int, int]:
    found = [finding.severity for finding in findings]
    return found.count("error"), found.count("note")


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _say(text: str) -> None:
    if text:
        click.echo(text)


@contextmanager
def _progress(as_json: bool) -> Iterator[Progress | None]:
    """Shows which checkpoint is read, when somebody is there to see it."""
    if as_json or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    with Console(stderr=True).status("checking") as status:

        def show(path: Path, done: int, total: int) -> None:
            status.update(f"checking {path.name}, {render.size(done)} of {render.size(total)} done")

        yield show
