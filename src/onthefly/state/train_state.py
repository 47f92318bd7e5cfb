"""The train state: the live objects that together are the training, taken and put back as one value.

Each object is a *part*: a thin adapter that knows how one kind of object is captured, checked against a stored value, and
put back. `TrainState.restore` has two phases. First everything is checked; only then does the first live object change,
and an object that can refuse (`load_state_dict` may raise) is loaded first and rolled back if a later one refuses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from onthefly.errors import StateMismatchError, UnsupportedValueError
from onthefly.state import rng

Value = dict[str, Any]
Number = int | float | bool | None

_RESERVED = {"rng", "modes", "buffers", "grads", "counters"}
_OPTIONAL = {"scaler", "scheduler"}  # a checkpoint and its loader need not agree on whether there is one


class Stateful(Protocol):
    """The contract of PyTorch's schedulers, scalers, loaders and most things beside them."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class Part(Protocol):
    """How one live object is captured and put back."""

    can_refuse: bool  # apply runs the object's own load_state_dict, which may raise

    def capture(self) -> Any: ...

    def check(self, stored: Any, path: str) -> None:
        """Raises `StateMismatchError` when `apply` could not succeed. Changes nothing."""

    def apply(self, stored: Any) -> None: ...


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
            if isinstance(value, bool | int | float):
                state.counters[name] = value
            elif value is not None:
                state.add(name, value)
        return state

    def add(self, name: str, value: Any) -> list[str]:
        """Track an object, or a mapping of several, under a name. Returns the names of the parts that it became."""
        if isinstance(value, Mapping) and not hasattr(value, "state_dict"):
            return [part for key, item in value.items() for part in self.add(f"{name}/{_plain_name(str(key))}", item)]
        if name in _RESERVED or name in self._parts:
            raise UnsupportedValueError(f"the name {name!r} is taken; track the object under another")
        self._parts[name] = _part_for(value, name)
        self._objects[name] = value
        return [name]

    @property
    def names(self) -> list[str]:
        return list(self._parts)

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {name: value for name, value in self._objects.items() if isinstance(value, nn.Module)}

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {name: value for name, value in self._objects.items() if isinstance(value, torch.optim.Optimizer)}

    def capture(self, *, gradients: bool = False) -> Value:
        """The whole state as one nested value, whose tensors are views of the live ones.

        With `gradients`, those pending in tracked optimizers are part of it.
        """
        value: Value = {}
        for name, part in self._parts.items():
            _put(value, name, part.capture())
        modules = {name: unwrapped(module) for name, module in self.modules.items()}
        value["modes"] = {name: _modes(module) for name, module in modules.items()}
        value["buffers"] = {name: _unsaved_buffers(module) for name, module in modules.items()}
        if gradients:
            value["grads"] = {name: _gradients(optimizer) for name, optimizer in self.optimizers.items()}
        value["rng"] = rng.capture()
        value["counters"] = dict(self.counters)
        return value

    def check(self, value: Value, names: Iterable[str] | None = None) -> list[str]:
        """The parts that `restore` would put back. Raises `StateMismatchError` if one does not fit. Changes nothing."""
        chosen = []
        for name in self._parts if names is None else names:
            found, stored = _get(value, name)
            if found:
                self._parts[name].check(stored, name)
                chosen.append(name)
            elif name.split("/")[0] not in _OPTIONAL:
                raise StateMismatchError(
                    f"the checkpoint has no {name!r}; it has: {', '.join(k for k in value if k not in _RESERVED)}"
                )
        return chosen

    def restore(self, value: Value, names: Iterable[str] | None = None, *, random_state: bool = True) -> list[str]:
        """Put a captured value back into the live objects (into the named parts only, if names are given).

        Raises `StateMismatchError`, with every live object as it was, when anything does not fit. A missing scaler or
        scheduler, on either side, is passed over, and so are stored objects that nobody here tracks. Returns the
        names of the parts that were put back. Nothing live shares memory with `value` afterwards.
        """
        chosen = self.check(value, names)
        for name in chosen:
            if name in self.modules:
                _check_buffers(unwrapped(self.modules[name]), value["buffers"].get(name, {}), name)
        self._apply_all(chosen, value)
        for name in chosen:
            if name in self.modules:
                module = unwrapped(self.modules[name])
                _set_modes(module, value["modes"].get(name, {}))
                _copy_all(dict(module.named_buffers(remove_duplicate=False)), value["buffers"].get(name, {}))
            if name in self.optimizers:
                _set_gradients(self.optimizers[name], value.get("grads", {}).get(name))
        if names is None:
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

    def _apply_all(self, names: list[str], value: Value) -> None:
        undo: list[Callable[[], None]] = []
        try:
            for name in sorted(names, key=lambda n: not self._parts[n].can_refuse):  # tensors change last
                part = self._parts[name]
                if part.can_refuse:
                    before = copy.deepcopy(part.capture())
                    undo.append(lambda part=part, before=before: part.apply(before))  # type: ignore[misc]
                part.apply(_get(value, name)[1])
        except Exception as e:
            for step in reversed(undo):
                step()
            if isinstance(e, StateMismatchError):
                raise
            raise StateMismatchError(f"{name}: its load_state_dict refused: {type(e).__name__}: {e}") from e


