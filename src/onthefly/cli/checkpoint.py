"""`onthefly checkpoint`: one checkpoint looked into, compared, taken out, brought in, kept and removed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onthefly.cli import options, render
from onthefly.cli.render import Column

if TYPE_CHECKING:
    from onthefly.checkpoints.contents import Contents, Fold, Part, Tensor
    from onthefly.comparison import Change, Diff, Difference
    from onthefly.store.queries import CheckpointRow

_LISTED = 24
"""Tensors of one part that are listed one by one; of more, those of all layers are shown as one."""
_ROWS = 40
_WIDTH = 100  # characters, of lines of values
_LONG = 40  # characters of one value
_GROUPS = 8  # lines of values of one part


@click.group(
    "checkpoint",
    short_help="Look into one checkpoint, compare, export, import, pin, remove.",
    invoke_without_command=True,
)
@click.pass_context
def checkpoint_command(ctx: click.Context) -> None:
    """Look into one checkpoint, compare two, take a state dict out, bring one in, keep or remove one."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@checkpoint_command.command("show", short_help="What it holds.")
@click.argument("ref")
@click.option("--verify", is_flag=True, help="Read every byte and hold it against the hash.")
@click.option("--all", "everything", is_flag=True, help="List every tensor and every value.")
@options.store
@options.as_json
def show_command(ref: str, verify: bool, everything: bool, store: Path | None, as_json: bool) -> None:
    """Everything that the checkpoint REF holds: tensors by part, with dtype, shape and size, counters, and plain values.

    Only its header is read. Of a large part, tensors whose names differ in numbers alone, such as those of its layers, are one
    line; --all and --json have every one.
    """
    with options.connect(store) as client:
        found, row = client.show(ref, verify=verify), client.resolve(ref)
    recorded = None if isinstance(row, Path) else row
    if as_json:
        click.echo(render.document({**render.jsonable(found), "recorded": recorded}))
    else:
        click.echo(contents_text(found, recorded, time.time(), everything))


@checkpoint_command.command("diff", short_help="What differs between two.")
@click.argument("a")
@click.argument("b")
@click.option(
    "-n",
    "--rows",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    metavar="N",
    help="At most N rows a table.",
)
@options.store
@options.as_json
def diff_command(a: str, b: str, rows: int, store: Path | None, as_json: bool) -> None:
    """What differs between the checkpoints A and B: plain values such as counters and the learning rate; how far every tensor
    of the model has moved, relative to its norm in A, the farthest first; and what else is not equal.

    The exit code is 0 whether they differ or not; --json tells it as `equal`.
    """
    with options.connect(store) as client:
        found = client.diff(a, b)
    click.echo(render.document(found) if as_json else diff_text(found, rows))


@checkpoint_command.command("export", short_help="Its model, as a plain state dict.")
@click.argument("ref")
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--only", metavar="NAME", help="Another part than the model, such as optimizer.")
@click.option("--force", is_flag=True, help="Replace a file that is there already.")
@options.store
@options.as_json
def export_command(ref: str, out: Path, only: str | None, force: bool, store: Path | None, as_json: bool) -> None:
    """Write the model of the checkpoint REF to OUT as a plain state dict for other tools: .safetensors or .pt, by its name.

    It is what `model.load_state_dict(torch.load(OUT, weights_only=True))` takes. .safetensors needs
    `pip install 'onthefly[export]'`.
    """
    with options.connect(store) as client:
        found = client.export(ref, out, only=only, force=force)
    if as_json:
        click.echo(render.document(found))
    else:
        told = f"{found.tensors} tensors  {render.size(found.size)}  {render.dim(str(found.path))}"
        click.echo(f"{render.bold('exported')} {found.part}  {told}")


@checkpoint_command.command("import", short_help="Bring a file into the store.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--run", metavar="NAME", help="Of a checkpoint: the run that it becomes one of. Default: the one that it names."
)
@click.option("--into", metavar="REF", help="Of a state dict: what all but the weights is from. Default: the newest.")
@click.option("--only", metavar="NAME", help="Of a state dict: which model's it is, when there are several.")
@options.store
@options.as_json
def import_command(
    file: Path, run: str | None, into: str | None, only: str | None, store: Path | None, as_json: bool
) -> None:
    """Bring FILE into the store as a pinned checkpoint of a run that nobody trains at the moment.

    A checkpoint, from another store or machine, is copied after every byte was checked. A plain state dict (.safetensors or
    .pt) becomes the weights in a new checkpoint that is otherwise the one of --into: names and shapes must be those of its model.
    Nothing of a file is ever executed. `onthefly load` then takes it by its hash.
    """
    with options.connect(store) as client:
        row = client.import_file(file, run=run, into=into, only=only)
    if as_json:
        click.echo(render.document(row))
    else:
        place = f"{row.run}@{row.step}  {row.hash[:12]}  {render.size(row.size)}  {render.dim(str(row.path))}"
        click.echo(f"{render.bold('imported')}  {place}")


