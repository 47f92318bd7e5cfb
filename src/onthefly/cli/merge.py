"""`onthefly merge`: several models become one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onthefly.cli import options, render
from onthefly.errors import InvalidCommandError

if TYPE_CHECKING:
    from onthefly.merging.streaming import Merged

_FILE = click.Path(path_type=Path)


@click.command("merge", short_help="Merge models in files into one.")
@click.argument("parents", nargs=-1, required=True, type=_FILE, metavar="PARENT...")
@click.option("--strategy", default="swa", show_default=True, metavar="NAME", help="How.")
@click.option("--out", required=True, type=_FILE, metavar="FILE", help="The new file, .safetensors.")
@click.option("--base", type=_FILE, metavar="FILE", help="What the parents were fine-tuned from.")
@click.option("--weights", metavar="LIST", help="A weight for each parent: 1,2.")
@click.option("--fisher", "fishers", multiple=True, type=_FILE, metavar="FILE", help="A parent's Fisher information.")
@click.option("--gram", "grams", multiple=True, type=_FILE, metavar="FILE", help="A parent's Gram matrices.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="An option of the strategy: density=0.2.")
@click.option("--only", metavar="NAME", help="Of checkpoints: which model, when there are several.")
@click.option("--force", is_flag=True, help="Replace a file that is there already.")
@options.as_json
def merge_command(
    parents: tuple[Path, ...],
    strategy: str,
    out: Path,
    base: Path | None,
    weights: str | None,
    fishers: tuple[Path, ...],
    grams: tuple[Path, ...],
    settings: tuple[str, ...],
    only: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Merge the models in the files PARENT... into one: checkpoints, or state dicts in .safetensors or .pt.

    No session and no store is needed, and memory does not grow with the models. Strategies: swa, weighted (--weights), fisher
    (--fisher for each parent), adapter, lora, task_arithmetic, ties, dare and dare_ties (--base), slerp, regmean (--gram for each
    parent). Their options, given by --set, are in docs/merging.md.
    """
    found = merge_of_files(parents, strategy, out, base, weights, fishers, grams, settings, only, force)
    if as_json:
        click.echo(render.document(found))
        return
    for warning in found.warnings:
        click.echo(f"{click.style('warning:', fg='yellow', bold=True)} {warning}", err=True)
    click.echo(merged_text(found))


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
