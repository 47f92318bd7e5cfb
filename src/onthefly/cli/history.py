"""Listings of what is recorded: checkpoints, and the history of events."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onthefly.cli import options, render
from onthefly.cli.render import Column

if TYPE_CHECKING:
    from onthefly.store.queries import CheckpointRow, EventRow

Reasons = Mapping[int, tuple[str, ...]]


@click.command("checkpoints", short_help="What was saved.")
@click.argument("run", required=False)
@click.option("--all", "evicted", is_flag=True, help="Also those that were removed, with the reason.")
@click.option("--why", is_flag=True, help="Also why each one is kept: newest, every K, best, pinned, origin, needed.")
@options.store
@options.as_json
def checkpoints_command(run: str | None, evicted: bool, why: bool, store: Path | None, as_json: bool) -> None:
    """Checkpoints, newest last: of RUN, or of all runs. The first column is a REF.

    With --why, one that is `needed` is what another run, or a generation, began from; the run's next save may remove one that
    has no reason.
    """
    with options.connect(store) as client:
        if run is not None:
            client.run(run)
        rows = client.checkpoints(run, evicted=evicted)
        kept = client.kept_because() if why else None
    if as_json:
        click.echo(render.document(rows if kept is None else [_with_reasons(row, kept) for row in rows]))
    elif not rows:
        click.echo("no checkpoint yet; `onthefly save` makes one")
    else:
        click.echo(checkpoints_text(rows, time.time(), kept))


@click.command("log", short_help="What happened, step by step.")
@click.argument("run", required=False)
@click.option("-n", "--last", type=click.IntRange(min=1), metavar="N", help="Only the last N events.")
@options.store
@options.as_json
def log_command(run: str | None, last: int | None, store: Path | None, as_json: bool) -> None:
    """The history of RUN, or of the whole store, oldest first. Nothing in it is ever changed."""
    with options.connect(store) as client:
        if run is not None:
            client.run(run)
        rows = sorted(client.events(run), key=lambda row: row.time)  # those of two sessions are interleaved
    rows = rows if last is None else rows[-last:]
    if as_json:
        click.echo(render.document(rows))
    elif not rows:
        click.echo("nothing has happened yet")
    else:
        click.echo(log_text(rows, time.time(), with_run=run is None))


def checkpoints_text(rows: list[CheckpointRow], now: float, kept: Reasons | None = None) -> str:
    """The table; with `kept`, the words by row id, why each one stays takes the place of whether it is pinned."""
    columns = (
        Column("REF"),
        Column("EPOCH", "right"),
        Column("GENERATION", "right"),
        Column("HASH"),
        Column("SIZE", "right"),
        Column("SAVED", "right"),
        Column("WHY"),
        Column("PINNED" if kept is None else "KEPT"),
        Column("METRICS"),
        Column("REMOVED"),
    )
    several = any(row.generation for row in rows)
    cells = [
        [
            f"{row.run}@{row.step}",
            str(row.epoch),
            str(row.generation) if several else "",
            row.hash[:12],
            render.size(row.size),
            render.ago(row.time, now),
            row.reason,
            _pinned(row) if kept is None else _kept(row, kept),
            render.pairs(row.metrics),
            "" if row.evicted is None else f"{row.evicted_reason} {render.ago(row.evicted, now)}",
        ]
        for row in rows
    ]
    return render.table(columns, cells)


def log_text(rows: list[EventRow], now: float, *, with_run: bool) -> str:
    columns = (Column("TIME"), Column("RUN"), Column("STEP", "right"), Column("EPOCH", "right"), Column("WHAT"))
    cells = [
        [
            render.clock(row.time, now),
            (row.run or "") if with_run else "",
            "" if row.step is None else str(row.step),
            "" if row.epoch is None else str(row.epoch),
            describe(row),
        ]
        for row in rows
    ]
    return render.table(columns, cells)


def describe(event: EventRow) -> str:
    """An event in words. One whose kind is not known here is shown by its name and data."""
    data = dict(event.data)
    words = _WORDS.get(event.kind)
    return words(data) if words is not None else _line(event.kind, data)


def _line(text: str, data: Mapping[str, Any]) -> str:
    shown = {name: item for name, item in data.items() if item is not None}
    return f"{text}  {render.dim(render.pairs(shown))}" if shown else text


def _started(data: dict[str, Any]) -> str:
    return f"session {data.get('session', '')} {'resumed' if data.get('resumed') else 'started'}".replace("  ", " ")


def _saved(data: dict[str, Any]) -> str:
    words = [f"saved {str(data.get('hash', ''))[:12]}", render.size(data.get("size"))]
    words += [f"({data['reason']})"] if data.get("reason") else []
    words += ["pinned"] if data.get("pinned") else []
    return " ".join(word for word in words if word) + _after(render.pairs(data.get("metrics") or {}))


def _command(data: dict[str, Any]) -> str:
    kind, changed = data.get("kind", "command"), data.get("changed")
    if changed:
        return f"{kind} " + ", ".join(
            f"{c['name']} {render.value(c['before'])} -> {render.value(c['after'])}" for c in changed
        )
    arguments = {name: item for name, item in (data.get("arguments") or {}).items() if item not in (None, False)}
    return f"{kind}{_after(render.pairs(arguments))}"


def _tested(data: dict[str, Any]) -> str:
    hidden = ("data", "path", "hash", "size", "step", "epoch", "seconds", "samples")
    numbers = {name: item for name, item in data.items() if name not in hidden}
    samples = f" on {data['samples']} samples" if "samples" in data else ""
    return f"tested {data.get('data', '')}{samples}".rstrip() + _after(render.pairs(numbers))


def _reported(data: dict[str, Any]) -> str:
    counts = Counter(str(one.get("severity")) for one in data.get("findings") or ())
    words = ", ".join(
        f"{counts[s]} {s}{'s' if counts[s] > 1 else ''}" for s in ("error", "warning", "note") if counts[s]
    )
    return f"report on {data.get('kind', '')}: {words or 'nothing wrong'}"


def _generation(data: dict[str, Any]) -> str:
    base = data.get("base") or {}
    origin = f", from {str(base['hash'])[:12]}" if base.get("hash") else ""
    return f"new generation by {data.get('reason', 'a command')}: goes on at step {data.get('from')}{origin}"


def _inexact(data: dict[str, Any]) -> str:
    if "metric" not in data:
        return _line("inexact", data)
    return f"inexact: {data['metric']} was {data.get('recorded')!r}, came out as {data.get('repeated')!r} when repeated"


def _child_ended(data: dict[str, Any]) -> str:
    code = data.get("code")
    tail = str(data.get("tail") or "").rstrip()
    words = f"{data.get('child')}, started beside it, ended" + (f" with exit code {code}" if code else "")
    return words + (f": {tail.splitlines()[-1]}" if tail else "")


def _lost(data: dict[str, Any]) -> str:
    seconds = render.span(float(data.get("seconds") or 0))
    lost = data.get("metrics") or 0
    return f"the store could not be used for {seconds}; " + (f"{lost} records lost" if lost else "nothing was lost")


_WORDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "sessionStarted": _started,
    "epochLength": lambda data: f"epochs of {data.get('batches') or 'unknown numbers of'} batches",
    "newRun": lambda data: _line("new run", {name: item for name, item in data.items() if item != "root"}),
    "runTransition": lambda data: f"{data.get('reason', 'went')}: from {data.get('from')} to {data.get('to')}",
    "undo": lambda data: f"took back: {data.get('command', 'a command')}",
    "autocast": lambda data: f"training runs under autocast: {data.get('dtype', '')} on {data.get('device', '')}",
    "scanned": lambda data: f"scanned {data.get('length', 0):,} samples of the {data.get('data', '')} data",
    "childStarted": lambda data: f"started {data.get('child')} beside it, as process {data.get('pid')}",
    "childEnded": _child_ended,
    "childFailed": lambda data: f"{data.get('child')} could not be started beside it: {data.get('reason', '')}",
    "finalizeRun": lambda data: "finished",
    "sessionEnded": lambda data: f"session ended: {data.get('outcome', 'unknown')}",
    "generation": _generation,
    "command": _command,
    "paused": lambda data: "paused",
    "resumed": lambda data: "resumed",
    "tested": _tested,
    "report": _reported,
    "reportBegun": lambda data: f"looking for a report on {data.get('kind', '')}, for {data.get('steps', '')} steps",
    "checkpointSaved": _saved,
    "checkpointEvicted": lambda data: f"removed {str(data.get('hash', ''))[:12]} ({data.get('reason', 'evicted')})",
    "checkpointPinned": lambda data: f"pinned {str(data.get('hash', ''))[:12]}",
    "checkpointUnpinned": lambda data: f"unpinned {str(data.get('hash', ''))[:12]}",
    "checkpointFailed": lambda data: f"a save failed: {data.get('message', '')}",
    "checkpointWaited": lambda data: (
        f"a save waited {render.span(float(data.get('seconds') or 0))} for the one before it"
    ),
    "checkpointSkipped": lambda data: "a save was passed over: the one before it is still being written",
    "checkpointTorn": lambda data: _line("the state changed while it was copied; it is taken again", data),
    "stagingRefused": lambda data: str(data.get("reason", "memory is short")),
    "inexact": _inexact,
    "lost": _lost,
    "storeUnavailable": _lost,
}


def _pinned(row: CheckpointRow) -> str:
    return "pinned" if row.pinned else ""


def _kept(row: CheckpointRow, kept: Reasons) -> str:
    if row.evicted is not None:
        return ""
    return ", ".join(kept.get(row.id, ())) or render.dim("may go")


def _with_reasons(row: CheckpointRow, kept: Reasons) -> dict[str, Any]:
    return {**render.jsonable(row), "kept_because": list(kept.get(row.id, ())) if row.evicted is None else None}


def _after(text: str) -> str:
    return f"  {render.dim(text)}" if text else ""
