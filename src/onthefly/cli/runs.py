"""Runs: listed, drawn as a graph, compared, put away."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onthefly.cli import options, render
from onthefly.cli.render import Column

if TYPE_CHECKING:
    from onthefly.run_comparison import RunDiff, SampleDiff
    from onthefly.store.queries import CheckpointRow, RunRow, SessionRow

_ROWS = 12


@click.group("runs", short_help="Every run of the store, as a list or a graph.", invoke_without_command=True)
@click.option("--graph", is_flag=True, help="Draw how they come from each other, newest first.")
@click.option("--ascii", "plain", is_flag=True, help="Draw with ASCII characters only.")
@click.option("--all", "everything", is_flag=True, help="Also those that are archived or removed.")
@options.store
@options.as_json
@click.pass_context
def runs_command(
    ctx: click.Context, graph: bool, plain: bool, everything: bool, store: Path | None, as_json: bool
) -> None:
    """Every run, oldest first: where it comes from, how far it is, and what it has on disk."""
    if ctx.invoked_subcommand is not None:
        return
    with options.connect(store) as client:
        runs, saved = client.runs(), client.checkpoints()
        sessions = {session.id: session for session in client.sessions()}
        heads = client.heads()
        steps = {row.hash: row.step for row in client.checkpoints(evicted=True)}
        logs = {run.name: client.store.log_path(run.name) for run in runs if run.status == "failed"}
    runs = [run for run in runs if everything or run.archived is None]
    described = [_run(row, saved, heads.get(row.name), sessions, steps) for row in runs]
    if as_json:
        click.echo(render.document(described))
        return
    if not described:
        click.echo("no run yet")
        return
    click.echo(graph_text(runs, described, time.time(), plain) if graph else runs_text(described, time.time()))
    for name, path in logs.items():
        if path.is_file() and (everything or any(run.name == name for run in runs)):
            from onthefly.runs.launcher import tail

            click.echo(f"\n{render.status('failed')}  {name} ended before it began; its last words ({path}):")
            click.echo("\n".join(f"  {line}" for line in tail(path, 5).splitlines()))


@runs_command.command("archive", short_help="Leave a run out of the lists.")
@click.argument("run")
@click.option("--undo", "back", is_flag=True, help="List it again.")
@options.store
def archive_command(run: str, back: bool, store: Path | None) -> None:
    """Leave RUN out of the lists. Nothing of it is removed."""
    with options.connect(store) as client:
        row = client.archive(run, archived=not back)
    click.echo(f"{render.bold('listed' if back else 'archived')}  {row.name}")


@runs_command.command("rm", short_help="Remove a run's checkpoints.")
@click.argument("run")
@options.store
@options.as_json
def rm_command(run: str, store: Path | None, as_json: bool) -> None:
    """Remove the checkpoints of RUN, but for those that another run goes on from. Its history stays, and its name stays taken."""
    with options.connect(store) as client:
        result = client.remove_run(run)
    if as_json:
        click.echo(render.document(result))
        return
    kept = f", {result['kept']} kept: other runs go on from there" if result["kept"] else ""
    click.echo(f"{render.bold('removed')}  {result['run']}  {render.size(result['freed'])} freed{kept}")


@click.command("diff", short_help="What two runs differ in.")
@click.argument("a")
@click.argument("b")
@options.store
@options.as_json
def diff_command(a: str, b: str, store: Path | None, as_json: bool) -> None:
    """What the runs A and B differ in: data, values, metrics at their last common step, how far each layer has moved, and, when
    both were scanned, which samples B has learned or forgotten. `onthefly checkpoint diff` compares two checkpoints.
    """
    with options.connect(store) as client:
        found = client.compare(a, b)
    click.echo(render.document(found) if as_json else diff_text(found))


def runs_text(rows: list[dict[str, Any]], now: float) -> str:
    columns = (
        Column("RUN"),
        Column("FROM"),
        Column("STATUS"),
        Column("STEP", "right"),
        Column("EPOCH", "right"),
        Column("GENERATION", "right"),
        Column("CHECKPOINTS", "right"),
        Column("ON DISK", "right"),
        Column("CREATED", "right"),
    )
    several = any(row["generation"] for row in rows)
    cells = [
        [
            row["name"],
            _from(row),
            render.status(row["status"]),
            str(row["step"]),
            str(row["epoch"]),
            str(row["generation"]) if several else "",
            str(row["checkpoints"]),
            render.size(row["size"]),
            render.ago(row["created"], now),
        ]
        for row in rows
    ]
    return render.table(columns, cells)


def graph_text(runs: list[RunRow], rows: list[dict[str, Any]], now: float, plain: bool) -> str:
    """The drawn graph, each run with what a list says of it."""
    from onthefly.runs.graph import draw

    described = {row["name"]: row for row in rows}
    lines = draw(runs, ascii=plain)
    width = max(len(line.graph) for line in lines)
    shown = []
    for line in lines:
        if line.run is None:
            shown.append(line.graph.rstrip())
            continue
        row = described[line.run]
        words = [render.bold(line.run), render.status(row["status"]), f"step {row['step']}"]
        words += [f"from {_from(row)}"] if row["parents"] else []
        shown.append(f"{line.graph.ljust(width)}  {'  '.join(words)}  {render.dim(render.ago(row['created'], now))}")
    return "\n".join(shown)


def diff_text(found: RunDiff) -> str:
    """A comparison of two runs, in sections; an equal one is left out."""
    parts = [
        f"{render.bold(found.a)}  {render.bold(found.b)}" + (f"  both from {found.ancestor}" if found.ancestor else "")
    ]
    if found.data[0] != found.data[1]:
        parts.append(_table(("DATA", found.a, found.b), [["trained on", *found.data]]))
    if found.values:
        cells = [[name, *(render.value(v) for v in pair)] for name, pair in list(found.values.items())[:_ROWS]]
        parts.append(_table(("VALUE", found.a, found.b), cells))
    if found.metrics:
        cells = [[m.name, str(m.step), render.value(m.a), render.value(m.b)] for m in found.metrics]
        parts.append(_table(("METRIC", "STEP", found.a, found.b), cells))
    if found.weights is not None and found.weights.changes:
        cells = [[c.path, f"{c.relative:.2%}"] for c in found.weights.changes[:_ROWS]]
        parts.append(_table(("LAYER", "MOVED"), cells))
    if found.samples is not None:
        parts.append(_samples(found.samples))
    else:
        parts.append(render.dim("single samples: scan both runs to compare them (onthefly scan)"))
    return "\n\n".join(parts)


def _samples(found: SampleDiff) -> str:
    same = found.samples - found.learned_count - found.forgotten_count
    lines = [
        f"{found.samples:,} samples by {found.by}: {found.learned_count:,} learned, {found.forgotten_count:,} forgotten, "
        f"{same:,} unchanged; mean loss {render.value(found.loss_a)} -> {render.value(found.loss_b)}"
    ]
    for word, indices in (("learned", found.learned), ("forgotten", found.forgotten)):
        if indices:
            more = ", ..." if len(indices) > _ROWS else ""
            lines.append(f"  {word}: {', '.join(map(str, indices[:_ROWS]))}{more}")
    return "\n".join(lines)


def _table(titles: tuple[str, ...], cells: list[list[str]]) -> str:
    columns = [Column(title, "left" if number == 0 else "right") for number, title in enumerate(titles)]
    return render.table(columns, cells)


def _from(row: dict[str, Any]) -> str:
    return ", ".join(parent if step is None else f"{parent}@{step}" for parent, step in row["from"])


def _run(
    row: RunRow,
    saved: list[CheckpointRow],
    head: tuple[int, int] | None,
    sessions: dict[int, SessionRow],
    steps: dict[str, int],
) -> dict[str, Any]:
    """What a list says of a run. `steps` are those of all checkpoints there ever were, by their hashes."""
    mine = [checkpoint for checkpoint in saved if checkpoint.run == row.name]
    live = next((s for s in sessions.values() if s.run == row.name and s.ended is None), None)
    newest = mine[-1] if mine else None
    base = row.base or {}
    step, epoch = head or ((newest.step, newest.epoch) if newest else (base.get("step", 0), base.get("epoch", 0)))
    return {
        **render.jsonable(row),
        "status": live.status if live is not None else row.status,
        "session": live.id if live is not None else None,
        "from": [(parent, steps.get(content)) for parent, content in row.parents],
        "step": live.step if live is not None else step,
        "epoch": live.epoch if live is not None else epoch,
        "checkpoints": len(mine),
        "size": sum(checkpoint.size for checkpoint in mine),
    }