def unwrapped(module: nn.Module) -> nn.Module:
    """The user's module inside `DistributedDataParallel`, `DataParallel` and `torch.compile`."""
    while True:
        if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


# -- parts -----------------------------------------------------------------------------------------------------


class _ModulePart:
    """Parameters and buffers, by their names in the user's own module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = unwrapped(module)
        # Entries that are not tensors of the module (get_extra_state, a state_dict of its own) need its own loading.
        live = {id(t) for t in (*self._module.parameters(), *self._module.buffers())}
        self.can_refuse = any(
            not isinstance(t, torch.Tensor) or id(t) not in live
            for t in self._module.state_dict(keep_vars=True).values()
        )

    def capture(self) -> dict[str, Any]:
        if self.can_refuse:
            return {_without_compile(name): value for name, value in self._module.state_dict().items()}
        return {_without_compile(name): tensor.detach() for name, tensor in self._tensors().items()}

    def check(self, stored: Any, path: str) -> None:
        live = self.capture()
        _check_same_names(live, stored, path)
        for name, value in live.items():
            if isinstance(value, torch.Tensor):
                _check_tensor(value, stored[name], f"{path}/{name}")

    def apply(self, stored: Any) -> None:
        if self.can_refuse:
            names = {_without_compile(name): name for name in self._module.state_dict()}
            self._module.load_state_dict({names[name]: _own(value) for name, value in stored.items()})
        else:
            _copy_all({_without_compile(name): tensor for name, tensor in self._tensors().items()}, stored)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return dict(self._module.state_dict(keep_vars=True))


class _OptimizerPart:
    """A `torch.optim.Optimizer`, entry by entry: its own `load_state_dict` casts moments to the parameter's dtype."""

    can_refuse = False

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def capture(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def check(self, stored: Any, path: str) -> None:
        if not isinstance(stored, dict) or not {"param_groups", "state"} <= stored.keys():
            raise StateMismatchError(f"{path}: what is stored there is not the state of an optimizer")
        live, saved = self._optimizer.param_groups, stored["param_groups"]
        if len(live) != len(saved):
            raise StateMismatchError(f"{path}: {len(saved)} parameter groups are stored, the optimizer has {len(live)}")
        for number, (mine, theirs) in enumerate(zip(live, saved, strict=True)):
            if len(mine["params"]) != len(theirs["params"]):
                raise StateMismatchError(
                    f"{path}: group {number} has {len(mine['params'])} parameters, {len(theirs['params'])} are stored"
                )
        parameters = self._parameters(stored)
        for index, entry in stored["state"].items():
            if index not in parameters:
                raise StateMismatchError(f"{path}/state/{index}: there is no such parameter")
            for key, value in entry.items() if isinstance(entry, dict) else ():
                mine = self._optimizer.state.get(parameters[index], {}).get(key)
                if isinstance(mine, torch.Tensor) and isinstance(value, torch.Tensor) and mine.shape != value.shape:
                    raise StateMismatchError(
                        f"{path}/state/{index}/{key}: stored as {_describe(value)}, live as {_describe(mine)}"
                    )

    def apply(self, stored: Any) -> None:
        optimizer, parameters = self._optimizer, self._parameters(stored)
        for mine, theirs in zip(optimizer.param_groups, stored["param_groups"], strict=True):
            for key, value in theirs.items():
                if key != "params":
                    mine[key] = _into(mine.get(key), value, None)
        for index, parameter in parameters.items():
            entry = stored["state"].get(index)
            if entry is None:
                optimizer.state.pop(parameter, None)
                continue
            mine = optimizer.state[parameter]
            for key in [key for key in mine if key not in entry]:
                del mine[key]
            group = self._group_of(parameter)
            for key, value in entry.items():
                # Step counts stay on the CPU unless the kernel reads them on the device, as in PyTorch itself.
                on_cpu = key == "step" and not (group.get("capturable") or group.get("fused"))
                mine[key] = _into(mine.get(key), value, None if on_cpu else parameter.device)

    def _parameters(self, stored: Any) -> dict[int, torch.Tensor]:
        return {
            index: parameter
            for mine, theirs in zip(self._optimizer.param_groups, stored["param_groups"], strict=True)
            for index, parameter in zip(theirs["params"], mine["params"], strict=True)
        }

    def _group_of(self, parameter: torch.Tensor) -> dict[str, Any]:
        return next(g for g in self._optimizer.param_groups if any(p is parameter for p in g["params"]))


class _StatefulPart:
    """Anything with `state_dict` and `load_state_dict`."""

    can_refuse = True

    def __init__(self, value: Stateful) -> None:
        self._value = value

    def capture(self) -> Any:
        return self._value.state_dict()

    def check(self, stored: Any, path: str) -> None:
        """Only the object itself knows; `apply` may refuse."""

    def apply(self, stored: Any) -> None:
        if isinstance(self._value, torch.amp.GradScaler) and not stored:  # it was saved disabled
            return
        self._value.load_state_dict(_own(stored))


class _GeneratorPart:
    """A private random generator."""

    can_refuse = True

    def __init__(self, generator: rng.Generator) -> None:
        self._generator = generator

    def capture(self) -> Any:
        return rng.generator_state(self._generator)

    def check(self, stored: Any, path: str) -> None:
        """Only the generator itself knows; `apply` may refuse."""

    def apply(self, stored: Any) -> None:
        rng.set_generator_state(self._generator, stored)


def _part_for(value: Any, name: str) -> Part:
    if isinstance(value, nn.Module):
        return _ModulePart(value)
    if (
        isinstance(value, torch.optim.Optimizer)
        and type(value).load_state_dict is torch.optim.Optimizer.load_state_dict
    ):
        return _OptimizerPart(value)
    if isinstance(value, rng.GENERATOR_TYPES):
        return _GeneratorPart(value)
    if callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None)):
        return _StatefulPart(value)
    if isinstance(value, torch.utils.data.DataLoader):
        raise UnsupportedValueError(
            f"{name}: a plain DataLoader does not know its position; iterate onthefly.state.loader.ExactLoader(loader) "
            "and pass that, or let onthefly.attach do it"
        )
    raise UnsupportedValueError(
        f"{name}: a {type(value).__qualname__} has no state_dict and load_state_dict, so it cannot be part of the train state"
    )


