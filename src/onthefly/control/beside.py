"""Runs that this session starts beside itself, and what becomes of them."""

from __future__ import annotations

import logging
from collections.abc import Callable

from onthefly.control.history import History
from onthefly.control.start import Start
from onthefly.runs import launch
from onthefly.runs.launcher import LocalLauncher, Order
from onthefly.store import queries
from onthefly.store.projection import project


class Beside:
    """Starts runs as processes of their own, and tells in the session's history how that went.

    They are the recorded command line, told to go on with that run. They do not end with this process.
    """

    def __init__(self, begun: Start, history: History, place: Callable[[], tuple[int, int]]) -> None:
        self._start = begun
        self._history = history
        self._place = place
        self._launcher = LocalLauncher(
            begun.config.beside, on_started=self._started, on_ended=self._ended, on_failed=self._failed
        )
        self._log = logging.getLogger("onthefly")

    def start(self, run: str) -> None:
        """Start a run, once there is a place for it. Returns at once."""
        store, session = self._start.store, self._start.session
        assert self._start.launch is not None
        extra = {launch.RESUME: run, launch.STORE: str(store.root)}
        # It reads from the database what the journal says of it.
        order = Order(run, self._start.launch, extra, store.log_path(run), ready=lambda: project(store, session))
        self._launcher.submit(order)

    def close(self) -> None:
        """Start nothing more; what runs is left alone."""
        self._launcher.close()

    # -- on the launcher's thread ------------------------------------------------------------------------------

    def _started(self, run: str, pid: int) -> None:
        self._history.event("childStarted", *self._place(), child=run, pid=pid)

    def _ended(self, run: str, code: int | None, tail: str) -> None:
        died = self._never_began(run)
        said = {"tail": tail} if died or code else {}
        self._history.event("childEnded", *self._place(), child=run, code=code, **said)
        if died:
            self._history.run_status("failed", run)
            self._log.warning("%s, started beside this run, ended before it began:\n%s", run, tail)

    def _failed(self, run: str, reason: str) -> None:
        self._history.event("childFailed", *self._place(), child=run, reason=reason)
        self._log.warning("%s could not be started beside this run: %s", run, reason)

    def _never_began(self, run: str) -> bool:
        row = queries.run(self._start.store, run)
        return row is not None and row.status == "planned"
