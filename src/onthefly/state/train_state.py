"""The train state: the live objects that together are the training, taken and put back as one value.

`TrainState.restore` has two phases. First everything is checked; only then does the first live object change,
and an object that can refuse (`load_state_dict` may raise) is loaded first and rolled back if a later one refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from onthefly.errors import CorruptCheckpointError, StateMismatchError, UnsupportedValueError
from onthefly.state import rng
from onthefly.state.parts import (
    Copies,
    Part,
    Stateful,
    all_parameters,
    check_same_names,
    check_tensor,
    copy_tensors,
    own,
    pair_up,
    part_for,
    plain_names,
    state_tensors,
    unwrapped,
)

__all__ = ["Copy", "Number", "Stateful", "TrainState", "Value", "copy_tensors", "unwrapped"]

Value = dict[str, Any]
Number = int | float | bool | None
Copy = Callable[[Iterable[tuple[torch.Tensor, torch.Tensor]]], None]
"""Copies stored tensors into live ones, pair by pair (live, stored)."""

_RESERVED = {"rng", "modes", "buffers", "owners", "grads", "counters"}
_REQUIRED = _RESERVED - {"grads"}
_OPTIONAL = {"scaler", "scheduler", "dynamics"}  # a checkpoint and its loader need not agree on whether there is one
_OPTIONAL_TYPES = (torch.amp.GradScaler, torch.optim.lr_scheduler.LRScheduler)  # under whatever name


class TrainState:
    """Named live objects, the process-wide random state, and counters.

    `capture` gives views of live tensors, not copies: write or copy them before training goes on.
    """

    def __init__(self) -> None:
        self.counters: dict[str, Number] = {}
        self._parts: dict[str, Part] = {}
        self._objects: dict[str, Any] = {}

    @classmethod
    def of(cls, objects: Mapping[str, Any]) -> TrainState:
        """A train state of live objects by name. Numbers among them are counters; an object that is None is left out."""
        state = cls()
        for name, value in objects.items():
            if _is_number(value):
                state.counters[name] = value
            elif value is not None:
                state.add(name, value)
        return state

    def add(self, name: str, value: Any) -> list[str]:
        """Track an object, or a mapping of several, under a name. Returns the names of the parts that it became.

        Raises `UnsupportedValueError`, with nothing added, for a name that is taken or an object that cannot be captured.
        """
        added = dict(_named(name, value))
        for part in added:
            taken = (other for other in (*self._parts, *_RESERVED) if f"{other}/".startswith(f"{name}/"))
            if next(taken, None) or name in _RESERVED:
                raise UnsupportedValueError(f"the name {part!r} is taken; track the object under another")
        parts = {part: part_for(item, part) for part, item in added.items()}
        self._parts.update(parts)
        self._objects.update(added)
        return list(added)

    @property
    def names(self) -> list[str]:
        return list(self._parts)

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {name: value for name, value in self._objects.items() if isinstance(value, nn.Module)}

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {name: value for name, value in self._objects.items() if isinstance(value, torch.optim.Optimizer)}

    def nbytes(self) -> int:
        """About how many bytes of tensors `capture` would give, without capturing anything."""
        tensors = {id(t): t for module in self.modules.values() for t in (*module.parameters(), *module.buffers())}
        for optimizer in self.optimizers.values():
            tensors.update({id(t): t for t in state_tensors(optimizer)})
        return sum(tensor.nbytes for tensor in tensors.values() if not is_lazy(tensor))

    def capture(self, *, gradients: bool = False) -> Value:
        """The whole state as one nested value, whose tensors are views of the live ones.

        With `gradients`, those pending in tracked optimizers are part of it.
        """
        value: Value = {}
        for name, part in self._parts.items():
            _put(value, name, part.capture())
        value["modes"] = {name: _modes(module) for name, module in self.modules.items()}
        value["buffers"] = {name: _unsaved_buffers(module) for name, module in self.modules.items()}
        value["owners"] = self._owners()
        if gradients:
            value["grads"] = {name: _gradients(optimizer) for name, optimizer in self.optimizers.items()}
        value["rng"] = rng.capture()
        value["counters"] = dict(self.counters)
        return value

    def check(self, value: Value, names: Iterable[str] | None = None) -> list[str]:
        """The parts that `restore` would put back. Changes nothing.

        Raises `StateMismatchError` if one does not fit, `CorruptCheckpointError` for what `capture` cannot have given.
        """
        _check_form(value)
        chosen = []
        for name in self._parts if names is None else names:
            found, stored = _get(value, name)
            if found:
                try:
                    self._check_part(name, stored, value)
                except (CorruptCheckpointError, StateMismatchError):
                    raise
                except Exception as e:  # what is stored can be of any form
                    raise CorruptCheckpointError(f"{name}: malformed: {type(e).__name__}: {e}") from e
                chosen.append(name)
            elif name.split("/")[0] not in _OPTIONAL and not isinstance(self._objects[name], _OPTIONAL_TYPES):
                raise StateMismatchError(
                    f"the checkpoint has no {name!r}; it has: {', '.join(k for k in value if k not in _RESERVED)}"
                )
        return chosen

    def restore(
        self,
        value: Value,
        names: Iterable[str] | None = None,
        *,
        random_state: bool = True,
        copy: Copy = copy_tensors,
    ) -> list[str]:
        """Put a captured value back into the live objects (into the named parts only, if names are given).

        Raises `StateMismatchError` when anything does not fit and `CorruptCheckpointError` for what `capture` cannot have
        given, with every live object as it was. A missing scaler or scheduler, on either side, is passed over, and so
        are stored objects that nobody here tracks. Returns the names of the parts that were put back. Nothing live
        shares memory with `value` afterwards. `copy` copies the tensors, all at once: whoever has the value from a file may
        know a shorter way.
        """
        chosen = self.check(value, names)
        if random_state:
            _check_random_state(value["rng"])
        copies = self._apply_all(chosen, value)
        for name in chosen:
            if name in self.modules:
                _set_modes(self.modules[name], value["modes"][name])
                pair_up(_unsaved_buffers(self.modules[name]), value["buffers"][name], copies)
            if name in self.optimizers:
                _set_gradients(self.optimizers[name], value.get("grads", {}).get(name, {}))
        copy(copies)
        if names is None:
            self.counters.clear()  # a later counter is no part of an earlier state
            self.counters.update(value["counters"])
        if random_state:
            rng.restore(value["rng"])
        return chosen

    def unclaimed(self, value: Value) -> list[str]:
        """Names of stored objects that no live part claims."""
        leaves = []
        for key, stored in value.items():
            if key in _RESERVED or key in self._parts:
                continue
            below = [name for name in self._parts if name.startswith(key + "/")]
            if not below:
                leaves.append(key)
            elif isinstance(stored, dict):
                leaves.extend(f"{key}/{k}" for k in stored if f"{key}/{k}" not in self._parts)
        return [name for name in leaves if name.split("/")[0] not in _OPTIONAL]

    def _owners(self) -> dict[str, list[str | None]]:
        """The names of each optimizer's parameters in the tracked modules: their order alone says little of them."""
        names: dict[int, str] = {}
        for path, wrapped in self.modules.items():
            module = unwrapped(wrapped)
            plain = plain_names(module)
            for name, parameter in module.named_parameters():
                names.setdefault(id(parameter), f"{path}/{plain(name)}")
        return {
            name: [names.get(id(parameter)) for parameter in all_parameters(optimizer)]
            for name, optimizer in self.optimizers.items()
        }

    def _check_part(self, name: str, stored: Any, value: Value) -> None:
        self._parts[name].check(stored, name)
        if name in self.modules:
            if name not in value["modes"]:
                raise StateMismatchError(f"{name}: what is stored there is not the state of a module")
            _check_buffers(self.modules[name], value["buffers"].get(name), f"buffers/{name}")
        if name in self.optimizers:
            _check_owners(self._owners()[name], value["owners"].get(name), name)
            _check_gradients(self.optimizers[name], value.get("grads", {}).get(name, {}), f"grads/{name}")

    def _apply_all(self, names: list[str], value: Value) -> Copies:
        undo: list[tuple[str, Any]] = []
        copies: Copies = []
        try:
            for name in sorted(names, key=lambda n: not self._parts[n].can_refuse):  # tensors change last
                part = self._parts[name]
                if part.can_refuse:
                    undo.append((name, own(part.capture())))
                part.apply(_get(value, name)[1], copies)
        except Exception as e:
            lost = self._put_back(undo)
            raise StateMismatchError(f"{name}: its load_state_dict refused: {type(e).__name__}: {e}{lost}") from e
        return copies

    def _put_back(self, undo: list[tuple[str, Any]]) -> str:
        lost = []
        for name, before in reversed(undo):
            try:
                self._parts[name].apply(before, [])
            except Exception as e:  # noqa: BLE001  a user's code; the others must be put back all the same
                lost.append(f"{name} ({type(e).__name__}: {e})")
        return f"; and it could not be put back as it was: {', '.join(lost)}" if lost else ""


