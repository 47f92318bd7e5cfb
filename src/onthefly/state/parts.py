"""Parts: how one live object is captured, checked against a stored value, and put back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from onthefly.errors import CorruptCheckpointError, StateMismatchError, UnsupportedValueError
from onthefly.state import rng


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

    def apply(self, stored: Any, copies: Copies) -> None:
        """Put a checked value back. Copies into tensors may be left to `copies`, which are done when all parts are."""


Copies = list[tuple[torch.Tensor, torch.Tensor]]
"""Tensors to be copied, as pairs (live, stored) of one shape, dtype and layout."""


def part_for(value: Any, name: str) -> Part:
    """The part that a live object becomes. Raises `UnsupportedValueError` for one that cannot be captured."""
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


# -- modules ---------------------------------------------------------------------------------------------------


class _ModulePart:
    """Parameters and buffers, by their names in the user's own module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = unwrapped(module)
        self._plain = plain_names(self._module)
        # Entries that are not tensors of the module (get_extra_state, a state_dict of its own) need its own loading.
        own = self._own_tensors()
        self.can_refuse = any(name not in own for name in self._module.state_dict(keep_vars=True))

    def capture(self) -> dict[str, Any]:
        if self.can_refuse:
            return {self._plain(name): value for name, value in self._module.state_dict().items()}
        return {
            # One without a shape yet is given as it is, to be refused under its name by what stores it.
            self._plain(name): tensor if is_lazy(tensor) else tensor.detach()
            for name, tensor in self._own_tensors().items()
        }

    def check(self, stored: Any, path: str) -> None:
        names = {self._plain(name): name for name in self._module.state_dict(keep_vars=True)}
        check_same_names(names, stored, path)
        own = self._own_tensors()
        tied: dict[int, str] = {}
        for plain, name in names.items():
            if name in own:
                check_tensor(own[name], stored[plain], f"{path}/{plain}")
                first = tied.setdefault(id(own[name]), plain)
                if not _same_bits(stored[first], stored[plain]):
                    raise StateMismatchError(
                        f"{path}: {first} and {plain} are tied, but stored with values that differ"
                    )

    def apply(self, stored: Any, copies: Copies) -> None:
        if self.can_refuse:
            names = {self._plain(name): name for name in self._module.state_dict(keep_vars=True)}
            self._module.load_state_dict({names[name]: own(value) for name, value in stored.items()})
        else:
            pair_up({self._plain(name): tensor for name, tensor in self._own_tensors().items()}, stored, copies)

    def _own_tensors(self) -> dict[str, torch.Tensor]:
        """The entries of the state dict that are parameters and buffers themselves."""
        live = {id(t) for t in (*self._module.parameters(), *self._module.buffers())}
        return {name: t for name, t in self._module.state_dict(keep_vars=True).items() if id(t) in live}


def unwrapped(module: nn.Module) -> nn.Module:
    """The user's module inside `DistributedDataParallel`, `DataParallel` and `torch.compile`."""
    while inner := _wrapped(module):
        module = getattr(module, inner)
    return module


def plain_names(module: nn.Module) -> Callable[[str], str]:
    """A function that takes the wrappers inside a module (compiled or parallel parts of it) out of names in it."""
    wrappers = [
        (name, f"{name}.{inner}" if name else inner)
        for name, submodule in module.named_modules(remove_duplicate=False)
        if (inner := _wrapped(submodule))
    ]

    def plain(name: str) -> str:
        for outer, inner in reversed(wrappers):  # the innermost first
            if name == inner:
                name = outer
            elif name.startswith(inner + "."):
                name = f"{outer}.{name[len(inner) + 1 :]}" if outer else name[len(inner) + 1 :]
        return name

    return plain


def _wrapped(module: nn.Module) -> str | None:
    """The attribute that holds the user's module, if this one is a wrapper."""
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return "module"
    return "_orig_mod" if isinstance(getattr(module, "_orig_mod", None), nn.Module) else None


# -- optimizers ------------------------------------------------------------------------------------------------


