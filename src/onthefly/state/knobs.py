"""Values that can be changed while training runs: an optimizer's group values, gradient clip, and knobs of the user's own.

Under a scheduler, a changed group value is a *factor*: it is applied just before each optimizer step and taken back just
after, so the scheduler finds its own exact value and is never touched. `hold` fixes the value the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from onthefly.errors import InvalidCommandError, StateMismatchError, UnsupportedValueError

CLIP = "grad_clip"
_NOT_NEGATIVE = {"lr", "weight_decay", "eps", "momentum", CLIP}
_STRUCTURAL = {"amsgrad", "capturable", "centered", "differentiable", "foreach", "fused"}
"""What an optimizer's state is made for. A step under another value of these would raise, and end the training."""


class Knob:
    """A value of the user's own that can be changed live. Read `value` wherever it is needed."""

    __slots__ = ("name", "value")

    def __init__(self, name: str, value: Any) -> None:
        self.name = name
        self.value = value

    def __repr__(self) -> str:
        return f"Knob({self.name!r}, {self.value!r})"


@dataclass(frozen=True)
class _Override:
    """A group value that is not what the scheduler, or the script, says."""

    mode: str  # "factor" or "hold"
    value: Any

    def of(self, base: Any) -> Any:
        return base * self.value if self.mode == "factor" else self.value


@dataclass(frozen=True)
class _Ramp:
    """The learning rates of an optimizer are on their way up: `done` of `steps` steps are taken."""

    done: int
    steps: int

    @property
    def factor(self) -> float:
        return (self.done + 1) / (self.steps + 1)


_Place = tuple[str, int, str]  # optimizer, group, key


@dataclass(frozen=True)
class Change:
    """One value that a `set` changed: its name, and what it was and is."""

    name: str
    before: Any
    after: Any


