"""Exchange: a part of a checkpoint goes out as a plain state dict, and checkpoints and state dicts come in. Loads torch.

Files in, files out; who records what came in is the caller. Nothing of a file is ever executed.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onthefly.checkpoints import sidecar
from onthefly.checkpoints.contents import contents
from onthefly.checkpoints.durable import replacing
from onthefly.checkpoints.format import write
from onthefly.checkpoints.header import check_bytes, opened, parse, read_header, recorded_hash
from onthefly.checkpoints.weights import (
    entry,
    few,
    form,
    model_of,
    models,
    read_state_dict,
    safetensors_library,
    value_of,
)
from onthefly.errors import (
    CheckpointWriteError,
    CorruptCheckpointError,
    InvalidCommandError,
    StateMismatchError,
    UnsupportedValueError,
)
from onthefly.runs.references import IMPORTED, listed
from onthefly.state.tree import flatten

_PIECE = 4 * 2**20


@dataclass(frozen=True)
class Exported:
    """A state dict that was written: which part it is, how many tensors it has, its size in bytes."""

    path: Path
    part: str
    tensors: int
    size: int


@dataclass(frozen=True)
class Arrived:
    """A checkpoint that stands in its folder now, durable, with its sidecar."""

    path: Path
    hash: str
    size: int
    step: int
    epoch: int
    counters: Mapping[str, Any]


# -- out -------------------------------------------------------------------------------------------------------


def export(source: Path, out: Path, *, only: str | None = None, force: bool = False) -> Exported:
    """Write one part of a checkpoint, its model unless `only` names another, as a plain state dict: whole, or not at all.

    ``model.load_state_dict(torch.load(out, weights_only=True))`` takes it back. Tied tensors are under each of their names,
    and all are contiguous. Raises `InvalidCommandError` for a part that there is not, or a name that ends in neither
    ``.safetensors`` nor ``.pt``; `UnsupportedValueError` for what such a file cannot hold; `CheckpointWriteError`, also for a
    file that is there already, unless `force`; and what opening a checkpoint raises.
    """
    if out.suffix not in (".safetensors", ".pt"):
        raise InvalidCommandError(f"{out}: a state dict goes into a file that ends in .safetensors or .pt")
    library = safetensors_library() if out.suffix == ".safetensors" else None
    if out.exists() and not force:
        raise CheckpointWriteError(errno.EEXIST, "there is such a file already; --force replaces it", str(out))
    value = value_of(source)
    part = only or model_of(value, source)
    stored = entry(value, part)
    if stored is None:
        raise InvalidCommandError(f"{source} has no {part!r}; it has: {listed(value)}")
    if library is not None:
        tensors = dict(_separate(_named_tensors(stored, part)))
        data = library.save(tensors, {"format": "pt"})
        with replacing(out) as handle, os.fdopen(os.dup(handle), "wb") as file:
            file.write(data)
        return Exported(out, part, len(tensors), out.stat().st_size)
    state = _plain(stored, part)
    with replacing(out) as handle, os.fdopen(os.dup(handle), "wb") as file:
        torch.save(state, file)
    return Exported(out, part, _count(state), out.stat().st_size)


def _plain(value: Any, path: str) -> Any:
    """The value in the types that ``torch.load(weights_only=True)`` takes."""
    if isinstance(value, torch.Tensor):
        return value.detach().contiguous()
    if isinstance(value, dict):
        return {key: _plain(item, f"{path}/{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item, f"{path}/{number}") for number, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UnsupportedValueError(f"{path}: a {type(value).__name__} has no place in a plain state dict")


def _count(value: Any) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return 1 if isinstance(value, torch.Tensor) else sum(map(_count, items))


def _named_tensors(value: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor under its name below `path`. Raises `UnsupportedValueError` for anything else."""
    if not isinstance(value, dict):
        raise UnsupportedValueError(f"{path}: a {type(value).__name__} is no state dict of tensors; export it to .pt")
    for key, item in value.items():
        if isinstance(item, dict):
            yield from ((f"{key}/{name}", tensor) for name, tensor in _named_tensors(item, f"{path}/{key}"))
        elif isinstance(item, torch.Tensor) and not item.is_complex():
            yield str(key), item.detach().contiguous()
        else:
            kind = item.dtype if isinstance(item, torch.Tensor) else type(item).__name__
            raise UnsupportedValueError(f"{path}/{key}: a {kind} has no place in a .safetensors file; export to .pt")


