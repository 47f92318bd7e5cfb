"""What each command does, on the training thread, between two steps.

An action is a function `(session, command) -> result`. It raises a typed error when the command cannot be carried out, and
leaves everything as it was then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onthefly.control import commands
from onthefly.control.commands import Command
from onthefly.control.looking import evaluate
from onthefly.errors import CheckpointError, InvalidCommandError, MissingPartError, said
from onthefly.state.loader import one_pass
from onthefly.state.undisturbed import undisturbed

if TYPE_CHECKING:
    from onthefly.control.ring import Kept
    from onthefly.session import Session

Result = dict[str, Any]


Answer = Result | Future[Any]
"""Now, or once something is durable: the future's result is a `Result`, or the checkpoint that was saved."""


def perform(session: Session, command: Command) -> Answer:
    """Carry out a command. A checkpoint that is still on its way is the answer once it is durable."""
    return _ACTIONS[type(command)](session, command)


def pause(session: Session, command: commands.Pause) -> Result:
    """Close the gate. The checkpoint comes after the answer: the one who asked wants to know that training stands."""
    session.hold(save=command.save)
    return {"paused": True}


def resume(session: Session, command: commands.Resume) -> Result:
    session.release()
    return {"paused": False}


def stop(session: Session, command: commands.Stop) -> Result:
    try:
        saved = told(session.save("stop", goes_on=False).result()) if command.save else {}
    except CheckpointError as e:
        raise type(e)(f"{said(e)}; training goes on: `onthefly stop --no-save` ends it without a checkpoint") from e
    session.leave("stopped", 0)
    return {"stopped": True, **saved}


def save(session: Session, command: commands.SaveCheckpoint) -> Future[Kept]:
    path = None if command.path is None else _path(command.path)
    if path is not None and path.exists():
        raise InvalidCommandError(
            f"{path}: there is such a file already, and no file is overwritten; choose another name"
        )
    return session.save("manual", pin=command.pin, path=path)


def pin(session: Session, command: commands.PinCheckpoint) -> Result:
    kept = session.pin(_path(command.path), command.pinned)
    return {**told(kept), "pinned": kept.pinned}


def remove(session: Session, command: commands.RemoveCheckpoint) -> Result:
    return told(session.remove(_path(command.path)))


def load(session: Session, command: commands.LoadCheckpoint) -> Result:
    return session.branches.load(_path(command.path), content=command.hash, name=command.name)


def reset(session: Session, command: commands.ResetSession) -> Result:
    return session.branches.reset()


def fork(session: Session, command: commands.ForkRun) -> Future[Result]:
    selection = session.sampling.selection(command)
    doubt = session.sampling.doubt(selection)
    return _with(session.branches.fork(command, selection), doubt)


def merge(session: Session, command: commands.MergeRuns) -> Result:
    return session.merges.merge(command)


def switch(session: Session, command: commands.SwitchRun) -> Result:
    return session.branches.switch(command.run)


def undo(session: Session, command: commands.Undo) -> Result:
    return session.branches.undo()


def set_value(session: Session, command: commands.SetValue) -> Result:
    return {"changed": session.branches.change(command)}


def subset(session: Session, command: commands.Subset) -> Result:
    selection = session.sampling.selection(command)
    digest = None if selection is None else selection.digest
    changed = session.branches.change(commands.Subset(recipe=None, selection=digest))
    return {"changed": changed, "selection": digest, **session.sampling.doubt(selection)}


def scan(session: Session, command: commands.ScanSamples) -> Result:
    return session.sampling.scan(command.data, embeddings=command.embeddings)


def show(session: Session, command: commands.ShowSamples) -> Result:
    return session.sampling.show(command.data, command.indices)


def cancel_scan(session: Session, command: commands.CancelScan) -> Result:
    raise InvalidCommandError("no scan is under way")


def adopt_scan(session: Session, command: commands.AdoptScan) -> Result:
    return session.sampling.adopt(command)


def report(session: Session, command: commands.ReportRun) -> Answer:
    """Begin to look; the answer comes once the steps are over, or training stands."""
    return session.reporting.begin(command)


def cancel_report(session: Session, command: commands.CancelReport) -> Result:
    session.reporting.cancel()
    return {"cancelled": True}


def export_subset(session: Session, command: commands.ExportSubset) -> Result:
    return session.sampling.export(command, _path(command.path))


def test(session: Session, command: commands.TestRun) -> Result:
    """Evaluate the model. What an evaluation may move (random state, modes, buffers, gradients' mode) is put back."""
    loader = session.inputs.test_loader if command.data == "test" else session.inputs.val_loader
    if loader is None:
        raise MissingPartError(f"attach was given no {command.data}_loader, so there is nothing to test on")
    if session.inputs.loss_fn is None:
        raise MissingPartError("attach was given no loss_fn, so a test has nothing to compute")
    model = session.model()
    saving = session.save("test", goes_on=False) if command.save else None  # it is written while the model is tested
    began = time.perf_counter()
    with undisturbed(model, loader, session.inputs.loss_fn):
        numbers = evaluate(model, one_pass(loader), session.inputs.loss_fn)
    seconds = time.perf_counter() - began
    result = {"data": command.data, **numbers, "seconds": seconds, **(told(saving.result()) if saving else {})}
    session.record("tested", **result)
    return result


_ACTIONS: Mapping[type[Command], Callable[[Any, Any], Answer]] = {
    commands.Pause: pause,
    commands.Resume: resume,
    commands.Stop: stop,
    commands.SaveCheckpoint: save,
    commands.PinCheckpoint: pin,
    commands.RemoveCheckpoint: remove,
    commands.LoadCheckpoint: load,
    commands.ResetSession: reset,
    commands.SetValue: set_value,
    commands.TestRun: test,
    commands.ScanSamples: scan,
    commands.ShowSamples: show,
    commands.CancelScan: cancel_scan,
    commands.AdoptScan: adopt_scan,
    commands.Subset: subset,
    commands.ForkRun: fork,
    commands.MergeRuns: merge,
    commands.SwitchRun: switch,
    commands.Undo: undo,
    commands.ReportRun: report,
    commands.CancelReport: cancel_report,
    commands.ExportSubset: export_subset,
}


def _path(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _with(answer: Future[Result], more: Result) -> Future[Result]:
    whole: Future[Result] = Future()

    def pass_on(done: Future[Result]) -> None:
        if (e := done.exception()) is not None:
            whole.set_exception(e)
        else:
            whole.set_result({**done.result(), **more})

    answer.add_done_callback(pass_on)
    return whole


def told(kept: Kept) -> Result:
    """A checkpoint, as an answer."""
    return {"path": str(kept.path), "hash": kept.hash, "size": kept.size, "step": kept.step, "epoch": kept.epoch}
