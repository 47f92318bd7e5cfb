"""Going from run to run: fork, switch, subset, undo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onthefly.cli import options
from onthefly.cli.steer import assignments, say
from onthefly.errors import InvalidCommandError


@click.command("fork", short_help="Go on as a new run, on chosen samples or with other values.")
@options.selecting
@click.option(
    "--set", "changes", multiple=True, metavar="NAME=VALUE", help="Change a value, as `onthefly set` does: lr*=0.1."
)
@click.option("--hold", is_flag=True, help="Keep the changed values fixed, whatever a scheduler says.")
@click.option("--name", help="Name of the new run. Default: fork1, fork2, ...")
@click.option("--beside", is_flag=True, help="Start it as its own process; the live run goes on.")
@click.option("--fresh", is_flag=True, help="Begin from the state that the run began with.")
@options.delivery
def fork_command(
    recipe: Any, changes: tuple[str, ...], hold: bool, name: str | None, beside: bool, fresh: bool, **given: Any
) -> None:
    """Go on as a new run from the next step boundary: on the samples that are chosen, or with other values, or both.

    \b
      onthefly fork --loss-quantile 0.9:1.0 --set 'lr*=0.1'
      onthefly fork --select 'noise_aware(0.1)' --name hard
      onthefly fork --beside --set lr=1e-3

    What the choice needs, the loss of every sample, is computed first. The run that is left stays where it is: `onthefly switch`
    goes on with it, `onthefly undo` takes the fork back.
    """
    as_json, store, how = _taken(given)
    values = assignments(changes)
    with options.connect(store) as client:
        result = client.fork(recipe, values=values, hold=hold, name=name, beside=beside, fresh=fresh, **how)
    _say("forked beside" if beside else "forked", result, as_json)


@click.command("switch", short_help="Go over to another run.")
@click.argument("run")
@options.delivery
def switch_command(run: str, **given: Any) -> None:
    """Go over to RUN, and on with it from where it stands. The run that is left keeps a checkpoint of its last step."""
    as_json, store, how = _taken(given)
    with options.connect(store) as client:
        _say("switched", client.switch(run, **how), as_json)


@click.command("subset", short_help="Train on chosen samples, or on all again.")
@options.selecting
@click.option("--all", "everything", is_flag=True, help="Train on all samples again.")
@options.delivery
def subset_command(recipe: Any, everything: bool, **given: Any) -> None:
    """Train on the samples that are chosen, from the next step on. The run stays the same; `fork` makes a new one."""
    if (recipe is None) != everything:
        raise InvalidCommandError("say which samples, such as --loss-quantile 0.9:1.0, or --all")
    as_json, store, how = _taken(given)
    with options.connect(store) as client:
        _say("subset", client.subset(recipe, **how), as_json)


@click.command("undo", short_help="Take back the last load, set, fork, switch, subset or reset.")
@options.delivery
def undo_command(**given: Any) -> None:
    """Go back to where the session was before the last command that changed its state. What was trained since stays recorded."""
    as_json, store, how = _taken(given)
    with options.connect(store) as client:
        _say("undone", client.undo(**how), as_json)


def _say(what: str, result: dict[str, Any], as_json: bool) -> None:
    warning = result.get("warning")
    shown = {key: value for key, value in result.items() if key not in ("warning", "selection", "values") or as_json}
    say(what, shown, as_json)
    if warning and not as_json:
        click.echo(f"{click.style('warning:', fg='yellow', bold=True)} {warning}", err=True)


def _taken(given: dict[str, Any]) -> tuple[bool, Path | None, Any]:
    return given.pop("as_json"), given.pop("store"), options.how(given)
