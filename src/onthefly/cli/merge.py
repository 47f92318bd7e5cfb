"""`onthefly merge`: several models become one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from onthefly.cli import merge_table, options, render
from onthefly.cli.steer import say
from onthefly.errors import CommandError, InvalidCommandError

if TYPE_CHECKING:
    from onthefly.merging.streaming import Merged

_OF_FILES = {"fishers": "--fisher", "grams": "--gram", "only": "--only", "force": "--force"}
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_LONG = 24 * 3600.0  # seconds: a merge is as long as its parents are large


@click.command("merge", short_help="Merge runs in the live session, or models in files.")
@click.argument("parents", nargs=-1, required=True, metavar="PARENT...")
@click.option(
    "--strategy",
    "strategies",
    multiple=True,
    default=("swa",),
    show_default=True,
    metavar="NAME",
    help="How; can be given several times. all: each that can be used.",
)
@click.option("--base", metavar="REF|FILE", help="What the parents come from. Default: where the runs' lines part.")
@click.option("--weights", metavar="LIST", help="A weight for each parent: 1,2.")
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="An option of the strategies: density=0.2."
)
@click.option("--commit", metavar="best|NAME", help="Go on with the best, or with what this strategy made.")
@click.option(
    "--floor/--no-floor", default=True, show_default=True, help="Commit nothing that is worse than the best parent."
)
@click.option(
    "--data", type=click.Choice(["val", "test"]), default="val", show_default=True, help="The data that judge."
)
@click.option("--slice", "slices", multiple=True, metavar="NAME=EXPRESSION", help="A row more: samples of those data.")
@click.option("--judge", metavar="ROW", help="The row that decides. Default: all of the data.")
@click.option(
    "--metric", type=click.Choice(["loss", "accuracy"]), help="What decides. Default: accuracy, where there is one."
)
@click.option("--name", help="Name of the new run. Default: merge1, merge2, ...")
@click.option(
    "--optimizer",
    type=click.Choice(["reset", "first", "average"]),
    default="reset",
    show_default=True,
    help="Its state after the merge.",
)
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    default=0,
    metavar="STEPS",
    help="The learning rate rises again over so many.",
)
@click.option(
    "--recalibrate",
    type=click.IntRange(min=0),
    default=2048,
    show_default=True,
    metavar="SAMPLES",
    help="Train samples that batch-norm statistics are estimated on.",
)
@click.option(
    "--true-fisher", is_flag=True, help="Fisher information by the models' own labels, not by those of the data."
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    metavar="N",
    help="Samples that statistics are of.",
)
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Merge files into this one, .safetensors.")
@click.option("--fisher", "fishers", multiple=True, metavar="FILE", help="With --out: a parent's Fisher information.")
@click.option("--gram", "grams", multiple=True, metavar="FILE", help="With --out: a parent's Gram matrices.")
@click.option("--only", metavar="NAME", help="With --out: which model of a checkpoint, when there are several.")
@click.option("--force", is_flag=True, help="With --out: replace a file that is there already.")
@options.delivery
@click.pass_context
def merge_command(ctx: click.Context, /, parents: tuple[str, ...], out: Path | None, **given: Any) -> None:
    """Merge the checkpoints that each PARENT, a REF, names, in models of their own beside the live one, and show how good they are on
    each slice of data. With --commit the session goes on with one of them, as a new run.

    \b
      onthefly merge baseline fork1 fork2 --strategy all
      onthefly merge baseline fork1 fork2 --strategy fisher --commit best --warmup 20
      onthefly merge a.safetensors b.safetensors --strategy ties --base base.safetensors --out merged.safetensors

    With --out each PARENT is a file: a checkpoint, or a state dict in .safetensors or .pt. That needs no session and no
    store, and memory does not grow with the models.

    Strategies: swa, weighted (--weights), fisher, adapter, lora, task_arithmetic, ties, dare, dare_ties, slerp, regmean, and in
    a session greedy. docs/merging.md says when to use which, and what options they take.
    """
    typed = {name for name in given if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT}
    if out is not None:
        _refuse(
            typed - {*_OF_FILES, "strategies", "base", "weights", "settings", "as_json"},
            "of a merge in a session, without --out",
        )
        _merge_files(parents, out, given)
        return
    _refuse(typed & _OF_FILES.keys(), "of a merge of files: give --out FILE, too")
    if all(Path(parent).suffix in _SUFFIXES and Path(parent).is_file() for parent in parents):
        raise InvalidCommandError("these are files: --out FILE.safetensors says where their merge goes")
    if "timeout" not in typed:
        given["timeout"] = _LONG
    as_json, store = given.pop("as_json"), given.pop("store")
    how = options.how(given)
    slices = dict(_slice(text) for text in given.pop("slices"))
    settings, weights = read_settings(given.pop("settings")), read_weights(given.pop("weights"))
    fisher = "true" if given.pop("true_fisher") else "empirical"
    strategies = list(given.pop("strategies"))
    for name in _OF_FILES:
        given.pop(name)
    with options.connect(store) as client:
        result = client.merge(
            parents,
            strategies,
            options=settings,
            weights=weights,
            slices=slices,
            fisher=fisher,
            **given,
            **how,
        )
    if as_json:
        click.echo(render.document(result))
    elif "scores" not in result:
        say(
            "merged",
            {k: v for k, v in result.items() if k in ("id", "status", "run", "from", "path", "hash", "step")},
            False,
        )
    else:
        click.echo(merge_table.preview(result))
        if result["committed"]:
            shown = {key: result[key] for key in ("step", "run", "from", "path", "hash")}
            say(f"committed {result['committed']}", shown, False)
    if result.get("refused"):
        raise CommandError(result["refused"])


def _merge_files(parents: Sequence[str], out: Path, given: dict[str, Any]) -> None:
    if len(given["strategies"]) != 1 or given["strategies"][0] in ("all", "greedy"):
        raise InvalidCommandError("files are merged by one --strategy; all and greedy, which judge, are for a session")
    base = None if given["base"] is None else Path(given["base"])
    found = merge_of_files(
        [Path(parent) for parent in parents],
        given["strategies"][0],
        out,
        base,
        given["weights"],
        [Path(path) for path in given["fishers"]],
        [Path(path) for path in given["grams"]],
        given["settings"],
        given["only"],
        given["force"],
    )
    if given["as_json"]:
        click.echo(render.document(found))
        return
    for warning in found.warnings:
        click.echo(f"{click.style('warning:', fg='yellow', bold=True)} {warning}", err=True)
    click.echo(merged_text(found))


def _refuse(names: set[str], what: str) -> None:
    if names:
        words = ", ".join(
            f"--{name.replace('_', '-')}" for name in sorted(_OF_FILES.get(name, name).strip("-") for name in names)
        )
        raise InvalidCommandError(f"{words}: {what}")


def _slice(text: str) -> tuple[str, str]:
    name, sign, expression = text.partition("=")
    if not name.strip() or not sign:
        raise InvalidCommandError(f"--slice takes NAME=EXPRESSION, such as 'hard=top(loss, 50)', not {text!r}")
    return name.strip(), expression


def merge_of_files(
    parents: Sequence[Path],
    strategy: str,
    out: Path,
    base: Path | None,
    weights: str | None,
    fishers: Sequence[Path],
    grams: Sequence[Path],
    settings: Sequence[str],
    only: str | None,
    force: bool,
) -> Merged:
    """Merge files, by what was typed."""
    if fishers and grams:
        raise InvalidCommandError("a strategy uses --fisher or --gram, not both")
    chosen, shares = read_settings(settings), read_weights(weights)
    from onthefly.merging.streaming import merge_files

    return merge_files(
        parents,
        strategy,
        chosen,
        out=out,
        weights=shares,
        base=base,
        statistics=fishers or grams or None,
        only=only,
        force=force,
    )


def merged_text(found: Merged) -> str:
    """A merge, for people."""
    how = f"{found.strategy} of {len(found.parents)}"
    told = f"{found.tensors} tensors  {render.size(found.size)}  {found.hash[:12]}  {render.dim(str(found.path))}"
    lines = [f"{render.bold('merged')} {how}  {told}"]
    if found.options:
        lines.append(f"  {render.dim(render.pairs(found.options))}")
    for word, names in (("averaged, not covered", found.averaged), ("from the first parent", found.kept)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  {word}: {', '.join(names[:3])}{more}")
    return "\n".join(lines)


def read_settings(settings: Sequence[str]) -> dict[str, str]:
    """``["density=0.2"]`` as a mapping. Raises `InvalidCommandError`."""
    pairs = [setting.partition("=") for setting in settings]
    for setting, (name, sign, _) in zip(settings, pairs, strict=True):
        if not name or not sign:
            raise InvalidCommandError(f"--set takes NAME=VALUE, such as density=0.2, not {setting!r}")
    return {name: value for name, _, value in pairs}


def read_weights(text: str | None) -> list[float] | None:
    """``"1,2"`` as numbers. Raises `InvalidCommandError`."""
    if text is None:
        return None
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as e:
        raise InvalidCommandError(f"--weights takes numbers, such as 1,2, not {text!r}") from e
