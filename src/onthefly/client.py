"""The Python door: what can be seen of runs, and asked of live sessions, from any process.

A client works on the store alone and needs no server. It loads no torch, but for what says so: that works on the values
in checkpoints.

    with onthefly.connect() as client:
        client.pause()
        client.set(lr="*0.1")
        client.resume()
"""

from __future__ import annotations

import copy
import os
import pwd
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict

from onthefly import errors, keeping
from onthefly.errors import (
    AmbiguousError,
    CheckpointError,
    CommandError,
    CommandTimeoutError,
    CorruptCheckpointError,
    InvalidCommandError,
    NoLiveSessionError,
    OnTheFlyError,
    ResumeError,
    UnknownReferenceError,
)
from onthefly.runs import launch as launching
from onthefly.runs import references
from onthefly.runs.lineage import Lineage
from onthefly.store import queries
from onthefly.store.store import Store

if TYPE_CHECKING:
    from typing import Unpack

    from onthefly.checkpoints.contents import Contents
    from onthefly.comparison import Diff
    from onthefly.exchange import Arrived, Exported
    from onthefly.fsck import Progress, Report
    from onthefly.garbage import Collection
    from onthefly.health.findings import Report as HealthReport
    from onthefly.remerging import MergeProof
    from onthefly.repairs import Repair
    from onthefly.reports import KeptReport
    from onthefly.run_comparison import RunDiff
    from onthefly.sample_values import Scanned
    from onthefly.samples.changes import Changes
    from onthefly.samples.recipes import Recipe
    from onthefly.samples.selection import Selection
    from onthefly.samples.table import SampleTable
    from onthefly.store.queries import CheckpointRow, CommandRow, EventRow, RunRow, ScanRow, Series, SessionRow
    from onthefly.verification import Plan, Verification

Result = dict[str, Any]
Choice = int | str | None
"""A session: its id, the name of the run that it is on, or None when only one is alive."""

_POLL = 0.02  # seconds between two looks for an answer
_TIMEOUT = 30.0
_LONG = 600.0  # for what takes as long as some steps of training
_RECENT = 500  # steps


class Delivery(TypedDict, total=False):
    """How a command is given; see `Client.command`."""

    session: Choice
    id: str
    wait: bool
    timeout: float


@dataclass(frozen=True)
class ResumeTarget:
    """A run that stopped before its end, and how its last process was started."""

    run: RunRow
    session: SessionRow
    launch: Mapping[str, Any]


@dataclass(frozen=True)
class Status:
    """The store at a glance: live sessions, the last one that ended when none is alive, and runs that can be resumed."""

    store: Path
    live: list[SessionRow]
    last: SessionRow | None
    unfinished: list[RunRow]


def connect(store: str | Path | None = None, *, door: str = "python") -> Client:
    """A client of a store: that folder, or `ONTHEFLY_STORE`, or `.onthefly` in the working directory.

    `door` is what the audit trail says of its commands.

    Raises `StoreError` when there is none, or when it cannot be used.
    """
    return Client(Store.open(store), door=door)