@checkpoint_command.command("pin", short_help="Keep it whatever retention says.")
@click.argument("ref")
@options.timeout
@options.store
@options.as_json
def pin_command(ref: str, timeout: float, store: Path | None, as_json: bool) -> None:
    """Keep the checkpoint REF whatever retention says. A session that is on its run does it at its next step boundary."""
    with options.connect(store) as client:
        _done("pinned", client.pin(ref, timeout=timeout), as_json)


@checkpoint_command.command("unpin", short_help="Let retention have it again.")
@click.argument("ref")
@options.timeout
@options.store
@options.as_json
def unpin_command(ref: str, timeout: float, store: Path | None, as_json: bool) -> None:
    """Let retention have the checkpoint REF again: a later save of its run may remove it."""
    with options.connect(store) as client:
        _done("unpinned", client.pin(ref, False, timeout=timeout), as_json)


@checkpoint_command.command("rm", short_help="Remove it; its row stays.")
@click.argument("ref")
@click.option("--force", is_flag=True, help="Also the newest of its run.")
@options.timeout
@options.store
@options.as_json
def rm_command(ref: str, force: bool, timeout: float, store: Path | None, as_json: bool) -> None:
    """Remove the checkpoint REF and its sidecar. Its row stays as a tombstone, with its hash.

    The origin of a run, and what a run goes on from, is never removed; the newest of a run only with --force.
    """
    with options.connect(store) as client:
        _done("removed", client.remove(ref, force=force, timeout=timeout), as_json)


def _done(what: str, result: dict[str, Any], as_json: bool) -> None:
    from onthefly.cli.steer import say

    say(what, result, as_json)


# -- what differs ----------------------------------------------------------------------------------------------


def diff_text(found: Diff, rows: int) -> str:
    """What differs, for people: at most so many rows a table."""
    head = [f"A  {found.hash_a}  {render.dim(str(found.a))}", f"B  {found.hash_b}  {render.dim(str(found.b))}"]
    if found.equal:
        return "\n".join([*head, click.style("equal, bit for bit", fg="green", bold=True)])
    tables = [_differing_values(found.values, rows), _moved(found.changes, rows), _other(found.rest, rows)]
    if not any(tables):
        tables = ["the values are equal; only how they are stored differs (tied tensors, or the order of names)"]
    return "\n\n".join(["\n".join(head), *(table for table in tables if table)])


def _differing_values(values: Sequence[Difference], rows: int) -> str:
    cells = [[one.path, *map(_short, one.values)] for one in values[:rows] if one.values is not None]
    columns = (Column("VALUE"), Column("A"), Column("B"))
    return _cut(render.table(columns, cells), len(cells), len(values)) if values else ""


def _moved(changes: Sequence[Change], rows: int) -> str:
    moved = [change for change in changes if change.relative]
    still = len(changes) - len(moved)
    cells = [
        [change.path, _shape(change.shape), _percent(change.relative), f"{change.largest:.3g}"]
        for change in moved[:rows]
    ]
    columns = (Column("MODEL"), Column("SHAPE"), Column("MOVED", "right"), Column("MAX", "right"))
    lines = [_cut(render.table(columns, cells), len(cells), len(moved))] if moved else []
    lines += [render.dim(f"{still} tensors of the model are equal")] if still else []
    return "\n".join(lines)


def _other(rest: Sequence[Difference], rows: int) -> str:
    cells = [[one.path, one.text] for one in rest[:rows]]
    return _cut(render.table((Column("ELSE"), Column("")), cells), len(cells), len(rest)) if rest else ""


def _percent(relative: float) -> str:
    return (
        f"{relative:.2%}"
        if 1e-4 <= relative < 10
        else f"{relative:.2g} x"
        if math.isfinite(relative)
        else str(relative)
    )


def _cut(table: str, shown: int, count: int) -> str:
    return table if shown == count else f"{table}\n{render.dim(f'and {count - shown} more: -n {count}')}"


# -- what it holds ---------------------------------------------------------------------------------------------


