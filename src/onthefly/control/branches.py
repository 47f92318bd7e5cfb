"""Going from run to run: a fork, a load, a switch, a reset, and the way back.

    fork     a new run that begins from this boundary, with other samples or values
    load     a new run that begins from a checkpoint: what was trained behind it stays what it was
    merge    a new run that begins from a state that was made of several checkpoints
    switch   another run, from where it stands
    reset    the run itself, from its beginning, as a new generation
    undo     to where the session was before the last of these, or before the last changed value

Nothing here edits history: there is one truth for each step of a run's generation. The run that is left keeps a
checkpoint of the boundary at which it was left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from onthefly.checkpoints import retention
from onthefly.checkpoints.format import CheckpointFile
from onthefly.control import commands, start
from onthefly.control.changes import Changed, Changes
from onthefly.control.checkpointer import Checkpointer, Save
from onthefly.control.history import History, Line
from onthefly.control.provenance import Kind, Provenance
from onthefly.control.ring import Kept, Ring
from onthefly.control.start import Change, Due, Standing, Start
from onthefly.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CommandError,
    InvalidCommandError,
    OnTheFlyError,
    ResumeError,
    UnknownReferenceError,
    said,
)
from onthefly.runs import launch, references
from onthefly.samples.selection import Selection
from onthefly.state.train_state import TrainState, Value
from onthefly.store import queries
from onthefly.store.projection import project
from onthefly.store.queries import CheckpointRow, EventRow

Result = dict[str, Any]
_TAKEN_BACK = ("command", "runTransition", "generation", "undo")


class Branches:
    """Owns the ring of the run that is under way, and what that run was born with. Everything happens at a boundary."""

    def __init__(
        self,
        begun: Start,
        state: TrainState,
        history: History,
        checkpointer: Checkpointer,
        changes: Changes,
        provenance: Provenance,
        *,
        save: Save,
        check: Callable[[Path, Value], None],
        put_back: Callable[[Value, CheckpointFile], bool],
        start_beside: Callable[[str], None],
    ) -> None:
        self._start = begun
        self._store = begun.store
        self._state = state
        self._history = history
        self._checkpointer = checkpointer
        self._changes = changes
        self._provenance = provenance
        self._save = save
        self._check = check  # whether a state fits the live objects
        self._put_back = put_back  # and whether that left the training at the boundary that the state is of
        self._start_beside = start_beside
        self._birth = [due.command for due in begun.birth]

    # -- what commands ask for ---------------------------------------------------------------------------------

    def fork(self, command: commands.ForkRun, selection: Selection | None) -> Future[Result]:
        """Begin a new run from this boundary, or, `fresh`, from the beginning of this one. The future is done when what it
        begins from is durable.

        Raises, with everything as it was, what the changes raise, and `StoreError` when the run cannot be written down.
        """
        born = self._born(command, selection)
        for change in born:
            self._changes.check(change)
        if command.beside:
            self._check_launch()
        origin = self._beginning() if command.fresh else None
        if origin is not None and self._checkpointer.ring.origin() is None:
            born = [*self._birth, *born]  # it begins where this run did
        parent = self._history.line
        line = Line(self._new_run(command.name, "fork", [(parent.run, "")]), 0)
        before = self._before()
        saving = self._save("fork", goes_on=False)
        if origin is not None and not command.beside:
            self._settled(line.run, saving)  # the state that is left is about to be gone
        base = _done(origin) if origin is not None else saving
        about = _told(selection, born)
        answer: Future[Result] = Future()
        if command.beside:
            step, epoch = self._place_of(origin)
            self._history.event("newRun", step, epoch, line, kind="fork", parents=[parent.run], **about)
            self._record_birth(line, born, step, epoch)
        else:
            ready = origin is None or self._return_to(origin.path, origin.hash)
            self._go_to(line, [], "fork", before, kind="fork", parents=[parent.run], **about)
            self._give_birth(born, ready)
        ring = self._checkpointer.ring

        def begins(saved: Future[Kept]) -> None:  # on the writer's thread
            lost: CheckpointError | None = None
            try:
                kept = saved.result()
                self._begins(line.run, "fork", kept, [(parent.run, kept)], selection, born)
                ring.need(kept.path)
                if command.beside:
                    self._start_beside(line.run)
            except BaseException as e:  # noqa: BLE001  whoever waits is told
                lost = _lost(line.run, parent.run, e, beside=command.beside)
            # Not before: after a death in between, the parent is what can be gone on with.
            if not command.beside:
                self._history.run_status("running", line.run)
                self._history.run_status("left", parent.run)
            elif lost is not None:
                self._history.run_status("failed", line.run)
            if lost is not None:
                answer.set_exception(lost)
            else:
                where = {"step": kept.step, "epoch": kept.epoch}
                answer.set_result({"run": line.run, "parent": parent.run, "hash": kept.hash, **where, **about})

        base.add_done_callback(begins)
        return answer

    def load(self, path: Path, *, content: str | None = None, name: str | None = None, reason: str = "load") -> Result:
        """Put a checkpoint's state into the live objects, and go on from there as a new run.

        Raises `CheckpointError`, `StateMismatchError` and `StoreError` with everything as it was.
        """
        value, file = self._checkpointer.read(path, content)
        self._check(path, value)
        left = self._leave()
        project(self._store, self._start.session)
        row = self._row(path, file.hash)
        parents = [(row.run, row.hash)] if row is not None and row.reason != references.IMPORTED else []
        before = self._before()
        line = Line(self._new_run(name, "rewind", parents), 0)
        self._put_back(value, file)  # wherever that leads: nothing is to be done there
        step, epoch = self._place()
        kept = Kept(path, file.hash, file.size, 0, step, epoch, "base", False, None)
        self._begins(line.run, "rewind", kept, [(parent, kept) for parent, _ in parents], None, [])
        self._go_to(
            line, [path], reason, before, kind="rewind", parents=[parent for parent, _ in parents], hash=kept.hash
        )
        self._settle_statuses(left)
        self._birth = []
        if row is None or self._is_trained_elsewhere(row.run):
            # Somebody else may remove the file, and a run's beginning must stay.
            self._save(retention.ORIGIN, goes_on=False)
        return {"loaded": str(path), "hash": file.hash, "step": step, "epoch": epoch, "run": line.run}

    def merge(
        self,
        value: Value,
        parents: Sequence[tuple[str, Kept]],
        how: Mapping[str, Any],
        name: str | None,
        born: Sequence[Change],
        base: Kept | None = None,
    ) -> Result:
        """Go on as a new run from a state of this boundary that was made of the parents' (run, checkpoint), after changes to it.

        A `base` that they were merged by is pinned: the merge stands on it, and lineage cannot tell. The state is durable before
        anything changes. Raises `CheckpointError`, `StateMismatchError` and `StoreError` with everything as it was.
        """
        self._check(Path("the merged state"), value)
        left = self._leave()
        before = self._before()
        line = Line(self._new_run(name, "merge", [(run, kept.hash) for run, kept in parents]), 0)
        ring = Ring(self._start.folder, self._history, self._start.config)
        kept: Kept | None = None
        try:
            kept = self._checkpointer.save_value(value, line, ring)
            value, file = self._checkpointer.read(kept.path, kept.hash)
            # Before the run is gone on with, or a death in between would leave it without.
            self._record_birth(line, born, kept.step, kept.epoch)
            ready = self._put_back(value, file)
        except OnTheFlyError:
            self._history.run_status("failed", line.run)
            if kept is not None:
                ring.discard(kept)
            raise
        if base is not None:
            self._history.pinned(str(base.path), base.hash, True)
        self._begins(line.run, "merge", kept, parents, None, born, how)
        names = [run for run, _ in parents]
        self._go_to(line, [], "merge", before, [kept], kind="merge", parents=names, hash=kept.hash)
        self._settle_statuses(left)
        self._checkpointer.adopt(kept)
        self._birth = list(born)
        if ready:
            for change in born:
                self._changes.apply(change)
        else:
            self._changes.expect([Due(kept.step, kept.epoch, change) for change in born])
        return {"run": line.run, "from": left, "parents": names, "path": str(kept.path), "hash": kept.hash}

    def switch(self, name: str, *, reason: str = "switch") -> Result:
        """Go over to another run, and on from where it stands.

        Raises `UnknownReferenceError`, `CommandError` for a run that cannot be gone on with here, and `CheckpointError` and
        `StateMismatchError`, with everything as it was.
        """
        left = self._leave()
        found = self._standing(name)
        assert found.base is not None
        value, file = self._checkpointer.read(found.base.path, found.base.hash)
        self._check(found.base.path, value)
        before = self._before()
        row = queries.run(self._store, name)
        assert row is not None
        ready = self._put_back(value, file)
        self._go_to(Line(name, row.generation), found.needed, reason, before, kept=found.kept)
        self._history.expect(found.recorded, found.head)
        self._settle_statuses(left)
        self._birth = [due.command for due in found.birth]
        self._changes.expect(found.again)
        step, epoch = self._place()
        if ready:
            self._changes.repeat(step, epoch)
        return {"run": name, "from": left, "hash": file.hash, "step": step, "epoch": epoch}

    def reset(self) -> Result:
        """Go back to the run's beginning, as a new generation of it, and let its other checkpoints go."""
        origin = self._beginning()
        value, file = self._checkpointer.read(origin.path, origin.hash)
        self._check(origin.path, value)
        before = self._before()
        self._checkpointer.ring.hold(self._save(retention.UNDO, goes_on=False).result().path)
        ready = self._put_back(value, file)
        step, epoch = self._place()
        base = {"path": str(origin.path), "hash": origin.hash, "step": step, "epoch": epoch}
        self._history.begin_generation(step, epoch, "reset", base, before=before)
        self._checkpointer.changed()
        self._give_birth(self._birth, ready)
        self._checkpointer.ring.need(origin.path)
        self._checkpointer.ring.leave_line(step)
        self._checkpointer.ring.clear()
        generation = self._history.generation
        return {"loaded": str(origin.path), "hash": origin.hash, "step": step, "generation": generation}

    def change(self, change: Change) -> Changed:
        """Change values or samples from this boundary on. The state before is saved, so that it can be taken back."""
        self._changes.check(change)
        if self._start.config.undo and not self._checkpointer.busy:
            ring = self._checkpointer.ring
            self._save(retention.UNDO).add_done_callback(lambda saved: _hold(ring, saved))
        before = self._before()
        changed = self._changes.apply(change)
        if changed:
            self._record(change, changed, before=before)
        return changed

    def undo(self) -> Result:
        """Go back to where the session was before its last change, as if that had not been. What was trained since stays recorded.

        Raises `CommandError` when there is nothing to take back, or the state before is no longer there.
        """
        self._checkpointer.settle()
        project(self._store, self._start.session)
        change = self._last_change()
        before = change.data["before"]
        row = self._before_it(change)
        if before["run"] != self._history.run and self._stands_at(before["run"], row):
            result = self.switch(before["run"], reason="undo")
        else:
            result = self.load(row.path, content=row.hash, reason="undo")
        undone = str(change.data.get("kind") or change.data.get("reason") or change.kind)
        self._history.event("undo", *self._place(), undone=[change.session, change.seq], command=undone)
        return {"undone": undone, **result}

    def needing(self, paths: Iterable[Path]) -> AbstractContextManager[None]:
        """Retention leaves these files meanwhile."""
        return self._checkpointer.ring.needing(paths)

    def root_began(self, origin: Future[Kept]) -> None:
        """Write the manifest of a run that began with this process, once its origin is durable."""
        line = self._history.line

        def begins(saved: Future[Kept]) -> None:
            if saved.exception() is None:
                digest = self._provenance.manifest(line.run, "root", [], None, [])
                self._history.run_begins(line.run, None, [], digest)

        origin.add_done_callback(begins)

    # -- parts -------------------------------------------------------------------------------------------------

    def _born(self, command: commands.ForkRun, selection: Selection | None) -> list[Change]:
        born: list[Change] = []
        if selection is not None:
            born.append(commands.Subset(recipe=None, selection=selection.digest))
        if command.values:
            born.append(commands.SetValue(values=command.values, hold=command.hold, release=False))
        return born

    def _settled(self, run: str, saving: Future[Kept]) -> None:
        try:
            saving.result()
        except CheckpointError:
            self._history.run_status("failed", run)
            raise

    def _new_run(self, name: str | None, kind: str, parents: Sequence[tuple[str, str]]) -> str:
        project_name = self._start.config.project
        return self._store.create_run(name, project=project_name, kind=kind, parents=parents, status="planned")

    def _begins(
        self,
        run: str,
        kind: Kind,
        base: Kept,
        parents: Sequence[tuple[str, Kept]],
        selection: Selection | None,
        born: Sequence[Change],
        merge: Mapping[str, Any] | None = None,
    ) -> None:
        """Write down what a run stands on: its manifest, its base, and its parents' hashes."""
        told = [{"run": parent, "step": kept.step, "epoch": kept.epoch, "hash": kept.hash} for parent, kept in parents]
        digest = self._provenance.manifest(run, kind, told, selection, born, merge)
        where = {"path": str(base.path), "hash": base.hash, "step": base.step, "epoch": base.epoch}
        self._history.run_begins(run, where, [kept.hash for _, kept in parents], digest)

    def _go_to(
        self,
        line: Line,
        needed: Sequence[Path],
        reason: str,
        before: Mapping[str, Any],
        kept: Sequence[Kept] = (),
        **new: Any,
    ) -> None:
        step, epoch = self._place()
        self._history.go_to(line)
        if new:
            self._history.event("newRun", step, epoch, **new)
        transition = {"from": before["run"], "to": line.run, "reason": reason, "before": dict(before)}
        self._history.event("runTransition", step, epoch, **transition)
        self._checkpointer.go_to(Ring(self._start.folder, self._history, self._start.config, kept, needed))

    def _settle_statuses(self, left: str) -> None:
        self._history.run_status("running")
        self._history.run_status("left", left)

    def _leave(self) -> str:
        """Save where the run is left, so that it can be gone on with from just there. Gives the run's name."""
        self._checkpointer.settle()
        self._save("leave", goes_on=False).result()
        return self._history.run

    def _return_to(self, path: Path, content: str) -> bool:
        self._checkpointer.settle()
        value, file = self._checkpointer.read(path, content)
        self._check(path, value)
        return self._put_back(value, file)

    def _give_birth(self, born: Sequence[Change], ready: bool) -> None:
        """Make of the state what the run begins with: now, or once the training is at the state's own boundary."""
        self._birth = list(born)
        step, epoch = self._place()
        if ready:
            for change in born:
                self._record(change, self._changes.apply(change), birth=True)
        else:
            self._record_birth(self._history.line, born, step, epoch)
            self._changes.expect([Due(step, epoch, change) for change in born])

    def _check_launch(self) -> None:
        if self._start.launch is None:
            raise CommandError(
                "a fork beside this one starts the same command line again, and there is none (a notebook, or a script piped "
                "in): put the loop into a file, or fork in place"
            )
        launch.check_first(self._start.launch, self._history.run)

    def _beginning(self) -> Kept:
        """What the run began with: its own origin, or the checkpoint of another run."""
        self._checkpointer.settle()
        if (origin := self._checkpointer.ring.origin()) is not None:
            return origin
        project(self._store, self._start.session)
        row = queries.run(self._store, self._history.run)
        if row is None or row.base is None:
            raise CheckpointNotFoundError("this run has no origin checkpoint: it could not be saved when the run began")
        base = row.base
        path = self._store.full_path(base["path"])
        return Kept(path, base["hash"], 0, row.generation, base["step"], base["epoch"], "base", False, None)

    def _record_birth(self, line: Line, born: Sequence[Change], step: int, epoch: int) -> None:
        for change in born:
            about = {"kind": change.kind, "arguments": change.model_dump(exclude_none=True), "birth": True}
            self._history.event("command", step, epoch, line, **about)

    def _record(self, change: Change, changed: Changed, **more: Any) -> None:
        about = {"kind": change.kind, "arguments": change.model_dump(exclude_none=True), "changed": changed}
        self._history.event("command", *self._place(), **about, **more)

    def _standing(self, name: str) -> Standing:
        """Raises for a run that this session cannot go on with."""
        if name == self._history.run:
            raise InvalidCommandError(f"the session is on {name!r} already")
        project(self._store, self._start.session)
        row = queries.run(self._store, name)
        if row is None:
            there_are = references.listed(run.name for run in queries.runs(self._store))
            raise UnknownReferenceError(f"there is no run {name!r}; there are: {there_are}")
        if row.status == "removed":
            raise CommandError(f"{name!r} was removed; its history is all that is left")
        if self._is_trained_elsewhere(name):
            raise CommandError(
                f"{name!r} is being trained by another process; stop that first: onthefly stop --run {name}"
            )
        try:
            found = start.standing(self._store, row, self._start.config.best_metric)
        except ResumeError as e:
            raise CommandError(said(e)) from e
        if found.base is None:
            raise CommandError(f"{name!r} has no checkpoint to go on from")
        return found

    def _stands_at(self, name: str, row: CheckpointRow) -> bool:
        try:
            found = self._standing(name)
        except CommandError:
            return False
        return found.base is not None and found.base.hash == row.hash and found.head <= row.step

    def _is_trained_elsewhere(self, run: str) -> bool:
        live = queries.sessions(self._store, alive=True)
        return any(session.run == run and session.id != self._start.session for session in live)

    def _row(self, path: Path, content: str) -> CheckpointRow | None:
        rows = [row for row in queries.checkpoints(self._store) if row.hash == content]
        return next((row for row in rows if row.path == path), None)

    def _last_change(self) -> EventRow:
        """The last one that was not taken back."""
        mine = {self._start.session}
        if self._start.resumed:
            began = queries.session(self._store, self._start.session)
            earlier = queries.sessions(self._store)
            mine |= {s.id for s in earlier if began is not None and s.run == self._start.run and s.id < began.id}
        stack: list[EventRow] = []
        for event in queries.events(self._store, kinds=_TAKEN_BACK):
            if event.session not in mine:
                continue
            if event.kind == "undo":
                stack = [one for one in stack if [one.session, one.seq] != event.data["undone"]]
            elif "before" in event.data and event.data.get("reason") != "undo":
                stack.append(event)
        if not stack:
            raise CommandError("there is nothing to undo: nothing was loaded, set, forked, switched or reset")
        return stack[-1]

    def _before_it(self, change: EventRow) -> CheckpointRow:
        before = change.data["before"]
        place = tuple(before[key] for key in ("run", "generation", "step", "epoch"))
        rows = [
            row
            for row in queries.checkpoints(self._store)
            if (row.run, row.generation, row.step, row.epoch) == place
            and (row.session, row.captured) <= (change.session, change.seq)
            and row.path.exists()
        ]
        if not rows:
            near = f"onthefly checkpoints {before['run']} lists what there is, onthefly load goes there"
            raise CommandError(f"the state at step {before['step']} of {before['run']!r} is no longer there; {near}")
        return rows[-1]

    def _before(self) -> dict[str, Any]:
        step, epoch = self._place()
        return {"run": self._history.run, "generation": self._history.generation, "step": step, "epoch": epoch}

    def _place(self) -> tuple[int, int]:
        counters = self._state.counters
        return int(counters["step"] or 0), int(counters["epoch"] or 0)

    def _place_of(self, origin: Kept | None) -> tuple[int, int]:
        return self._place() if origin is None else (origin.step, origin.epoch)


def _told(selection: Selection | None, born: Sequence[Change]) -> dict[str, Any]:
    about: dict[str, Any] = {}
    if selection is not None:
        about |= {"selection": selection.digest, "samples": len(selection.indices), "of": selection.length}
    for change in born:
        if isinstance(change, commands.SetValue):
            about["values"] = dict(change.values)
    return about


def _lost(run: str, parent: str, e: BaseException, *, beside: bool) -> CheckpointError:
    if beside:
        return CheckpointError(f"{run} was not begun: {said(e)}")
    return CheckpointError(
        f"training is on {run}, but what it begins from could not be saved ({said(e)}): save soon, "
        f"or go back to {parent} with `onthefly switch {parent}`"
    )


def _hold(ring: Ring, saved: Future[Kept]) -> None:
    if saved.exception() is None:
        ring.hold(saved.result().path)


def _done(kept: Kept) -> Future[Kept]:
    future: Future[Kept] = Future()
    future.set_result(kept)
    return future
