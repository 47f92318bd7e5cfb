"""How a session begins: on a new run, on one that is resumed, or as a replay that proves another."""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import os
import platform
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onthefly.checkpoints import format
from onthefly.checkpoints.durable import remove_stray
from onthefly.config import SessionConfig
from onthefly.control import commands, dashboard
from onthefly.control.history import History
from onthefly.control.ring import Kept
from onthefly.errors import CheckpointError, InexactError, InvalidCommandError, ResumeError
from onthefly.runs import launch, references
from onthefly.runs.lineage import Lineage
from onthefly.state.train_state import TrainState
from onthefly.state.tree import flatten
from onthefly.store import queries
from onthefly.store.journal import Journal
from onthefly.store.liveness import SessionLock
from onthefly.store.queries import CheckpointRow, EventRow, RunRow
from onthefly.store.store import Store

# How often this process has attached; a relaunch can go back only to the first. It counts for the process, as its name says.
_attachments = itertools.count(1)


Change = commands.SetValue | commands.Subset
"""A command that changes what the steps after it are, and is applied again when they are repeated."""


@dataclass(frozen=True)
class Due:
    """A recorded command, to be applied again when its boundary is reached."""

    step: int
    epoch: int
    command: Change

    def is_due(self, step: int, epoch: int) -> bool:
        return (self.epoch, self.step) <= (epoch, step)


@dataclass(frozen=True)
class Until:
    """Where a replay ends, and the file that it leaves there."""

    step: int
    epoch: int
    out: Path

    def reached(self, step: int, epoch: int) -> bool:
        """Raises `InexactError` when the boundary was passed without being met."""
        if (step, epoch) == (self.step, self.epoch):
            return True
        if step > self.step or epoch > self.epoch:
            raise InexactError(
                f"the replay is at step {step} of epoch {epoch} without having met step {self.step} of epoch {self.epoch}"
            )
        return False

    def write(self, state: TrainState) -> None:
        format.write(self.out, *flatten(state.capture()))


@dataclass(frozen=True)
class Standing:
    """Where a recorded run stands: all that it takes to go on with it."""

    base: Kept | None
    """The state to begin from: its newest good checkpoint, or the one of its parent that it began from."""
    kept: Sequence[Kept]
    needed: Sequence[Path]
    """Files that runs stand on: retention leaves them."""
    again: Sequence[Due]
    birth: Sequence[Due]
    """What made of its parent's state the one that it begins with."""
    recorded: Mapping[str, Mapping[int, list[float]]]
    head: int
    """The last step that is recorded of it."""


@dataclass
class Start:
    """What a session finds when it begins. Owns the store, the journal and the lock until `close`."""

    store: Store
    session: int
    journal: Journal
    lock: SessionLock
    history: History
    config: SessionConfig
    folder: Path
    resumed: bool = False
    base: Kept | None = None
    """The checkpoint to begin from; None: the objects as they are."""
    needed: Sequence[Path] = ()
    kept: Sequence[Kept] = ()
    again: Sequence[Due] = ()
    birth: Sequence[Due] = ()
    scans: Path | None = None
    """Where selections are read from, if not in the store."""
    until: Until | None = None
    run: str = ""
    """The run that it begins on."""
    launch: Mapping[str, Any] | None = None
    """How this process was started, if it can be started again."""

    @property
    def selections(self) -> Path:
        return self.scans or self.store.scans_dir

    def close(self) -> None:
        self.journal.close()
        self.lock.release()
        self.store.close()


def begin(config: SessionConfig, inexact: Sequence[str]) -> Start:
    """Begin as the process's environment says. What it says is taken from there, so that no child takes it for its own.

    Raises `ResumeError` in a loader worker: a script without ``if __name__ == "__main__":`` is run again by each
    spawned one.
    """
    if multiprocessing.current_process().daemon:
        raise ResumeError(
            "onthefly.attach was called in a worker process: put the script's main part under `if __name__ == '__main__':`"
        )
    number = next(_attachments)
    resume, replay = os.environ.pop(launch.RESUME, None), os.environ.pop(launch.REPLAY, None)
    # A process that was started again may be told where its run is recorded; that counts, whatever its script says.
    told = (resume is not None or replay is not None) and launch.STORE in os.environ
    chosen = None if told else config.store
    store = Store.open(None if chosen is None else os.fspath(chosen), create=True)
    try:
        store.recover(time.time())
        about = _About(store, config, launch.record(number), inexact)
        if replay is not None:
            return _replayed(about, json.loads(replay))
        begun = _resumed(about, resume) if resume is not None else _fresh(about)
        if config.ui or os.environ.get(dashboard.ASKED) == "1":
            dashboard.show(store.root, _say)
        return begun
    except BaseException:
        store.close()
        raise


