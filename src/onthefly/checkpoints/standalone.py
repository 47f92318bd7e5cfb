"""Saving and loading live objects without a session: two functions, no database."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onthefly.checkpoints.format import Written, open_checkpoint, write
from onthefly.checkpoints.sidecar import describe, parse_name
from onthefly.errors import CorruptCheckpointError, StateMismatchError
from onthefly.state.train_state import Number, TrainState
from onthefly.state.tree import flatten, unflatten


def save_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Any] | TrainState) -> Written:
    """Save live objects in one file: durably, whole or not at all. Random generators are always part of it.

    `state` names the objects: a module, an optimizer, anything with ``state_dict`` and ``load_state_dict``, or a mapping of
    several. Numbers in it are counters; None stands for an object that there is not::

        save_checkpoint("last.safetensors", {"model": model, "optimizer": optimizer, "step": 1200})

    Raises `UnsupportedValueError`, naming the path in the state, before anything is written, and `CheckpointWriteError` (disk
    full, no permission, no such folder) with an older file of that name as it was.
    """
    captured = _train_state(state)
    tree, tensors = flatten(captured.capture())
    written = write(path, tree, tensors)
    run, generation, step = parse_name(Path(path).name) or (None, 0, None)
    counters = captured.counters
    describe(
        path,
        written.hash,
        written.size,
        counters,
        run=run,
        generation=generation,
        step=_count(counters.get("step"), step),
        epoch=_count(counters.get("epoch"), None),
        reason="manual",
    )
    return written


def load_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Any] | TrainState) -> dict[str, Number]:
    """Put a saved state back into live objects, random generators included. Returns the saved counters.

    Only what `state` names is loaded. A scaler or a scheduler may be missing on either side; all else that `state` names must
    be in the file and fit. Every byte is checked against the file's hash, and everything against the live objects, before
    the first of them changes::

        step = load_checkpoint("last.safetensors", {"model": model, "optimizer": optimizer})["step"]

    Raises `CheckpointNotFoundError`, `CorruptCheckpointError`, or `StateMismatchError`, with all live objects as they were.
    """
    live = _train_state(state)
    file = open_checkpoint(path)
    try:
        value = unflatten(file.tree, file.tensors)
        live.restore(value, copy=file.copy)
    except (CorruptCheckpointError, StateMismatchError) as e:
        raise type(e)(f"{file.path}: {e}") from e
    return dict(value["counters"])


def _train_state(state: Mapping[str, Any] | TrainState) -> TrainState:
    return state if isinstance(state, TrainState) else TrainState.of(state)


def _count(value: Any, otherwise: int | None) -> int | None:
    return int(value) if hasattr(value, "__index__") else otherwise
