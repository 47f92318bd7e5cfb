"""Random number generators: the process-wide ones, and private ones that hide in a user's objects."""

from __future__ import annotations

import functools
import random
import types
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

Generator = random.Random | np.random.RandomState | np.random.Generator | torch.Generator
GENERATOR_TYPES = (random.Random, np.random.RandomState, np.random.Generator, torch.Generator)

_WALK_OBJECTS = 4096  # a bounded look: a data set may hold millions of objects
_WALK_ITEMS = 64


def capture() -> dict[str, Any]:
    """The state of every process-wide generator: Python, NumPy, torch CPU, and each accelerator in use."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.default_generator.get_state(),
    }
    # An accelerator that was never used has no generator yet; asking for it would initialise the device.
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    if torch.xpu.is_available() and torch.xpu.is_initialized():  # type: ignore[no-untyped-call]
        state["xpu"] = torch.xpu.get_rng_state_all()
    return state


def restore(state: Mapping[str, Any]) -> None:
    """Put back what `capture` took. States of accelerators that this machine lacks are left aside."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.default_generator.set_state(state["torch"].clone())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
    if "xpu" in state and torch.xpu.is_available():
        torch.xpu.set_rng_state_all(state["xpu"][: torch.xpu.device_count()])


@contextmanager
def preserved() -> Iterator[None]:
    """Run a block without a trace in the process-wide generators."""
    state = capture()
    try:
        yield
    finally:
        restore(state)


def generator_state(generator: Generator) -> Any:
    """The state of one private generator, as a value that can be stored."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state()


def set_generator_state(generator: Generator, state: Any) -> None:
    """Put back what `generator_state` took."""
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state.clone())


def find_generators(roots: Mapping[str, Any]) -> dict[str, Generator]:
    """Private generators reachable from some objects, by the first path that leads to each.

    The walk follows attributes, slots, containers (their first 64 items), partials, closures and bound methods,
    through at most 4,096 objects. It runs no code of the objects (no properties, no ``__getattr__``).
    """
    found: dict[str, Generator] = {}
    seen = {id(np.random.mtrand._rand), id(random._inst), id(torch.default_generator)}
    queue = deque(roots.items())
    visited = 0
    while queue and visited < _WALK_OBJECTS:
        path, value = queue.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        visited += 1
        if isinstance(value, GENERATOR_TYPES):
            found[path] = value
        else:
            queue.extend(_children(path, value))
    return found


_OPAQUE = (
    str,
    bytes,
    bytearray,
    int,
    float,
    complex,
    bool,
    type(None),
    type,
    types.ModuleType,
    torch.Tensor,
    np.ndarray,
)


def _children(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, _OPAQUE):
        return
    if isinstance(value, Mapping):
        items = [(f"{path}[{key!r}]", item) for key, item in zip(value, value.values(), strict=False)][:_WALK_ITEMS]
        yield from items
        return
    if isinstance(value, list | tuple | set | frozenset | deque):
        yield from ((f"{path}[{i}]", item) for i, item in zip(range(_WALK_ITEMS), value, strict=False))
        return
    if isinstance(value, functools.partial):
        yield from ((f"{path}.{name}", getattr(value, name)) for name in ("func", "args", "keywords"))
    if isinstance(value, types.MethodType):
        yield f"{path}.__self__", value.__self__
    if isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield f"{path}.<{name}>", cell.cell_contents
            except ValueError:  # a cell that was not filled yet
                continue
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        yield from ((f"{path}.{name}", item) for name, item in list(attributes.items()))
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            member = cls.__dict__.get(name)
            if isinstance(member, types.MemberDescriptorType):
                try:
                    yield f"{path}.{name}", member.__get__(value)
                except AttributeError:  # a slot that was never set
                    continue
