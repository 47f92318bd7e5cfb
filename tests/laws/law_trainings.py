"""The parents' side of these tests: trainings that are started, steered, killed and compared.

Everything that a test waits for is a fact: an answered command, an event in the store, a step that a child is in.
"""

import functools
import itertools
import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import law_programs
import numpy as np
import torch
from law_programs import LINE, Program, run

from onthefly import client
from onthefly.store import queries
from onthefly.store.store import Store

PATIENCE = 60.0  # seconds for a fact of milliseconds; a process that hangs must not hang the suite

# A process that is forked from one that has torch needs no 1.7 s to import it, nor 1.2 s more for its first optimizer.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["onthefly.session", "onthefly.trainer", "onthefly.client", "sqlalchemy.dialects.sqlite", "torch._dynamo"]
)


def until(fact, what, patience=PATIENCE):
    """Wait for something to be true, and give it."""
    end = time.monotonic() + patience
    while not (found := fact()):
        assert time.monotonic() < end, f"it did not come to pass: {what}"
        time.sleep(0.002)
    return found


class Training:
    """One process that trains. Killed, if it still runs, when its `Trainings` end.

    It is forked from one that has torch, or started as a real command line.
    """

    def __init__(self, program, *, command_line=False):
        self.program = program
        self.folder = Path(program.folder)
        self.folder.mkdir(parents=True)
        if program.user is not None:
            os.chown(self.folder, program.user, program.user)
        if command_line:
            self._process = self._pipe = _CommandLine(program)
        else:
            self._pipe, theirs = _processes.Pipe()
            self._process = _processes.Process(target=run, args=(program, theirs))
            self._process.start()
            theirs.close()
        self._client = None

    @property
    def pid(self):
        return self._process.pid

    @property
    def client(self):
        if self._client is None:
            database = Path(self.program.store) / "onthefly.db"
            until(lambda: database.exists() or self.is_over, "a store")
            self._client = until(self._connected, "a client")
        return self._client

    def _connected(self):
        try:
            return client.connect(self.program.store)
        except client.OnTheFlyError:
            if self.is_over:
                raise
            return None

    @property
    def session(self):
        """The row of its session."""
        return until(
            lambda: next((row for row in self.client.sessions() if row.pid == self.pid), None) or self._must_live(),
            "a session",
        )

    @property
    def is_over(self):
        return not self._process.is_alive()

    @property
    def said(self):
        return (self.folder / "said.txt").read_text() if (self.folder / "said.txt").exists() else ""

    # -- its steps ---------------------------------------------------------------------------------------------

    def at(self, step, patience=PATIENCE):
        """Wait until it stands in that step. 0: before the first boundary; -1: after the loop."""
        until(lambda: self._pipe.poll() or self.is_over, f"step {step}", patience)
        assert self._pipe.poll(), f"the training ended before step {step}; it said:\n{self.said}"
        assert self._pipe.recv() == step
        return self

    @property
    def standing(self):
        """Whether it stands in a step."""
        return self._pipe.poll()

    def go(self):
        """Let it on from where it stands."""
        self._pipe.send("go")
        return self

    def deliver(self, kind, /, **arguments):
        """Give a command to a training that stands in a step. It is at the gate on return; gives its id.

        Commands are taken in their order, and one that makes no sense is refused at once, by the recorder.
        """
        id = self.send(kind, **arguments)
        behind = self.send("nonsense")
        assert self.answer(behind).status == "failed"
        return id

    def send(self, kind, /, *, id=None, **arguments):
        """Queue a command, and give its id."""
        id = id or uuid.uuid4().hex
        self.client.store.insert_command(self.session.id, id, kind, arguments, time.time())
        return id

    def answer(self, id):
        """Wait for a command's answer: its row."""

        def answered():
            row = queries.command(self.client.store, id)
            if row.status == "queued":
                self._must_live()
            return row if row.status != "queued" else None

        return until(answered, f"an answer to {id}")

    def done(self, id):
        """Wait for a command that must not fail; gives its result."""
        row = self.answer(id)
        assert row.status == "done", row.error
        return row.result

    def failed(self, id):
        """Wait for a command that must fail; gives its error."""
        row = self.answer(id)
        assert row.status == "failed", row.result
        return row.error

    def event(self, kind, count=1):
        """Wait for an event; gives the last one of its kind."""

        def there():
            events = self.client.events(kinds=[kind])
            if len(events) < count:
                self._must_live()
            return events[-1] if len(events) >= count else None

        return until(there, f"{kind}, {count} times")

    def go_on(self, step, kind, /, **arguments):
        """Wait until it stands in a step, give it a command, let it on, and give the result."""
        id = self.at(step).deliver(kind, **arguments)
        return self.go().done(id)

    # -- its end -----------------------------------------------------------------------------------------------

    def end(self, code=0):
        """Wait for its end; gives its result, or None when it has left none."""
        self._process.join(PATIENCE)
        found = self._process.exitcode
        assert found == code, f"it ended with {found}, not {code}; it said:\n{self.said}"
        path = self.folder / "result.pt"
        return torch.load(path, weights_only=False) if path.exists() else None

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        self._process.join(PATIENCE)
        assert self._process.exitcode == -signal.SIGKILL

    def signal(self, number):
        """Send a signal as a terminal or a batch system does: to the whole group, if it has one of its own."""
        if self.program.group:
            os.killpg(self.pid, number)
        else:
            os.kill(self.pid, number)

    def children(self):
        """The pids of its child processes, such as loader workers."""
        tasks = Path(f"/proc/{self.pid}/task").glob("*/children")
        return [int(pid) for task in tasks for pid in task.read_text().split()]

    def taken(self):
        """Every (step, loss) that its `session.log` has taken."""
        path = self.folder / "taken.bin"
        data = path.read_bytes() if path.exists() else b""
        return list(LINE.iter_unpack(data[: len(data) // LINE.size * LINE.size]))

    def close(self):
        if self._process.is_alive():
            self._process.kill()
        self._process.join(PATIENCE)
        self._process.close()
        self._pipe.close()
        if self._client is not None:
            self._client.close()

    def _must_live(self):
        assert not self.is_over, f"the training is over; it said:\n{self.said}"


class _CommandLine:
    """A program started as a user would, with the doors of a multiprocessing process and of a pipe to it."""

    def __init__(self, program):
        arguments = {name: value for name, value in asdict(program).items() if name != "given"}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ONTHEFLY_")}
        if program.resume is not None:
            environment |= {"ONTHEFLY_RESUME": program.resume, "ONTHEFLY_STORE": program.store}
        with open(Path(program.folder) / "said.txt", "wb") as said:
            self._popen = subprocess.Popen(
                [sys.executable, law_programs.__file__, json.dumps(arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                env=environment,
                start_new_session=program.group,
            )
        self.pid = self._popen.pid

    @property
    def exitcode(self):
        return self._popen.poll()

    def is_alive(self):
        return self._popen.poll() is None

    def join(self, timeout):
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(timeout)

    def kill(self):
        self._popen.kill()

    def poll(self):
        ready, _, _ = select.select([self._popen.stdout], [], [], 0)
        return bool(ready) and self.is_alive()  # at its end there is nothing to read, which counts as ready

    def recv(self):
        step = int(self._popen.stdout.readline())
        # Python does not see a signal that comes just before it begins to read: wait until it does, where that can be seen.
        waits = Path(f"/proc/{self.pid}/wchan")
        until(
            lambda: not waits.exists() or waits.read_text() in ("", "0") or "pipe_read" in waits.read_text(), "a reader"
        )
        return step

    def send(self, word):
        self._popen.stdin.write(f"{word}\n".encode())
        self._popen.stdin.flush()

    def close(self):
        for end in (self._popen.stdin, self._popen.stdout):
            end.close()


class Trainings:
    """All trainings of one test."""

    def __init__(self, folder):
        self.folder = folder
        self._numbers = itertools.count()
        self._started = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for training in self._started:
            training.close()

    @property
    def store(self):
        return self.folder / "store"

    def start(self, store="store", *, command_line=False, **program):
        """Start a training in a store of that name."""
        folder = str(self.folder / f"training{next(self._numbers)}")
        program = Program(folder=folder, store=str(self.folder / store), **program)
        self._started.append(Training(program, command_line=command_line))
        return self._started[-1]

    def resume(self, before, run="baseline", **changes):
        """Start the process that goes on with the run of another, which is over."""
        folder = str(self.folder / f"training{next(self._numbers)}")
        program = replace(before.program, folder=folder, resume=run, **{"stops": (), **changes})
        self._started.append(Training(program))
        return self._started[-1]

    def opened(self, store="store"):
        return opened(self.folder / store)


@contextmanager
def opened(folder):
    """The store, closed afterwards."""
    store = Store.open(folder)
    try:
        yield store
    finally:
        store.close()


def in_a_process(target, *arguments):
    """What a function sends through the pipe that it is given as its last argument."""
    ours, theirs = _processes.Pipe()
    process = _processes.Process(target=target, args=(*arguments, theirs))
    process.start()
    theirs.close()
    answer = ours.recv()
    process.join(PATIENCE)
    process.close()
    ours.close()
    return answer


def plain(**program):
    """The result of the same training in a plain loop, which knows nothing of sessions."""
    program.pop("config", None)
    program.pop("stops", None)
    return _plain(tuple(sorted(program.items())))


@functools.cache
def _plain(program):
    with tempfile.TemporaryDirectory() as folder:
        training = Training(Program(folder=f"{folder}/plain", store=None, **dict(program)))
        try:
            return training.end()
        finally:
            training.close()


class Values(dict):
    """What is changed at a step. Hashable, so that a plain loop's result can be kept by what it was given."""

    def __hash__(self):
        return hash(repr(sorted(self.items())))


def changes_of(store, run, generation=0):
    """What a run was told to change, as the `given` of a plain loop."""
    events = queries.events(store, run, generation=generation, kinds=["command"])
    changes = [
        (event.step, event.epoch, Values({c["name"].split(".")[-1]: c["after"] for c in event.data["changed"]}))
        for event in events
    ]
    return tuple(sorted(changes, key=lambda change: change[:2]))  # stable: at one step they stay in their order


# -- equality --------------------------------------------------------------------------------------------------


def assert_same(one, other, *names):
    """Equal bit for bit, types included; the first place that differs is named. `names`: only these entries."""
    for name in names or one:
        difference = _difference(one[name], other[name], name)
        assert difference is None, difference


def _difference(one, other, path):
    if type(one) is not type(other):
        return f"{path}: {type(one).__name__} and {type(other).__name__}"
    if isinstance(one, torch.Tensor):
        if one.shape != other.shape or one.dtype != other.dtype or not torch.equal(one, other):
            return f"{path}: {one} and {other}"
        return None
    if isinstance(one, np.ndarray):
        return None if np.array_equal(one, other) else f"{path}: {one} and {other}"
    if isinstance(one, Mapping):
        if list(one) != list(other):
            return f"{path}: {list(one)} and {list(other)}"
        return next((d for key in one if (d := _difference(one[key], other[key], f"{path}.{key}"))), None)
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return f"{path}: {len(one)} and {len(other)} items"
        pairs = enumerate(zip(one, other, strict=True))
        return next((d for i, (a, b) in pairs if (d := _difference(a, b, f"{path}[{i}]"))), None)
    return None if one == other else f"{path}: {one!r} and {other!r}"


STATE = ("model", "average", "optimizer", "scheduler", "noise", "step", "random")
"""What the end of a training leaves, whichever way it came there."""
