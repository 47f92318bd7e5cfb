"""Verifying: a stretch of a run is trained again in a fresh process, and must come out bit for bit.

`plan` chooses the stretch (values in, values out), `replay` runs the recorded command line over it in a temporary
store, and `differences` names what is not equal. Torch is loaded only to open checkpoints.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onthefly.control.commands import COMMANDS
from onthefly.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    InvalidCommandError,
    ResumeError,
    UnknownReferenceError,
)
from onthefly.runs import launch as launching
from onthefly.runs.references import IMPORTED, describe, in_order

if TYPE_CHECKING:
    from onthefly.store.queries import CheckpointRow, EventRow, SessionRow

_NAMED = 20  # differences that are written out
_TAIL = 15  # lines of a failed replay's output that its error quotes
_STATE_CHANGING = frozenset(command.kind for command in COMMANDS if command.changes_state)


@dataclass(frozen=True)
class Plan:
    """A stretch of one run and generation between two recorded checkpoints, and what it takes to train it again."""

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


def newest(checkpoints: Sequence[CheckpointRow]) -> CheckpointRow:
    """The newest checkpoint to which a stretch leads. Raises `UnknownReferenceError` when there is none at all."""
    rows = in_order(row for row in checkpoints if row.evicted is None)
    if not rows:
        raise UnknownReferenceError("there is no checkpoint in this store yet; `onthefly save` makes one")
    return next((row for row in reversed(rows) if any(_leads(other, row) for other in rows)), rows[-1])


def plan(
    start: CheckpointRow,
    end: CheckpointRow | None,
    *,
    checkpoints: Sequence[CheckpointRow],
    events: Iterable[EventRow],
    sessions: Mapping[int, SessionRow],
) -> Plan:
    """The stretch that begins at `start`. Without `end` it ends at the next checkpoint of that run and generation; when
    `start` is the last one there, the stretch is the one that ends in it.

    Raises `UnknownReferenceError` when there is only one checkpoint, `InvalidCommandError` when the two do not follow
    each other, and `ResumeError` when the run cannot be started again.
    """
    if end is None:
        start, end = _pair(start, [row for row in checkpoints if row.evicted is None])
    elif not _leads(start, end):
        raise InvalidCommandError(
            f"no steps lead from {describe(start)} to {describe(end)} in one generation of one run"
        )
    makers = [sessions[row.session] for row in (end, start) if row.session in sessions]
    launch = next((session.launch for session in makers if session.launch is not None), None)
    if launch is None:
        raise ResumeError(
            f"{start.run!r} was not started by a command line that can be run again (a notebook, or a script piped in); "
            "put the loop into a file to verify it"
        )
    launching.check_first(launch, start.run)
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
    with tempfile.TemporaryDirectory(prefix=".verify-", dir=_room_beside(plan.start.path)) as name:
        folder = Path(name)
        # A live run may evict either file while its replay is under way.
        start = _held(plan.start.path, folder / "start.safetensors")
        end = _held(plan.end.path, folder / "end.safetensors") if plan.end.path.is_file() else plan.end.path
        out = folder / "replayed.safetensors"
        _run(plan, start, folder, out, scans, timeout)
        from onthefly.checkpoints.format import open_checkpoint

        replayed_hash = open_checkpoint(out).hash
        equal = replayed_hash == plan.end.hash
        found = [] if equal else differences(end, out)
    return Verification(
        run=plan.start.run,
        generation=plan.start.generation,
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


def _pair(chosen: CheckpointRow, rows: Sequence[CheckpointRow]) -> tuple[CheckpointRow, CheckpointRow]:
    if after := [row for row in in_order(rows) if _leads(chosen, row)]:
        return chosen, min(after, key=_place)
    if before := [row for row in in_order(rows) if _leads(row, chosen)]:
        return max(before, key=_place), chosen
    raise UnknownReferenceError(
        f"{describe(chosen)} is the only checkpoint of its run and generation; verify needs two: `onthefly save` makes one"
    )


def _moment(row: CheckpointRow) -> tuple[int, int, int, int]:
    return (row.epoch, row.step, row.session, row.captured)


def _commands(events: Iterable[EventRow], start: CheckpointRow, end: CheckpointRow) -> Iterator[dict[str, Any]]:
    """State-changing commands between two checkpoints, in order.

    Their places decide, and the order of facts only where the places are one: of a stretch that was repeated after a
    crash, the checkpoints are younger than the commands.
    """
    first, last = _moment(start), _moment(end)
    for event in sorted(events, key=lambda e: (e.epoch, e.step, e.session, e.seq)):
        if event.kind != "command" or (event.run, event.generation) != (start.run, start.generation):
            continue
        moment = (event.epoch, event.step, event.session, event.seq)
        if not first < moment <= last or event.data.get("kind") not in _STATE_CHANGING:
            continue
        yield {
            "step": event.step,
            "epoch": event.epoch,
            "kind": event.data["kind"],
            "arguments": event.data.get("arguments", {}),
        }


# -- the process -----------------------------------------------------------------------------------------------


def _room_beside(path: Path) -> Path | None:
    """Where there is room for one more checkpoint: in the same folder. None, the system's place, if it is read-only."""
    return path.parent if os.access(path.parent, os.W_OK) else None


def _held(path: Path, name: Path) -> Path:
    """Another name of a file, or a copy where there are no links."""
    try:
        os.link(path, name)
    except OSError:
        shutil.copyfile(path, name)
    return name


def _run(plan: Plan, start: Path, folder: Path, out: Path, scans: Path, timeout: float | None) -> None:
    order = {
        "checkpoint": str(start),
        "hash": plan.start.hash,
        "run": plan.start.run,
        "generation": plan.start.generation,
        "until": [plan.end.step, plan.end.epoch],
        "commands": plan.commands,
        "out": str(out),
        "scans": str(scans.absolute()),
    }
    extra = {launching.REPLAY: json.dumps(order), launching.STORE: str(folder / "store")}
    log = folder / "output.txt"
    with open(log, "wb") as output:
        process = launching.spawn(
            plan.launch,
            extra,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its loader workers can be ended with it
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired as e:
            raise ResumeError(f"the replay did not reach {describe(plan.end)} within {timeout:g} s") from e
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code == 0 and out.is_file():
        return
    ended = f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
    lines = log.read_text("utf-8", "replace").rstrip().splitlines()[-_TAIL:]
    said = "\n".join(["; its last words:", *(f"  {line}" for line in lines)]) if lines else ", without a word"
    raise ResumeError(f"the replay {ended} before it had saved {plan.end.run}@{plan.end.step}{said}")