@dataclass(frozen=True)
class _About:
    store: Store
    config: SessionConfig
    launch: Mapping[str, Any] | None
    inexact: Sequence[str]

    def start(self, run: str, generation: int, **more: Any) -> Start:
        config = {k: v if isinstance(v, bool | int | float | None) else str(v) for k, v in asdict(self.config).items()}
        inexact = [*self.inexact, *_nondeterminism()]
        session = self.store.create_session(
            project=self.config.project,
            run=run,
            pid=os.getpid(),
            host=socket.gethostname(),
            launch=self.launch,
            environment=environment(),
            inexact=inexact,
            config=config,
            time=time.time(),
        )
        lock = SessionLock(self.store.lock_path(session))
        lock.acquire()
        journal = Journal(self.store.journal_path(session))
        folder = (
            Path(self.config.save_dir).expanduser().absolute() if self.config.save_dir else self.store.checkpoints_dir
        )
        folder.mkdir(parents=True, exist_ok=True)
        remove_stray(folder)
        history = History(journal, run, generation)
        more |= {"run": run, "launch": self.launch}
        begun = Start(self.store, session, journal, lock, history, self.config, folder, **more)
        for reason in inexact:
            logging.getLogger("onthefly").warning("this run cannot be repeated exactly: %s", reason)
        return begun


def _fresh(about: _About) -> Start:
    unfinished = [run.name for run in queries.runs(about.store) if run.status == "unfinished"]
    run = about.store.create_run(about.config.run, project=about.config.project)
    begun = about.start(run, 0)
    begun.history.event("newRun", 0, 0, kind="root")
    _say(f"run {run} in {about.store.root}; from another terminal: onthefly status")
    if unfinished:
        _say(f"{', '.join(unfinished)} did not finish; to go on with the last: onthefly resume {unfinished[-1]}")
    return begun


def _resumed(about: _About, name: str) -> Start:
    run = queries.run(about.store, name)
    if run is None:
        raise ResumeError(f"there is no run {name!r} in {about.store.root}")
    for session in queries.sessions(about.store, alive=True):
        if session.run == name:
            raise ResumeError(f"run {name} is being trained already, by process {session.pid}")
    before = queries.session(about.store, queries.trainers(about.store).get(name, 0))
    found = standing(about.store, run, about.config.best_metric)
    begun = about.start(
        name,
        run.generation,
        resumed=True,
        base=found.base,
        needed=found.needed,
        kept=found.kept,
        again=found.again,
        birth=found.birth,
    )
    step = found.base.step if found.base is not None else 0
    begun.history.expect(found.recorded, found.head)
    begun.history.run_status("running")
    _say_differences(begun, before.environment if before is not None else {}, step)
    where = f"from step {step}" if found.base is not None else "from the start: it has no checkpoint yet"
    repeated = f"; steps up to {found.head} are repeated and compared" if found.head > step else ""
    _say(f"run {name} goes on {where}{repeated}")
    return begun


def standing(store: Store, run: RunRow, best_metric: str) -> Standing:
    """Where a run stands, by what the store has recorded of it.

    Raises `ResumeError` when none of its checkpoints is good, and for a run that was killed before the checkpoint that it
    was to begin from was durable.
    """
    rows = queries.checkpoints(store, run.name)
    base, after = _newest_good(store, run, rows)
    if base is None and run.kind != "root":
        parents = " or ".join(parent for parent, _ in run.parents) or "another run"
        raise ResumeError(f"{run.name} ended before the checkpoint that it begins from was saved; go on with {parents}")
    again = _recorded_commands(store, run, base, after)
    recorded = _recorded_metrics(store, run, base.step if base is not None else -1)
    head = max([*(s for steps in recorded.values() for s in steps), *(due.step for due in again)], default=-1)
    lineage = Lineage(queries.runs(store))
    return Standing(
        base=base,
        kept=[_kept(row, _judged_by(row, run, best_metric)) for row in rows if Path(row.path).exists()],
        needed=[row.path for row in rows if lineage.needs(row)],
        again=again,
        birth=_due([_told(e) for e in _command_events(store, run.name, 0) if e.data.get("birth")]),
        recorded=recorded,
        head=head,
    )


def _replayed(about: _About, orders: Mapping[str, Any]) -> Start:
    quiet = replace(
        about.config,
        save_dir=None,
        ckpt_every_steps=None,
        ckpt_every_minutes=None,
        ckpt_every_epoch=False,
        handle_signals=False,
    )
    about = replace(about, config=quiet)
    path = Path(orders["checkpoint"])
    step, epoch = orders["until"]
    run = about.store.create_run(orders["run"], project=quiet.project)
    return about.start(
        run,
        int(orders["generation"]),
        base=Kept(path, orders["hash"], 0, int(orders["generation"]), 0, 0, "base", False, None),
        again=_due(orders["commands"]),
        scans=Path(orders["scans"]),
        until=Until(int(step), int(epoch), Path(orders["out"])),
    )


