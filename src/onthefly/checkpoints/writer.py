"""Threads that work behind the training: one copies staged tensors, one makes checkpoints durable."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue


class Worker:
    """A thread that does what it is given, one task after the other. What a task raises is logged.

    The thread starts with the first task, and does not keep the process alive. Where none can be started any more (the
    interpreter is shutting down) a task is done at once, by the caller.
    """

    def __init__(self, name: str) -> None:
        self.handles: set[int] = set()
        """Files that a task has open; a forked child closes them, or it would keep their disk space."""
        self._name = name
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        _close_in_children(self)

    def submit(self, task: Callable[[], None]) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                _done(task)
                return
            self._thread = thread
        self._tasks.put(task)

    def drain(self) -> None:
        """Wait until everything given so far is done."""
        if self._thread is not None and self._thread is not threading.current_thread():
            done = threading.Event()
            self._tasks.put(done.set)
            done.wait()

    def close(self) -> None:
        """End the thread, once everything given so far is done."""
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            _done(task)


def _done(task: Callable[[], None]) -> None:
    try:
        task()
    except BaseException:
        logging.getLogger("onthefly").exception("a task behind the training failed")


def _close_in_children(worker: Worker) -> None:
    reference = weakref.ref(worker)

    def after() -> None:
        if (live := reference()) is not None:
            for handle in live.handles:
                with suppress(OSError):  # the parent was just about to close it
                    os.close(handle)

    os.register_at_fork(after_in_child=after)
