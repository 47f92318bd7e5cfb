"""`onthefly watch`: a live view of one session. It only reads the store, so training does not feel it."""

from __future__ import annotations

import math
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onthefly.cli import history, options, render
from onthefly.errors import NoLiveSessionError

if TYPE_CHECKING:
    from onthefly.client import Choice, Client
    from onthefly.store.queries import Series, SessionRow

_EVENTS = 6
_HEIGHT = 6
_RATE_WINDOW = 30.0  # seconds of points that the rate is taken over


@click.command("watch", short_help="A live view: step, loss, rates, events.")
@click.option("--once", is_flag=True, help="Print one frame and end.")
@click.option("--metric", metavar="NAME", help="What to chart. Default: the loss.")
@click.option(
    "--every",
    type=click.FloatRange(min=0.05),
    default=0.5,
    show_default=True,
    metavar="SECONDS",
    help="Between frames.",
)
@options.choice
@options.store
def watch_command(
    once: bool, metric: str | None, every: float, store: Path | None, session_id: int | None, run_name: str | None
) -> None:
    """Look at the live session until it ends, or until Ctrl-C, which ends only the view.

    When the output is not a terminal, or no session is alive, it prints one frame.
    """
    which = options.chosen(session_id, run_name)
    with options.connect(store) as client:
        row = _shown(client, which)
        if once or row.ended is not None or not sys.stdout.isatty():
            click.echo(frame(client, row, metric, width=shutil.get_terminal_size().columns))
        else:
            _follow(client, row, metric, every)


def frame(client: Client, row: SessionRow, metric: str | None, *, width: int) -> str:
    """One picture of a session."""
    now = time.time()
    names = client.metric_names(row.run)
    name = metric or _loss_among(names)
    series = client.series(row.run, name, resolution=_resolution(row.step)) if name is not None else None
    parts = [_head(row, series, now)]
    if series is not None and name is not None and len(series.values):
        parts.append(_chart(name, series, width))
    others = {other: value for other, value in client.latest(row.run).items() if other != name}
    if others:
        parts.append(render.pairs(others))
    events = [event for event in client.events(row.run) if event.session <= row.id][-_EVENTS:]
    if events:
        parts.append(history.log_text(events, now, with_run=False))
    return "\n\n".join(parts)


def _follow(client: Client, row: SessionRow, metric: str | None, every: float) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()

    def picture(row: SessionRow) -> Text:
        return Text.from_ansi(frame(client, row, metric, width=console.width))

    with Live(picture(row), console=console, auto_refresh=False) as live:
        while row.ended is None:
            time.sleep(every)
            row = _again(client, row)
            live.update(picture(row), refresh=True)


def _again(client: Client, row: SessionRow) -> SessionRow:
    """The session as it is now. One that was killed meanwhile is recorded as such, like at every opening of a store."""
    found = next(session for session in client.sessions() if session.id == row.id)
    if found.ended is None and not client.store.is_alive(found):
        client.store.recover(time.time())
        found = next(session for session in client.sessions() if session.id == row.id)
    return found


def _shown(client: Client, which: Choice) -> SessionRow:
    """The live session, or the last one that was, when nothing is chosen."""
    try:
        return client.session(which)
    except NoLiveSessionError:
        last = client.status().last
        if which is not None or last is None:
            raise
        return last


def _head(row: SessionRow, series: Series | None, now: float) -> str:
    status = row.status if row.ended is None else f"{row.outcome or row.status} {render.ago(row.ended, now)}"
    words = [
        render.bold(row.run),
        render.status(status),
        f"step {render.bold(str(row.step))}",
        f"epoch {row.epoch}",
        *_rate(series, row, now),
        render.dim(f"session {row.id}, pid {row.pid}, for {render.span((row.ended or now) - row.started)}"),
    ]
    return "  ".join(words)


def _rate(series: Series | None, row: SessionRow, now: float) -> list[str]:
    """Steps a second, over the last seconds that anything was logged in."""
    if series is None or row.ended is not None or row.status == "paused":
        return []
    recent = series.times >= max(now - _RATE_WINDOW, row.started)
    steps, times = series.steps[recent], series.times[recent]
    if len(steps) < 2 or times[-1] <= times[0]:
        return []
    rate = float((steps[-1] - steps[0]) / (times[-1] - times[0]))
    return [f"{render.number(rate)} steps/s"] if rate > 0 else []


def _chart(name: str, series: Series, width: int) -> str:
    columns = render.means(series.values.tolist(), width - 14)
    lines = render.chart(columns, _HEIGHT)
    finite = [number for number in columns if math.isfinite(number)]
    labels = [""] * len(lines)
    if finite:
        labels[0], labels[-1] = render.number(max(finite)), render.number(min(finite))
    margin = max(map(len, labels))
    drawn = [f"{render.dim(label.rjust(margin) + ' │')} {line}" for label, line in zip(labels, lines, strict=True)]
    last = render.number(float(series.values[-1]))
    steps = render.dim(f"steps {series.steps[0]} to {series.steps[-1]}")
    return "\n".join([f"{render.bold(name)} {last}  {steps}", *drawn])


def _resolution(steps: int) -> int:
    """Coarse enough that a frame is drawn at once, fine enough for any terminal."""
    return 1 if steps < 100_000 else 16 if steps < 1_000_000 else 256 if steps < 10_000_000 else 4096


def _loss_among(names: list[str]) -> str | None:
    """The metric to chart: `loss`, or what sounds like it, or the first."""
    by_sound = [name for name in names if "loss" in name]
    return "loss" if "loss" in names else next(iter(by_sound or names), None)
