"""Comparing: what differs between two checkpoints, entry by entry, and by how much. Loads torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onthefly.checkpoints.header import recorded_hash
from onthefly.checkpoints.weights import entry, models, value_of

Words = tuple[str, str]
"""What the two sides are called."""

_SLICE = 2**22  # numbers that are compared at once: as float64 they take 32 MiB


@dataclass(frozen=True)
class Difference:
    """One entry that differs: its path, and how, in words. `values` are the two, when they are plain ones."""

    path: str
    text: str
    values: tuple[Any, Any] | None = None

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


@dataclass(frozen=True)
class Change:
    """How far a tensor of a model has moved: `relative` is ``||b - a|| / ||a||``, `largest` is ``max |b - a|``.

    `relative` is infinite for a tensor that was all zeros and is not, and NaN where one of the two is not finite.
    """

    path: str
    shape: tuple[int, ...]
    relative: float
    largest: float


@dataclass(frozen=True)
class Diff:
    """What differs between two checkpoints. `equal` says it all; everything else is empty then."""

    a: Path
    b: Path
    hash_a: str
    hash_b: str
    equal: bool
    values: list[Difference] = field(default_factory=list)
    """Counters and other plain values that differ."""
    changes: list[Change] = field(default_factory=list)
    """Every tensor of a model that both have in one shape and dtype, the one that moved most first."""
    rest: list[Difference] = field(default_factory=list)
    """Everything else that differs, such as tensors of the optimizer, and entries that only one has."""


def diff(a: Path, b: Path) -> Diff:
    """Compare two checkpoints. Of two with one hash, nothing but that is read.

    Raises `CheckpointNotFoundError` or `CorruptCheckpointError`.
    """
    hashes = recorded_hash(a), recorded_hash(b)
    if hashes[0] == hashes[1]:
        return Diff(a, b, *hashes, equal=True)
    mine, theirs = value_of(a), value_of(b)
    changes = sorted(_changes(mine, theirs), key=_weight, reverse=True)
    in_changes = {change.path for change in changes}
    found = list(differences(mine, theirs, ("in A", "in B")))
    return Diff(
        a,
        b,
        *hashes,
        equal=False,
        values=[one for one in found if one.values is not None],
        changes=changes,
        rest=[one for one in found if one.values is None and one.path not in in_changes],
    )


def differences(mine: Any, theirs: Any, words: Words, path: str = "") -> Iterator[Difference]:
    """Every entry in which two values differ, in their bits."""
    one_word, other_word = words
    if type(mine) is not type(theirs):
        yield _unequal(mine, theirs, words, path)
    elif isinstance(mine, dict):
        for key in dict.fromkeys((*mine, *theirs)):
            below = f"{path}/{key}" if path else str(key)
            if key not in theirs:
                yield Difference(below, f"{one_word}, not {other_word}")
            elif key not in mine:
                yield Difference(below, f"{other_word}, not {one_word}")
            elif path == "rng":
                # A stream is one thing, whatever it is made of.
                if any(True for _ in differences(mine[key], theirs[key], words, below)):
                    yield Difference(below, "the random stream stands elsewhere")
            else:
                yield from differences(mine[key], theirs[key], words, below)
    elif isinstance(mine, list | tuple) and len(mine) == len(theirs):
        for number, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            yield from differences(one, other, words, f"{path}/{number}")
    elif isinstance(mine, torch.Tensor):
        yield from _tensor_differences(mine, theirs, words, path)
    elif isinstance(mine, np.ndarray):
        if mine.dtype != theirs.dtype or mine.shape != theirs.shape or mine.tobytes() != theirs.tobytes():
            yield Difference(path, "the arrays differ")
    elif mine != theirs and not (mine != mine and theirs != theirs):
        yield _unequal(mine, theirs, words, path)


def _unequal(mine: Any, theirs: Any, words: Words, path: str) -> Difference:
    text = f"{words[0]} {_short(mine)}, {words[1]} {_short(theirs)}"
    return Difference(path, text, (mine, theirs) if _is_plain(mine) and _is_plain(theirs) else None)


def _tensor_differences(mine: torch.Tensor, theirs: torch.Tensor, words: Words, path: str) -> Iterator[Difference]:
    if mine.dtype != theirs.dtype or mine.shape != theirs.shape:
        forms = (
            f"{word} {tensor.dtype} {list(tensor.shape)}" for word, tensor in zip(words, (mine, theirs), strict=True)
        )
        yield Difference(path, ", ".join(forms))
        return
    mine, theirs = _real(mine), _real(theirs)
    if torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (mine, theirs))):
        return
    gap = (mine.to(torch.float64) - theirs.to(torch.float64)).abs()
    count = int((gap != 0).sum())  # a NaN is unequal, too
    if count == 0:
        text = "equal as numbers, but not in their bits (the sign of a zero, or the payload of a NaN)"
    else:
        text = f"{count:,} of {gap.numel():,} values differ, max |difference| {float(gap.max()):.3g}"
    yield Difference(path, text)


# -- models ----------------------------------------------------------------------------------------------------


def _changes(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Change]:
    for part in models(mine):
        there, other_there = entry(mine, part), entry(theirs, part)
        if not isinstance(there, dict) or not isinstance(other_there, dict):
            continue
        for name, tensor in there.items():
            other = other_there.get(name)
            if isinstance(tensor, torch.Tensor) and isinstance(other, torch.Tensor) and _same_form(tensor, other):
                yield _change(f"{part}/{name}", tensor, other)


def _change(path: str, a: torch.Tensor, b: torch.Tensor) -> Change:
    moved, size, largest = 0.0, 0.0, 0.0
    one, other = (_real(tensor).reshape(-1) for tensor in (a, b))
    for begin in range(0, one.numel(), _SLICE):
        before = one[begin : begin + _SLICE].to(torch.float64)
        gap = other[begin : begin + _SLICE].to(torch.float64) - before
        moved += float(gap.square().sum())
        size += float(before.square().sum())
        highest = float(gap.abs().max())
        largest = highest if highest != highest or highest > largest else largest
    relative = math.sqrt(moved) / math.sqrt(size) if size else math.inf if moved else 0.0
    return Change(path, tuple(a.shape), relative, largest)


def _same_form(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _weight(change: Change) -> float:
    return math.inf if math.isnan(change.relative) else change.relative


def _real(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach()
    return torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
