"""The gate: where requests wait until the training thread passes a step boundary."""

from __future__ import annotations

from dataclasses import dataclass
from queue import Empty, SimpleQueue

from onthefly.control.commands import Command


@dataclass(frozen=True)
class Request:
    """A command on its way to the training thread; `id` is its row in the store."""

    id: str
    command: Command


class Gate:
    """Filled by the recorder thread and by signal handlers, emptied by the training thread.

    `raised` is all that a step looks at. It is cleared *before* the queue is emptied, so nothing that arrives meanwhile
    is left lying.
    """

    def __init__(self) -> None:
        self.raised = False
        self.signal: int | None = None
        self._queue: SimpleQueue[Request | None] = SimpleQueue()  # its put may interrupt its get: handlers use it

    def put(self, request: Request) -> None:
        self._queue.put(request)
        self.raised = True

    def put_signal(self, number: int) -> None:
        """Ask the training thread to save and leave."""
        self.signal = number
        self._queue.put(None)
        self.raised = True

    def take(self, timeout: float = 0.0) -> Request | None:
        """The next request, or None when there is none within `timeout` seconds, or a signal came."""
        try:
            return self._queue.get(timeout=timeout) if timeout else self._queue.get_nowait()
        except Empty:
            return None