# -- tensors and values ----------------------------------------------------------------------------------------


def _plain_name(name: str) -> str:
    if not name or "/" in name:
        raise UnsupportedValueError(f"{name!r} cannot name a part of the train state: it is empty or contains '/'")
    return name


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


def _without_compile(name: str) -> str:
    return name.replace("_orig_mod.", "")  # a compiled submodule


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _check_same_names(live: Mapping[str, Any], stored: Any, path: str) -> None:
    if not isinstance(stored, Mapping):
        raise StateMismatchError(f"{path}: what is stored there is not the state of a module")
    missing, extra = [n for n in live if n not in stored], [n for n in stored if n not in live]
    if missing or extra:
        words = [f"not stored: {', '.join(missing[:5])}"] * bool(missing) + [
            f"not live: {', '.join(extra[:5])}"
        ] * bool(extra)
        raise StateMismatchError(
            f"{path}: {len(missing) + len(extra)} names are not on both sides ({'; '.join(words)})"
        )


def _check_tensor(live: torch.Tensor, stored: Any, path: str) -> None:
    if not isinstance(stored, torch.Tensor) or stored.shape != live.shape or stored.dtype != live.dtype:
        found = _describe(stored) if isinstance(stored, torch.Tensor) else type(stored).__name__
        raise StateMismatchError(f"{path}: stored as {found}, live as {_describe(live)}")


