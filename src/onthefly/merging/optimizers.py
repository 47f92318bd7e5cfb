"""What becomes of optimizer states when models are merged. Values of a train state in, values out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from onthefly.errors import StateMismatchError

Policy = Literal["reset", "first", "average"]
Stored = Mapping[str, Any]
"""An optimizer in a train state: its class, the form of its parameters, its groups and its state."""


def merged(live: Stored, parents: Sequence[Stored], policy: Policy, name: str = "optimizer") -> dict[str, Any]:
    """The optimizer that a merged model goes on with: the groups of the live one, such as its learning rate, and by policy

    - ``reset``: no state. It was gathered along ways that the merged model has not gone; it is the safe choice.
    - ``first``: the state of the first parent.
    - ``average``: the average of the parents' moments, entry by entry, in float64, in the dtype of the first; counts of steps
      are the largest.

    Raises `StateMismatchError` for parents whose optimizers are of another class or have other parameters or entries.
    """
    if policy == "reset":
        return {**live, "state": {}}
    for number, parent in enumerate(parents):
        _check(live, parent, f"{name} of parent {number + 1}")
    states = [parent["state"] for parent in parents]
    if policy == "first":
        return {**live, "state": states[0]}
    return {
        **live,
        "state": {index: _average([s.get(index) for s in states], f"{name}/{index}") for index in states[0]},
    }


def _check(live: Stored, stored: Any, what: str) -> None:
    if not isinstance(stored, Mapping) or not {"class", "parameters", "state"} <= stored.keys():
        raise StateMismatchError(f"{what}: what is stored there is no optimizer; merge with the policy `reset`")
    if stored["class"] != live["class"] or stored["parameters"] != live["parameters"]:
        raise StateMismatchError(
            f"{what} is a {stored['class']} of {len(stored['parameters'])} parameters, and does not fit the live "
            f"{live['class']} of {len(live['parameters'])}; merge with the policy `reset`"
        )


def _average(entries: Sequence[Any], what: str) -> Any:
    first = entries[0]
    if not all(isinstance(entry, Mapping) and entry.keys() == first.keys() for entry in entries):
        raise StateMismatchError(
            f"{what}: not every parent has the same entries; merge with the policy `first` or `reset`"
        )
    return {key: _averaged(key, [entry[key] for entry in entries], what) for key in first}


def _averaged(key: str, values: Sequence[Any], what: str) -> Any:
    first = values[0]
    if key == "step":
        return max(values, key=float)
    if not isinstance(first, torch.Tensor) or not first.is_floating_point():
        return first
    if not all(isinstance(v, torch.Tensor) and v.shape == first.shape for v in values):
        raise StateMismatchError(f"{what}: {key} has not the same shape in every parent; merge with the policy `reset`")
    total = torch.zeros(first.shape, dtype=torch.float64)
    for value in values:
        total += value
    return (total / len(values)).to(first.dtype)