class Client:
    """Looks at a store and commands its live sessions. Owns the store, and closes it; a context manager.

    Sessions whose process died are found and recorded as killed when a client opens a store.
    """

    def __init__(self, store: Store, *, door: str = "python", asker: str | None = None) -> None:
        self.store = store
        self.door = door
        self.asker = asker if asker is not None else _user()
        store.recover(time.time())

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.store.close()

    def through(self, door: str, asker: str) -> Client:
        """This client of the same store, for somebody who comes through another door. Close only one of them."""
        other = copy.copy(self)
        other.door, other.asker = door, asker
        return other

    # -- looking -----------------------------------------------------------------------------------------------

    def sessions(self, *, alive: bool | None = None) -> list[SessionRow]:
        """Sessions in the order in which they started; with `alive`, only those that live, or only those that do not."""
        return list(queries.sessions(self.store, alive=alive))

    def runs(self) -> list[RunRow]:
        """Every run of the store."""
        return list(queries.runs(self.store))

    def run(self, name: str) -> RunRow:
        """One run. Raises `UnknownReferenceError`, listing those there are."""
        runs = self.runs()
        for row in runs:
            if row.name == name:
                return row
        there_are = references.listed(row.name for row in runs) or "none yet"
        raise UnknownReferenceError(f"there is no run {name!r}; there are: {there_are}")

    def checkpoints(self, run: str | None = None, *, evicted: bool = False) -> list[CheckpointRow]:
        """Checkpoints, oldest first: of one run, or of all. `evicted` ones are gone but for their rows."""
        return references.in_order(queries.checkpoints(self.store, run, evicted=evicted))

    def kept_because(self) -> dict[int, tuple[str, ...]]:
        """Why retention leaves every live checkpoint where it is, by the row's `id`: ``newest``, ``every 1000``, ``best``,
        ``pinned``, ``origin``, or ``needed`` by a lineage. Without a word, the run's next save may remove it."""
        return keeping.kept_because(self.checkpoints(), self.runs(), queries.configs(self.store))

    def events(
        self,
        run: str | None = None,
        *,
        after: tuple[int, int] | None = None,
        kinds: Sequence[str] | None = None,
        limit: int | None = None,
    ) -> list[EventRow]:
        """The history, oldest first; `after` a (session, seq), of some `kinds`, at most `limit`."""
        return list(queries.events(self.store, run, after=after, kinds=kinds, limit=limit))

    def metric_names(self, run: str) -> list[str]:
        """What the run has logged."""
        return list(queries.metric_names(self.store, run))

    def series(self, run: str, name: str, *, generation: int | None = None, resolution: int = 1) -> Series:
        """One metric of a run: as its line now stands, or as one generation recorded it."""
        return queries.series(self.store, run, name, generation=generation, resolution=resolution)

    def trajectory(self, run: str, name: str) -> Series:
        """One metric from the first step of the run that this one goes back to: every stretch from the run that trained it."""
        import numpy as np

        from onthefly.store.queries import Series

        parts = []
        for segment in Lineage(self.runs()).path(self.run(run).name):
            found = self.series(segment.run, name)
            last = np.inf if segment.last_step is None else segment.last_step
            here = (found.steps > segment.first_step) & (found.steps <= last)
            parts.append((found.steps[here], found.values[here], found.times[here]))
        return Series(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def latest(self, run: str) -> dict[str, float]:
        """The last value of everything that the run has logged."""
        row = self.run(run)
        head = max((session.step for session in self.sessions() if session.run == run), default=0)
        values = {}
        for name in self.metric_names(run):
            points = queries.recorded(self.store, run, row.generation, name, head - _RECENT)
            if not len(points.values):  # logged now and then, such as at the end of an epoch: a short series
                points = self.series(run, name)
            if len(points.values):
                values[name] = float(points.values[-1])
        return values

    def status(self) -> Status:
        """The store at a glance."""
        sessions = self.sessions()
        live = [row for row in sessions if row.ended is None and self.store.is_alive(row)]
        ended = [row for row in sessions if row not in live]
        last = max(ended, key=lambda row: max(row.heartbeat, row.ended or 0), default=None)
        return Status(self.store.root, live, None if live else last, self._unfinished(live))

    def resolve(self, ref: str) -> CheckpointRow | Path:
        """What a REF names: a checkpoint of the store, or the absolute path of a file that the store does not know.

        Raises `UnknownReferenceError` or `AmbiguousError`, which list what there is.
        """
        reference = references.parse(ref)
        rows = self.checkpoints(evicted=True)
        if reference.path is None:
            try:
                return references.resolve(reference, self.runs(), rows, best_by=self._best_metric(reference.name))
            except UnknownReferenceError:
                if reference.at is not None or not Path(ref).is_file():
                    raise
        path = (reference.path or Path(ref)).resolve()
        if not path.is_file():
            raise UnknownReferenceError(f"there is no file {reference.path}")
        known = [row for row in rows if row.path.name == path.name and row.path.resolve() == path]
        return references.in_order(row for row in known if row.evicted is None)[-1] if known else path

    def diff(self, a: str, b: str) -> Diff:
        """What differs between the checkpoints that two REFs name. Loads torch.

        Raises `UnknownReferenceError`, `AmbiguousError`, `CheckpointNotFoundError`, and `CorruptCheckpointError`.
        """
        from onthefly import comparison

        return comparison.diff(self._file(a), self._file(b))

    def show(self, ref: str, *, verify: bool = False) -> Contents:
        """What a checkpoint holds: every tensor's name, dtype, shape and size, and every plain value. Only its header is
        read, or, to `verify` that they match its hash, all its bytes.

        Raises `UnknownReferenceError`, `AmbiguousError`, `CheckpointNotFoundError`, and `CorruptCheckpointError`, also for a
        file whose content is not the one that was recorded.
        """
        from onthefly.checkpoints.contents import contents
        from onthefly.checkpoints.header import read_header

        found = self.resolve(ref)
        header = read_header(found if isinstance(found, Path) else found.path, verify=verify)
        if not isinstance(found, Path) and header.hash != found.hash:
            raise CorruptCheckpointError(
                f"{header.path}: its content is {header.hash[:12]}, and {found.hash[:12]} was recorded"
            )
        return contents(header, verified=verify)

    # -- keeping and exchanging --------------------------------------------------------------------------------

    def pin(self, ref: str, pinned: bool = True, *, timeout: float = _TIMEOUT) -> Result:
        """Keep a checkpoint whatever retention says, or, not `pinned`, let retention have it again.

        A session that is on its run does it at its next step boundary; without one it is done at once. Raises
        `UnknownReferenceError`, `AmbiguousError`, and what `command` raises.
        """
        return self._pin(self._recorded(ref), pinned, timeout)

    def remove(self, ref: str, *, force: bool = False, timeout: float = _TIMEOUT) -> Result:
        """Remove a checkpoint with its file; its row stays, as a tombstone. Done by the same hands as `pin`.

        Raises `CommandError` for the origin of a run, for one that a lineage needs, and, unless `force`, for the newest of its
        run; `CheckpointError` when the file cannot be removed.
        """
        row = self._recorded(ref)
        keeping.refuse_removal(row, self.checkpoints(row.run), self.runs(), force=force)
        if (session := self._session_on(row.run)) is not None:
            return self.command("removeCheckpoint", session.id, timeout=timeout, path=str(row.path))
        from onthefly.checkpoints import sidecar
        from onthefly.store import catalog

        catalog.bury(self.store, row, "removed")  # first: a row without a file would be a promise
        try:
            row.path.unlink(missing_ok=True)
            sidecar.path_of(row.path).unlink(missing_ok=True)
        except OSError as e:
            raise CheckpointError(f"{row.path} is no longer listed, but cannot be removed: {e.strerror or e}") from e
        return _told(row)

    def export(self, ref: str, out: str | Path, *, only: str | None = None, force: bool = False) -> Exported:
        """Write the model of a checkpoint, or the part `only`, as a plain state dict: ``.safetensors`` or ``.pt``, by the name.

        Raises `InvalidCommandError` for another name or a part that there is not, `UnsupportedValueError` for what such a file
        cannot hold, and `CheckpointWriteError`, also for a file that is there already, unless `force`. Loads torch.
        """
        from onthefly import exchange

        return exchange.export(self._file(ref), Path(out), only=only, force=force)

    def import_file(
        self, file: str | Path, *, run: str | None = None, into: str | None = None, only: str | None = None
    ) -> CheckpointRow:
        """Bring a file into the store as a pinned checkpoint, and record it as the newest of its run.

        A checkpoint, from another store, is copied after every byte was checked, under `run`, or the run that it says it is of.
        A plain state dict becomes the weights of the model (or of the module `only`) in what else the checkpoint `into` holds;
        by default, the newest of the store. Nothing of a file is executed. Loads torch.

        Raises `UnknownReferenceError` for a run that is not here, `CommandError` while a session is on it,
        `StateMismatchError` for other names or shapes, `CorruptCheckpointError`, `CheckpointWriteError`, and
        `InvalidCommandError` for arguments that the file has no use for.
        """
        from onthefly import exchange

        file = Path(file)
        if exchange.is_checkpoint(file):
            if into is not None or only is not None:
                raise InvalidCommandError(f"{file} is a whole checkpoint; only a plain state dict goes into another")
            said, generation = exchange.run_of(file)
            if (name := run or said) is None:
                raise InvalidCommandError(f"{file} does not say which run it is of; give --run NAME")
            target = self.run(name)
            self._refuse_live(target.name)
            generation = min(generation, target.generation)
            arrived = exchange.bring_in(file, self.store.checkpoints_dir, target.name, generation)
            return self._record(arrived, target.name, generation)
        if run is not None:
            raise InvalidCommandError(f"{file} is no checkpoint; a plain state dict goes into a checkpoint: --into REF")
        base = self._recorded(into) if into is not None else self._newest()
        self._refuse_live(base.run)
        arrived = exchange.graft(file, base.path, self.store.checkpoints_dir, base.run, base.generation, only=only)
        return self._record(arrived, base.run, base.generation)

    # -- commanding --------------------------------------------------------------------------------------------

    def session(self, which: Choice = None) -> SessionRow:
        """The live session of that id or on that run; without either, the only one that lives.

        Raises `NoLiveSessionError`, or `AmbiguousError`, which lists them.
        """
        live = self.sessions(alive=True)
        chosen = [row for row in live if which is None or which in (row.id, row.run)]
        if len(chosen) == 1:
            return chosen[0]
        if chosen:
            names = references.listed(f"{row.id} ({row.run}, pid {row.pid})" for row in chosen)
            raise AmbiguousError(f"several sessions are alive; choose one with --session ID or --run NAME: {names}")
        if which is None:
            resumable = self._unfinished(live)
            hint = f"; `onthefly resume` goes on with {resumable[-1].name}" if resumable else ""
            raise NoLiveSessionError(f"no session is alive in {self.store.root}{hint}")
        what = f"session {which}" if isinstance(which, int) else f"session on the run {which!r}"
        there_are = references.listed(f"{row.id} ({row.run})" for row in live) or "none"
        raise NoLiveSessionError(f"no {what} is alive; alive: {there_are}")

    def command(
        self,
        kind: str,
        session: Choice = None,
        *,
        id: str | None = None,
        wait: bool = True,
        timeout: float = _TIMEOUT,
        **arguments: Any,
    ) -> Result:
        """Give a live session a command, and wait for its answer: its result, with the step and epoch at which it was done.

        A command that is given twice under one `id` is carried out once, and both get the one answer. `timeout` is in
        seconds. Without `wait` the result is ``{"id", "status": "queued"}`` at once. Raises the error that the session
        answered with; `InvalidCommandError` before anything is sent; `NoLiveSessionError` when the session is dead, or
        dies before it answers; `CommandTimeoutError` when time is over: the command then stays queued.
        """
        from onthefly.control import commands  # pydantic takes a while to load, and looking does not need it

        command = commands.build(kind, arguments)
        target = self.session(session)
        id = id or uuid.uuid4().hex
        self.store.insert_command(
            target.id, id, kind, command.model_dump(), time.time(), door=self.door, asker=self.asker
        )
        if not wait:
            return {"id": id, "status": "queued"}
        try:
            row = self._answer(target, id, timeout)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{kind} stays asked of session {target.id} ({target.run}), which will do it; `onthefly scan --cancel` stops a scan or "
                "a merge, `onthefly undo` takes back a change"
            ) from None
        if row is None:
            raise CommandTimeoutError(
                f"session {target.id} ({target.run}) has not answered {kind!r} within {timeout:g} s; it stays queued"
            )
        if row.status == "failed":
            raise _error(row)
        return {"step": row.step, "epoch": row.epoch, **(row.result or {})}

    def pause(self, *, save: bool = True, **how: Unpack[Delivery]) -> Result:
        """Hold training at the next step boundary. See `command` for `how` and what is raised, here and below."""
        return self.command("pause", save=save, **how)

    def resume(self, **how: Unpack[Delivery]) -> Result:
        """Let a paused session train on."""
        return self.command("resume", **how)

    def save(self, path: str | Path | None = None, *, pin: bool = False, **how: Unpack[Delivery]) -> Result:
        """Save a checkpoint: into the store, or to a file. A pinned one is never evicted."""
        return self.command("saveCheckpoint", path=None if path is None else str(Path(path).absolute()), pin=pin, **how)

    def load(self, ref: str, *, name: str | None = None, **how: Unpack[Delivery]) -> Result:
        """Put the state of the checkpoint that a REF names back into the live session, which goes on from there as a new run."""
        found = self.resolve(ref)
        if isinstance(found, Path):
            return self.command("loadCheckpoint", path=str(found), name=name, **how)
        return self.command("loadCheckpoint", path=str(found.path), hash=found.hash, name=name, **how)

    def set(
        self,
        values: Mapping[str, Any] | None = None,
        /,
        *,
        hold: bool = False,
        release: bool = False,
        session: Choice = None,
        wait: bool = True,
        timeout: float = _TIMEOUT,
        **named: Any,
    ) -> Result:
        """Change values from the next step on: ``set(lr=1e-4)``, ``set({"optimizer.0.lr": "*0.1"})``."""
        return self.command(
            "set",
            session,
            wait=wait,
            timeout=timeout,
            values={**(values or {}), **named},
            hold=hold,
            release=release,
        )

    def test(self, data: str = "test", *, save: bool = True, **how: Unpack[Delivery]) -> Result:
        """Evaluate the model, on its `test` or its `val` data. Training is not affected."""
        return self.command("testRun", data=data, save=save, **how)

    def fork(
        self,
        recipe: Recipe | str | None = None,
        *,
        selection: str | None = None,
        values: Mapping[str, Any] | None = None,
        hold: bool = False,
        name: str | None = None,
        beside: bool = False,
        fresh: bool = False,
        **how: Unpack[Delivery],
    ) -> Result:
        """Go on as a new run, on the samples that a recipe chooses, or with other values, or both.

        `recipe` is a recipe or its notation (`onthefly.samples.recipes`), such as ``"quantile(loss, 0.9, 1)"``; what it needs is
        scanned first. `beside` starts it as a process of its own, `fresh` from the state that the run began with.
        """
        about = {"values": dict(values or {}), "hold": hold, "name": name, "beside": beside, "fresh": fresh}
        return self.command("forkRun", recipe=_recipe(recipe), selection=selection, **about, **how)

    def merge(
        self,
        refs: Sequence[str],
        strategies: str | Sequence[str] = "swa",
        *,
        base: str | None = None,
        options: Mapping[str, Any] | None = None,
        weights: Sequence[float] | None = None,
        data: str = "val",
        slices: Mapping[str, Recipe | str] | None = None,
        judge: str | None = None,
        metric: str | None = None,
        commit: str | None = None,
        floor: bool = True,
        name: str | None = None,
        optimizer: str = "reset",
        warmup: int = 0,
        recalibrate: int = 2048,
        fisher: str = "empirical",
        samples: int = 256,
        **how: Unpack[Delivery],
    ) -> Result:
        """Merge the checkpoints that REFs name, and judge what comes of it; with `commit` the session goes on with one of them.

        The name of the run that the session is on means its present state. `strategies` is a name or several, or ``"all"``; `base`
        is what the parents come from, by default where the first of them left their nearest common ancestor. The rest is in
        `commands.MergeRuns`. The result is a table: ``scores`` by column (parents, ``now``, strategies) and slice, with what is ``best`` of
        each slice, where a strategy is ``worse`` than the best parent, why (``explained``), what was ``skipped``, and
        ``committed``, or why it was ``refused``.
        """
        if len(refs) < 2:
            raise InvalidCommandError(f"a merge takes two parents or more, not {len(refs)}")
        target = self.session(how.get("session"))
        parents = [None if ref == target.run else self._recorded(ref) for ref in refs]
        whence = self._fork_point(parents, target.run) if base is None else self._recorded(base)
        if commit is not None:
            for row in (*parents, whence):  # another process may let go of what the merge will stand on
                if row is not None and not row.pinned and self._session_on(row.run) not in (None, target):
                    self._pin(row, True)
        return self.command(
            "mergeRuns",
            parents=[_as_parent(row) for row in parents],
            base=None if whence is None else _as_parent(whence),
            strategies=[strategies] if isinstance(strategies, str) else list(strategies),
            options=dict(options or {}),
            weights=None if weights is None else list(weights),
            data=data,
            slices=dict(slices or {}),
            judge=judge,
            metric=metric,
            commit=commit,
            floor=floor,
            name=name,
            optimizer=optimizer,
            warmup=warmup,
            recalibrate=recalibrate,
            fisher=fisher,
            samples=samples,
            **how,
        )

    def merge_base(self, parents: Sequence[CheckpointRow]) -> CheckpointRow | None:
        """The checkpoint that `merge` takes the differences of these from, by default: where the lines of their runs part. None when
        they have none in common, or it is gone."""
        return self._fork_point(parents, parents[0].run) if parents else None

    def subset(
        self, recipe: Recipe | str | None = None, *, selection: str | None = None, **how: Unpack[Delivery]
    ) -> Result:
        """Train on the samples that a recipe or a selection names, from the next step on; without either, on all again."""
        return self.command("subset", recipe=_recipe(recipe), selection=selection, **how)

    def switch(self, run: str, **how: Unpack[Delivery]) -> Result:
        """Go over to another run, and on with it from where it stands."""
        self.run(run)
        return self.command("switchRun", run=run, **how)

    def undo(self, **how: Unpack[Delivery]) -> Result:
        """Take back the last command that changed the state, with the steps after it. They stay recorded."""
        return self.command("undo", **how)

    def scan(self, data: str = "train", *, embeddings: bool = False, **how: Unpack[Delivery]) -> Result:
        """Compute the loss of every sample, and more, under the present weights. Training stands meanwhile, and is not affected."""
        return self.command("scanSamples", data=data, embeddings=embeddings, **how)

    def scan_checkpoint(
        self,
        ref: str,
        data: str = "train",
        *,
        embeddings: bool = False,
        timeout: float | None = None,
        tell: Callable[[str], object] | None = None,
    ) -> Result:
        """The same under the weights of a checkpoint, computed in a process of its own: the recorded command line is started
        again, and ends before it trains. Works with a live session, which goes on untouched, and without one.

        A state that was scanned before is not scanned again. `timeout` is in seconds; `tell` is told how far it is. Raises
        `UnknownReferenceError`, `AmbiguousError`, `CheckpointNotFoundError`, and `ResumeError` when the run cannot be started again,
        or, quoting its last words, when the process ends before it has scanned.
        """
        from onthefly import sample_values, scanning
        from onthefly.runs import replay

        row = self._recorded(ref)
        if (known := sample_values.known(self.store, row.hash, data, embeddings=embeddings)) is not None:
            return known.told()
        maker = queries.session(self.store, row.session)
        launch = replay.launch_of(row.run, [None if maker is None else maker.launch], "scan")
        learned = self.events(kinds=["autocast"])
        # Of the process that made it, whichever run that was on then, or of an earlier one of the run.
        told = [one for one in learned if one.session == row.session] or [
            one for one in learned if one.run == row.run and one.session < row.session
        ]
        job = scanning.Job(row, data, embeddings, launch, told[-1].data if told else None)
        began = time.monotonic()
        table = scanning.scan(job, self.store.scans_dir, timeout=timeout, tell=tell)
        if (known := sample_values.known(self.store, row.hash, data, embeddings=embeddings)) is not None:
            return known.told()  # somebody else was faster
        path = sample_values.place(self.store, row.hash, data, embeddings=embeddings)
        digest = table.write(path)
        seconds = time.monotonic() - began
        found = sample_values.Scanned(table, path, digest, data, row.hash, row.step, seconds, again=False)
        try:
            self._adopt(row, found)
        except CommandTimeoutError:
            raise  # it stays queued: the session records the scan when it comes to it
        except OnTheFlyError:
            path.unlink(missing_ok=True)
            raise
        return found.told()

    def show_samples(self, indices: Sequence[int], data: str = "train", **how: Unpack[Delivery]) -> Result:
        """Read samples from a live session's data set, at most 64; `shown_samples` gives what came. Training is not affected."""
        return self.command("showSamples", data=data, indices=list(indices), **how)

    def shown_samples(self, key: str) -> SampleTable:
        """What `show_samples` has read, by the `shown` of its answer: a row a sample, with its kind, text, label and pixels.

        Raises `UnknownReferenceError`.
        """
        from onthefly import sample_values

        return sample_values.shown(self.store, key)

    def cancel_scan(self, **how: Unpack[Delivery]) -> Result:
        """Stop the scan that is under way."""
        return self.command("cancelScan", **how)

    def reset(self, **how: Unpack[Delivery]) -> Result:
        """Go back to the state that the session began with."""
        return self.command("resetSession", **how)

    def stop(self, *, save: bool = True, **how: Unpack[Delivery]) -> Result:
        """Finish the step, save, and end the process."""
        return self.command("stop", save=save, **how)

    def report(
        self,
        kind: str = "health",
        run: str | None = None,
        *,
        steps: int = 20,
        double_run: bool = True,
        timeout: float = _LONG,
    ) -> HealthReport:
        """Look at a run, and say what is wrong with it: see `onthefly.health`.

        A run that a live session is on is looked into for `steps` steps while it trains; of any other, what is recorded is judged.
        Without `run` it is the only live session's, or the newest of the store. `double_run`: for determinism on a live
        session, train three steps again in a fresh process, and compare. `timeout` is in seconds.

        Raises `InvalidCommandError` for a report that there is not, `UnknownReferenceError`, `AmbiguousError`, `CommandError` while
        another report is under way, and `CommandTimeoutError`.
        """
        from onthefly import reports

        return reports.report(self, kind, run, steps=steps, double_run=double_run, timeout=timeout)

    def cancel_report(self, **how: Unpack[Delivery]) -> Result:
        """End the report that is under way. It is answered with what was seen until then."""
        return self.command("cancelReport", **how)

    def recorded_report(self, kind: str = "health", run: str | None = None) -> HealthReport:
        """What is recorded of a run, judged, whether or not a session is on it: nobody is asked, and nothing is executed.

        Without `run` it is the newest of the store. Raises `InvalidCommandError` and `UnknownReferenceError`.
        """
        from onthefly import reports

        return reports.recorded(self, kind, run)

    def reports(self, run: str | None = None, kind: str | None = None, *, limit: int = 20) -> list[KeptReport]:
        """Reports that sessions have made, the newest first, each with what the store had recorded of its run until then."""
        from onthefly import reports

        return reports.kept(self, queries.reports(self.store, run=run, kind=kind, limit=limit))

    # -- samples -----------------------------------------------------------------------------------------------

    def scans(self, run: str | None = None) -> list[ScanRow]:
        """The scans of a run, or of all, oldest first."""
        return queries.scans(self.store, run=run)

    def samples(self, ref: str | None = None, *, dynamics: bool = False, data: str = "train") -> SampleTable:
        """What is known of every sample: the newest scan, of a run, of the checkpoint that a REF names, or of any; or, with
        `dynamics`, what training has recorded, as of that checkpoint or the newest. Its `about` says of which state.

        Raises `UnknownReferenceError` when nothing of that kind was computed yet.
        """
        from onthefly import sample_values

        if ref is None or any(run.name == ref for run in self.runs()):
            return sample_values.of(self.store, ref, dynamics=dynamics, data=data)
        return sample_values.of_state(self.store, self._recorded(ref).hash, dynamics=dynamics, data=data)

    def sample_map(self, scan: int, method: str = "pca") -> SampleTable:
        """Where each sample of a scan with embeddings lies in two dimensions, columns x and y: by pca, or by umap (an optional extra).

        Raises `UnknownReferenceError`, `MissingPartError` without umap-learn, and `InvalidCommandError` for another method.
        """
        from onthefly import sample_values

        for row in self.scans():
            if row.id == scan:
                return sample_values.sample_map(self.store, row, method)
        raise UnknownReferenceError(f"there is no scan {scan}")

    def sample_tags(self, data: str = "train", *, project: str | None = None) -> dict[str, list[int]]:
        """The words that people have given to samples, each with the indices of its samples. By default of the newest session's
        project. Raises `UnknownReferenceError` when the store has no session yet."""
        from onthefly.store import tags

        found = tags.read(self.store, self._project(project), data)
        return {tag: indices.tolist() for tag, indices in found.items()}

    def tag_samples(
        self,
        indices: Sequence[int],
        tag: str,
        data: str = "train",
        *,
        tagged: bool = True,
        project: str | None = None,
    ) -> dict[str, list[int]]:
        """Give a tag to samples, or, not `tagged`, take it from them; gives all tags. The tag "discarded" marks what nothing is to be
        trained on: the dashboard leaves such samples out of a fork.

        Raises `InvalidCommandError` for what is no tag or no index, and as `sample_tags`.
        """
        from onthefly.store import tags

        found = tags.change(self.store, self._project(project), data, tag, indices, tagged=tagged)
        return {tag: indices.tolist() for tag, indices in found.items()}

    def _project(self, named: str | None) -> str:
        if named is not None:
            return named
        rows = self.sessions()
        if not rows:
            raise UnknownReferenceError("the store has no session yet, so there are no samples to speak of")
        return rows[-1].project

    def selection(self, name: str) -> Selection:
        """The samples that a run is trained on, by its newest change of them; or the selection of that digest.

        Raises `UnknownReferenceError` for a run that is trained on all samples.
        """
        from onthefly import sample_values

        return sample_values.selection(self.store, name)

    def export_samples(
        self, to: str | Path, *, selection: str | None = None, recipe: Recipe | str | None = None
    ) -> Result:
        """Write the samples of a run or of a selection, or those that a recipe chooses, with what is known of each, to a new
        ``.parquet``, ``.csv`` or ``.json`` file. By default, all."""
        from onthefly import sample_values

        done = sample_values.export(self.store, Path(to).absolute(), selection, _recipe(recipe))
        return {"path": str(done.path), "rows": done.rows}

    # -- runs --------------------------------------------------------------------------------------------------

    def compare(self, a: str, b: str) -> RunDiff:
        """What two runs differ in: what they began from, values, weights, metrics at common steps, and single samples. Loads torch.

        Raises `UnknownReferenceError`.
        """
        from onthefly import run_comparison

        return run_comparison.compare(self, self.run(a), self.run(b))

    def sample_changes(self, a: str, b: str, data: str = "train") -> Changes:
        """Which samples the run `b` has learned or forgotten, seen from `a`: by the newest scan of `data` of each. Loads no torch.

        Raises `UnknownReferenceError` when one of them was not scanned, or they are of data sets of different lengths.
        """
        from onthefly import sample_values
        from onthefly.samples.changes import changes

        before, after = (sample_values.of(self.store, self.run(run).name, data=data) for run in (a, b))
        return changes(before.columns, after.columns)

    def heads(self) -> dict[str, tuple[int, int]]:
        """For every run, the last step and epoch that is recorded of it."""
        return queries.heads(self.store)

    def archive(self, run: str, archived: bool = True) -> RunRow:
        """Leave a run out of listings, or take it in again. Nothing of it is removed."""
        from onthefly.store import catalog

        row = self.run(run)
        catalog.archive(self.store, row.name, time.time() if archived else None)
        return self.run(run)

    def remove_run(self, run: str) -> Result:
        """Remove what a run has on disk, but for what another run goes on from. Its history stays, and so does its name.

        Raises `CommandError` for a run that a session trains.
        """
        from onthefly.store import catalog

        row = self.run(run)
        if (session := self._session_on(row.name)) is not None:
            raise CommandError(f"{row.name!r} is being trained by process {session.pid}; stop it first: onthefly stop")
        from onthefly.checkpoints import sidecar

        lineage = Lineage(other for other in keeping.lasting(self.runs()) if other.name != row.name)
        freed, kept = 0, 0
        for checkpoint in self.checkpoints(row.name):
            if lineage.needs(checkpoint):
                kept += 1
                continue
            catalog.bury(self.store, checkpoint, "run removed")  # first: a row without a file would be a promise
            checkpoint.path.unlink(missing_ok=True)
            sidecar.path_of(checkpoint.path).unlink(missing_ok=True)
            freed += checkpoint.size
        catalog.remove_run(self.store, row.name, time.time())
        return {"run": row.name, "freed": freed, "kept": kept}

    # -- starting again ----------------------------------------------------------------------------------------

    def resume_target(self, run: str | None = None) -> ResumeTarget:
        """The unfinished run to resume: that one, or the only one.

        Raises `ResumeError` when it is alive, finished, or has no command line that can be run again;
        `UnknownReferenceError` for a run that is not there; `AmbiguousError`, listing them, when several are unfinished.
        """
        live = self.sessions(alive=True)
        row = self._only_unfinished(live) if run is None else self.run(run)
        if busy := [session for session in live if session.run == row.name]:
            raise ResumeError(f"{row.name!r} is being trained now: session {busy[-1].id}, pid {busy[-1].pid}")
        if row.status == "finished":
            raise ResumeError(f"{row.name!r} is finished; there is nothing left to train")
        if row.status == "removed":
            raise ResumeError(f"{row.name!r} was removed; its history is all that is left")
        last = queries.session(self.store, queries.trainers(self.store).get(row.name, 0))
        if last is None:
            raise ResumeError(f"no session of {row.name!r} is recorded, so how to start it is not known")
        if last.launch is None:
            raise ResumeError(
                f"{row.name!r} was not started by a command line that can be run again (a notebook, or a script piped "
                f"in); start it yourself with {launching.RESUME}={row.name} in its environment"
            )
        launching.check_first(last.launch, row.name)
        return ResumeTarget(row, last, last.launch)

    def relaunch(self, target: ResumeTarget) -> NoReturn:
        """Become the process that trains the run on. Raises `ResumeError` when what it was started from is gone."""
        extra = {launching.RESUME: target.run.name, launching.STORE: str(self.store.root.absolute())}
        self.close()
        launching.relaunch(target.launch, extra)

    # -- proving -----------------------------------------------------------------------------------------------

    def plan(self, ref: str | None = None, to: str | None = None) -> Plan:
        """What `verify` would train again."""
        from onthefly import verification

        checkpoints, runs = self.checkpoints(), self.runs()
        start = self._recorded(ref) if ref is not None else verification.newest(checkpoints, runs)
        end = self._recorded(to) if to is not None else None
        return verification.plan(
            start,
            end,
            checkpoints=checkpoints,
            runs=runs,
            events=self.events((end or start).run, kinds=["command"]),
            sessions={row.id: row for row in self.sessions()},
        )

    def verify(self, ref: str | None = None, to: str | None = None, *, timeout: float | None = None) -> Verification:
        """Train a recorded stretch again in a fresh process, and compare it with what was recorded, bit by bit.

        It starts at `ref` and ends at `to`, or at the next checkpoint of that run and generation; without `ref` it is the
        newest such stretch of the store. When `ref` is the first checkpoint of a run that began from another's (a fork, a
        rewind), or of a generation after a reset, the stretch is the one from there, with what the run was born with. `timeout`
        is in seconds. A difference is a result, not an error. Raises `UnknownReferenceError`, `AmbiguousError`,
        `InvalidCommandError` for REFs between which no steps lie, and `ResumeError` when the replay cannot start or does not
        come to its end.
        """
        from onthefly import verification

        return verification.replay(self.plan(ref, to), self.store.scans_dir, timeout=timeout)

    def verify_merge(self, run: str) -> MergeProof:
        """Compute the merge that a run began from again, from its parents' checkpoints, and compare it bit by bit.

        A difference is a result, not an error. Raises `UnknownReferenceError`, `CommandError` for a run that is no merge, and
        `CheckpointError` when a parent, or what was measured of it, is gone or damaged.
        """
        from onthefly import remerging

        return remerging.prove(self.store, self.run(run))

    def fsck(self, *, full: bool = True, progress: Progress | None = None) -> Report:
        """Look whether every recorded checkpoint is there with its content, and what else lies beside them. Changes nothing.

        With `full` every byte is read; `progress` is told the path that is read next, the bytes that are done, and of how many.
        What is lost or damaged is a finding with the severity ``"error"``, and not raised.
        """
        from onthefly import fsck

        return fsck.check(self.store, full=full, progress=progress)

    def repair(self, report: Report) -> tuple[Repair, ...]:
        """Do what the remedies of a report of `fsck` say: nothing by which a checkpoint could be lost."""
        from onthefly import repairs

        return repairs.repair(self.store, report)

    def gc(self, *, keep: int | None = None, dry_run: bool = False) -> Collection:
        """Remove files that nothing needs and checkpoints that retention lets go, of each run that no session trains.

        With `keep` that many of the newest are kept, whatever the run's session was told; with `dry_run` nothing is removed.
        Raises `ValueError` for a `keep` below 1.
        """
        from onthefly import garbage

        return garbage.collect(self.store, keep=keep, dry_run=dry_run)

    # -- parts -------------------------------------------------------------------------------------------------

    def _answer(self, target: SessionRow, id: str, timeout: float) -> CommandRow | None:
        """The command's row once it is done, or None when time is over."""
        deadline = time.monotonic() + timeout
        while True:
            row = queries.command(self.store, id)
            if row is not None and row.status != "queued":
                return row
            if not self.store.is_alive(target):
                self.store.recover(time.time())  # it may have answered with its last breath
                row = queries.command(self.store, id)
                if row is not None and row.status != "queued":
                    return row
                raise NoLiveSessionError(f"session {target.id} ({target.run}) ended before it could answer")
            if time.monotonic() >= deadline:
                return None
            time.sleep(_POLL)

    def _unfinished(self, live: Iterable[SessionRow]) -> list[RunRow]:
        busy = {row.run for row in live}
        return [row for row in self.runs() if row.status == "unfinished" and row.name not in busy]

    def _only_unfinished(self, live: Iterable[SessionRow]) -> RunRow:
        rows = self._unfinished(live)
        if not rows:
            raise ResumeError(f"no unfinished run in {self.store.root}; there is nothing to resume")
        if len(rows) > 1:
            names = references.listed(row.name for row in rows)
            raise AmbiguousError(f"several runs are unfinished; say which: onthefly resume RUN, one of {names}")
        return rows[0]

    def _best_metric(self, run: str | None) -> str:
        config = queries.configs(self.store).get(run or "", {})
        return str(config.get("best_metric", "val_loss"))

    def _pin(self, row: CheckpointRow, pinned: bool, timeout: float = _TIMEOUT) -> Result:
        if (session := self._session_on(row.run)) is not None:
            return self.command("pinCheckpoint", session.id, timeout=timeout, path=str(row.path), pinned=pinned)
        from onthefly.store import catalog

        catalog.pin(self.store, row, pinned)
        return {**_told(row), "pinned": pinned}

    def _fork_point(self, parents: Sequence[CheckpointRow | None], live: str) -> CheckpointRow | None:
        """The checkpoint that all of these come from, if it is still there. None stands for the head of the run that is live.

        It is of their nearest common ancestor: where the first line left it, or that one of its own checkpoints among them that is
        earlier still.
        """
        lineage = Lineage(self.runs())
        names = [live if row is None else row.run for row in parents]
        ancestor = lineage.nearest_common(names)
        if ancestor is None:
            return None
        contents = {content for name in names for content in lineage.departures(name, ancestor)}
        rows = [row for row in self.checkpoints(ancestor) if row.hash in contents]
        rows += [row for row in parents if row is not None and row.run == ancestor]
        return min((row for row in rows if row.path.exists()), key=lambda row: (row.generation, row.step), default=None)

    def _session_on(self, run: str) -> SessionRow | None:
        return next((session for session in self.sessions(alive=True) if session.run == run), None)

    def _refuse_live(self, run: str) -> None:
        if (session := self._session_on(run)) is not None:
            raise CommandError(
                f"session {session.id} (pid {session.pid}) is on {run!r} and owns its checkpoints; import when it has ended"
            )

    def _newest(self) -> CheckpointRow:
        rows = self.checkpoints()
        if not rows:
            raise UnknownReferenceError("there is no checkpoint in this store to import into")
        return rows[-1]

    def _record(self, arrived: Arrived, run: str, generation: int) -> CheckpointRow:
        """Record a file that is in place; when that fails, the file does not stay."""
        from onthefly.checkpoints import sidecar
        from onthefly.store import catalog

        best_by, counters = self._best_metric(run), arrived.counters
        measured = counters.get(best_by) is not None and counters.get(f"{best_by}_step") == arrived.step
        try:
            catalog.record(
                self.store,
                run=run,
                generation=generation,
                step=arrived.step,
                epoch=arrived.epoch,
                path=arrived.path,
                hash=arrived.hash,
                size=arrived.size,
                reason=references.IMPORTED,
                pinned=True,
                metrics={best_by: float(counters[best_by])} if measured else {},
            )
        except BaseException:
            arrived.path.unlink(missing_ok=True)
            sidecar.path_of(arrived.path).unlink(missing_ok=True)
            raise
        return next(row for row in reversed(self.checkpoints(run)) if row.path == arrived.path)

    def _adopt(self, row: CheckpointRow, found: Scanned) -> None:
        """Record a scan of a checkpoint whose file is in place: by the session that keeps the run's history, if one lives."""
        about: dict[str, Any] = {
            "run": row.run,
            "generation": row.generation,
            "step": row.step,
            "epoch": row.epoch,
            "checkpoint": row.hash,
            "data": found.data,
            "columns": list(found.table.columns),
            "length": len(found.table),
            "path": str(found.path),
            "hash": found.hash,
            "seconds": found.seconds,
        }
        live = {session.id: session for session in self.sessions(alive=True)}
        # One that has gone on to another run keeps the history of what it trained before.
        if (session := self._session_on(row.run) or live.get(row.session)) is not None:
            try:
                self.command("adoptScan", session.id, **about)
            except NoLiveSessionError:
                self.store.recover(time.time())
            else:
                return
        from onthefly.store import catalog

        catalog.scanned(self.store, **about)

    def _file(self, ref: str) -> Path:
        found = self.resolve(ref)
        return found if isinstance(found, Path) else found.path

    def _recorded(self, ref: str) -> CheckpointRow:
        found = self.resolve(ref)
        if isinstance(found, Path):
            raise UnknownReferenceError(f"{found} is not a recorded checkpoint of {self.store.root}")
        return found


