"""A stop watch for the parts of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from onthefly.health.throughput import PARTS


class Clock:
    """Knows which part of a step is under way, and how long each took. Time that collectors take counts for none.

    On CUDA the device is waited for at every mark: kernels run later than they are called.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._wait = device.type == "cuda"
        self._part = "rest"
        self._since = now()
        self._hidden = 0.0
        self._seconds = dict.fromkeys(PARTS, 0.0)

    @property
    def part(self) -> str:
        return self._part

    def turn(self, part: str) -> str:
        """From now on it is this part. Gives the one before."""
        if self._wait:
            torch.cuda.synchronize()
        now, before = self._now(), self._part
        self._seconds[before] += max(now - self._since - self._hidden, 0.0)
        self._part, self._since, self._hidden = part, now, 0.0
        return before

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Inside is what would not be there without a collector."""
        began = self._now()
        try:
            yield
        finally:
            self._hidden += self._now() - began

    def move(self, source: str, target: str, seconds: float) -> None:
        """So many seconds that were counted for one part were of another."""
        seconds = min(seconds, self._seconds[source])
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def lap(self) -> dict[str, float]:
        """The seconds of each part since the last lap."""
        self.turn(self._part)
        done, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return done
