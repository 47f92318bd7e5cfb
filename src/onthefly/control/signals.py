"""SIGINT and SIGTERM, turned into "finish the step, save and leave"."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

from onthefly.control.gate import Gate


class Signals:
    """Handles the two signals from `install` to `close`, in the process that installed it and in no other."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._owner = os.getpid()
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Take over. Elsewhere than in the main thread Python allows no handler, and none is installed."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)

    def close(self) -> None:
        """Put the old handlers back, unless somebody else has installed one since."""
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._handle:
                # None stands for a handler that was not installed from Python, and cannot be put back from there.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked loader worker: Ctrl-C is for the trainer, which ends its workers
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if number == signal.SIGINT and self._gate.signal is not None:
            raise KeyboardInterrupt
        self._gate.put_signal(number)
        if number == signal.SIGINT:
            # Whoever reads stderr may be gone with the same Ctrl-C, or be in the middle of being written to.
            with suppress(OSError, RuntimeError):
                print("\nonthefly: finishing this step, then saving; Ctrl-C again leaves at once", file=sys.stderr)
