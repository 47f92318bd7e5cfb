"""What a session writes down of itself. Everything goes to the journal first; the database is made from it."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onthefly.store.journal import Journal

_MOST_DIFFERENCES = 20  # reported one by one; a run that left its line differs in every step after


@dataclass(frozen=True)
class Line:
    """What facts are written under: a run and its generation. `series` are the numbers of its metrics in the journal."""

    run: str
    generation: int
    series: dict[str, int] = field(default_factory=dict, compare=False)


class History:
    """Facts of the run that is under way, in the order in which they came to be, and the check of steps that are done a second time.

    Owns the line that is written. It never raises for a full disk: the journal holds what it cannot write.
    """

    def __init__(self, journal: Journal, run: str, generation: int) -> None:
        self.line = Line(run, generation)
        self.head = -1  # the last step that an earlier process recorded of this line; until there, steps repeat
        self.differences = 0
        self.loss: float | None = None  # the last one logged, for a heartbeat
        self._journal = journal
        self._recorded: dict[tuple[str, int], deque[float]] = {}
        self._log = logging.getLogger("onthefly")

    @property
    def run(self) -> str:
        return self.line.run

    @property
    def generation(self) -> int:
        return self.line.generation

    @property
    def seq(self) -> int:
        """The number of the last fact: what a checkpoint taken now comes after."""
        return self._journal.seq

    def expect(self, recorded: Mapping[str, Mapping[int, list[float]]], head: int) -> None:
        """Say what an earlier process logged in steps that are about to be done again, by name and step."""
        self.head = head
        self._recorded = {
            (name, step): deque(values) for name, steps in recorded.items() for step, values in steps.items()
        }

    def metrics(
        self, step: int, epoch: int, numbers: Mapping[str, float], when: float | None = None, line: Line | None = None
    ) -> None:
        """Record numbers of a step, of the line that it was of. What was recorded before is compared, and not written twice."""
        line = line or self.line
        if "loss" in numbers:
            self.loss = numbers["loss"]
        if self._recorded and line is self.line:
            numbers = self._compare(step, epoch, numbers)
        values: list[float] = []  # id, number, id, number, ...
        for name, value in numbers.items():
            number = line.series.get(name)
            if number is None:
                number = line.series[name] = self._journal.series(line.run, line.generation, name)
            values += (number, value)
        if values:
            self._journal.metrics(step, epoch, time.time() if when is None else when, values)

    def event(self, event: str, step: int, epoch: int, line: Line | None = None, /, **data: Any) -> int:
        """Record an event of the run, or of another line. Returns its number in the journal."""
        line = line or self.line
        return self._journal.fact(
            "event",
            {
                "event": event,
                "run": line.run,
                "generation": line.generation,
                "step": step,
                "epoch": epoch,
                "time": time.time(),
                "data": data,
            },
        )

    def result(
        self,
        command: str,
        step: int,
        epoch: int,
        *,
        run: str | None = None,
        result: Mapping[str, Any] | None = None,
        error: Mapping[str, Any] | None = None,
    ) -> None:
        """Answer a command. `run` is where it was carried out: by default where the session is now."""
        status = "done" if error is None else "failed"
        answer = {"command": command, "status": status, "result": result, "error": error}
        where = {"run": run or self.run, "step": step, "epoch": epoch}
        self._journal.fact("result", {**answer, **where, "time": time.time()})

    def checkpoint(self, line: Line, **data: Any) -> None:
        """Record a checkpoint of a line that is durable."""
        about = {"run": line.run, "generation": line.generation, "time": time.time()}
        self._journal.fact("checkpoint", {**about, **data})

    def scan(self, line: Line, step: int, epoch: int, **data: Any) -> None:
        """Record a scan whose file is durable."""
        where = {"run": line.run, "generation": line.generation, "step": step, "epoch": epoch}
        self._journal.fact("scan", {**where, "time": time.time(), **data})

    def pinned(self, path: str, content: str, pinned: bool) -> None:
        """Record that a checkpoint is to stay, or no longer."""
        self._journal.fact("pinned", {"path": path, "hash": content, "pinned": pinned, "time": time.time()})

    def evicted(self, path: str, content: str, reason: str) -> None:
        """Record that a checkpoint is about to be removed."""
        self._journal.fact("evicted", {"path": path, "hash": content, "reason": reason, "time": time.time()})

    def begin_generation(self, step: int, epoch: int, reason: str, base: Mapping[str, Any], **more: Any) -> None:
        """Leave the recorded line of the run: from here on it is written anew, beginning at `base`, a checkpoint."""
        self.line = Line(self.run, self.generation + 1)
        self.head = -1
        self._recorded.clear()
        # In this order: an event alone, should the process be killed here, would hide what the run then goes on to log.
        self._journal.fact("run", {"run": self.run, "generation": self.generation, "base": dict(base)})
        self.event("generation", step, epoch, reason=reason, base=dict(base), **{"from": step}, **more)

    def go_to(self, line: Line) -> None:
        """What happens from here on is of another run, in which the session is from now on."""
        self.line = line
        self.head = -1
        self._recorded.clear()
        self._journal.fact("session", {"run": line.run})

    def run_begins(
        self, run: str, base: Mapping[str, Any] | None, parents: Sequence[str], manifest: str | None
    ) -> None:
        """Record what a run stands on, once it is durable: the checkpoint it begins from, and its parents' by their hashes."""
        about: dict[str, Any] = {"run": run, "parents": list(parents), "manifest": manifest}
        self._journal.fact("run", about if base is None else {**about, "base": dict(base)})

    def run_status(self, status: str, run: str | None = None) -> None:
        self._journal.fact("run", {"run": run or self.run, "status": status})

    def session_ended(self, outcome: str) -> None:
        self._journal.fact("session", {"status": "ended", "outcome": outcome, "ended": time.time()})

    def _compare(self, step: int, epoch: int, numbers: Mapping[str, float]) -> dict[str, float]:
        new = {}
        for name, value in numbers.items():
            before = self._recorded.get((name, step))
            if not before:
                new[name] = value
                continue
            recorded = before.popleft()
            if not (recorded == value or (math.isnan(recorded) and math.isnan(value))):
                self._differs(name, step, epoch, recorded, value)
        if step > self.head:
            self._recorded.clear()
        return new

    def _differs(self, name: str, step: int, epoch: int, recorded: float, value: float) -> None:
        self.differences += 1
        if self.differences > _MOST_DIFFERENCES:
            return
        self.event("inexact", step, epoch, metric=name, recorded=recorded, repeated=value)
        self._log.warning("inexact: %s of step %d was %r and came out as %r when repeated", name, step, recorded, value)