class _OptimizerPart:
    """A `torch.optim.Optimizer`, entry by entry: its own `load_state_dict` casts moments to the parameter's dtype.

    Its class and the form of its parameters are stored, too, or a fresh optimizer would take anything.
    """

    can_refuse = False

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def capture(self) -> dict[str, Any]:
        return {
            "class": type(self._optimizer).__qualname__,
            "parameters": [describe(p) for p in all_parameters(self._optimizer)],
            **self._optimizer.state_dict(),
        }

    def check(self, stored: Any, path: str) -> None:
        _check_is_optimizer(stored, path)
        mine = self.capture()
        if stored["class"] != mine["class"]:
            raise StateMismatchError(f"{path}: stored is a {stored['class']}, live a {mine['class']}")
        sizes, stored_sizes = ([len(group["params"]) for group in each["param_groups"]] for each in (mine, stored))
        if sizes != stored_sizes:
            raise StateMismatchError(
                f"{path}: parameter groups of {stored_sizes} parameters are stored, the optimizer has {sizes}"
            )
        for index, (live, found) in enumerate(zip(mine["parameters"], stored["parameters"], strict=True)):
            if live != found:
                raise StateMismatchError(f"{path}: parameter {index} is stored as {found}, live as {live}")

    def apply(self, stored: Any, copies: Copies) -> None:
        optimizer = self._optimizer
        for mine, theirs in zip(optimizer.param_groups, stored["param_groups"], strict=True):
            for key, value in theirs.items():
                if key not in ("params", "param_names"):
                    mine[key] = _into(mine.get(key), value, None, copies)
            for index, parameter in zip(theirs["params"], mine["params"], strict=True):
                entry = stored["state"].get(index)
                if entry is None:
                    optimizer.state.pop(parameter, None)
                else:
                    _put_entry(optimizer.state[parameter], entry, parameter.device, mine, copies)
        for key in [key for key in optimizer.state if not isinstance(key, torch.Tensor)]:
            del optimizer.state[key]
        indices = {index for group in stored["param_groups"] for index in group["params"]}
        optimizer.state.update({key: own(entry) for key, entry in stored["state"].items() if key not in indices})


def all_parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """The tensors that an optimizer keeps for its parameters, and those that it keeps beside them."""
    for entry in optimizer.state.values():
        values = entry.values() if isinstance(entry, dict) else [entry]
        yield from (value for value in values if isinstance(value, torch.Tensor))


def _check_is_optimizer(stored: Any, path: str) -> None:
    """That `_OptimizerPart.apply` finds all that it reads."""
    if not isinstance(stored, dict) or not {"class", "parameters", "param_groups", "state"} <= stored.keys():
        raise StateMismatchError(f"{path}: what is stored there is not the state of an optimizer")
    groups, state, forms = stored["param_groups"], stored["state"], stored["parameters"]
    sound = isinstance(groups, list) and isinstance(forms, list) and isinstance(state, dict)
    sound = sound and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups)
    sound = sound and all(isinstance(form, str) for form in forms) and isinstance(stored["class"], str)
    sound = sound and all(type(index) is int for group in groups for index in group["params"])
    # `apply` asks these for their truth, which a tensor may not have.
    sound = sound and all(
        isinstance(group.get(key), bool | None) for group in groups for key in ("capturable", "fused")
    )
    sound = sound and not any(isinstance(key, torch.Tensor) for key in state)  # they stand for parameters, by number
    if not sound or [index for group in groups for index in group["params"]] != list(range(len(forms))):
        raise CorruptCheckpointError(f"{path}: its parameter groups are malformed")
    for index, entry in state.items():
        if isinstance(index, int) and not (index < len(forms) and isinstance(entry, dict)):
            raise CorruptCheckpointError(f"{path}/state/{index}: it is no entry of a parameter")


def _put_entry(
    mine: dict[str, Any], entry: Mapping[str, Any], device: torch.device, group: Mapping[str, Any], copies: Copies
) -> None:
    for key in [key for key in mine if key not in entry]:
        del mine[key]
    for key, value in entry.items():
        # Step counts stay on the CPU unless the kernel reads them on the device, as in PyTorch itself.
        on_cpu = key == "step" and not (group.get("capturable") or group.get("fused"))
        mine[key] = _into(mine.get(key), value, None if on_cpu else device, copies)


def _into(live: Any, stored: Any, device: torch.device | None, copies: Copies) -> Any:
    """What becomes the stored value when the copies are done: the live tensor where it has the same form."""
    if not isinstance(stored, torch.Tensor) or isinstance(stored, nn.Parameter) or not _owns_every_element(stored):
        return own(stored, device)
    if not (
        isinstance(live, torch.Tensor)
        and live.shape == stored.shape
        and live.dtype == stored.dtype
        and live.stride() == stored.stride()
        and (device is None or live.device == device)
    ):
        live = torch.empty_strided(
            stored.shape, stored.stride(), dtype=stored.dtype, device=device or stored.device
        ).requires_grad_(stored.requires_grad)
    copies.append((live, stored))
    return live