# -- names -----------------------------------------------------------------------------------------------------


def _named(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    """The objects in a mapping of several, each under its whole name."""
    if not name or "/" in name:
        raise UnsupportedValueError(f"{name!r} cannot name a part of the train state: it is empty or contains '/'")
    if not isinstance(value, Mapping) or hasattr(value, "state_dict"):
        return [(name, value)]
    return [(f"{name}/{below}", item) for key, inner in value.items() for below, item in _named(str(key), inner)]


def _put(value: Value, name: str, item: Any) -> None:
    *above, last = name.split("/")
    for key in above:
        value = value.setdefault(key, {})
    value[last] = item


def _get(value: Value, name: str) -> tuple[bool, Any]:
    node: Any = value
    for key in name.split("/"):
        if not isinstance(node, dict) or key not in node:
            return False, None
        node = node[key]
    return True, node


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.number | np.bool_)


# -- checks ----------------------------------------------------------------------------------------------------


def _check_form(value: Any) -> None:
    """That `restore` finds all that it reads, beside the parts."""
    if not isinstance(value, dict):
        raise CorruptCheckpointError(f"the stored state is a {type(value).__name__}, not a train state")
    for key in sorted(_REQUIRED | (_RESERVED & value.keys())):
        if not isinstance(value.get(key), dict):
            raise CorruptCheckpointError(f"the stored state has no {key}: it is malformed")
    for name, modes in value["modes"].items():
        lists = [modes.get(key) for key in ("frozen", "eval")] if isinstance(modes, dict) else [None]
        if not all(isinstance(names, list) and all(isinstance(n, str) for n in names) for names in lists):
            raise CorruptCheckpointError(f"modes/{name}: malformed")
    for name, number in value["counters"].items():
        if number is not None and not _is_number(number):
            raise CorruptCheckpointError(f"counters/{name}: a {type(number).__name__} is not a number")


