"""One call after the other, in a thread beside the caller's: hashing goes on while the disk is waited for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

B = TypeVar("B")


class Aside:
    """Runs calls in a thread of its own, one after the other; in the caller's where no thread can be started any more.

    That is so while the interpreter shuts down, and a checkpoint may well be saved then (`atexit`).
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(1)

    def __enter__(self) -> Aside:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=kind is not None)

    def run(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        if self._pool is not None:
            try:
                return self._pool.submit(call, *arguments)
            except RuntimeError:
                self._pool.shutdown(cancel_futures=True)  # the call may be queued already
                self._pool = None
        done: Future[Any] = Future()
        done.set_result(call(*arguments))
        return done


class Buffers(Generic[B]):
    """A few buffers that are filled again once the calls that use them are done."""

    def __init__(self, buffers: list[B]) -> None:
        self._free = buffers
        self._busy: deque[tuple[B, tuple[Future[Any], ...]]] = deque()

    def take(self) -> B:
        """A buffer that nobody uses. Raises what a call that used it raised."""
        if self._free:
            return self._free.pop()
        buffer, calls = self._busy.popleft()
        for call in calls:
            call.result()
        return buffer

    def occupy(self, buffer: B, *calls: Future[Any]) -> None:
        """Give a buffer back for when these calls are done."""
        self._busy.append((buffer, calls))

    def drain(self) -> None:
        """Wait until all calls are done. Raises what one of them raised."""
        while self._busy:
            for call in self._busy.popleft()[1]:
                call.result()
