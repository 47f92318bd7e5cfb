"""Commands to the live session. Each waits for the session's answer and says it in one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from onthefly.cli import options, render
from onthefly.errors import InvalidCommandError


@click.command("pause", short_help="Hold training at the next step.")
@click.option("--no-save", is_flag=True, help="Do not save a checkpoint once paused.")
@options.delivery
def pause_command(no_save: bool, **given: Any) -> None:
    """Hold training at the next step boundary, and save a checkpoint there. Returns as soon as training stands."""
    as_json, store, how = _taken(given)
    with options.connect(store) as client:
        say("paused", client.pause(save=not no_save, **how), as_json)


@click.command("save", short_help="Save a checkpoint now.")
@click.option("--pin", is_flag=True, help="Never evict it.")
@click.option(
    "--path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write it to this new file instead of into the store; it is recorded, and never evicted.",
)
@options.delivery
def save_command(pin: bool, path: Path | None, **given: Any) -> None:
    """Save a checkpoint at the next step boundary. It is durable when this returns."""
    as_json, store, how = _taken(given)
    with options.connect(store) as client:
        say("saved", client.save(path, pin=pin, **how), as_json)


@click.command("load", short_help="Put a checkpoint back into the live session.")
@click.argument("ref")
@options.delivery
def load_command(ref: str, **given: Any) -> None:
    """Put the state of the checkpoint REF back into the live session. The run goes on from there as a new generation."""
    as_json, store, how = _taken(given)
    with options.connect(store) as client:
        say("loaded", client.load(ref, **how), as_json)


@click.command("set", short_help="Change the learning rate and other values live.")
@click.argument("values", nargs=-1, required=True, metavar="NAME=VALUE...")
@click.option("--hold", is_flag=True, help="Keep the values fixed, whatever a scheduler says.")
@click.option("--release", is_flag=True, help="Give the named values back to their scheduler or their script.")
@options.delivery
def set_command(values: tuple[str, ...], hold: bool, release: bool, **given: Any) -> None:
    """Change values from the next step on.

    A name is a knob of the script's, grad_clip, a group value such as lr, or that of one group, such as optimizer.0.lr. A
    value is JSON, or else text. Under a scheduler a group value becomes a factor; NAME*=FACTOR multiplies it.

    \b
      onthefly set lr=1e-4 weight_decay=0.01
      onthefly set 'lr*=0.1'
      onthefly set lr=1e-4 --hold
      onthefly set lr --release
    """
    as_json, store, how = _taken(given)
    named = assignments(values, release=release)
    with options.connect(store) as client:
        say("set", client.set(named, hold=hold, release=release, **how), as_json)


@click.command("test", short_help="Evaluate the model; training is not affected.")
@click.option("--data", type=click.Choice(["test", "val"]), default="test", show_default=True, help="On which data.")
@click.option("--no-save", is_flag=True, help="Do not save a checkpoint of the tested state.")
@options.delivery
def test_command(data: str, no_save: bool, **given: Any) -> None:
    """Evaluate the model at the next step boundary. Training is not affected."""
    as_json, store, how = _taken(given)
    with options.connect(store) as client:
        say("tested", client.test(data, save=not no_save, **how), as_json)


@click.command("reset", short_help="Go back to the state that the session began with.")
@options.delivery
def reset_command(**given: Any) -> None:
    """Go back to the state that the session began with. The run goes on from there as a new generation."""
    as_json, store, how = _taken(given)
    with options.connect(store) as client:
        say("reset", client.reset(**how), as_json)


@click.command("stop", short_help="Save and end the process; `onthefly resume` goes on.")
@click.option("--no-save", is_flag=True, help="Leave without a checkpoint.")
@options.delivery
def stop_command(no_save: bool, **given: Any) -> None:
    """Finish the step, save a checkpoint and end the process. `onthefly resume` goes on from there."""
    as_json, store, how = _taken(given)
    with options.connect(store) as client:
        say("stopped", client.stop(save=not no_save, **how), as_json)


def assignments(words: Sequence[str], *, release: bool = False) -> dict[str, Any]:
    """``lr=1e-4`` and ``lr*=0.1`` as names and values. Raises `InvalidCommandError`."""
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        factor = name.endswith("*")
        name = name.removesuffix("*").strip()
        if not name or bool(equals) == release:
            wanted = "only names when values are released" if release else "NAME=VALUE, such as lr=1e-4"
            raise InvalidCommandError(f"set: {word!r} is not what is expected here: {wanted}")
        if name in values:
            raise InvalidCommandError(f"set: {name} is given twice")
        values[name] = f"*{text.strip()}" if factor else _parsed(text)
        if factor and not isinstance(_parsed(text), int | float):
            raise InvalidCommandError(f"set: {word!r}: a factor is a number")
    return dict.fromkeys(values) if release else values


def say(what: str, result: dict[str, Any], as_json: bool) -> None:
    """Print a command's answer: in one line, with lines below for what was changed."""
    if as_json:
        click.echo(render.document(result))
        return
    rest = dict(result)
    if rest.get("status") == "queued":
        click.echo(f"queued {render.dim(str(rest.get('id', '')))}")
        return
    changes = rest.pop("changed", None)
    words = [f"step {step}"] if (step := rest.pop("step", None)) is not None else []
    rest.pop("epoch", None)
    saved = _checkpoint(rest)
    click.echo("  ".join([render.bold(what), *words, *_numbers(rest), *saved]))
    for change in changes or ():
        click.echo(f"  {change['name']}  {render.value(change['before'])} -> {render.value(change['after'])}")
    if changes == []:
        click.echo("  nothing changed: it was so already")


def _checkpoint(rest: dict[str, Any]) -> list[str]:
    """The checkpoint that the answer is about, in words; what they say is taken out of `rest`."""
    path = rest.pop("path", None) or rest.pop("loaded", None)
    content, size = rest.pop("hash", None), rest.pop("size", None)
    words = [str(content)[:12]] if content else []
    words += [render.size(size)] if size is not None else []
    return words + ([render.dim(str(path))] if path is not None else [])


def _numbers(rest: dict[str, Any]) -> list[str]:
    shown = {name: item for name, item in rest.items() if not isinstance(item, bool) and item is not None}
    seconds = shown.pop("seconds", None)
    words = [render.pairs(shown)] if shown else []
    return words + ([f"in {render.span(float(seconds))}"] if seconds is not None else [])


def _parsed(text: str) -> Any:
    for read in (json.loads, float):  # float also takes `.5` and `1.`, which JSON does not
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _taken(given: dict[str, Any]) -> tuple[bool, Path | None, Any]:
    return given.pop("as_json"), given.pop("store"), options.how(given)
