"""OnTheFly: git and a debugger for PyTorch training runs.

The public names are resolved when they are first used: torch is not imported by a command that needs none of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onthefly import checkpoints as checkpoints
    from onthefly import merging as merging
    from onthefly.client import connect as connect
    from onthefly.config import SessionConfig as SessionConfig
    from onthefly.errors import OnTheFlyError as OnTheFlyError
    from onthefly.session import Session as Session
    from onthefly.session import attach as attach
    from onthefly.trainer import Trainer as Trainer

_HOMES = {
    "attach": "onthefly.session",
    "connect": "onthefly.client",
    "OnTheFlyError": "onthefly.errors",
    "Session": "onthefly.session",
    "SessionConfig": "onthefly.config",
    "Trainer": "onthefly.trainer",
}
_MODULES = ("checkpoints", "merging")

__all__ = ["OnTheFlyError", "Session", "SessionConfig", "Trainer", "attach", "checkpoints", "connect", "merging"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"onthefly.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'onthefly' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
