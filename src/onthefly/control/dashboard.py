"""The dashboard of a session's store: found, or started as a process of its own that this one does not own.

Nothing of it concerns training: what goes wrong is said, and training goes on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from onthefly.errors import OnTheFlyError, said
from onthefly.runs import launch
from onthefly.store import hubs

ASKED = "ONTHEFLY_UI"
"""The environment variable that asks for a dashboard, whatever the script says: 1."""

_PROGRAM = "import sys; from onthefly.cli import main; sys.exit(main())"
_HOST = "127.0.0.1"


def show(store: Path, say: Callable[[str], object]) -> None:
    """Say where the store's dashboard is, and start it if it is not there. Returns at once, and raises nothing."""
    try:
        if hubs.is_served(store):
            note = hubs.running(store)
            say(f"dashboard: {_url(note.url, Path(note.home))}" if note is not None else "dashboard: onthefly ui")
        elif missing := [
            name for name in ("fastapi", "uvicorn", "websockets", "tsdownsample") if find_spec(name) is None
        ]:
            logging.getLogger("onthefly").warning(
                "no dashboard: %s is not installed; pip install 'onthefly[ui]'", missing[0]
            )
        else:
            port = _free_port(store)
            url = _url(f"http://{_HOST}:{port}", store)
            _start(store, port)
            say(f"dashboard, in a moment: {url}")
    except (OnTheFlyError, OSError) as e:
        logging.getLogger("onthefly").warning("no dashboard: %s", said(e))


def _start(store: Path, port: int) -> None:
    words = ["ui", "--no-open", "--host", _HOST, "--port", str(port), str(store)]
    command = {
        "argv": [sys.executable, "-c", _PROGRAM, *words],
        "executable": sys.executable,
        "cwd": str(Path.cwd()),
        "environment": {},
    }
    with open(os.open(store / "hub" / "hub.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as log:
        # It keeps no terminal and no pipe of ours open, and no signal to our group reaches it.
        process = launch.spawn(
            command, {}, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    process.returncode = 0  # it outlives this process, and nobody waits for it


def _url(base: str, home: Path) -> str:
    return f"{base}/?token={hubs.token(home)}"


def _free_port(store: Path) -> int:
    """The port of the dashboard before, so that a page that is open finds it again; or any."""
    before = hubs.last(store)
    for port in (before.port if before is not None else 0, 0):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((_HOST, port))
            return int(probe.getsockname()[1])
    raise OSError("there is no free port")