class Knobs:
    """Owns every live value. It is a part of the train state, so a checkpoint has the values of its moment."""

    def __init__(self, optimizers: Mapping[str, torch.optim.Optimizer], schedulers: Mapping[str, Any]) -> None:
        self._optimizers = dict(optimizers)
        self._knobs: dict[str, Knob] = {}
        self._waiting: dict[str, Any] = {}  # values of knobs that were stored and are not registered yet
        self._clip: float | None = None
        self._overrides: dict[_Place, _Override] = {}
        self._ramps: dict[str, _Ramp] = {}
        self._applied: dict[_Place, Any] = {}  # what the groups held before the step under way
        self._driven = {
            (name, key)
            for name, optimizer in self._optimizers.items()
            for scheduler in schedulers.values()
            if getattr(scheduler, "optimizer", None) is optimizer
            for key in _driven_keys(scheduler)
        }
        self._handles = [
            handle
            for name, optimizer in self._optimizers.items()
            for handle in (
                optimizer.register_step_pre_hook(lambda o, a, k, name=name: self._before_step(name)),  # type: ignore[misc]
                optimizer.register_step_post_hook(lambda o, a, k, name=name: self._end_step(name)),  # type: ignore[misc]
            )
        ]

    def close(self) -> None:
        """Leave the optimizers alone from now on."""
        for handle in self._handles:
            handle.remove()

    def register(self, name: str, value: Any) -> Knob:
        """A knob of the user's own. A value that was stored for it takes the place of the given one.

        Raises `UnsupportedValueError` for a name that is taken, or a value that is not a number, text, bool or None.
        """
        if name in self._knobs or name == CLIP or not name.isidentifier():
            raise UnsupportedValueError(f"{name!r} cannot name a knob: it is taken, or not a plain name")
        if not isinstance(value, bool | int | float | str | None):
            raise UnsupportedValueError(f"knob {name}: a {type(value).__name__} is not a number, text, bool or None")
        knob = self._knobs[name] = Knob(name, self._waiting.pop(name, value))
        return knob

    @property
    def unclaimed(self) -> list[str]:
        """Knobs that were stored and that nobody has registered."""
        return list(self._waiting)

    def unclaimed_of(self, state: Any) -> list[str]:
        """Knobs in a state that nobody here has registered."""
        stored = state.get("knobs") if isinstance(state, Mapping) else None
        return [name for name in stored or () if name not in self._knobs]

    def values(self) -> dict[str, Any]:
        """Every live value by name, as the next step will see it."""
        found: dict[str, Any] = {name: knob.value for name, knob in self._knobs.items()}
        found[CLIP] = self._clip
        for name, optimizer in self._optimizers.items():
            for index, group in enumerate(optimizer.param_groups):
                for key in group:
                    if key != "params" and _is_plain(group[key]):
                        value = _number(self._effective((name, index, key)))
                        warming = key == "lr" and name in self._ramps
                        found[f"{name}.{index}.{key}"] = value * self._ramps[name].factor if warming else value
        return found

    def plan(
        self, values: Mapping[str, Any], *, hold: bool = False, release: bool = False
    ) -> list[tuple[str, Any, Any]]:
        """What `set` would do: names, targets and new values. Changes nothing. Raises `InvalidCommandError` as it does."""
        plan: list[tuple[str, Any, Any]] = []
        for name, value in values.items():
            targets: list[Any] = self._targets(name)
            if release and isinstance(targets[0], Knob):
                raise InvalidCommandError(f"{name}: a knob belongs to no scheduler; set it instead")
            for target in targets:
                plan.append((name, target, None if release else self._wanted(name, target, value, hold)))
        return plan

    def set(self, values: Mapping[str, Any], *, hold: bool = False, release: bool = False) -> list[Change]:
        """Change values; all of them, or none when one is refused. Setting a value that it has changes nothing.

        A text such as ``"*0.1"`` multiplies. Raises `InvalidCommandError`, naming what can be set.
        """
        changes = []
        for name, target, wanted in self.plan(values, hold=hold, release=release):
            before = self._read(target)
            if release:
                self._release(target)
            elif not (_same(before, wanted) and (not hold or self._holds(target))):
                self._write(target, wanted, hold)
            after = self._read(target)
            if not _same(before, after) or hold or release:
                label = ".".join(map(str, target)) if isinstance(target, tuple) else name
                changes.append(Change(label, _number(before), _number(after)))
        return changes

    # -- train state -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "knobs": {**self._waiting, **{name: knob.value for name, knob in self._knobs.items()}},
            CLIP: self._clip,
            "overrides": {".".join(map(str, place)): asdict(o) for place, o in self._overrides.items()},
            **({"ramps": {name: asdict(ramp) for name, ramp in self._ramps.items()}} if self._ramps else {}),
        }

    def warmed_up(self, state: Mapping[str, Any], steps: int) -> dict[str, Any]:
        """A `state_dict` whose learning rates, whatever a scheduler or a `set` says of them, rise from 0 over the next steps.

        In the k-th of n steps they are k / (n + 1) of what they would be.
        """
        ramps = {name: asdict(_Ramp(0, steps)) for name in self._optimizers} if steps else {}
        return {**{key: value for key, value in state.items() if key != "ramps"}, **({"ramps": ramps} if ramps else {})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises `StateMismatchError`, with nothing changed, for an override of a group that is not there."""
        overrides = {}
        for text, override in state["overrides"].items():
            name, index, key = text.rsplit(".", 2)
            groups = self._optimizers[name].param_groups if name in self._optimizers else []
            if int(index) >= len(groups) or key not in groups[int(index)]:
                raise StateMismatchError(f"knobs: {text} was set, and there is no such group value here")
            overrides[name, int(index), key] = _Override(**override)
        ramps = {name: _Ramp(**ramp) for name, ramp in state.get("ramps", {}).items()}
        if unknown := [name for name in ramps if name not in self._optimizers]:
            raise StateMismatchError(f"knobs: the learning rate of {unknown[0]} was warming up, and there is none here")
        self._overrides = overrides
        self._ramps = ramps
        self._clip = state[CLIP]
        self._waiting = {}
        for name, value in state["knobs"].items():
            if name in self._knobs:
                self._knobs[name].value = value
            else:
                self._waiting[name] = value

    # -- places ------------------------------------------------------------------------------------------------

    def _targets(self, name: str) -> list[Knob | str | _Place]:
        if name in self._knobs:
            return [self._knobs[name]]
        if name == CLIP:
            if not self._optimizers:
                raise InvalidCommandError("grad_clip needs an optimizer, and this session has none")
            return [CLIP]
        places: list[Knob | str | _Place] = [
            (optimizer, index, key)
            for optimizer, live in self._optimizers.items()
            for index, group in enumerate(live.param_groups)
            for key in group
            if _can_be_set(key, group[key]) and name in _spellings(optimizer, index, key)
        ]
        if not places:
            raise InvalidCommandError(f"there is nothing named {name!r} to set; there are: {', '.join(self._names())}")
        return places

    def _names(self) -> list[str]:
        keys = {
            key: None
            for optimizer in self._optimizers.values()
            for group in optimizer.param_groups
            for key in group
            if _can_be_set(key, group[key])
        }
        return [*self._knobs, CLIP, *keys]

    def _read(self, target: Knob | str | _Place) -> Any:
        if isinstance(target, Knob):
            return target.value
        return self._clip if isinstance(target, str) else self._effective(target)

    def _effective(self, place: _Place) -> Any:
        base = self._group(place)[place[2]]
        override = self._overrides.get(place)
        return base if override is None else override.of(base)

    def _group(self, place: _Place) -> dict[str, Any]:
        return self._optimizers[place[0]].param_groups[place[1]]

    def _holds(self, target: Knob | str | _Place) -> bool:
        return not isinstance(target, tuple) or (target in self._overrides and self._overrides[target].mode == "hold")

    def _wanted(self, name: str, target: Knob | str | _Place, value: Any, hold: bool) -> Any:
        """The new value, in the type of the old one."""
        current = _number(self._read(target))
        if isinstance(value, str) and value.startswith("*") and not isinstance(current, str):
            try:
                value = current * float(value[1:])
            except (TypeError, ValueError):
                raise InvalidCommandError(f"{name}: {current!r} cannot be multiplied by {value[1:]!r}") from None
        if isinstance(target, str):  # the clip: a number, or nothing
            value = None if value is None else _in_type_of(0.0, value, name)
        else:
            value = _in_type_of(current, value, name)
        if name.split(".")[-1] in _NOT_NEGATIVE and isinstance(value, float) and not 0 <= value < math.inf:
            raise InvalidCommandError(f"{name}: must be a finite number of at least 0, not {value!r}")
        if name.split(".")[-1] == "betas" and isinstance(value, tuple) and not all(0 <= b < 1 for b in value):
            raise InvalidCommandError(f"{name}: each must be at least 0 and below 1, not {value!r}")
        if isinstance(target, tuple) and not hold and self._is_driven(target):
            base = _number(self._group(target)[target[2]])
            if not isinstance(base, float | int) or base == 0:
                raise InvalidCommandError(
                    f"{name}: its scheduler says {base!r} now, and no factor turns that into {value!r}; use hold"
                )
        return value

    def _is_driven(self, place: _Place) -> bool:
        return (place[0], place[2]) in self._driven

    def _write(self, target: Knob | str | _Place, value: Any, hold: bool) -> None:
        if isinstance(target, Knob):
            target.value = value
        elif isinstance(target, str):
            self._clip = value
        elif hold:
            self._overrides[target] = _Override("hold", value)
        elif self._is_driven(target):
            self._overrides[target] = _Override("factor", value / _number(self._group(target)[target[2]]))
        else:
            self._overrides.pop(target, None)
            group, key = self._group(target), target[2]
            if isinstance(group[key], torch.Tensor):
                group[key].fill_(value)
            else:
                group[key] = value

    def _release(self, target: str | _Place) -> None:
        if isinstance(target, str):
            self._clip = None
        else:
            self._overrides.pop(target, None)

    # -- around a step -----------------------------------------------------------------------------------------

    def _before_step(self, name: str) -> None:
        self._after_step(name)  # a step that raised in the middle left its values behind
        if self._clip is not None:
            self._clip_gradients(self._optimizers[name], self._clip)
        ramp = self._ramps.get(name)
        changed = dict.fromkeys(place for place in self._overrides if place[0] == name)
        if ramp is not None:
            groups = self._optimizers[name].param_groups
            changed |= dict.fromkeys((name, index, "lr") for index, group in enumerate(groups) if "lr" in group)
        for place in changed:
            group, key = self._group(place), place[2]
            value = self._effective(place)
            self._applied[place] = group[key]
            group[key] = value * ramp.factor if ramp is not None and key == "lr" else value

    def _after_step(self, name: str) -> None:
        for place in [place for place in self._applied if place[0] == name]:
            self._group(place)[place[2]] = self._applied.pop(place)

    def _end_step(self, name: str) -> None:
        self._after_step(name)
        if (ramp := self._ramps.pop(name, None)) is not None and ramp.done + 1 < ramp.steps:
            self._ramps[name] = _Ramp(ramp.done + 1, ramp.steps)

    @staticmethod
    def _clip_gradients(optimizer: torch.optim.Optimizer, norm: float) -> None:
        # A fused optimizer under a GradScaler unscales inside its kernel: here gradients are still scaled.
        scale = getattr(optimizer, "grad_scale", None)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, norm if scale is None else norm * float(scale))


def _driven_keys(scheduler: Any) -> set[str]:
    return {"lr", "momentum", "betas"} if getattr(scheduler, "cycle_momentum", False) else {"lr"}


def _spellings(optimizer: str, index: int, key: str) -> set[str]:
    names = {optimizer, optimizer.split("/")[-1]}
    return {key} | {f"{name}.{key}" for name in names} | {f"{name}.{index}.{key}" for name in names}


def _can_be_set(key: str, value: Any) -> bool:
    return key != "params" and key not in _STRUCTURAL and _is_plain(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    if isinstance(value, tuple):
        return all(isinstance(item, int | float) for item in value)
    return isinstance(value, bool | int | float | str)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def _same(one: Any, other: Any) -> bool:
    one, other = _number(one), _number(other)
    return type(one) is type(other) and (one == other or (one != one and other != other))


def _in_type_of(current: Any, value: Any, name: str) -> Any:
    if current is None:
        return value
    if isinstance(current, bool) and isinstance(value, bool):
        return value
    if isinstance(current, float) and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(current, int) and not isinstance(current, bool) and type(value) in (int, float):
        return value if type(value) is int or value != int(value) else int(value)
    if isinstance(current, str) and isinstance(value, str):
        return value
    if isinstance(current, tuple) and isinstance(value, list | tuple) and len(value) == len(current):
        return tuple(_in_type_of(a, b, name) for a, b in zip(current, value, strict=True))
    raise InvalidCommandError(f"{name}: it is {current!r}, and {value!r} is not of that kind")
