"""Verifying: a stretch of a run is trained again in a fresh process, and must come out bit for bit.

A stretch lies between two checkpoints of one run and generation, or between the checkpoint of another that it began from and its
own first one: then what made the run of that state, such as other samples, is done again, too.

`plan` chooses the stretch (values in, values out), `replay` runs the recorded command line over it in a temporary
store, and `differences` names what is not equal. Torch is loaded only to open checkpoints.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onthefly.control.commands import COMMANDS
from onthefly.errors import CheckpointError, CheckpointNotFoundError, InvalidCommandError, UnknownReferenceError
from onthefly.runs import replay as replaying
from onthefly.runs.references import IMPORTED, describe, in_order

if TYPE_CHECKING:
    from onthefly.store.queries import CheckpointRow, EventRow, RunRow, SessionRow

_NAMED = 20  # differences that are written out
_STATE_CHANGING = frozenset(command.kind for command in COMMANDS if command.changes_state)


@dataclass(frozen=True)
class Plan:
    """A stretch between two recorded checkpoints, and what it takes to train it again. It is of the run and generation of `end`;
    `start` may be the one of another run that this one began from."""

    start: CheckpointRow
    end: CheckpointRow
    commands: list[dict[str, Any]]
    launch: Mapping[str, Any]
    inexact: list[str] = field(default_factory=list)
    """What the session said, while it ran, that it could not make exact."""


@dataclass(frozen=True)
class Verification:
    """What a replay gave. `equal` says it all; `differences` and `causes` are empty then."""

    run: str
    generation: int
    start: CheckpointRow
    end: CheckpointRow
    recorded_hash: str
    replayed_hash: str
    equal: bool
    commands: int
    """How many commands were applied again on the way."""
    seconds: float
    differences: list[str]
    causes: list[str]


def newest(checkpoints: Sequence[CheckpointRow], runs: Iterable[RunRow] = ()) -> CheckpointRow:
    """The newest checkpoint to which a stretch leads. Raises `UnknownReferenceError` when there is none at all."""
    known = _Recorded(checkpoints, runs)
    if not known.rows:
        raise UnknownReferenceError("there is no checkpoint in this store yet; `onthefly save` makes one")
    return next((row for row in reversed(known.rows) if known.before(row) is not None), known.rows[-1])


def plan(
    start: CheckpointRow,
    end: CheckpointRow | None,
    *,
    checkpoints: Sequence[CheckpointRow],
    runs: Iterable[RunRow],
    events: Iterable[EventRow],
    sessions: Mapping[int, SessionRow],
) -> Plan:
    """The stretch that begins at `start`. Without `end` it ends at the next checkpoint of that run and generation; when
    `start` is the last one there, or the first of a run that began from a checkpoint, the stretch is the one that ends in it.

    Raises `UnknownReferenceError` when there is only one checkpoint, `InvalidCommandError` when the two do not follow
    each other, and `ResumeError` when the run cannot be started again.
    """
    known = _Recorded(checkpoints, runs)
    if end is None:
        start, end = known.stretch(start)
    elif not (_leads(start, end) or known.begins(start, end)):
        raise InvalidCommandError(
            f"no steps lead from {describe(start)} to {describe(end)} in one generation of one run"
        )
    makers = [sessions[row.session] for row in (end, start) if row.session in sessions]
    launch = replaying.launch_of(end.run, (session.launch for session in makers), "verify")
    inexact = list(dict.fromkeys(str(reason) for session in makers for reason in session.inexact))
    return Plan(start, end, list(_commands(events, start, end)), launch, inexact)


def replay(plan: Plan, scans: Path, *, timeout: float | None = None) -> Verification:
    """Train the stretch again in a fresh process, and compare.

    Selections are read from `scans`. `timeout` is in seconds. Raises `ResumeError`, quoting the process's last words, when it does not come to the end,
    and `CheckpointError` when the checkpoint to start from cannot be used.
    """
    if not plan.start.path.is_file():
        raise CheckpointNotFoundError(errno.ENOENT, "the checkpoint to start from is gone", str(plan.start.path))
    began = time.monotonic()
    with replaying.workroom(plan.start.path, ".verify-") as folder:
        start = replaying.held(plan.start.path, folder / "start.safetensors")
        end = replaying.held(plan.end.path, folder / "end.safetensors") if plan.end.path.is_file() else plan.end.path
        out = folder / "replayed.safetensors"
        orders = {
            "checkpoint": str(start),
            "hash": plan.start.hash,
            "run": plan.end.run,
            "generation": plan.end.generation,
            "until": [plan.end.step, plan.end.epoch],
            "commands": plan.commands,
            "out": str(out),
            "scans": str(scans.absolute()),
        }
        replaying.run(plan.launch, orders, folder, aim=f"saved {plan.end.run}@{plan.end.step}", timeout=timeout)
        from onthefly.checkpoints.format import open_checkpoint

        replayed_hash = open_checkpoint(out).hash
        equal = replayed_hash == plan.end.hash
        found = [] if equal else differences(end, out)
    return Verification(
        run=plan.end.run,
        generation=plan.end.generation,
        start=plan.start,
        end=plan.end,
        recorded_hash=plan.end.hash,
        replayed_hash=replayed_hash,
        equal=equal,
        commands=len(plan.commands),
        seconds=time.monotonic() - began,
        differences=found,
        causes=[] if equal else likely_causes(found, plan),
    )


def differences(recorded: Path, replayed: Path) -> list[str]:
    """Which entries of two checkpoints differ, and by how much, in words. Loads torch."""
    from onthefly import comparison
    from onthefly.checkpoints.weights import value_of

    try:
        mine, theirs = value_of(recorded), value_of(replayed)
    except CheckpointError as e:
        return [f"cannot say what differs: {e}"]
    lines = [str(one) for one in comparison.differences(mine, theirs, ("recorded", "replayed"))]
    if not lines:
        lines = ["the values are equal; only how they are stored differs (tied tensors, or the order of names)"]
    return lines if len(lines) <= _NAMED else [*lines[:_NAMED], f"and {len(lines) - _NAMED} more"]


def likely_causes(lines: Sequence[str], plan: Plan) -> list[str]:
    """What a difference may come from, most telling first."""
    causes = [f"the session said: {reason}" for reason in plan.inexact]
    if any(line.startswith("rng/") for line in lines):
        causes.append("something drew random numbers that the replay did not draw, or the other way round")
    elif any(line.startswith("loader") for line in lines):
        causes.append("the data or its order changed")
    elif any("max |difference|" in line for line in lines):
        causes.append("a nondeterministic kernel, another number of threads, or another machine")
    if "PYTHONHASHSEED" not in plan.launch["environment"]:
        causes.append("code that depends on the order of a set of strings: PYTHONHASHSEED was not fixed")
    causes.append("code or data that was edited since")
    return causes


# -- the stretch -----------------------------------------------------------------------------------------------


def _place(row: CheckpointRow) -> tuple[int, int]:
    return row.step, row.epoch


def _leads(one: CheckpointRow, other: CheckpointRow) -> bool:
    """Whether training went from one to the other. It never made what was imported, nor went on from there in that line."""
    if IMPORTED in (one.reason, other.reason):
        return False
    return (one.run, one.generation) == (other.run, other.generation) and _place(one) < _place(other)


class _Recorded:
    """The checkpoints that are there, oldest first, and which of them runs began from."""

    def __init__(self, checkpoints: Iterable[CheckpointRow], runs: Iterable[RunRow]) -> None:
        self.rows = in_order(row for row in checkpoints if row.evicted is None)
        self._runs = {run.name: run for run in runs}

    def stretch(self, chosen: CheckpointRow) -> tuple[CheckpointRow, CheckpointRow]:
        """The one that ends in a run's first checkpoint, or begins in `chosen`, or else ends in it."""
        before = self.before(chosen)
        if before is not None and not _leads(before, chosen):
            return before, chosen
        if after := [row for row in self.rows if _leads(chosen, row)]:
            return chosen, min(after, key=_place)
        if before is not None:
            return before, chosen
        raise UnknownReferenceError(
            f"{describe(chosen)} is the only checkpoint of its run and generation; verify needs two: `onthefly save` makes one"
        )

    def before(self, row: CheckpointRow) -> CheckpointRow | None:
        """The checkpoint from which training came to this one: of its own line, or the one that the line began from."""
        if line := [other for other in self.rows if _leads(other, row)]:
            return max(line, key=_place)
        bases = [other for other in self.rows if self.begins(other, row)]
        # Several may be of one content; the run's own word says which it was.
        return min(bases, key=lambda other: not self._is_at_base(other, row.run), default=None)

    def begins(self, base: CheckpointRow, row: CheckpointRow) -> bool:
        """Whether a run, or a generation of it, began from `base` and came to `row`."""
        run = self._runs.get(row.run)
        if run is None or run.base is None or base.id == row.id or row.reason == IMPORTED:
            return False
        if row.generation == 0 and run.kind == "root":
            return False  # it began from nothing; `base` is what a reset went back to
        if (base.run, base.generation) == (row.run, row.generation):
            return False
        return base.hash == run.base["hash"] and _place(base) <= _place(row)

    def _is_at_base(self, row: CheckpointRow, run: str) -> bool:
        base = self._runs[run].base or {}
        return row.path.name == Path(base["path"]).name and (row.step, row.epoch) == (base["step"], base["epoch"])


def _moment(row: CheckpointRow) -> tuple[int, int, int, int]:
    return (row.epoch, row.step, row.session, row.captured)


def _commands(events: Iterable[EventRow], start: CheckpointRow, end: CheckpointRow) -> Iterator[dict[str, Any]]:
    """State-changing commands between two checkpoints, in order.

    Their places decide, and the order of facts only where the places are one: of a stretch that was repeated after a
    crash, the checkpoints are younger than the commands. Of a line that began from another's checkpoint they are all that
    it was told, from its birth on.
    """
    of_one_line = (start.run, start.generation) == (end.run, end.generation)
    first, last = _moment(start) if of_one_line else None, _moment(end)
    for event in sorted(events, key=lambda e: (e.epoch, e.step, e.session, e.seq)):
        if event.kind != "command" or (event.run, event.generation) != (end.run, end.generation):
            continue
        moment = (event.epoch, event.step, event.session, event.seq)
        if (first is not None and moment <= first) or moment > last or event.data.get("kind") not in _STATE_CHANGING:
            continue
        yield {
            "step": event.step,
            "epoch": event.epoch,
            "kind": event.data["kind"],
            "arguments": event.data.get("arguments", {}),
        }
