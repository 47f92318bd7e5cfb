"""The session: what a training loop holds, and where its step boundaries are.

    attach            restores what it was given, when the process resumes a run
    epochs / iter     boundary, batch, boundary, batch, ...; at a boundary nothing of the training is under way
    a boundary        commands, due checkpoints, pauses; everything that is asked from outside happens here
    close             the last facts are written, signal handlers and hooks are put back

There is one boundary for each (step, epoch): before every batch, and after the end-of-epoch code of the last epoch. The one
between an epoch's last batch and its end-of-epoch code is left out: a checkpoint there could not say whether that code ran.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from onthefly.checkpoints.format import CheckpointFile
from onthefly.config import SessionConfig
from onthefly.control import actions, commands, start
from onthefly.control.beside import Beside
from onthefly.control.branches import Branches
from onthefly.control.changes import Changed, Changes
from onthefly.control.checkpointer import Checkpointer
from onthefly.control.gate import Gate, Request
from onthefly.control.gradients import GradientWatch
from onthefly.control.history import Line
from onthefly.control.merges import Merges
from onthefly.control.provenance import Provenance
from onthefly.control.recorder import Recorder
from onthefly.control.reporting import Reporting
from onthefly.control.ring import Kept, Ring
from onthefly.control.sampling import Inputs, Sampling
from onthefly.control.signals import Signals
from onthefly.control.start import Start, Until
from onthefly.errors import (
    HalfRestoredError,
    InexactError,
    MissingPartError,
    OnTheFlyError,
    StateError,
    StateMismatchError,
    UnsupportedValueError,
    said,
)
from onthefly.samples.dynamics import Dynamics
from onthefly.samples.scan import ScanStopped
from onthefly.state.knobs import Knob, Knobs
from onthefly.state.loader import END, ExactLoader, SideLoaders
from onthefly.state.train_state import TrainState, Value

_INTERVAL = "interval"
_PATIENCE = 16  # boundaries that a command waits for pending gradients to be used


def attach(
    model: nn.Module | Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer],
    *,
    scheduler: Any = None,
    scaler: Any = None,
    train_loader: Any = None,
    val_loader: Any = None,
    test_loader: Any = None,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    per_sample_loss: Callable[[Any, Any], torch.Tensor] | None = None,
    embed: Callable[..., torch.Tensor] | None = None,
    model_factory: Callable[[], nn.Module] | None = None,
    config: SessionConfig | None = None,
) -> Session:
    """Attach a session to a training loop.

    Model, optimizer and scheduler may each be one object or a mapping of several. In a process that `onthefly resume`
    started, they are given the state of the run's newest good checkpoint. The other arguments are what some commands
    need: `loss_fn(outputs, targets)` and a loader of (inputs, targets) for `test`.

    Raises `UnsupportedValueError` for an object that cannot be part of a train state, `UnsupportedLoaderError` for a loader
    that cannot be repeated, `ResumeError` when the run cannot be resumed here, `StateMismatchError` when its
    checkpoint does not fit, and `StoreError` when the store cannot be opened.
    """
    config = config or SessionConfig()
    loader = None
    if train_loader is not None:
        loader = ExactLoader(train_loader, exact_augmentation=config.exact_augmentation)
    state = TrainState()
    state.counters.update(step=0, epoch=0)
    for name, value in (("model", model), ("optimizer", optimizer), ("scheduler", scheduler), ("scaler", scaler)):
        if value is not None:
            state.add(name, value)
    if loader is not None:
        state.add("loader", loader)
    schedulers = scheduler if isinstance(scheduler, Mapping) else {"scheduler": scheduler}
    knobs = Knobs(state.optimizers, schedulers)
    state.add("knobs", knobs)
    state.add("side_loaders", SideLoaders({"val": val_loader, "test": test_loader}))
    if config.grad_clip is not None:
        knobs.set({"grad_clip": config.grad_clip})
    known = {name: one for name, one in schedulers.items() if one is not None}
    inputs = Inputs(
        train_loader, val_loader, test_loader, loss_fn, per_sample_loss, embed, model_factory, known, scaler
    )
    samples = loader.samples if loader is not None else None
    dynamics = Dynamics(samples) if samples is not None else None
    if dynamics is not None:
        state.add("dynamics", dynamics)
    inexact = [*(loader.inexact if loader is not None else []), *_untracked_schedulers(state, schedulers)]
    return Session(state, knobs, loader, dynamics, inputs, start.begin(config, inexact))


class Session:
    """A live training process: iterate it, log to it, and everything else happens from outside. Made by `attach`.

    It is a context manager: leaving the block closes it. Without one it is closed when the process ends.
    """

    def __init__(
        self,
        state: TrainState,
        knobs: Knobs,
        loader: ExactLoader | None,
        dynamics: Dynamics | None,
        inputs: Inputs,
        begun: Start,
    ) -> None:
        self.inputs = inputs
        self._state = state
        self._knobs = knobs
        self._loader = loader
        self._dynamics = dynamics
        self._start = begun
        self._config = begun.config
        self._counters = state.counters
        self._history = begun.history
        self._gate = Gate()
        self._watch = GradientWatch(state.optimizers, lambda: self.step)
        self._signals = Signals(self._gate)
        ring = Ring(begun.folder, self._history, self._config, begun.kept, begun.needed)
        self._checkpointer = Checkpointer(state, ring, self._history, self._config, self._raise_gate)
        self._changes = Changes(knobs, loader, begun.selections, begun.again, self._checkpointer.changed)
        self._beside = Beside(begun, self._history, lambda: (self.step, self.epoch))
        self.branches = Branches(
            begun,
            state,
            self._history,
            self._checkpointer,
            self._changes,
            Provenance(begun),
            save=self.save,
            check=self._check_fit,
            put_back=self._put_back,
            start_beside=self._beside.start,
        )
        self.sampling = Sampling(state, loader, dynamics, inputs, begun, self._history, self.save, self._look_up)
        self.merges = Merges(state, knobs, inputs, begun, self._history, self.sampling, self.branches, self.save)
        self.reporting = Reporting(state, knobs, loader, inputs, begun, self._history, self._checkpointer, self.save)
        self._recorder = Recorder(begun.store, begun.session, begun.journal, self._gate, self._status, self._is_due)
        self._log = logging.getLogger("onthefly")
        self._pid = os.getpid()
        self._entering: Value | None = None  # what the next boundary puts back: it is the one that this was saved at
        self._in_body = False  # of an epoch that `epochs` has handed out: that one
        self._body_epoch = 0
        self._jumping = False  # the body is being left for another epoch; what it still does is no part of the run
        self._waiting: list[Request] = []
        self._waited = 0
        self._begun = self._done = self._closed = False
        self._paused = False
        self._save_when_paused = False
        self._due_save: str | None = None  # one that waits for pending gradients to be used
        self._leaving: tuple[str, int] | None = None
        # As recorded last: of which line, how many batches, from which step and epoch on.
        self._epoch_length: tuple[Line, int | None, int, int] | None = None
        self._epochs: int | None = None  # how many the loop that is under way was told to do
        self._attend_at: float = 0  # the next step with something to do, whether or not the gate is raised
        try:
            self._restore()
        except BaseException:
            self._abandon()
            raise
        if begun.until is None:
            self._checkpointer.expect()
        self._recorder.on_outage = self._report_outage
        self._recorder.start()
        if self._config.handle_signals:
            self._signals.install()
        atexit.register(self._close_at_exit)

    # -- for the training loop ---------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Batches handed out so far."""
        return self._counters["step"]  # type: ignore[return-value]

    @property
    def epoch(self) -> int:
        """The epoch under way, from 0."""
        return self._counters["epoch"]  # type: ignore[return-value]

    @property
    def iteration(self) -> int:
        """Batches handed out in this epoch, of the samples that are trained on now; without a loader, the step."""
        return self._loader.batch if self._loader is not None else self.step

    @property
    def batches(self) -> int | None:
        """Batches in a whole epoch of the samples that are trained on now, or None where that is not known."""
        return self._loader.batches if self._loader is not None else None

    @property
    def indices(self) -> npt.NDArray[np.int64] | None:
        """Which samples of the data set the last batch is made of, in its order, or None where that cannot be known."""
        return self._loader.indices if self._loader is not None else None

    @property
    def run(self) -> str:
        """The name of the run that this session is on."""
        return self._history.run

    @property
    def generation(self) -> int:
        """How often the run was reset, or taken back to a checkpoint."""
        return self._history.generation

    @property
    def store(self) -> Path:
        """The store's folder."""
        return self._start.store.root

    def epochs(self, n: int) -> Iterator[int]:
        """Go through epochs up to `n` in all; after a resume, from the one that was under way.

        Code that follows the batches in the body belongs to the epoch: it runs before the epoch's checkpoint is taken.
        """
        loader = self._needed_loader()
        self._go_on()
        self._epochs = n
        ended = False
        try:
            while True:
                if not loader.under_way:
                    self._boundary("epoch" if ended and self._config.ckpt_every_epoch else None)
                if self._epochs_are_over() or self._steps_are_over():
                    break
                self._say_epoch_length(loader)
                self._in_body, self._body_epoch = True, self.epoch
                yield self.epoch
                self._in_body = False
                ended = not self._jumping and self._end_epoch_if_done()
                self._jumping = False
        finally:
            self._epochs = None
            self._in_body = False
        self._finish(save=not loader.under_way)

    def __iter__(self) -> Iterator[Any]:
        """The rest of this epoch inside `epochs`; elsewhere all batches up to `max_epochs` and `max_steps`."""
        if self._epochs is not None:
            yield from self._batches(self._needed_loader())
            return
        loader = self._needed_loader()
        if self._config.max_epochs is None and self._config.max_steps is None:
            raise MissingPartError(
                "this loop over a session would never end: write `for epoch in session.epochs(n): for batch in session: ...`, "
                "or give SessionConfig max_epochs or max_steps"
            )
        self._go_on()
        ended = False
        while True:
            if not loader.under_way:
                self._boundary("epoch" if ended and self._config.ckpt_every_epoch else None)
            if self._epochs_are_over() or self._steps_are_over():
                break
            if not loader.under_way:
                loader.set_epoch(self.epoch)
            self._say_epoch_length(loader)
            yield from self._batches(loader)
            ended = self._end_epoch_if_done()
        self._finish()

    def steps(self, n: int) -> Iterator[int]:
        """Count steps up to `n` in all, for a loop that draws its own batches; after a resume, from where it was."""
        self._go_on()
        while True:
            self._boundary()
            if self.step >= n or self._steps_are_over():
                break
            self._counters["step"] += 1  # type: ignore[operator]
            if (watch := self.reporting.watch) is not None:
                watch.begin_step(self.step)
            yield self.step - 1
        self._finish()

    def log(self, **numbers: Any) -> None:
        """Record numbers of this step. A number that was logged outlives the process, even one that is killed.

        Takes Python and NumPy numbers and one-element tensors. A tensor on an accelerator is read later, on another
        thread. Raises `UnsupportedValueError` for anything else.
        """
        if self._jumping:
            return
        counters, best = self._counters, self._config.best_metric
        step: int = counters["step"]  # type: ignore[assignment]
        epoch: int = counters["epoch"]  # type: ignore[assignment]
        plain: dict[str, float] = {}
        for name, value in numbers.items():
            if isinstance(value, torch.Tensor):
                if not (value.is_cpu or name == best):
                    self._log_later(name, value, step, epoch)
                    continue
                value = _number(name, value)
            plain[name] = value if type(value) is float else _plain(name, value)
        if best in plain:
            counters[best] = plain[best]
            counters[f"{best}_step"] = step
            self._checkpointer.changed()
        if (watch := self.reporting.watch) is None:
            self._history.metrics(step, epoch, plain)
        else:
            with watch.own():
                self._history.metrics(step, epoch, plain)

    def log_samples(self, losses: Any, *, correct: Any = None, margins: Any = None, indices: Any = None) -> None:
        """Record the loss of every sample of the batch in hand: what training computes anyway tells hard samples from mislabelled ones.

        `losses`: a tensor or array [N] in the order of the batch; `correct` (bool) and `margins` (logit of the true class minus the
        largest other), of the same length, if there are any. `indices`: which samples of the data set they are; by default those
        of the last batch. A tensor on an accelerator is not waited for.

        Raises `InvalidCommandError` for other shapes, and `MissingPartError` where the session cannot know the batch's samples.
        """
        if self._jumping:
            return
        if self._dynamics is None:
            raise MissingPartError(
                "log_samples needs a train_loader whose data set has a length, and attach was given none"
            )
        if indices is None and (indices := self.indices) is None:
            raise MissingPartError(
                "this loader does not tell which samples a batch is made of: pass log_samples(..., indices=)"
            )
        self._dynamics.record(indices, losses, correct, margins)
        self._checkpointer.changed()

    def track(self, **objects: Any) -> None:
        """Make anything with `state_dict` and `load_state_dict`, or a random generator, part of the train state.

        Call it before the loop. In a resumed process the object is given its state here.
        """
        self._before_loop("track")
        for name, value in objects.items():
            for part in self._state.add(name, value):
                if self._entering is not None:
                    self._state.restore(self._entering, [part], random_state=False)

    def knob(self, name: str, value: Any) -> Knob:
        """Register a value that can be changed live; read it as `.value`. Call it before the loop."""
        self._before_loop("knob")
        return self._knobs.register(name, value)

    def close(self) -> None:
        """End the session. Called a second time it does nothing."""
        self._close(failed=False)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        left = isinstance(error, SystemExit) and error.code in (0, None)
        self._close(failed=error is not None and not left)

    # -- for actions -------------------------------------------------------------------------------------------

    def hold(self, *, save: bool = True) -> None:
        """Stay at this boundary until `release`."""
        self._save_when_paused = save and not self._paused
        self._paused = self.reporting.paused = True
        self.reporting.end("the session was paused")
        self.record("paused")

    def release(self) -> None:
        if self._paused:
            self.record("resumed")
        self._paused = self.reporting.paused = False

    def leave(self, outcome: str, code: int) -> None:
        """End the process at this boundary, once the command under way is answered."""
        self._leaving = (outcome, code)

    def save(self, reason: str, *, pin: bool = False, path: Path | None = None, goes_on: bool = True) -> Future[Kept]:
        """Save a checkpoint of this boundary; the future is done when it is durable. See `Checkpointer.save`."""
        return self._checkpointer.save(reason, gradients=self._watch.pending(), pin=pin, path=path, goes_on=goes_on)

    def pin(self, path: Path, pinned: bool) -> Kept:
        """Pin or unpin a checkpoint of this run. Raises `InvalidCommandError` for any other."""
        return self._checkpointer.pin(path, pinned)

    def remove(self, path: Path) -> Kept:
        """Remove a checkpoint of this run. Raises `InvalidCommandError` for any other, and for one that it stands on."""
        self._checkpointer.settle()
        self._checkpointer.changed()
        return self._checkpointer.ring.remove(path)

    def set(self, values: Mapping[str, Any], *, hold: bool = False, release: bool = False) -> Changed:
        """Change live values, for the steps from this boundary on."""
        return self.branches.change(commands.SetValue(values=dict(values), hold=hold, release=release))

    def model(self) -> nn.Module:
        """The model to test. Raises `MissingPartError` when there are several."""
        modules = self._state.modules
        if len(modules) > 1 and "model" not in modules:
            raise MissingPartError(f"this session trains several models ({', '.join(modules)}): a test needs just one")
        return modules.get("model") or next(iter(modules.values()))

    def record(self, event: str, /, **data: Any) -> None:
        """Record an event at this boundary."""
        self._history.event(event, self.step, self.epoch, **data)

    # -- iterating ---------------------------------------------------------------------------------------------

    def _batches(self, loader: ExactLoader) -> Iterator[Any]:
        counters, gate = self._counters, self._gate
        while not (loader.exhausted or self._jumping):
            # Before an epoch's first batch, whoever called has been at the boundary. This line is what a step costs.
            if loader.under_way and (gate.raised or counters["step"] >= self._attend_at):  # type: ignore[operator]
                self._attend()
                if self._steps_are_over():
                    self.save(
                        "end", goes_on=False
                    )  # here, and not behind the code that follows: that code runs on a resume, too
                    return
                if self._jumping or self._epochs_are_over():
                    return
            watch = self.reporting.watch
            batch = loader.next() if watch is None else watch.fetch(loader)
            if batch is END:
                return
            counters["step"] += 1  # type: ignore[operator]
            yield batch

    def _boundary(self, save: str | None = None) -> None:
        if save is not None or self._gate.raised or self.step >= self._attend_at:
            self._attend(save)

    def _end_epoch_if_done(self) -> bool:
        """Leave the epoch, unless the loop is over in the middle of it, or was taken to its end by a load."""
        if self._epochs_are_over() or (self._steps_are_over() and not self._needed_loader().exhausted):
            return False
        self._end_epoch()
        return True

    def _say_epoch_length(self, loader: ExactLoader) -> None:
        """Where an epoch begins: record how many batches it has, unless all was as was said before. Charts by epoch stand on it."""
        if loader.under_way or self.step < self._history.head:
            return
        said = (self._history.line, loader.batches, self.step, self.epoch)
        line, batches, step, epoch = self._epoch_length or (None, None, 0, 0)
        expected = batches is not None and self.step == step + (self.epoch - epoch) * batches
        if not (expected and (line, batches) == said[:2]):
            self._epoch_length = said
            self.record("epochLength", batches=loader.batches)

    def _end_epoch(self) -> None:
        loader = self._needed_loader()
        loader.end_epoch()
        self._counters["epoch"] = loader.epoch

    def _steps_are_over(self) -> bool:
        return self._config.max_steps is not None and self.step >= self._config.max_steps

    def _epochs_are_over(self) -> bool:
        last = self._epochs if self._epochs is not None else self._config.max_epochs
        return last is not None and self.epoch >= last

    def _go_on(self) -> None:
        """A loop begins. There may have been one before it."""
        if self._done:
            self._done = False
            if self._config.handle_signals:
                self._signals.install()

    def _finish(self, *, save: bool = True) -> None:
        if self._start.until is not None:
            if not self._begun:  # a checkpoint of the loop's end, in the middle of an epoch: there was no boundary yet
                self._attend()
            raise InexactError(f"the loop ended before step {self._start.until.step}, which was recorded")
        self._done = True
        self.reporting.boundary()
        self.reporting.end("the loop ended")
        if save:
            self.save("end", goes_on=False)
        self._checkpointer.settle()  # as long as a signal still means: finish what you are doing
        self._signals.close()

    # -- at a boundary -----------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """The first boundary: everything is tracked by now."""
        self._begun = True
        if self._entering is not None:
            found = [*self._state.unclaimed(self._entering), *(f"knob {name}" for name in self._knobs.unclaimed)]
            if found:
                raise StateMismatchError(
                    f"the checkpoint holds {', '.join(found)}, which nobody here tracks: "
                    "call session.track or session.knob before the loop, as the run did when it was saved"
                )
        elif self._start.until is None:
            # A run that begins anew, killed before its origin was durable: what it was told at the start comes first, or the
            # next process would take it for a part of this origin.
            self._changes.repeat(self.step, self.epoch)
            origin = self._checkpointer.save("origin")
            if origin.done() and isinstance(refused := origin.exception(), StateError):
                raise refused  # it would be so at every save
            self.branches.root_began(origin)
        self.record("sessionStarted", session=self._start.session, resumed=self._start.resumed)

    def _attend(self, save: str | None = None) -> None:
        """Everything that happens at a boundary besides training."""
        self.reporting.boundary()
        if not self._begun:
            self._begin()
        if self._entering is not None:
            # All of it once more: code at the start of an epoch has run since, for the second time.
            value, self._entering = self._entering, None
            self._state.restore(value)
            self._watch.forget()
        self._gate.raised = False
        self._checkpointer.save_again(gradients=self._watch.pending())
        self._due_save = save or self._due_save
        self._changes.repeat(self.step, self.epoch)
        if self._start.until is not None and self._start.until.reached(self.step, self.epoch):
            self._do_as_ordered(self._start.until)
        ready = self._ready()
        if ready and (reason := self._due_save or self._interval()):  # before a command makes another state of it
            self._due_save = None
            if reason == _INTERVAL:
                self._checkpointer.save_interval(gradients=self._watch.pending())
            else:
                self.save(reason)
        while (request := self._gate.take()) is not None:
            self._waiting.append(request)
        for request in list(self._waiting):
            # One that stops a scan is taken out by the scan.
            if request in self._waiting and not self._jumping and self._may_run(request, ready):
                self._waiting.remove(request)
                self._perform(request)
        while self._paused and self._gate.signal is None and not self._jumping:
            self._stand_still()
        if self._gate.signal is not None and (ready or self._paused) and not self._jumping:
            self._obey_signal(self._gate.signal)
        self._waited = 0 if ready else self._waited + 1
        if self._waiting or self._gate.signal is not None or not ready or self._jumping:
            self._gate.raised = True
        self._plan()
        self.reporting.leave()

    def _do_as_ordered(self, until: Until) -> None:
        if until.scan is not None:
            self.sampling.scan_to(until.scan, until.out, self.step, self.epoch)
        else:
            until.write(self._state)
        self._leave("replayed", 0)

    def _interval(self) -> str | None:
        return _INTERVAL if self.step >= self._checkpointer.next_step or self._is_due() else None

    def _is_due(self) -> bool:
        """Whether the minutes between checkpoints are over. The recorder looks; a step does not read the clock for it."""
        return time.monotonic() >= self._checkpointer.next_time

    def _ready(self) -> bool:
        """Whether no gradients are pending, or enough boundaries have passed waiting for it."""
        return not self._watch.pending() or self._waited >= _PATIENCE

    def _may_run(self, request: Request, ready: bool) -> bool:
        if isinstance(request.command, commands.Pause | commands.Resume):
            return True
        if isinstance(request.command, commands.SetValue | commands.Subset) and self.step < self._history.head:
            return False  # until the head these steps are being repeated; a new value would make them other steps
        return ready or self._paused

    def _stand_still(self) -> None:
        """Paused: wait for one request and carry it out."""
        if self._save_when_paused:
            self._save_when_paused = False
            self.save("pause")
        self._checkpointer.save_again(gradients=self._watch.pending(), goes_on=False)
        for request in [r for r in self._waiting if self._may_run(r, True)]:
            if request not in self._waiting:
                continue
            self._waiting.remove(request)
            self._perform(request)
            if self._jumping or not self._paused:
                return
        request_or_none = self._gate.take(timeout=1.0)
        if request_or_none is not None:
            self._waiting.append(request_or_none)

    def _perform(self, request: Request) -> None:
        run, step, epoch = self._history.run, self.step, self.epoch
        self.reporting.disturbed()
        try:
            result = actions.perform(self, request.command)
        except OnTheFlyError as e:
            self._history.result(request.id, step, epoch, run=run, error=_error(e, said(e), e.exit_code))
        except Exception as e:  # noqa: BLE001 - the user's own code, called by the action, failed: training goes on
            self._log.exception("the command %s failed", request.command.kind)
            message = f"{type(e).__name__}: {e}"
            self._history.result(request.id, step, epoch, run=run, error=_error(e, message, 6))
        else:
            self._answer(request.id, result, run, step, epoch)
        self._recorder.hurry()
        if self._leaving is not None:
            self._leave(*self._leaving)

    def _answer(self, command: str, result: actions.Answer, run: str, step: int, epoch: int) -> None:
        if not isinstance(result, Future):
            self._history.result(command, step, epoch, run=run, result=result)
            return

        def answer(done: Future[Any]) -> None:  # on the writer's thread, once a checkpoint is durable
            if isinstance(e := done.exception(), OnTheFlyError):
                self._history.result(command, step, epoch, run=run, error=_error(e, said(e), e.exit_code))
            else:
                found = done.result()
                told = actions.told(found) if isinstance(found, Kept) else found
                self._history.result(command, step, epoch, run=run, result=told)
            self._recorder.hurry()

        result.add_done_callback(answer)

    def _obey_signal(self, number: int) -> None:
        interrupted = number == signal.SIGINT
        self.save("stop", goes_on=False)
        self._leave("interrupted" if interrupted else "terminated", 128 + number)

    def _plan(self) -> None:
        """Find the next step at which there is something to do."""
        steps = [self._checkpointer.next_step if self._entering is None else 0, self._changes.next_step]
        steps.append(self.reporting.next_step)
        if self._start.until is not None:
            steps.append(self._start.until.step)
        if self._config.max_steps is not None:
            steps.append(self._config.max_steps)
        self._attend_at = min(steps)

    # -- beginning and end -------------------------------------------------------------------------------------

    def _restore(self) -> None:
        if self._start.base is None:
            return
        base = self._start.base
        value, file = self._checkpointer.read(base.path, base.hash)
        self._state.restore(value, self._state.names, random_state=False, copy=file.copy)
        self._counters.update(value["counters"])
        self._entering = value
        self._checkpointer.adopt(self._checkpointer.ring.find(base.path))

    def _check_fit(self, path: Path, value: Value) -> None:
        """Raises `StateMismatchError` for a state that these live objects cannot take."""
        knobs = self._knobs.unclaimed_of(value.get("knobs"))
        if unclaimed := [*self._state.unclaimed(value), *(f"knob {name}" for name in knobs)]:
            raise StateMismatchError(f"{path}: nobody here tracks {', '.join(unclaimed)}, which it holds")
        self._state.check(value)

    def _put_back(self, value: Value, file: CheckpointFile) -> bool:
        """Put a state into the live objects; whether the training stands at the state's own boundary then.

        Code at the start of an epoch's body must run as it did before the checkpoint, under the epoch's own number. So a
        state of another epoch, or of the start of this one, ends the batches; what the body does after them leaves
        no trace; and the state is put back once more at the boundary that it belongs to.
        """
        self._checkpointer.changed()
        self.reporting.end("another state was loaded")
        try:
            self._state.restore(value, copy=file.copy)
        except HalfRestoredError as e:
            self.leave("failed", e.exit_code)  # without saving: this is no state of anything
            raise
        self._watch.forget()
        self._changes.expect(())
        under_way = self._loader is not None and self._loader.under_way
        if self._in_body:
            self._jumping = not under_way or self.epoch != self._body_epoch
        if self._jumping or (self._epochs is not None and not self._in_body and under_way):
            self._entering = value
        self._checkpointer.changed()
        self._checkpointer.postpone()
        return self._entering is None

    def _leave(self, outcome: str, code: int) -> None:
        self._close(failed=False, outcome=outcome)
        raise SystemExit(code)

    def _close(self, *, failed: bool, outcome: str | None = None) -> None:
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        if outcome in (None, "left") and not failed and not self._done and self._begun and self._entering is None:
            self._save_where_it_was_left()
        finished = outcome is None and not failed
        outcome = outcome or ("failed" if failed else "finished")
        self.reporting.end("the session ended")
        for request in self._waiting:
            self._refuse(request)
        while (late := self._gate.take()) is not None:
            self._refuse(late)
        self._beside.close()
        self._checkpointer.close()
        self.record("finalizeRun" if finished else "sessionEnded", outcome=outcome)
        self._history.run_status("finished" if finished else "unfinished")
        self._history.session_ended(outcome)
        self._signals.close()
        self._recorder.close()
        self._abandon()
        if self._loader is not None:
            self._loader.close()
        atexit.unregister(self._close_at_exit)

    def _abandon(self) -> None:
        self._closed = True
        self._checkpointer.close()
        self._watch.close()
        self._knobs.close()
        self._start.close()

    def _save_where_it_was_left(self) -> None:
        """The loop was left by `break`. That is a boundary if the last batch was trained on to the end."""
        if self._loader is not None and self._loader.exhausted:
            self._end_epoch()
            self.save("end", goes_on=False)
        elif self._watch.stepped():
            self.save("end", goes_on=False)

    def _close_at_exit(self) -> None:
        """Nobody closed it. Whether a loop that did not come to its end was left on purpose, only `close` could say."""
        if getattr(sys, "last_value", None) is not None:
            self._close(failed=True)
        else:
            self._close(failed=False, outcome=None if self._done else "left")

    def _refuse(self, request: Request) -> None:
        message = f"the session ended before it could {request.command.kind}"
        error = {"type": "NoLiveSessionError", "message": message, "exit_code": 6}
        self._history.result(request.id, self.step, self.epoch, error=error)

    def _look_up(self) -> None:
        """In the middle of a long command: see whether somebody wants it to stop."""
        while (request := self._gate.take()) is not None:
            self._waiting.append(request)
        for request in self._waiting:  # also one that came with the scan
            if isinstance(request.command, commands.CancelScan):
                self._waiting.remove(request)
                self._history.result(request.id, self.step, self.epoch, result={"cancelled": True})
                raise ScanStopped("the scan was cancelled")
        if self._gate.signal is not None:
            raise ScanStopped("the scan was stopped: the session was told to leave")

    def _raise_gate(self) -> None:
        self._gate.raised = True

    def _report_outage(self, seconds: float, lost: int) -> None:
        """Called on the recorder's thread when the store can be used again."""
        self.record("lost" if lost else "storeUnavailable", seconds=round(seconds, 1), metrics=lost)

    def _status(self) -> tuple[str, int, int, float | None]:
        status = "starting" if not self._begun else "paused" if self._paused else "running"
        if self.sampling.progress is not None:
            status = f"scanning {self.sampling.progress:.0%}"
        elif status == "running" and self.step < self._history.head:
            status = "repeating"
        return status, self.step, self.epoch, self._history.loss

    # -- small things ------------------------------------------------------------------------------------------

    def _needed_loader(self) -> ExactLoader:
        if self._loader is None:
            raise MissingPartError("attach was given no train_loader; use `for i in session.steps(n)` without one")
        return self._loader

    def _before_loop(self, what: str) -> None:
        if self._begun:
            raise UnsupportedValueError(f"session.{what} must be called before the loop begins")

    def _log_later(self, name: str, value: torch.Tensor, step: int, epoch: int) -> None:
        if value.numel() != 1 or value.is_complex():
            raise UnsupportedValueError(f"log: {name} is a tensor of shape {list(value.shape)}, not one number")
        copy, when, line = value.detach().clone(), time.time(), self._history.line
        self._recorder.defer(lambda: self._history.metrics(step, epoch, {name: _number(name, copy)}, when, line))


def _untracked_schedulers(state: TrainState, schedulers: Mapping[str, Any]) -> Iterator[str]:
    """PyTorch marks the `step` of an optimizer that a scheduler was made for."""
    for name, optimizer in state.optimizers.items():
        known = any(getattr(scheduler, "optimizer", None) is optimizer for scheduler in schedulers.values())
        if getattr(optimizer.step, "_wrapped_by_lr_sched", False) and not known:
            yield f"a scheduler drives {name}, and attach was not given it: pass scheduler=, or its place is lost"


def _number(name: str, value: torch.Tensor) -> float:
    try:
        return _plain(name, value.item())
    except RuntimeError:
        raise UnsupportedValueError(f"log: {name} is a tensor of shape {list(value.shape)}, not one number") from None


def _plain(name: str, value: Any) -> float:
    if type(value) is float:
        return value
    if isinstance(value, int | float | np.number | np.bool_) and not isinstance(value, np.complexfloating):
        return float(value)
    raise UnsupportedValueError(f"log: {name} is a {type(value).__name__}, not a number")


def _error(e: Exception, message: str, code: int) -> dict[str, Any]:
    return {"type": type(e).__name__, "message": message, "exit_code": code}
