"""The recorder thread: the only part of a training process that touches the database."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue

from onthefly.control import commands
from onthefly.control.gate import Gate, Request
from onthefly.errors import InvalidCommandError, StoreError
from onthefly.store.journal import Journal
from onthefly.store.projection import project
from onthefly.store.store import CommandWatch, Store

_POLL = 0.02  # seconds between looks for commands
_FLUSH = 0.5  # between writes of the journal's news into the database: each costs training a few milliseconds
_HEARTBEAT = 1.0
_RETRY = 0.5  # while the database cannot be used
_BUSY = 0.1  # that another process's write is waited for: whoever forks loader workers meanwhile waits with it
_PATIENCE = 1.0  # with an outage, until anybody is told
_LAST_TRIES = 2.0  # for the last news of a session; what is left then is carried over by whoever opens the store next

Status = Callable[[], tuple[str, int, int, float | None]]
"""What a heartbeat says: status, step, epoch, the last loss."""


class Recorder:
    """Carries facts from the journal to the database, and commands from the database to the gate.

    Nothing here is waited for by training: while the database is locked, full or gone, the journal keeps everything,
    and it is carried over when the database is back, or by whoever opens the store after this process has died.
    """

    def __init__(
        self, store: Store, session: int, journal: Journal, gate: Gate, status: Status, is_due: Callable[[], bool]
    ) -> None:
        self._root = store.root  # a connection of its own: that one waits longer
        self._session = session
        self._journal = journal
        self._gate = gate
        self._status = status
        self._is_due = is_due  # a checkpoint is: the gate is raised for it
        self._seen: set[str] = set()
        self._deferred: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._outside = threading.Lock()  # held while the database is in use; os.fork waits for it
        self._stop = False
        self._give_up = float("inf")
        self._awake = threading.Event()
        self._urgent = False
        self._unusable_since: float | None = None
        self._told = False
        self.on_outage: Callable[[float, int], None] = lambda seconds, lost: None
        self._lost = 0
        self._log = logging.getLogger("onthefly")
        self._thread = threading.Thread(target=self._run, name="onthefly-recorder", daemon=True)
        _stay_outside_while_forking(self)

    def start(self) -> None:
        self._thread.start()

    def defer(self, task: Callable[[], None]) -> None:
        """Run something short on this thread, such as reading a device tensor."""
        self._deferred.put(task)

    def hurry(self) -> None:
        """Somebody waits for what was just written down."""
        self._urgent = True
        self._awake.set()

    def close(self, timeout: float = 10.0) -> None:
        """Stop, after one last carrying over. What the database did not take stays in the journal."""
        self._give_up = time.monotonic() + _LAST_TRIES
        self._stop = True
        self._awake.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    # -- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        store: Store | None = None
        watch: CommandWatch | None = None
        flushed = beat = 0.0
        carried, said = -1, ""
        while True:
            self._awake.clear()
            last, urgent, self._urgent = self._stop, self._urgent, False
            self._run_deferred()
            if self._is_due():
                self._gate.raised = True
            now = time.monotonic()
            try:
                with self._outside:
                    if store is None:
                        store = Store.open(self._root, busy_timeout=_BUSY)
                    if watch is None:
                        watch = CommandWatch(store)
                        self._take_commands(store)
                    elif watch.changed():
                        self._take_commands(store)
                    if (now - flushed >= _FLUSH or last or urgent) and (
                        self._journal.seq != carried or self._journal.failing
                    ):
                        if self._journal.failing:
                            self._journal.sync()  # training may have nothing to write for long
                        carried, flushed = self._journal.seq, now
                        project(store, self._session)
                    status, step, epoch, loss = self._status()
                    if now - beat >= _HEARTBEAT or last or status != said:
                        beat, said = now, status
                        store.heartbeat(
                            self._session, status=status, step=step, epoch=epoch, time=time.time(), loss=loss
                        )
                    if self._journal.failing:
                        self._unusable(
                            now, "its journal cannot be written; training goes on, memory keeps what happens"
                        )
                    else:
                        self._usable_again(now)
                    if last:
                        project(store, self._session)  # what has just been said
            except Exception as e:  # noqa: BLE001  whatever it is, training must go on, and the next try may succeed
                if not isinstance(e, StoreError | OSError):
                    self._log.exception("the recorder met what it does not know; it goes on trying")
                carried = -1
                if watch is not None:
                    watch.close()
                watch = None
                self._unusable(now, f"{e}; training goes on, the journal keeps what happens")
            if last and (watch is not None or now >= self._give_up):
                break
            self._awake.wait(_POLL if watch is not None or last else _RETRY)
        if watch is not None:
            watch.close()
        if store is not None:
            store.close()

    def _take_commands(self, store: Store) -> None:
        for row in store.queued_commands(self._session):
            if row.id in self._seen:
                continue
            self._seen.add(row.id)
            try:
                command = commands.build(row.kind, row.arguments)
            except InvalidCommandError as e:
                self._refuse(row.id, e)
            else:
                self._gate.put(Request(row.id, command))

    def _refuse(self, command: str, e: InvalidCommandError) -> None:
        _, step, epoch, _ = self._status()
        error = {"type": type(e).__name__, "message": str(e), "exit_code": e.exit_code}
        answer = {"command": command, "status": "failed", "result": None, "error": error}
        self._journal.fact("result", {**answer, "step": step, "epoch": epoch, "time": time.time()})
        self._urgent = True

    def _run_deferred(self) -> None:
        while True:
            try:
                task = self._deferred.get_nowait()
            except Empty:
                return
            try:
                task()
            except Exception:  # noqa: BLE001  a number is lost, and not the thread
                self._log.exception("a number that was logged could not be read")

    def _unusable(self, now: float, reason: str) -> None:
        if self._unusable_since is None:
            self._unusable_since = now
        if not self._told and now - self._unusable_since >= _PATIENCE:
            self._told = True
            self._log.warning("the store cannot be used: %s", reason)

    def _usable_again(self, now: float) -> None:
        lost = self._journal.lost - self._lost
        seconds = now - self._unusable_since if self._unusable_since is not None else 0.0
        told, self._told, self._unusable_since, self._lost = self._told, False, None, self._journal.lost
        if told or lost:
            self.on_outage(seconds, lost)


def _stay_outside_while_forking(recorder: Recorder) -> None:
    """A child forked in the middle of a database call would inherit SQLite's locks and half of its state."""
    reference = weakref.ref(recorder)

    def before() -> None:
        if (live := reference()) is not None:
            live._outside.acquire()

    def after() -> None:
        if (live := reference()) is not None and live._outside.locked():
            live._outside.release()

    os.register_at_fork(before=before, after_in_parent=after, after_in_child=after)
