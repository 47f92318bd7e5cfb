"""Merging: several models of one form become one.

`strategies` are pure functions of tensors, `catalogue` has them in words and `registry` binds the two; `parents` opens what is
merged; `plan` checks all of it before anything is computed; `streaming` writes a merge to a file in bounded memory, `in_memory`
makes state dicts. The functions named here take models or state dicts, leave them as they are, and give a new state dict.

It may import `checkpoints`, `state` and `errors`. It never touches the store nor the session, never executes anything that it
reads, and never changes a parent.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onthefly.merging.in_memory import adapter_fuse_merge as adapter_fuse_merge
    from onthefly.merging.in_memory import fisher_soup_merge as fisher_soup_merge
    from onthefly.merging.in_memory import merge_state_dicts as merge_state_dicts
    from onthefly.merging.in_memory import stochastic_weight_averaging as stochastic_weight_averaging
    from onthefly.merging.in_memory import weighted_average_merge as weighted_average_merge
    from onthefly.merging.streaming import merge_files as merge_files

_HOMES = {
    "adapter_fuse_merge": "in_memory",
    "fisher_soup_merge": "in_memory",
    "merge_files": "streaming",
    "merge_state_dicts": "in_memory",
    "stochastic_weight_averaging": "in_memory",
    "weighted_average_merge": "in_memory",
}

__all__ = [
    "adapter_fuse_merge",
    "fisher_soup_merge",
    "merge_files",
    "merge_state_dicts",
    "stochastic_weight_averaging",
    "weighted_average_merge",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"onthefly.merging.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'onthefly.merging' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