def _user() -> str:
    """Who runs this process, for the audit trail: `user@host`."""
    try:
        name = pwd.getpwuid(os.getuid()).pw_name  # and not what the environment says
    except KeyError:  # a container may have no name for its user
        name = f"uid {os.getuid()}"
    return f"{name}@{socket.gethostname()}"


def _recipe(recipe: Recipe | str | None) -> Recipe | None:
    if not isinstance(recipe, str):
        return recipe
    from onthefly.samples.recipes import parse  # brings NumPy

    return parse(recipe)


def _as_parent(row: CheckpointRow | None) -> Result:
    return {} if row is None else {"path": str(row.path), "hash": row.hash}


def _told(row: CheckpointRow) -> Result:
    """A checkpoint, as a session answers with it."""
    return {"path": str(row.path), "hash": row.hash, "size": row.size, "step": row.step, "epoch": row.epoch}


def _error(row: CommandRow) -> OnTheFlyError:
    """The error that a session answered with, as its own class when it is one of ours."""
    answer = row.error or {}
    message = str(answer.get("message") or "the command failed")
    kind = getattr(errors, str(answer.get("type")), None)
    if isinstance(kind, type) and issubclass(kind, OnTheFlyError):
        return kind(message)
    return CommandError(f"{answer['type']}: {message}" if answer.get("type") else message)