# -- everything else -------------------------------------------------------------------------------------------


class _StatefulPart:
    """Anything with `state_dict` and `load_state_dict`."""

    can_refuse = True

    def __init__(self, value: Stateful) -> None:
        self._value = value

    def capture(self) -> Any:
        return self._value.state_dict()

    def check(self, stored: Any, path: str) -> None:
        """Only the object itself knows; `apply` may refuse."""

    def apply(self, stored: Any, copies: Copies) -> None:
        if isinstance(self._value, torch.amp.GradScaler) and not stored:  # it was saved disabled
            return
        self._value.load_state_dict(own(stored))


class _GeneratorPart:
    """A private random generator."""

    can_refuse = True

    def __init__(self, generator: rng.Generator) -> None:
        self._generator = generator

    def capture(self) -> Any:
        return rng.generator_state(self._generator)

    def check(self, stored: Any, path: str) -> None:
        """Only the generator itself knows; `apply` may refuse."""

    def apply(self, stored: Any, copies: Copies) -> None:
        rng.set_generator_state(self._generator, stored)


# -- tensors ---------------------------------------------------------------------------------------------------


def describe(tensor: torch.Tensor) -> str:
    if is_lazy(tensor):
        return "a tensor without a shape yet"
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def check_same_names(live: Mapping[str, Any], stored: Any, path: str) -> None:
    """Raises `StateMismatchError`, naming some, when names are on one side only."""
    if not isinstance(stored, Mapping):
        raise StateMismatchError(f"{path}: what is stored there is not the state of a module")
    missing, extra = [n for n in live if n not in stored], [n for n in stored if n not in live]
    if missing or extra:
        words = [f"not stored: {', '.join(missing[:5])}"] * bool(missing) + [
            f"not live: {', '.join(map(str, extra[:5]))}"
        ] * bool(extra)
        raise StateMismatchError(
            f"{path}: {len(missing) + len(extra)} names are not on both sides ({'; '.join(words)})"
        )


def check_tensor(live: torch.Tensor, stored: Any, path: str) -> None:
    """Raises `StateMismatchError` when `copy_tensors` could not put the stored value into the live tensor."""
    if is_lazy(live):
        raise StateMismatchError(f"{path}: the live parameter has no shape yet; run one batch through the module first")
    if not isinstance(stored, torch.Tensor) or stored.shape != live.shape or stored.dtype != live.dtype:
        found = describe(stored) if isinstance(stored, torch.Tensor) else type(stored).__name__
        raise StateMismatchError(f"{path}: stored as {found}, live as {describe(live)}")
    if live.is_meta:
        raise StateMismatchError(f"{path}: the live tensor is on the meta device, which holds no values")
    if not _same_bits(_distinct(stored, live).expand_as(stored), stored):
        raise StateMismatchError(f"{path}: live it is one value expanded to {describe(live)}, stored are several")


def pair_up(live: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor], copies: Copies) -> None:
    """Add what takes stored values, which were checked, into the live tensors of the same names."""
    for name, value in stored.items():
        copies.append((_distinct(live[name], live[name]), _distinct(value, live[name])))


@torch.no_grad()
def copy_tensors(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy stored tensors into live ones, pair by pair (live, stored)."""
    for live, stored in pairs:
        live.copy_(stored)


def own(value: Any, device: torch.device | None = None) -> Any:
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
            owned_dict[key] = own(item, device)
        return owned_dict
    if isinstance(value, list):
        return [own(item, device) for item in value]
    if type(value) is tuple:
        return tuple(own(item, device) for item in value)
    return copy.deepcopy(value)


def _owns_every_element(tensor: torch.Tensor) -> bool:
    return 0 not in tensor.stride() and tensor.numel() > 0


def _distinct(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor without the repetitions of an expanded one, which cannot be written to."""
    for dimension, (stride, size) in enumerate(zip(like.stride(), like.shape, strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor


def _same_bits(a: Any, b: Any) -> bool:
    if a is b or (a.data_ptr() == b.data_ptr() and a.stride() == b.stride()):
        return True
    return bool(torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)))