def contents_text(found: Contents, row: CheckpointRow | None, now: float, everything: bool = False) -> str:
    """What a checkpoint holds, for people."""
    checked = (
        click.style("every byte matches it", fg="green") if found.verified else render.dim("not checked: --verify")
    )
    head = [] if row is None else [_recorded(row, now)]
    head += [f"hash      {found.hash}  {checked}", f"file      {found.path}  {render.size(found.size)}"]
    head += [f"counters  {render.pairs(found.counters)}"] if found.counters else []
    return "\n".join([*head, "", _tensors(found.parts, everything), "", *_values(found.parts, everything)]).rstrip()


def _recorded(row: CheckpointRow, now: float) -> str:
    words = [render.bold(f"{row.run}@{row.step}"), f"epoch {row.epoch}"]
    words += [f"generation {row.generation}"] if row.generation else []
    words += [f"saved {render.ago(row.time, now)} ({row.reason})", *(["pinned"] if row.pinned else [])]
    return "  ".join([*words, render.pairs(row.metrics)]).rstrip()


def _tensors(parts: Iterable[Part], everything: bool) -> str:
    columns = (
        Column("TENSORS"),
        Column("", "right"),
        Column("DTYPE"),
        Column("SHAPE"),
        Column("NUMBERS", "right"),
        Column("SIZE", "right"),
        Column("TIED TO"),
    )
    cells, numbers, size = [], 0, 0
    for part in parts:
        if part.tensors:
            cells.append([render.bold(part.name), "", "", "", f"{part.numbers:,}", render.size(part.size), ""])
            cells += _rows(part, everything)
            numbers, size = numbers + part.numbers, size + part.size
    cells.append([render.bold("all"), "", "", "", f"{numbers:,}", render.size(size), ""])
    return render.table(columns, cells)


def _rows(part: Part, everything: bool) -> Iterator[list[str]]:
    from onthefly.checkpoints.contents import folded

    if everything or len(part.tensors) <= _LISTED:
        yield from map(_row, part.tensors)
        return
    folds = folded(part.tensors)
    for fold in folds[:_ROWS]:
        yield _row(fold.tensors[0]) if len(fold.tensors) == 1 else _folded_row(fold)
    if rest := folds[_ROWS:]:
        size = render.size(sum(tensor.size for fold in rest for tensor in fold.tensors))
        yield [render.dim(f"  and {len(rest)} more: --all"), "", "", "", "", size, ""]


def _row(tensor: Tensor) -> list[str]:
    shown = ["", "", tensor.tied_to] if tensor.tied_to else [f"{tensor.numbers:,}", render.size(tensor.size), ""]
    return [f"  {tensor.path}", "", tensor.dtype, _shape(tensor.shape), *shown]


def _folded_row(fold: Fold) -> list[str]:
    numbers, size = (sum(getattr(tensor, of) for tensor in fold.tensors) for of in ("numbers", "size"))
    shape = "various" if fold.shape is None else _shape(fold.shape)
    return [
        f"  {fold.path}",
        f"{len(fold.tensors)} x",
        fold.tensors[0].dtype,
        shape,
        f"{numbers:,}",
        render.size(size),
        "",
    ]


def _shape(shape: Iterable[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _values(parts: Iterable[Part], everything: bool) -> Iterator[str]:
    lines: list[tuple[str, str]] = []
    for part in parts:
        if part.name == "rng" and not everything:  # of no meaning to anybody but its generator
            continue
        groups: dict[str, dict[str, Any]] = {}
        for path, value in part.values.items():
            above, _, name = f"{part.name}/{path}".rpartition("/")
            groups.setdefault(above, {})[name] = value
        shown = list(groups.items())[: None if everything else _GROUPS]
        for above, values in shown:
            lines += [(above if number == 0 else "", line) for number, line in enumerate(_filled(values, everything))]
        if more := len(groups) - len(shown):
            lines.append(("", render.dim(f"and {more} more like these: --all")))
    if lines:
        yield render.table((Column("VALUES"), Column("")), lines)


def _filled(values: Mapping[str, Any], everything: bool) -> Iterator[str]:
    """Names and values in lines of a readable width."""
    line = ""
    for name, value in values.items():
        pair = f"{name} {render.value(value) if everything else _short(value)}"
        if line and len(line) + len(pair) > _WIDTH:
            yield line
            line = ""
        line = f"{line}  {pair}" if line else pair
    yield line


def _short(value: Any) -> str:
    text = render.value(value)
    if len(text) <= _LONG:
        return text
    return f"[{len(value)} items]" if isinstance(value, list) else f"{text[: _LONG - 3]}..."
