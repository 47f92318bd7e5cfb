"""What is known of single samples: scan, samples, show, export."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from onthefly.cli import options, render
from onthefly.cli.options import leaving_in_order
from onthefly.cli.render import Column
from onthefly.cli.steer import say
from onthefly.errors import InvalidCommandError

if TYPE_CHECKING:
    from onthefly.client import Delivery
    from onthefly.samples.table import SampleTable

_SHOWN = ("index", "name", "label", "prediction", "loss", "confidence", "margin")
_DYNAMIC = ("index", "mean_loss", "variability", "max_loss", "forgotten", "seen", "mean_confidence", "known")


@click.command("scan", short_help="Compute the loss of every sample.")
@click.argument("ref", required=False)
@click.option(
    "--data", type=click.Choice(["train", "val", "test"]), default="train", show_default=True, help="Of which data."
)
@click.option("--embeddings", is_flag=True, help="Also an embedding of every sample.")
@click.option(
    "--beside", is_flag=True, help="The newest checkpoint of the live session's run, in a process of its own."
)
@click.option("--cancel", is_flag=True, help="Stop the scan that is under way.")
@options.delivery
def scan_command(ref: str | None, data: str, embeddings: bool, beside: bool, cancel: bool, **given: Any) -> None:
    """Compute the loss of every sample, and for a classifier more, under the present weights. Training stands meanwhile.

    With REF, under those of that checkpoint, in a process of its own: the run's command line is started again, and ends before it
    trains. No session need be alive, and one that is trains on.

    Nothing of the training is affected. A state that was scanned before is not scanned again. `onthefly samples` shows what came
    of it.
    """
    as_json, store = given.pop("as_json"), given.pop("store")
    how = options.how(given)
    alone = ref is not None or beside
    _refuse_nonsense(how, ref, alone, cancel)
    with options.connect(store) as client:
        if cancel:
            say("cancelled", client.cancel_scan(**how), as_json)
            return
        if alone:
            # The default is how long a session may take to answer; a process of its own may take as long as it takes.
            asked = click.get_current_context().get_parameter_source("timeout") is ParameterSource.COMMANDLINE
            timeout = how["timeout"] if asked else None
            chosen = ref or f"{client.session(how['session']).run}@latest"
            with leaving_in_order(), nullcontext() if as_json else _waiting(chosen) as status:
                tell = None if status is None else status.tell
                result = client.scan_checkpoint(chosen, data, embeddings=embeddings, timeout=timeout, tell=tell)
        else:
            result = client.scan(data, embeddings=embeddings, **how)
    if as_json or result.get("status") == "queued":
        say("scanned", result, as_json)
        return
    again = "scanned already" if result["again"] else f"scanned in {render.span(result['seconds'])}"
    loss = "" if result["loss"] is None else f"  mean loss {render.value(result['loss'])}"
    click.echo(
        f"{render.bold(again)}  step {result['step']}  {result['samples']:,} samples of the {result['data']} data{loss}"
    )
    click.echo(f"  {render.dim(', '.join(result['columns']))}")
    click.echo(f"  {render.dim(result['path'])}")


@click.command("samples", short_help="The worst samples, by loss or by what training has recorded.")
@click.argument("ref", required=False)
@click.option("--top", type=click.IntRange(min=1), default=20, show_default=True, metavar="N", help="How many.")
@click.option("--by", metavar="COLUMN", help="Sort by this column, largest first. Default: loss, or mean_loss.")
@click.option(
    "--dynamics", is_flag=True, help="What training itself has recorded: mean loss, variability, times forgotten."
)
@click.option(
    "--data", type=click.Choice(["train", "val", "test"]), default="train", show_default=True, help="Of which data."
)
@click.option("--plot", is_flag=True, help="Draw a histogram of the losses instead; with --dynamics, the data map.")
@click.option(
    "--to", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Draw it into this picture."
)
@options.store
@options.as_json
def samples_command(
    ref: str | None,
    top: int,
    by: str | None,
    dynamics: bool,
    data: str,
    plot: bool,
    to: Path | None,
    store: Path | None,
    as_json: bool,
) -> None:
    """The samples with the largest loss in the newest scan of REF, a run or one checkpoint, or of any run. `onthefly scan`
    makes one."""
    with options.connect(store) as client:
        table = client.samples(ref, dynamics=dynamics, data=data)
    if plot or to is not None:
        click.echo(_drawn(table, dynamics, to))
        return
    column = by or ("mean_loss" if dynamics else "loss")
    rows = _worst(table, column, top)
    if as_json:
        click.echo(render.document({"about": dict(table.about), "samples": len(table), "by": column, "rows": rows}))
        return
    about = table.about
    click.echo(
        render.dim(
            f"{about.get('run')}@{about.get('step')}, {len(table):,} samples of the {about.get('data')} data, by {column}"
        )
    )
    shown = [name for name in (_DYNAMIC if dynamics else _SHOWN) if any(name in row for row in rows)]
    shown += [column] if column not in shown else []
    columns = [Column(name.upper().replace("_", " "), "left" if name == "name" else "right") for name in shown]
    click.echo(render.table(columns, [[_cell(row.get(name)) for name in shown] for row in rows]))


@click.command("show", short_help="What some samples are, as the data set gives them.")
@click.argument("indices", nargs=-1, type=click.IntRange(min=0), required=True, metavar="INDEX...")
@click.option(
    "--data", type=click.Choice(["train", "val", "test"]), default="train", show_default=True, help="Of which data."
)
@options.delivery
def show_command(indices: tuple[int, ...], data: str, **given: Any) -> None:
    """Read samples from the data set of a live session, at most 64, and tell what each is: its kind, type, shape, label, and first
    values. Training stands meanwhile, and is not affected. The dashboard draws them.
    """
    as_json, store = given.pop("as_json"), given.pop("store")
    with options.connect(store) as client:
        result = client.show_samples(indices, data, **options.how(given))
        if result.get("status") == "queued":
            say("shown", result, as_json)
            return
        found = client.shown_samples(result["shown"]).columns
    names = [name for name in found if name != "pixels"]
    rows = [{name: _plain(found[name][row]) for name in names} for row in range(len(indices))]
    if as_json:
        click.echo(render.document({**result, "rows": rows}))
        return
    columns = [Column("INDEX", "right"), *(Column(name) for name in ("KIND", "TYPE", "SHAPE", "LABEL", "CONTENT"))]
    told = [
        [*(str(row[name]) for name in ("index", "kind", "dtype", "shape", "label")), _line(row["text"])] for row in rows
    ]
    click.echo(render.table(columns, told))


@click.command("map", short_help="Lay a scan's embeddings out in two dimensions.")
@click.argument("scan", type=click.IntRange(min=0), metavar="SCAN")
@click.option(
    "--method", type=click.Choice(["pca", "umap"]), default="pca", show_default=True, help="umap: an optional extra."
)
@click.option(
    "--to", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write x and y of each sample here."
)
@options.store
@options.as_json
def map_command(scan: int, method: str, to: Path | None, store: Path | None, as_json: bool) -> None:
    """Lay the embeddings of the scan of that number out in two dimensions: by principal components, or by UMAP, which is learnt from
    20,000 samples at most and takes minutes then. A map by UMAP is kept in the store; the dashboard shows it.
    """
    with options.connect(store) as client:
        found = client.sample_map(scan, method)
        if to is not None:
            import numpy as np

            from onthefly.samples.export import export

            export(found.columns, np.arange(len(found)), to)
    if as_json:
        click.echo(render.document({"scan": scan, "method": method, "samples": len(found)}))
    else:
        where = f"  {render.dim(str(to))}" if to is not None else ""
        click.echo(f"{render.bold('mapped')}  {len(found):,} samples by {method}{where}")


@click.command("export", short_help="Write samples with their values to a file.")
@click.option(
    "--to",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    metavar="FILE",
    help="A new .parquet, .csv or .json file.",
)
@click.option("--selection", metavar="RUN", help="The samples that this run is trained on, or a selection's digest.")
@options.selecting
@options.store
@options.as_json
def export_command(to: Path, selection: str | None, recipe: Any, store: Path | None, as_json: bool) -> None:
    """Write samples to FILE: their indices, with losses, labels, predictions and names as far as they are known. By default, all.

    \b
      onthefly export --selection fork1 --to hard.parquet
      onthefly export --loss-quantile 0.9:1.0 --to hard.csv
    """
    with options.connect(store) as client:
        result = client.export_samples(to, selection=selection, recipe=recipe)
    if as_json:
        click.echo(render.document(result))
    else:
        click.echo(f"{render.bold('exported')}  {result['rows']:,} samples  {render.dim(result['path'])}")


def _refuse_nonsense(how: Delivery, ref: str | None, alone: bool, cancel: bool) -> None:
    if ref is not None and how["session"] is not None:
        raise InvalidCommandError("REF says which run: leave out --session and --run")
    if alone and cancel:
        raise InvalidCommandError("--cancel stops the scan of a session; end the command of one beside it with Ctrl-C")
    if alone and not how["wait"]:
        raise InvalidCommandError("a scan beside the training ends with its command: leave out --no-wait")


class _Waiting:
    """A line that says how far a process is."""

    def __init__(self, ref: str, show: Callable[[str], None]) -> None:
        self._ref = ref
        self._show = show

    def tell(self, word: str) -> None:
        self._show(f"{self._ref}: {word}")


@contextmanager
def _waiting(ref: str) -> Iterator[_Waiting]:
    from rich.console import Console

    with Console(stderr=True).status(f"{ref}: starting") as status:
        yield _Waiting(ref, status.update)


def _worst(table: SampleTable, column: str, top: int) -> list[dict[str, Any]]:
    flat = {name: values for name, values in table.columns.items() if values.ndim == 1}
    if column not in flat or flat[column].dtype.kind not in "fiub":
        raise InvalidCommandError(f"there is no column {column!r} to sort by; there are: {', '.join(flat)}")
    import numpy as np

    numbers = flat[column].astype(np.float64)
    order = np.argsort(-numbers, kind="stable")[: min(top, int(np.isfinite(numbers).sum()))]
    return [{"index": int(i), **{name: _plain(values[i]) for name, values in flat.items()}} for i in order]


def _line(text: str, most: int = 80) -> str:
    whole = " ".join(text.split())
    return whole if len(whole) <= most else whole[: most - 1] + "…"


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _drawn(table: SampleTable, dynamics: bool, to: Path | None) -> str:
    from onthefly.samples import plot

    where = f"{table.about.get('run')}@{table.about.get('step')}"
    drawing: plot.Plot
    if dynamics:
        columns = table.columns
        drawing = plot.data_map(
            columns["confidence_variability"], columns["mean_confidence"], columns["known"], title=where
        )
    else:
        drawing = plot.histogram(table.columns["loss"], title=f"{len(table):,} samples, {where}")
    if to is not None:
        plot.picture(drawing, to)
        return f"{render.bold('drawn')}  {render.dim(str(to))}"
    width, height = shutil.get_terminal_size()
    return plot.terminal(drawing, width, height - 1)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return render.value(value) if not isinstance(value, str) else value
