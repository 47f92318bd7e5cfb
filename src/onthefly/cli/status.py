"""`onthefly status`: what is training now, and what could go on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onthefly.cli import options, render
from onthefly.cli.render import Column

if TYPE_CHECKING:
    from onthefly.client import Status
    from onthefly.store.queries import SessionRow

_COLUMNS = (
    Column("SESSION", "right"),
    Column("RUN"),
    Column("STATUS"),
    Column("STEP", "right"),
    Column("EPOCH", "right"),
    Column("LOSS", "right"),
    Column("STARTED", "right"),
    Column("SEEN", "right"),
    Column("PID", "right"),
)


@click.command("status", short_help="What is training now, and what could go on.")
@options.store
@options.as_json
def status_command(store: Path | None, as_json: bool) -> None:
    """Live sessions with run, step and epoch; without one, how the last one ended and what can be resumed."""
    with options.connect(store) as client:
        found = client.status()
    click.echo(render.document(found) if as_json else text(found, time.time()))


def text(found: Status, now: float) -> str:
    """The store at a glance, for people."""
    lines = []
    if found.live:
        lines.append(render.table(_COLUMNS, [_row(row, now) for row in found.live]))
    elif found.last is not None:
        lines += ["no live session; the last one:", render.table(_COLUMNS, [_row(found.last, now)])]
    else:
        lines.append(f"nothing has been trained in {found.store} yet")
    if found.unfinished:
        names = ", ".join(row.name for row in found.unfinished)
        how = "onthefly resume" if len(found.unfinished) == 1 and not found.live else "onthefly resume RUN"
        lines.append(f"unfinished: {names}  {render.dim(f'(go on with `{how}`)')}")
    return "\n".join(lines)


def _row(row: SessionRow, now: float) -> list[str]:
    seen = row.heartbeat if row.ended is None else row.ended
    word = row.outcome or row.status if row.ended is not None else row.status
    return [
        str(row.id),
        row.run,
        render.status(word),
        str(row.step),
        str(row.epoch),
        "" if row.loss is None else render.number(row.loss),
        render.ago(row.started, now),
        render.ago(seen, now),
        str(row.pid) if row.ended is None else "",
    ]
