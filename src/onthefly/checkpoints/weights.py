"""Weights: the state dict of a model, from a checkpoint or from a file of another tool. Mapped, so that nothing is read before
it is used; and nothing of a file is ever executed. Loads torch.
"""

from __future__ import annotations

import errno
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from onthefly.checkpoints.format import CheckpointFile, open_checkpoint
from onthefly.errors import CheckpointNotFoundError, CommandError, CorruptCheckpointError, InvalidCommandError
from onthefly.state.tree import unflatten

_PICKLED = (".pt", ".pth", ".bin")  # what others call a file of torch.save
_NAMED = 3  # entries that an error names


def value_of(path: Path) -> dict[str, Any]:
    """The whole value of a checkpoint, after checking every byte. Raises as `open_checkpoint` does."""
    return value_in(open_checkpoint(path))


def value_in(file: CheckpointFile) -> dict[str, Any]:
    """The whole value of an open checkpoint. Raises `CorruptCheckpointError` for what no session saved."""
    try:
        value = unflatten(file.tree, file.tensors)
    except CorruptCheckpointError as e:
        raise CorruptCheckpointError(f"{file.path}: {e}") from e
    if not isinstance(value, dict):
        raise CorruptCheckpointError(f"{file.path}: its state is a {type(value).__name__}, not a train state")
    return value


def models(value: Mapping[str, Any]) -> list[str]:
    """The names of the parts of a train state that are modules."""
    modes = value.get("modes")
    return [str(name) for name in modes] if isinstance(modes, dict) else []


def model_of(value: Mapping[str, Any], source: Path) -> str:
    """The name of a train state's model. Raises `InvalidCommandError` when there is none, or several."""
    names = models(value)
    if "model" in names or len(names) == 1:
        return "model" if "model" in names else names[0]
    raise InvalidCommandError(
        f"{source} has several models: {', '.join(names)}; choose one with --only NAME"
        if names
        else f"{source} has no model; --only NAME chooses another part: {', '.join(map(str, value))}"
    )


def entry(value: Mapping[str, Any], name: str) -> Any:
    """What stands under a part's whole name, or None."""
    node: Any = value
    for key in name.split("/"):
        node = node.get(key) if isinstance(node, dict) else None
    return node


def read_state_dict(file: Path) -> dict[str, torch.Tensor]:
    """A plain state dict of tensors, from ``.safetensors`` or a file of ``torch.save``. No code in it is run.

    The tensors are views of the file, in memory of their own once written to. Raises `CheckpointNotFoundError`,
    `InvalidCommandError` for a file of another kind, and `CorruptCheckpointError`.
    """
    if not file.is_file():
        raise CheckpointNotFoundError(errno.ENOENT, "there is no such file", str(file))
    read = _reader(file)
    try:
        found = read(file)
    except Exception as e:  # whatever a foreign file does to its reader is an error of that file
        # Its own advice (to let the file run code) is none of ours.
        raise CorruptCheckpointError(
            f"{file}: it is not a state dict of plain tensors, or damaged ({type(e).__name__}); nothing of it was executed"
        ) from e
    if not isinstance(found, Mapping) or not found:
        raise CorruptCheckpointError(f"{file}: it holds a {type(found).__name__}, not a state dict")
    if other := [str(key) for key, item in found.items() if not (isinstance(key, str) and is_plain(item))]:
        raise CorruptCheckpointError(
            f"{file}: a state dict is names and plain tensors, and these are none: {few(other)}; "
            "save model.state_dict() alone"
        )
    return dict(found)


def is_plain(item: Any) -> bool:
    """Whether an entry of a state dict is a dense tensor in the processor's memory."""
    return type(item) in (torch.Tensor, torch.nn.Parameter) and item.layout is torch.strided and item.is_cpu


def form(tensor: torch.Tensor) -> str:
    """``float32[2, 3]``"""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def few(names: Iterable[str]) -> str:
    """The first few, and how many more there are."""
    every = list(names)
    return ", ".join(every[:_NAMED]) + (f" and {len(every) - _NAMED} more" if len(every) > _NAMED else "")


def safetensors_library() -> ModuleType:
    """The library for other tools' files. Raises `CommandError` where it is not installed."""
    try:
        import safetensors.torch
    except ImportError as e:
        raise CommandError(
            "plain .safetensors files need the safetensors library: pip install 'onthefly[export]'"
        ) from e
    return safetensors.torch


def _reader(file: Path) -> Callable[[Path], Any]:
    if file.suffix == ".safetensors":
        return safetensors_library().load_file  # type: ignore[no-any-return]
    if file.suffix in _PICKLED:
        # Files of before PyTorch 1.6 are no zip, and cannot be mapped.
        mapped = zipfile.is_zipfile(file)
        return lambda path: torch.load(path, weights_only=True, map_location="cpu", mmap=mapped)
    raise InvalidCommandError(f"{file}: it is no checkpoint, and no state dict in .safetensors or .pt")
