"""Options that several commands share, and how a command comes to its client."""

from __future__ import annotations

import functools
import gc
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from onthefly.errors import InvalidCommandError

if TYPE_CHECKING:
    from onthefly.client import Choice, Client, Delivery

F = TypeVar("F", bound=Callable[..., Any])

_CHOICES = ("select", "loss_quantile", "loss_range", "top_loss", "indices")

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


def selecting(command: F) -> F:
    """Which samples. The command is given a `recipe`: its notation or its JSON form, or None."""

    @functools.wraps(command)
    def with_recipe(*args: Any, **given: Any) -> Any:
        return command(*args, recipe=_recipe({name: given.pop(name) for name in _CHOICES}), **given)

    wrapped: Any = with_recipe
    for option in reversed(
        (
            click.option(
                "--select", metavar="EXPRESSION", help="Any choice: 'top(el2n, 500) - suspects()'. See docs/samples.md."
            ),
            click.option("--loss-quantile", metavar="LOW:HIGH", help="Losses between these quantiles: 0.9:1.0."),
            click.option(
                "--loss-range", metavar="LOW:HIGH", help="Losses between these values; either may be left out."
            ),
            click.option("--top-loss", type=click.IntRange(min=1), metavar="N", help="The N largest losses."),
            click.option(
                "--indices", metavar="LIST|FILE", help="These samples: 3,17,42, or a file with one index a line."
            ),
        )
    ):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[no-any-return]


def _recipe(given: dict[str, Any]) -> str | dict[str, Any] | None:
    """What those options say. Raises `InvalidCommandError` for two of them, and for what is no range."""
    said = {name: value for name, value in given.items() if value is not None}
    if len(said) > 1:
        words = " and ".join(f"--{name.replace('_', '-')}" for name in said)
        raise InvalidCommandError(
            f"{words} are two choices; say both as one: --select 'quantile(loss, 0.9, 1) & top(el2n, 500)'"
        )
    if not said:
        return None
    ((name, value),) = said.items()
    if name == "select":
        return str(value)
    if name == "top_loss":
        return {"select": "top", "field": "loss", "k": value}
    if name == "indices":
        return {"select": "indices", "indices": _indices(value)}
    low, colon, high = value.partition(":")
    try:
        bounds = [float(end) if end else None for end in (low, high)]
    except ValueError:
        bounds = []
    if not colon or not bounds:
        raise InvalidCommandError(f"--{name.replace('_', '-')} takes LOW:HIGH, such as 0.9:1.0, not {value!r}")
    kind = "quantile" if name == "loss_quantile" else "range"
    if kind == "quantile":
        bounds = [0.0 if bounds[0] is None else bounds[0], 1.0 if bounds[1] is None else bounds[1]]
    return {"select": kind, "field": "loss", "low": bounds[0], "high": bounds[1]}


def _indices(text: str) -> list[Any]:
    words = text.replace(",", " ").split()
    if not all(word.lstrip("-").replace(".", "", 1).isdigit() for word in words):
        try:
            words = Path(text).expanduser().read_text("utf-8").replace(",", " ").split()
        except (OSError, UnicodeDecodeError) as e:
            raise InvalidCommandError(f"--indices: {text!r} is neither a list of numbers nor a file of them") from e
    try:
        return [int(word) if word.lstrip("-").isdigit() else float(word) for word in words]
    except ValueError as e:
        raise InvalidCommandError(f"--indices: {e}") from e


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
    return client.connect(path, door="cli")


@contextmanager
def leaving_in_order() -> Iterator[None]:
    """Inside, a SIGTERM (of `timeout`, say) lets this process end a process that it has started and clear up before it leaves."""
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