@torch.no_grad()
def _copy_all(live: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]) -> None:
    for name, value in stored.items():
        live[name].copy_(value)


def _own(value: Any, device: torch.device | None = None) -> Any:
    """A deep copy with memory of its own; tensors keep dtype and strides, and go to the device if one is given."""
    if isinstance(value, torch.Tensor):
        with torch.no_grad():
            target = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device or value.device)
            owned = target.copy_(value) if _owns_every_element(value) else value.to(device or value.device, copy=True)
        if isinstance(value, nn.Parameter):
            return nn.Parameter(owned, requires_grad=value.requires_grad)
        return owned.requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        # copy.copy keeps the type (OrderedDict, defaultdict, Counter) and its attributes, such as _metadata.
        owned_dict = copy.copy(value)
        for key, item in value.items():
            owned_dict[key] = _own(item, device)
        return owned_dict
    if isinstance(value, list):
        return [_own(item, device) for item in value]
    if type(value) is tuple:
        return tuple(_own(item, device) for item in value)
    return copy.deepcopy(value)


def _owns_every_element(tensor: torch.Tensor) -> bool:
    return 0 not in tensor.stride() and tensor.numel() > 0


def _into(live: Any, stored: Any, device: torch.device | None) -> Any:
    """The stored value, in the live tensor's memory where it has the same form."""
    if isinstance(live, torch.Tensor) and isinstance(stored, torch.Tensor):
        same_place = device is None or live.device == device
        if (
            live.shape == stored.shape
            and live.dtype == stored.dtype
            and live.stride() == stored.stride()
            and same_place
        ):
            with torch.no_grad():
                return live.copy_(stored)
    return _own(stored, device)


def _modes(module: nn.Module) -> dict[str, list[str]]:
    """What may change during training and is no tensor: frozen parameters, and submodules in evaluation mode."""
    return {
        "frozen": [
            _without_compile(n) for n, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad
        ],
        "eval": [_without_compile(n) for n, m in module.named_modules(remove_duplicate=False) if not m.training],
    }


def _set_modes(module: nn.Module, modes: Mapping[str, list[str]]) -> None:
    frozen, evaluating = set(modes.get("frozen", ())), set(modes.get("eval", ()))
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.is_leaf:
            parameter.requires_grad_(_without_compile(name) not in frozen)
    for name, submodule in module.named_modules(remove_duplicate=False):
        submodule.training = _without_compile(name) not in evaluating


def _unsaved_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers registered with persistent=False: no state_dict has them, but training may change them."""
    saved = module.state_dict(keep_vars=True)
    return {name: b for name, b in module.named_buffers(remove_duplicate=False) if name not in saved}


def _check_buffers(module: nn.Module, stored: Mapping[str, torch.Tensor], path: str) -> None:
    live = _unsaved_buffers(module)
    _check_same_names(live, stored, f"buffers/{path}")
    for name, buffer in live.items():
        _check_tensor(buffer, stored[name], f"buffers/{path}/{name}")


def _all_parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _gradients(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {str(i): p.grad for i, p in enumerate(_all_parameters(optimizer)) if p.grad is not None}


def _set_gradients(optimizer: torch.optim.Optimizer, stored: Mapping[str, torch.Tensor] | None) -> None:
    for index, parameter in enumerate(_all_parameters(optimizer)):
        gradient = (stored or {}).get(str(index))
        parameter.grad = None if gradient is None else _own(gradient, parameter.device)
