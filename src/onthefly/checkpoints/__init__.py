"""Checkpoint files: every byte of a checkpoint passes through this room.

`save_checkpoint` and `load_checkpoint` are its front door, and need neither a session nor a store. Behind them, `format`
and `header` are the file itself, `contents` says what is in one, `staging` and `writer` take it out of a training that
goes on, `weights` is the model in it, or in a file of another tool, `sidecar` is its name and the note beside it, `retention`
says which files may go. The room may import `state` and `errors`; it never imports the store, and it never executes anything
that it reads. `header`, `contents`, `sidecar`, `durable` and `retention` load no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onthefly.checkpoints.standalone import load_checkpoint as load_checkpoint
    from onthefly.checkpoints.standalone import save_checkpoint as save_checkpoint

__all__ = ["load_checkpoint", "save_checkpoint"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("onthefly.checkpoints.standalone"), name)
    raise AttributeError(f"module 'onthefly.checkpoints' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
