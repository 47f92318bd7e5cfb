"""`onthefly report`: what a good engineer would say about a run."""

from __future__ import annotations

from pathlib import Path

import click

from onthefly.cli import options, render
from onthefly.cli.steer import say
from onthefly.health import findings

_STYLES = {"error": {"fg": "red"}, "warning": {"fg": "yellow"}, "title": {"bold": True}, "dim": {"dim": True}}


@click.command("report", short_help="What is wrong with a run, since when, and what to do.")
@click.argument("kind", type=click.Choice(findings.KINDS), default="health")
@click.argument("run", required=False)
@click.option(
    "--steps",
    type=click.IntRange(min=1, max=10_000),
    default=20,
    show_default=True,
    metavar="K",
    help="How many steps of a live session to look into.",
)
@click.option(
    "--no-double-run", is_flag=True, help="For determinism: do not train three steps again in a fresh process."
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for those steps.",
)
@click.option("--cancel", is_flag=True, help="End the report that is under way: it is of what was seen until then.")
@options.store
@options.as_json
def report_command(
    kind: str,
    run: str | None,
    steps: int,
    no_double_run: bool,
    timeout: float,
    cancel: bool,
    store: Path | None,
    as_json: bool,
) -> None:
    """Look at RUN, and say what is wrong, how bad it is, since which step, how that is known, and what to do about it.

    A run that is live is looked into for some steps while it trains; nothing of it is affected. Of one that has ended, what is
    recorded is judged. Without RUN it is the live session's, or the newest. `health` sums all the others up.
    """
    with options.connect(store) as client:
        if cancel:
            say("cancelled", client.cancel_report(session=run, timeout=timeout), as_json)
            return
        found = client.report(kind, run, steps=steps, double_run=not no_double_run, timeout=timeout)
    if as_json:
        click.echo(render.document(found.to_json()))
        return
    for style, line in findings.lines(found):
        click.echo(click.style(line, **_STYLES.get(style, {})))  # type: ignore[arg-type]
