"""What each command does, on the training thread, between two steps.

An action is a function `(session, command) -> result`. It raises a typed error when the command cannot be carried out, and
leaves everything as it was then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from onthefly.control import commands
from onthefly.control.commands import Command
from onthefly.errors import CheckpointError, InvalidCommandError, MissingPartError, said
from onthefly.state import rng
from onthefly.state.loader import one_pass
from onthefly.state.train_state import unwrapped

if TYPE_CHECKING:
    from onthefly.control.ring import Kept
    from onthefly.session import Session

Result = dict[str, Any]


def perform(session: Session, command: Command) -> Result | Future[Kept]:
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
    kept = session.load(_path(command.path), content=command.hash, reason="load")
    return {"loaded": str(kept.path), "hash": kept.hash, "step": kept.step, "epoch": kept.epoch}


def reset(session: Session, command: commands.ResetSession) -> Result:
    kept = session.reset()
    return {"loaded": str(kept.path), "hash": kept.hash, "step": kept.step, "generation": session.generation}


def set_value(session: Session, command: commands.SetValue) -> Result:
    changes = session.set(command.values, hold=command.hold, release=command.release)
    return {"changed": [asdict(change) for change in changes]}


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
    with undisturbed(model, loader):
        numbers = evaluate(model, one_pass(loader), session.inputs.loss_fn)
    seconds = time.perf_counter() - began
    result = {"data": command.data, **numbers, "seconds": seconds, **(told(saving.result()) if saving else {})}
    session.record("tested", **result)
    return result


_ACTIONS: Mapping[type[Command], Callable[[Any, Any], Result | Future[Kept]]] = {
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
}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Any,
    loss_fn: Callable[[Any, Any], torch.Tensor],
    metrics: Mapping[str, Callable[[Any, Any], Any]] | None = None,
    device: torch.device | None = None,
) -> dict[str, float]:
    """The mean loss (and mean metrics) over a loader of (inputs, targets) batches, weighted by batch size.

    The model must be in evaluation mode. Batches go to the device of the model's first parameter unless one is given.
    Raises `MissingPartError` for batches that are not pairs, and for a loader without a batch.
    """
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    functions = {"loss": loss_fn, **(metrics or {})}
    totals = dict.fromkeys(functions, 0.0)
    samples = 0
    for batch in loader:
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            raise MissingPartError(
                f"a test needs batches that are (inputs, targets) pairs; this loader gives a {type(batch).__name__}"
            )
        inputs, targets = to_device(batch[0], device), to_device(batch[1], device)
        outputs = model(inputs)
        count = _batch_size(targets)
        for name, function in functions.items():
            totals[name] += float(function(outputs, targets)) * count
        samples += count
    if not samples:
        raise MissingPartError("the loader gave no batch, so there is nothing to evaluate")
    return {**{name: total / samples for name, total in totals.items()}, "samples": samples}


def _batch_size(value: Any) -> int:
    """Samples in a batch: the length of the first tensor in it."""
    if isinstance(value, torch.Tensor):
        return len(value) if value.dim() else 1
    items = list(value.values()) if isinstance(value, dict) else value
    if isinstance(items, list | tuple) and items and isinstance(items[0], torch.Tensor | dict | list | tuple):
        return _batch_size(items[0])
    return len(items) if hasattr(items, "__len__") else 1


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors, and lists, tuples and dicts of them, on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(item, device) for item in value)
    return value


@contextmanager
def undisturbed(model: nn.Module, loader: Any = None) -> Iterator[None]:
    """Evaluate inside: the model is in evaluation mode, and afterwards everything is as it was.

    Modes, buffers, the process-wide random state, and private generators that the loader reaches are put back.
    """
    bare = unwrapped(model)
    modes = {module: module.training for module in bare.modules()}
    buffers = {name: buffer.detach().clone() for name, buffer in bare.named_buffers()}
    generators = rng.find_generators({"loader": loader})
    states = {path: rng.generator_state(generator) for path, generator in generators.items()}
    with rng.preserved():
        bare.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            live = dict(bare.named_buffers())
            with torch.no_grad():
                for name, buffer in buffers.items():
                    live[name].copy_(buffer)
            for path, generator in generators.items():
                rng.set_generator_state(generator, states[path])


def _path(text: str) -> Path:
    return Path(text).expanduser().absolute()


def told(kept: Kept) -> Result:
    """A checkpoint, as an answer."""
    return {"path": str(kept.path), "hash": kept.hash, "size": kept.size, "step": kept.step, "epoch": kept.epoch}
