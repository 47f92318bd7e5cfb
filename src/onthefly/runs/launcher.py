"""Launching beside: recorded command lines, each started as a process of its own, a few at once and the rest in order."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from onthefly.errors import InvalidCommandError, OnTheFlyError, ResumeError, said
from onthefly.runs import launch as launching
from onthefly.runs.launch import Launch

LINES = 20
"""How many lines of its log are told of a run that has ended."""
_READ = 8192  # bytes of a log, from its end
_LOOK = 0.2  # seconds from one look at the children to the next; there is none without children

_SEQUENCE = re.compile(  # what a terminal takes for an order: colours, cursor moves; titles and other strings; the rest
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b[]PX^_][^\x07\x1b\n]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


@dataclass(frozen=True)
class Order:
    """A run to start: the recorded command line, what its environment says besides, and the file for its output."""

    run: str
    launch: Launch
    extra: Mapping[str, str]
    log: Path
    ready: Callable[[], object] | None = None
    """Called right before the start, on the launcher's thread. What it raises is why the run could not be started."""


class Launcher(Protocol):
    """Starts runs beside this process. They are independent of it: they live on when it ends."""

    @property
    def waiting(self) -> tuple[str, ...]:
        """The runs that are not started yet, next first."""

    @property
    def running(self) -> tuple[str, ...]:
        """The runs that were started and are not known to have ended, oldest first."""

    def submit(self, order: Order) -> None:
        """Take an order, and return at once.

        Raises `InvalidCommandError` when the run waits or runs already, and `ResumeError` after `close`.
        """

    def close(self) -> None:
        """Start nothing more, and leave alone what runs. A second call does nothing."""