def _newest_good(
    store: Store, run: RunRow, rows: Sequence[CheckpointRow]
) -> tuple[Kept | None, tuple[int, int] | None]:
    """The newest checkpoint of the run's generation whose bytes match its hash, and the fact that it comes after.

    Raises `ResumeError` when there were checkpoints and none is good.
    """
    bad = []
    # An import is a state to be loaded; the run never was in it.
    candidates = [row for row in rows if row.generation == run.generation and row.reason != references.IMPORTED]
    for row in sorted(candidates, key=lambda row: (row.session, row.captured, row.id), reverse=True):
        try:
            file = format.open_checkpoint(row.path)
        except CheckpointError as e:
            bad.append(str(e))
            logging.getLogger("onthefly").warning("passing over a checkpoint: %s", e)
            continue
        if file.hash == row.hash:
            return _kept(row, ""), (row.session, row.captured)
        bad.append(f"{row.path}: its content is {file.hash[:12]}, and {row.hash[:12]} was recorded")
    if run.base is not None:
        base = run.base
        path = store.full_path(base["path"])
        return Kept(path, base["hash"], 0, run.generation, base["step"], base["epoch"], "base", False, None), None
    if bad:
        raise ResumeError(f"run {run.name} has no checkpoint that can be used: {'; '.join(bad)}")
    return None, None


def _recorded_commands(store: Store, run: RunRow, base: Kept | None, after: tuple[int, int] | None) -> list[Due]:
    """The commands that the state of `base`, whose capture came after the fact `after`, has not seen.

    Their places decide, and the order of facts only where the places are one: a checkpoint of a repeated stretch
    is younger than the commands that an earlier process was given in the steps behind it.
    """
    begun = (base.epoch, base.step) if base is not None else (0, 0)
    return _due(
        [
            _told(e)
            for e in _command_events(store, run.name, run.generation)
            if (e.epoch, e.step) > begun
            or ((e.epoch, e.step) == begun and (after is None or (e.session, e.seq) > after))
        ]
    )


def _command_events(store: Store, run: str, generation: int) -> list[EventRow]:
    return queries.events(store, run, generation=generation, kinds=["command"])


def _told(event: EventRow) -> dict[str, Any]:
    return {"step": event.step, "epoch": event.epoch, **event.data}


def _due(recorded: Sequence[Mapping[str, Any]]) -> list[Due]:
    found = []
    for one in recorded:
        command = commands.build(one["kind"], one["arguments"])
        if not isinstance(command, Change):
            raise InvalidCommandError(f"a {command.kind} cannot be applied again at a step")
        found.append(Due(int(one["step"]), int(one["epoch"]), command))
    return sorted(found, key=lambda due: (due.epoch, due.step))


def _recorded_metrics(store: Store, run: RunRow, after: int) -> dict[str, dict[int, list[float]]]:
    recorded: dict[str, dict[int, list[float]]] = {}
    for name in queries.metric_names(store, run.name):
        series = queries.recorded(store, run.name, run.generation, name, after)
        for step, value in zip(series.steps.tolist(), series.values.tolist(), strict=True):
            recorded.setdefault(name, {}).setdefault(step, []).append(value)
    return recorded


def _judged_by(row: CheckpointRow, run: RunRow, metric: str) -> str:
    """The metric, or none for a checkpoint of a line that the run has left."""
    return "" if row.generation < run.generation and run.base and row.step > run.base["step"] else metric


def _kept(row: CheckpointRow, metric: str) -> Kept:
    return Kept(
        path=Path(row.path),
        hash=row.hash,
        size=row.size,
        generation=row.generation,
        step=row.step,
        epoch=row.epoch,
        reason=row.reason,
        pinned=row.pinned,
        metric=row.metrics.get(metric),
    )


# -- the surroundings ------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """What may make the same steps come out otherwise: versions, device, threads, flags, hash seed."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "hash_seed": os.environ.get("PYTHONHASHSEED"),
    }


def _nondeterminism() -> list[str]:
    if torch.cuda.is_available() and not torch.are_deterministic_algorithms_enabled():
        return ["CUDA kernels may be nondeterministic: call torch.use_deterministic_algorithms(True)"]
    return []


def _say_differences(begun: Start, before: Mapping[str, Any], step: int) -> None:
    now = environment()
    differences = {name: [before[name], now[name]] for name in now if name in before and before[name] != now[name]}
    if differences:
        begun.history.event("environmentChanged", step, 0, **differences)
        words = ", ".join(f"{name} was {old!r} and is {new!r}" for name, (old, new) in differences.items())
        logging.getLogger("onthefly").warning("the run goes on in other surroundings: %s", words)


def _say(text: str) -> None:
    print(f"onthefly: {text}", file=sys.stderr)
