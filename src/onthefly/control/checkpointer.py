"""Checkpoints of a live run: when one is due, what a step waits for, and what becomes of it behind the training."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from onthefly.checkpoints import format, retention, sidecar
from onthefly.checkpoints.staging import Slot, Staged, Staging
from onthefly.checkpoints.writer import Worker
from onthefly.config import SessionConfig
from onthefly.control.history import History, Line
from onthefly.control.ring import Kept, Ring
from onthefly.errors import (
    CheckpointError,
    CheckpointWriteError,
    CorruptCheckpointError,
    StateError,
    StateMismatchError,
    said,
)
from onthefly.state.parts import all_parameters, state_tensors
from onthefly.state.train_state import Number, TrainState, Value
from onthefly.state.tree import flatten, unflatten

_WORTH_OVERLAPPING = 32 * 2**20
"""Bytes; below that a copy takes a few milliseconds, and a thread to share them with costs as much."""
_WORTH_TELLING = 0.05
"""Seconds that a save waited for the one before it."""

_BESIDE = 2**20
"""Bytes that a checkpoint takes beside its tensors, about: header and sidecar."""

Place = tuple[int, int]


@dataclass
class _Save:
    """A save that was asked for, as it was at its boundary."""

    future: Future[Kept]
    reason: str
    pin: bool
    path: Path | None
    line: Line
    ring: Ring
    step: int
    epoch: int
    captured: int
    metric: float | None
    counters: Mapping[str, Number]


class _TornError(Exception):
    def __init__(self, names: list[str]) -> None:
        super().__init__(names)
        self.names = names


class Save(Protocol):
    """Saves a checkpoint of the boundary that training stands at: see `Checkpointer.save`."""

    def __call__(self, reason: str, *, goes_on: bool = True) -> Future[Kept]: ...


class Checkpointer:
    """Takes the train state at a boundary, and has it written, recorded and retained by a thread of its own.

    `save` returns as soon as training may go on; the future that it gives is done when the checkpoint is durable and
    recorded. A failed save leaves every older checkpoint where it is, but for those that retention would have let go after it,
    where the disk was short of room.
    """

    def __init__(
        self, state: TrainState, ring: Ring, history: History, config: SessionConfig, on_torn: Callable[[], None]
    ) -> None:
        self._state = state
        self.ring = ring
        self._history = history
        self._config = config
        self._on_torn = on_torn  # called on the writer's thread: a save must be taken again at the next boundary
        self._writer = Worker("onthefly-writer")
        self._copier = Worker("onthefly-copier")
        self._staging = Staging(config.ckpt_slots, self._copier, self._refused)
        self._latest: tuple[Place, Future[Kept]] | None = None  # of a state that nothing has changed since
        self._staged: list[Staged] = []  # what the next step waits for
        self._torn: list[_Save] = []
        self._at_boundary: set[str] = set()  # tensors that changed when they should not have
        self._told = True
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self.spent = 0.0
        """Seconds that the training thread was held up by copies of its state, and by waiting for room for one."""
        self.next_step = float("inf")
        self.next_time = float("inf")
        self._log = logging.getLogger("onthefly")
        self._handles: list[Any] = []
        for optimizer in state.optimizers.values():
            self._handles.append(optimizer.register_step_pre_hook(lambda o, a, k: self._before_step()))
            self._handles.append(optimizer.register_step_post_hook(lambda o, a, k: self._first_step()))
        self.postpone()

    def expect(self) -> None:
        """There will be saves: have memory ready for them, in the background, now and once the optimizers have their state."""
        self._told = False
        self._staging.expect(self._state.nbytes())

    def postpone(self) -> None:
        """Count steps and minutes to the next save from now."""
        config, step = self._config, int(self._state.counters.get("step") or 0)
        if config.ckpt_every_steps:
            self.next_step = (step // config.ckpt_every_steps + 1) * config.ckpt_every_steps
        if config.ckpt_every_minutes:
            self.next_time = time.monotonic() + 60 * config.ckpt_every_minutes

    @property
    def busy(self) -> bool:
        """Whether a save would wait for one that is being written."""
        return self._staging.busy

    def changed(self) -> None:
        """The live state is not what was saved last, though the step is the same."""
        self._latest = None

    def go_to(self, ring: Ring) -> None:
        """What is saved from here on is of another run. What was asked for before stays with the run that it is of."""
        self.ring = ring
        self.changed()
        self.postpone()

    def adopt(self, kept: Kept | None) -> None:
        """The live state is that of this checkpoint of the run's own."""
        self._latest = None if kept is None else (self._place(), _done(kept))
        self.postpone()

    def save(
        self, reason: str, *, gradients: bool = False, pin: bool = False, path: Path | None = None, goes_on: bool = True
    ) -> Future[Kept]:
        """Take the train state of this boundary, and have it saved.

        The future raises `CheckpointWriteError` or `UnsupportedValueError`, after a `checkpointFailed` event was recorded;
        nothing is lost by it but the new checkpoint. A state that is already saved, or about to be, is not saved again.
        While every staging slot is in use this waits. With `goes_on` false the caller waits for the future, and nothing of
        the copy is left to the next step.
        """
        self.postpone()
        if path is None and (latest := self._already(gradients, pin, goes_on)) is not None:
            return latest
        save = self._asked(Future(), reason, pin, path)
        if path is None:
            self._latest = (self._place(), save.future)
        self._take(save, gradients, goes_on)
        return save.future

    def save_value(self, value: Value, line: Line, ring: Ring) -> Kept:
        """Save a state that was composed for this boundary, and is not the live one, as the origin of a line. Waits for it.

        Raises `CheckpointWriteError` and `UnsupportedValueError`, after a `checkpointFailed` event was recorded.
        """
        save = replace(self._asked(Future(), retention.ORIGIN, False, None), line=line, ring=ring, metric=None)
        self._writer.drain()  # two writers could choose one name
        try:
            tree, tensors = flatten(value)
            size = format.Layout(tree, tensors).data_size
        except StateError as e:
            self._fail(save, e)
        else:
            self._settled(save, lambda path: format.write(path, tree, tensors), size)
        return save.future.result()

    def save_interval(self, *, gradients: bool) -> None:
        """Save because it is time; if the config says so, pass it over while the one before is still being written."""
        if self._config.ckpt_when_busy == "skip" and self._staging.busy:
            self.postpone()
            step, epoch = self._place()
            self._history.event("checkpointSkipped", step, epoch, reason="interval")
        else:
            self.save("interval", gradients=gradients)

    def save_again(self, *, gradients: bool, goes_on: bool = True) -> None:
        """At a boundary: take again what changed while it was being copied."""
        with self._lock:
            torn, self._torn = self._torn, []
        for old in torn:
            save = self._asked(old.future, old.reason, old.pin, old.path)
            if save.path is None:
                self._latest = (self._place(), save.future)
            self._take(save, gradients, goes_on)

    def settle(self) -> None:
        """Wait until everything that was asked for is saved, or has failed."""
        self._writer.drain()
        with self._lock:
            torn, self._torn = self._torn, []
        for save in torn:
            names = ", ".join(sorted(self._at_boundary)[:3])
            message = f"it changed while it was being copied ({names}), and there is no later boundary to take it at"
            self._fail(save, CheckpointWriteError(message))

    def close(self) -> None:
        """Finish what was asked for, and take the hooks away."""
        self.settle()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._staged.clear()
        self._writer.close()
        self._copier.close()

    def read(self, path: Path, content: str | None = None) -> tuple[Value, format.CheckpointFile]:
        """The whole value of a checkpoint, after checking every byte.

        Raises `CheckpointNotFoundError`, `CorruptCheckpointError`, or the latter when its hash is not the wanted one, and
        `StateMismatchError` for a checkpoint that no session made.
        """
        file = format.open_checkpoint(path)
        if content is not None and not file.hash.startswith(content):
            raise CorruptCheckpointError(f"{path}: its content is {file.hash[:12]}, not {content[:12]}")
        value = unflatten(file.tree, file.tensors)
        counters = value.get("counters") if isinstance(value, dict) else None
        if not isinstance(counters, dict) or not all(type(counters.get(name)) is int for name in ("step", "epoch")):
            raise StateMismatchError(f"{path}: it was not saved by a session: it does not tell its step and epoch")
        return value, file

    def pin(self, path: Path, pinned: bool) -> Kept:
        """Pin or unpin a checkpoint. Raises `InvalidCommandError` for one that is not of this run."""
        self.settle()
        kept = self.ring.pin(path, pinned)
        self._history.pinned(str(path), kept.hash, pinned)
        if self._latest is not None and self._latest[1].done() and self._latest[1].exception() is None:
            latest = self._latest[1].result()
            self._latest = (self._latest[0], _done(kept)) if latest.path == path else self._latest
        return kept

    # -- on the training thread --------------------------------------------------------------------------------

    def _place(self) -> Place:
        counters = self._state.counters
        return int(counters["step"] or 0), int(counters["epoch"] or 0)

    def _metric(self, step: int) -> float | None:
        counters = self._state.counters
        name = self._config.best_metric
        value = counters.get(name)
        return float(value) if value is not None and counters.get(f"{name}_step") == step else None

    def _already(self, gradients: bool, pin: bool, goes_on: bool) -> Future[Kept] | None:
        """The save of this very state."""
        if self._latest is None or self._latest[0] != self._place():
            return None
        future = self._latest[1]
        if pin or not goes_on:
            # Somebody is going to wait for it, here: it must not be one that a later boundary takes again.
            self._writer.drain()
            self.save_again(gradients=gradients, goes_on=False)
            self._writer.drain()
            future = self._latest[1]
        if future.done() and (future.exception() is not None or not future.result().path.exists()):
            return None
        if pin and not future.result().pinned:
            return _done(self.pin(future.result().path, True))
        return future

    def _asked(self, future: Future[Kept], reason: str, pin: bool, path: Path | None) -> _Save:
        step, epoch = self._place()
        return _Save(
            future=future,
            reason=reason,
            pin=pin or path is not None,
            path=path,
            line=self._history.line,
            ring=self.ring,
            step=step,
            epoch=epoch,
            captured=self._history.seq,
            metric=self._metric(step),
            counters=dict(self._state.counters),
        )

    def _take(self, save: _Save, gradients: bool, goes_on: bool) -> None:
        began = time.perf_counter()
        try:
            self._copy(save, gradients, goes_on)
        finally:
            self.spent += time.perf_counter() - began

    def _copy(self, save: _Save, gradients: bool, goes_on: bool) -> None:
        try:
            tree, tensors = flatten(self._state.capture(gradients=gradients))
            layout = format.Layout(tree, tensors)
            if save.reason == retention.ORIGIN:
                layout.header()  # too large a structure is said at the start
        except StateError as e:
            self._fail(save, e)
            return
        try:
            slot = self._slot(save, layout.data_size)
        except MemoryError as e:
            self._refused(f"{e}; checkpoints are written while training waits")
            self._writer.drain()  # two writers could choose one name
            self._settled(save, lambda path: format.write(path, tree, tensors), layout.data_size)
            return
        except BaseException as e:
            self._fail(save, CheckpointWriteError(f"it was given up: {type(e).__name__}: {e}"))
            raise
        try:
            late = self._late(layout) if goes_on else set()
            staged = Staged(slot, layout, late, self._copier)
        except BaseException as e:
            self._staging.give(slot)
            self._fail(save, CheckpointWriteError(f"it could not be copied: {type(e).__name__}: {e}"))
            raise
        if late:
            self._staged = [*(other for other in self._staged if not other.over), staged]
        self._writer.submit(lambda: self._write(save, staged))

    def _slot(self, save: _Save, nbytes: int) -> Slot:
        began, waits = time.monotonic(), self._staging.busy
        slot = self._staging.take(nbytes)
        if waits and (seconds := time.monotonic() - began) >= _WORTH_TELLING:
            about = {"reason": save.reason, "seconds": round(seconds, 3)}
            self._history.event("checkpointWaited", save.step, save.epoch, **about)
        return slot

    def _late(self, layout: format.Layout) -> set[int]:
        """The tensors, by their number in the layout, whose copy may wait: only an optimizer's step changes them."""
        if self._config.ckpt_staging == "boundary":
            return set()
        owned = {
            tensor.data_ptr(): tensor.nbytes
            for optimizer in self._state.optimizers.values()
            for tensor in _owned(optimizer)
            if tensor.is_cpu or tensor.is_cuda
        }
        found = {
            number
            for number, (entry, tensor) in enumerate(zip(layout.entries, layout.tensors, strict=True))
            if tensor.nbytes and owned.get(tensor.data_ptr()) == tensor.nbytes and entry.name not in self._at_boundary
        }
        if self._config.ckpt_staging == "auto" and not _gains(layout.tensors[number] for number in found):
            return set()
        return found

    def _before_step(self) -> None:
        if self._staged and os.getpid() == self._pid:  # in a forked child nobody copies
            began = time.perf_counter()
            for staged in self._staged:
                staged.before_step()
            self._staged = []
            self.spent += time.perf_counter() - began

    def _first_step(self) -> None:
        """An optimizer has made its state: there will be more to stage than there was at the start."""
        if not self._told:
            self._told = True
            self._staging.expect(self._state.nbytes())

    def _refused(self, reason: str) -> None:
        step, epoch = self._place()
        self._history.event("stagingRefused", step, epoch, reason=reason)
        self._log.warning("%s", reason)

    # -- on the writer's thread --------------------------------------------------------------------------------

    def _write(self, save: _Save, staged: Staged) -> None:
        def whole() -> None:
            if names := staged.torn():
                raise _TornError(names)

        def write(path: Path) -> format.Written:
            whole()
            return format.write_image(path, staged.layout, staged.slot.image(), self._writer.handles, whole)

        try:
            self._settled(save, write, staged.layout.data_size)
        except _TornError as e:
            self._tear(save, e.names)
        finally:
            staged.over = True
            self._staging.give(staged.slot)

    def _settled(self, save: _Save, write: Callable[[Path], format.Written], size: int = 0) -> None:
        """Write, record, retain; in the end the future is done, whatever happens, but for a `_TornError`, which is raised."""
        try:
            if save.path is None:
                save.ring.make_room(size + _BESIDE, save.reason)
            # No file is overwritten: until the new one is there, the old one may be all that is left.
            path = save.path or sidecar.free_path(save.ring.folder, save.line.run, save.step, save.line.generation)
            written = write(path)
            sidecar.describe(
                path,
                written.hash,
                written.size,
                save.counters,
                run=save.line.run,
                generation=save.line.generation,
                step=save.step,
                epoch=save.epoch,
                reason=save.reason,
            )
            kept = Kept(
                path=path,
                hash=written.hash,
                size=written.size,
                generation=save.line.generation,
                step=save.step,
                epoch=save.epoch,
                reason=save.reason,
                pinned=save.pin,
                metric=save.metric,
            )
            self._record(kept, save)
            if save.path is None:
                save.ring.add(kept)
        except _TornError:
            raise
        except (CheckpointError, StateError) as e:
            self._fail(save, e)
        except BaseException as e:  # noqa: BLE001  the thread lives on, and whoever waits is told
            self._log.exception("a checkpoint could not be saved")
            self._fail(save, CheckpointWriteError(f"{type(e).__name__}: {e}"))
        else:
            save.future.set_result(kept)

    def _tear(self, save: _Save, names: list[str]) -> None:
        self._at_boundary.update(names)
        about = {"reason": save.reason, "tensors": names[:3], "count": len(names)}
        self._history.event("checkpointTorn", save.step, save.epoch, save.line, **about)
        self._log.warning(
            "the state of step %d changed before optimizer.step() while it was being copied (%s); it is taken again, and "
            "these are copied at the boundary from now on",
            save.step,
            ", ".join(names[:3]),
        )
        with self._lock:
            self._torn.append(save)
        self._on_torn()

    def _fail(self, save: _Save, e: CheckpointError | StateError) -> None:
        about = {"reason": save.reason, "error": type(e).__name__, "message": said(e)}
        self._history.event("checkpointFailed", save.step, save.epoch, save.line, **about)
        self._log.error("checkpoint at step %d was not saved: %s", save.step, said(e))
        save.future.set_exception(e)

    def _record(self, kept: Kept, save: _Save) -> None:
        self._history.checkpoint(
            save.line,
            step=kept.step,
            epoch=kept.epoch,
            path=str(kept.path),
            hash=kept.hash,
            size=kept.size,
            reason=kept.reason,
            pinned=kept.pinned,
            captured=save.captured,
            metrics={} if kept.metric is None else {self._config.best_metric: kept.metric},
        )


def _done(kept: Kept) -> Future[Kept]:
    future: Future[Kept] = Future()
    future.set_result(kept)
    return future


def _owned(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """What only the optimizer's step changes."""
    yield from all_parameters(optimizer)
    yield from state_tensors(optimizer)


def _gains(late: Iterator[torch.Tensor]) -> bool:
    """Whether copying these beside the training is faster than before it: a core must be free for it, or a copy engine."""
    nbytes = 0
    for tensor in late:
        if tensor.is_cuda:
            return True
        nbytes += tensor.nbytes
    return nbytes >= _WORTH_OVERLAPPING and torch.get_num_threads() < _cores()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