class LocalLauncher:
    """A `Launcher` of processes on this machine, at most `limit` at once.

    Each has `/dev/null` as its input, appends its output to the order's log, and is a session of its own: no terminal
    and no signal to this process's group reaches it. It inherits no open file, and neither ignored nor blocked signals.

    The callbacks are called on the launcher's one thread, which begins with the first order, in this order for a run:
    `on_started(run, pid)` and later `on_ended(run, code, tail)`, or only `on_failed(run, reason)` when it could not be
    started. `code` is negative for the signal that killed it, and None when something else in this process took it
    (`os.wait()`, an ignored SIGCHLD); `tail` is what it wrote last, see `tail`. What a callback raises is logged.

    Raises `ValueError` for a `limit` below 1.
    """

    def __init__(
        self,
        limit: int = 2,
        *,
        on_started: Callable[[str, int], object],
        on_ended: Callable[[str, int | None, str], object],
        on_failed: Callable[[str, str], object],
    ) -> None:
        if limit < 1:
            raise ValueError(f"a launcher runs at least 1 process at once, not {limit}")
        self._limit = limit
        self._on_started, self._on_ended, self._on_failed = on_started, on_ended, on_failed
        self._changed = threading.Condition()  # guards what follows
        self._waiting: OrderedDict[str, Order] = OrderedDict()  # an order stays here while it is being started
        self._running: dict[str, _Child] = {}
        self._closed = False
        self._thread: threading.Thread | None = None
        self._outside = threading.Lock()  # held while a process is being made; os.fork waits for it
        _stay_outside_while_forking(self)

    @property
    def waiting(self) -> tuple[str, ...]:
        with self._changed:
            return tuple(self._waiting)

    @property
    def running(self) -> tuple[str, ...]:
        with self._changed:
            return tuple(self._running)

    def submit(self, order: Order) -> None:
        """Take an order, and return at once.

        Raises `InvalidCommandError` when the run waits or runs already, and `ResumeError` after `close`, or when the
        system gives no thread.
        """
        with self._changed:
            if self._closed:
                raise ResumeError(f"{order.run!r} cannot be started beside a session that has ended; {_by_hand(order)}")
            if order.run in self._waiting:
                raise InvalidCommandError(f"{order.run!r} waits to be started already")
            if order.run in self._running:
                raise InvalidCommandError(f"{order.run!r} runs already, as process {self._running[order.run].pid}")
            if self._thread is None:
                self._thread = self._begin(order)
            self._waiting[order.run] = order
            self._changed.notify()

    def close(self) -> None:
        """Start nothing more, wait for no child, and end the thread, after the callback or `ready` that it is in.

        What still waited is told to `on_failed`. A child that ends later, while this process lives on, leaves its
        entry in the table of processes until this process ends: nobody is left to take its exit code.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    # -- the thread --------------------------------------------------------------------------------------------

    def _begin(self, order: Order) -> threading.Thread:
        thread = threading.Thread(target=self._run, name="onthefly-launcher", daemon=True)
        try:
            thread.start()
        except RuntimeError as e:
            raise ResumeError(f"{order.run!r} cannot be started from here: {e}; {_by_hand(order)}") from e
        return thread

    def _run(self) -> None:
        while (order := self._next()) is not None:
            self._start(order)
        with self._changed:
            dropped = list(self._waiting.values())
            self._waiting.clear()
        for order in dropped:
            self._tell(self._on_failed, order.run, f"it waited for its turn when its session ended; {_by_hand(order)}")

    def _next(self) -> Order | None:
        """Waits for an order whose turn it is. Meanwhile tells of those that have ended. None once closed."""
        while True:
            self._tell_ended()
            with self._changed:
                if self._closed:
                    return None
                if self._waiting and len(self._running) < self._limit:
                    return next(iter(self._waiting.values()))
                self._changed.wait(_LOOK if self._running else None)

    def _start(self, order: Order) -> None:
        try:
            if order.ready is not None:
                order.ready()
            if self._closed:
                return
            order.log.parent.mkdir(parents=True, exist_ok=True)
            with open(order.log, "ab") as output:
                began = output.tell()
                pid = self._spawn(order, output.fileno())
        except BaseException as e:  # noqa: BLE001  whatever it is, it is told, and the others are started
            with self._changed:
                del self._waiting[order.run]
            words = said(e) if isinstance(e, OnTheFlyError | OSError) else f"{type(e).__name__}: {e}"
            self._tell(self._on_failed, order.run, words)
            return
        with self._changed:
            del self._waiting[order.run]
            self._running[order.run] = _Child(pid, order.log, began)
        self._tell(self._on_started, order.run, pid)

    def _spawn(self, order: Order, output: int) -> int:
        with self._outside:
            process = launching.spawn(
                order.launch,
                order.extra,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        # It is waited for by its pid. Popen would take a code that is gone for 0, and warn of a child that outlives it.
        process.returncode = 0
        return process.pid

    def _tell_ended(self) -> None:
        for run, child in list(self._running.items()):
            try:
                ended, status = os.waitpid(child.pid, os.WNOHANG)
                code = os.waitstatus_to_exitcode(status)
            except ChildProcessError:
                ended, code = child.pid, None
            if ended:
                with self._changed:
                    del self._running[run]
                self._tell(self._on_ended, run, code, child.last_words())

    def _tell(self, callback: Callable[..., object], *what: Any) -> None:
        try:
            callback(*what)
        except BaseException:
            logging.getLogger("onthefly").exception("what became of the run %r could not be told", what[0])


@dataclass(frozen=True)
class _Child:
    pid: int
    log: Path
    began: int  # the size of the log before it

    def last_words(self) -> str:
        try:
            return tail(self.log, since=self.began)
        except OSError as e:
            return f"(its log cannot be read: {said(e)})"


def tail(path: Path, lines: int = LINES, *, since: int = 0) -> str:
    """The last lines of a log, of at most 8 KB, as plain text. "" when it is empty or not there.

    Only what lies behind the first `since` bytes counts. A terminal can be given it: escape sequences and control
    characters other than tab and newline are taken out, and of a line that was written over and over, such as a
    progress bar, the last state stays. What is not UTF-8 becomes U+FFFD. Raises `ValueError` for less than one line,
    and `OSError` when the file cannot be read.
    """
    if lines < 1:
        raise ValueError(f"the tail of a log is at least 1 line, not {lines}")
    try:
        with open(path, "rb") as log:
            begin = max(since, log.seek(0, os.SEEK_END) - _READ)
            log.seek(begin)
            raw = log.read(_READ)
    except FileNotFoundError:
        return ""
    if begin > since:
        raw = raw.lstrip(bytes(range(0x80, 0xC0)))  # the rest of a character that was cut
    text = _SEQUENCE.sub("", raw.decode("utf-8", "replace"))
    shown = [_CONTROL.sub("", line.rstrip("\r").rpartition("\r")[2]) for line in text.split("\n")]
    return "\n".join("\n".join(shown).rstrip().split("\n")[-lines:])


def _by_hand(order: Order) -> str:
    return f"start it with `onthefly resume {order.run}`"


def _stay_outside_while_forking(launcher: LocalLauncher) -> None:
    """A child forked while a process is being made would inherit the pipe on which its start is waited for, and keep it open."""
    reference = weakref.ref(launcher)

    def before() -> None:
        if (live := reference()) is not None:
            live._outside.acquire()

    def after() -> None:
        if (live := reference()) is not None and live._outside.locked():
            live._outside.release()

    os.register_at_fork(before=before, after_in_parent=after, after_in_child=after)