def _check_random_state(stored: Mapping[str, Any]) -> None:
    with rng.preserved():
        try:
            rng.restore(stored)
        except Exception as e:
            raise CorruptCheckpointError(f"rng: malformed: {type(e).__name__}: {e}") from e


def _check_owners(live: list[str | None], stored: Any, path: str) -> None:
    sound = isinstance(stored, list) and all(name is None or isinstance(name, str) for name in stored)
    if not sound or len(stored) != len(live):
        raise CorruptCheckpointError(f"owners/{path}: malformed")
    for index, (mine, theirs) in enumerate(zip(live, stored, strict=True)):
        if mine != theirs and mine is not None and theirs is not None:
            raise StateMismatchError(f"{path}: parameter {index} is stored for {theirs}, live it is {mine}")


def _check_buffers(module: nn.Module, stored: Any, path: str) -> None:
    live = _unsaved_buffers(module)
    check_same_names(live, stored, path)
    for name, buffer in live.items():
        check_tensor(buffer, stored[name], f"{path}/{name}")


def _check_gradients(optimizer: torch.optim.Optimizer, stored: Any, path: str) -> None:
    parameters = {str(index): parameter for index, parameter in enumerate(all_parameters(optimizer))}
    if not isinstance(stored, dict) or not stored.keys() <= parameters.keys():
        raise CorruptCheckpointError(f"{path}: malformed")
    for index, gradient in stored.items():
        check_tensor(parameters[index], gradient, f"{path}/{index}")


# -- what no state_dict has ------------------------------------------------------------------------------------


def _modes(module: nn.Module) -> dict[str, list[str]]:
    """What may change during training and is no tensor: frozen parameters, and submodules in evaluation mode."""
    plain = plain_names(module)
    # A wrapper and what it wraps are one by name; the inner one comes later, and is the one that counts.
    training = {plain(name): submodule.training for name, submodule in module.named_modules(remove_duplicate=False)}
    return {
        "frozen": [plain(n) for n, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad],
        "eval": [name for name, value in training.items() if not value],
    }


def _set_modes(module: nn.Module, modes: Mapping[str, list[str]]) -> None:
    plain = plain_names(module)
    frozen, evaluating = set(modes["frozen"]), set(modes["eval"])
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.is_leaf:
            parameter.requires_grad_(plain(name) not in frozen)
    for name, submodule in module.named_modules(remove_duplicate=False):
        submodule.training = plain(name) not in evaluating


def _unsaved_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers registered with persistent=False: no state_dict has them, but training may change them."""
    module = unwrapped(module)
    plain = plain_names(module)
    saved = module.state_dict(keep_vars=True)
    return {plain(name): b for name, b in module.named_buffers(remove_duplicate=False) if name not in saved}


def _gradients(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {str(i): p.grad for i, p in enumerate(all_parameters(optimizer)) if p.grad is not None}


def _set_gradients(optimizer: torch.optim.Optimizer, stored: Mapping[str, torch.Tensor]) -> None:
    for index, parameter in enumerate(all_parameters(optimizer)):
        gradient = stored.get(str(index))
        parameter.grad = None if gradient is None else own(gradient, parameter.device)
