"""Options that several commands share, and how a command comes to its client."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from onthefly.errors import InvalidCommandError

if TYPE_CHECKING:
    from onthefly.client import Choice, Client, Delivery

F = TypeVar("F", bound=Callable[..., Any])

store = click.option(
    "--store",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="The store. Default: $ONTHEFLY_STORE, or .onthefly in the working directory.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")

timeout = click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for the answer.",
)


def choice(command: F) -> F:
    """``--session`` and ``--run``: which live session."""
    command = click.option("--run", "run_name", metavar="NAME", help="The session on this run.")(command)
    return click.option("--session", "session_id", type=int, metavar="ID", help="The session of this number.")(command)


def delivery(command: F) -> F:
    """Everything a command to a live session takes besides its arguments."""
    command = as_json(command)
    command = store(command)
    command = timeout(command)
    command = click.option("--no-wait", is_flag=True, help="Do not wait for the answer.")(command)
    return choice(command)


def chosen(session_id: int | None, run_name: str | None) -> Choice:
    """Which session those two options mean. Raises `InvalidCommandError` when both are given."""
    if session_id is not None and run_name is not None:
        raise InvalidCommandError("give --session or --run, not both")
    return session_id if session_id is not None else run_name


def how(options: dict[str, Any]) -> Delivery:
    """The options of `delivery`, as the client takes them. They are taken out of `options`."""
    return {
        "session": chosen(options.pop("session_id"), options.pop("run_name")),
        "wait": not options.pop("no_wait"),
        "timeout": options.pop("timeout"),
    }


def connect(path: Path | None) -> Client:
    """The client of a store. SQLAlchemy is loaded here, and not by ``--help``."""
    # Loading makes many objects and no garbage: looking for some takes a fifth of the time that `status` has.
    gc.disable()
    try:
        from onthefly import client
    finally:
        gc.enable()
    return client.connect(path)