def _separate(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors, tied ones each with memory of its own: the library refuses to write shared memory."""
    seen: set[int] = set()
    for name, tensor in tensors:
        yield name, tensor.clone() if tensor.numel() and tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())


# -- in --------------------------------------------------------------------------------------------------------


def is_checkpoint(file: Path) -> bool:
    """Whether a file says that it is a checkpoint of OnTheFly. Raises `CheckpointNotFoundError`, or `CheckpointError`."""
    try:
        recorded_hash(file)
    except CorruptCheckpointError:
        return False
    return True


def run_of(file: Path) -> tuple[str | None, int]:
    """The run and generation of a checkpoint, by its sidecar or else its name."""
    if (found := sidecar.read_sidecar(file)) is not None and found.run is not None:
        return found.run, found.generation
    run, generation, _ = sidecar.parse_name(file.name) or (None, 0, 0)
    return run, generation


def bring_in(file: Path, folder: Path, run: str, generation: int) -> Arrived:
    """Copy a checkpoint into a folder, under the name that belongs there, after checking every byte of the copy.

    Raises `CorruptCheckpointError`, `StateMismatchError` for a checkpoint that no session made, and `CheckpointWriteError`.
    """
    found = contents(read_header(file), verified=False)
    step, epoch, counters = _moment({"counters": found.counters}, file)
    target = sidecar.free_path(folder, run, step, generation)
    with opened(file) as source, replacing(target) as copy:
        with os.fdopen(os.dup(source), "rb") as reading, os.fdopen(os.dup(copy), "wb") as writing:
            shutil.copyfileobj(reading, writing, _PIECE)
        header = parse(copy, file)
        check_bytes(copy, header)
    return _described(Arrived(target, header.hash, header.size, step, epoch, counters), run, generation)


def graft(weights: Path, into: Path, folder: Path, run: str, generation: int, *, only: str | None = None) -> Arrived:
    """Write the checkpoint `into` once more, with the weights of its model (or of the module `only`) from a plain state dict.

    What was measured with the old weights, such as a val_loss, is not said of the new ones. Raises `CorruptCheckpointError`
    for a file that is no state dict, `StateMismatchError` for one with other names or shapes, `InvalidCommandError` for a
    file of another kind, or a module that there is not, and `CheckpointWriteError`.
    """
    state = read_state_dict(weights)
    value = value_of(into)
    part = only or model_of(value, into)
    if part not in models(value):
        raise InvalidCommandError(f"{into} has no model {part!r}; it has: {listed(models(value))}")
    _replace(entry(value, part), state, f"{weights} does not fit {part!r} of {into.name}")
    step, epoch, counters = _moment(value, into)
    value["counters"] = {name: number for name, number in counters.items() if not _is_measured(name, counters)}
    target = sidecar.free_path(folder, run, step, generation)
    written = write(target, *flatten(value))
    return _described(Arrived(target, written.hash, written.size, step, epoch, value["counters"]), run, generation)


def _replace(live: Mapping[str, Any], state: Mapping[str, torch.Tensor], problem: str) -> None:
    """Put tensors in the place of others, in their memory, so that ties and strides stay. Names and shapes must be equal."""
    old = {name: tensor.detach() for name, tensor in live.items() if isinstance(tensor, torch.Tensor)}
    wrong = []
    if missing := [name for name in old if name not in state]:
        wrong.append(f"it lacks {few(missing)}")
    if extra := [name for name in state if name not in old]:
        wrong.append(f"it has {few(extra)} besides")
    both = [name for name in old if name in state]
    if unequal := [
        f"{name} is {form(state[name])}, not {form(old[name])}" for name in both if not _fits(old[name], state[name])
    ]:
        wrong.append(few(unequal))
    if wrong:
        raise StateMismatchError(f"{problem}: {'; '.join(wrong)}")
    for name, tensor in old.items():
        tensor.copy_(state[name].detach())
    if untied := [name for name, tensor in old.items() if not _equal(tensor, state[name].detach().to(tensor.dtype))]:
        raise StateMismatchError(f"{problem}: {few(untied)} is tied to another, and differs from it in the file")


def _fits(old: torch.Tensor, new: torch.Tensor) -> bool:
    of_one_kind = old.dtype == new.dtype or (old.dtype.is_floating_point and new.dtype.is_floating_point)
    return of_one_kind and old.shape == new.shape


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def _moment(state: Any, file: Path) -> tuple[int, int, dict[str, Any]]:
    """Step, epoch, and all counters."""
    counters = state.get("counters") if isinstance(state, dict) else None
    if not isinstance(counters, dict) or not all(type(counters.get(name)) is int for name in ("step", "epoch")):
        raise StateMismatchError(f"{file}: it was not saved by a session: it does not tell its step and epoch")
    return counters["step"], counters["epoch"], counters


def _is_measured(name: str, counters: Mapping[str, Any]) -> bool:
    return f"{name}_step" in counters or (name.endswith("_step") and name.removesuffix("_step") in counters)


def _described(arrived: Arrived, run: str, generation: int) -> Arrived:
    sidecar.describe(
        arrived.path,
        arrived.hash,
        arrived.size,
        arrived.counters,
        run=run,
        generation=generation,
        step=arrived.step,
        epoch=arrived.epoch,
        reason=IMPORTED,
    )
    return arrived
