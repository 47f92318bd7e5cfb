"""`onthefly resume`: let a paused session train on, or start an unfinished run again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onthefly.cli import options, render, steer
from onthefly.errors import InvalidCommandError

if TYPE_CHECKING:
    from onthefly.client import Client, Delivery
    from onthefly.store.queries import SessionRow


@click.command("resume", short_help="Go on: with a paused session, or with a run whose process is gone.")
@click.argument("run", required=False)
@options.delivery
def resume_command(run: str | None, as_json: bool, store: Path | None, **given: Any) -> None:
    """Go on training.

    With a live session: let it train on if it is paused. Without one: start the recorded command line of the unfinished run
    again, in its working directory and in this terminal; it goes on from the newest good checkpoint. RUN says which
    run, when several are paused or unfinished.
    """
    if run is not None and given["run_name"] not in (None, run):
        raise InvalidCommandError("give RUN or --run, not both")
    given["run_name"] = run or given["run_name"]
    how = options.how(given)
    with options.connect(store) as client:
        live = _paused(client, how)
        if live is not None:
            how["session"] = live.id
            steer.say(f"resumed {live.run}", client.resume(**how), as_json)
            return
        target = client.resume_target(given_run(how))
        click.echo(
            f"{render.bold('resuming')} {target.run.name}  {render.dim(' '.join(target.launch['argv']))}", err=True
        )
        client.relaunch(target)


def given_run(how: Delivery) -> str | None:
    """The run that is asked for by name. Raises `InvalidCommandError` for a session's number: the session is over."""
    which = how.get("session")
    if isinstance(which, int):
        raise InvalidCommandError(f"session {which} is not alive; name the run to start again: onthefly resume RUN")
    return which


def _paused(client: Client, how: Delivery) -> SessionRow | None:
    """The live session that is meant; with several, the one that is paused. None when there is none to mean."""
    which = how.get("session")
    live = [row for row in client.sessions(alive=True) if which is None or which in (row.id, row.run)]
    paused = [row for row in live if row.status == "paused"]
    if len(paused) == 1:
        return paused[0]
    return client.session(which) if live else None
