"""Why a merge will or will not work: how far its parents are from each other, and what lies between them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from onthefly.errors import InvalidCommandError, StateMismatchError

Weights = Mapping[str, torch.Tensor]
"""Tensors by name: a state dict, or an opened file that reads them when asked."""

_PIECE = 1 << 22  # values that are worked on at once


@dataclass(frozen=True)
class Relation:
    """How two parents stand to each other, over all weights or in one tensor."""

    distance: float
    """|a - b| over the mean of |a| and |b|: 0 for equal ones, 2 for opposite ones."""
    cosine: float | None
    """Of their differences from the base, or without one of the weights themselves. None where one of them is zero."""
    agreement: float | None
    """Of the weights that both have changed from the base, the share that they changed in the same direction (the sign
    conflicts of Yadav et al. 2023, "TIES-Merging"). None without a base, and where no weight was changed by both."""


@dataclass(frozen=True)
class Comparison:
    first: int
    second: int
    overall: Relation
    layers: dict[str, Relation]
    """The tensors that are farthest apart, by distance, the worst first."""


def compare(
    parents: Sequence[Weights],
    base: Weights | None = None,
    *,
    worst: int = 5,
    on_piece: Callable[[], None] = lambda: None,
) -> list[Comparison]:
    """Every pair of parents next to each other, by all of their floating tensors, with so many of the worst tensors.

    Merges by averaging want parents that are near and whose changes do not contradict: a cosine of changes around 0 is usual for
    different tasks (Ilharco et al. 2023, "Editing Models with Task Arithmetic"); a large distance with a low cosine means
    parents of different origin, between which the loss is high (see `linear_path`).

    `on_piece` is called now and then, and may raise. A name of a tied tensor counts like any other. Raises `InvalidCommandError` for fewer than two parents, and
    `StateMismatchError` for tensors that do not fit.
    """
    if len(parents) < 2:
        raise InvalidCommandError(f"a comparison takes two parents or more, not {len(parents)}")
    pairs = list(itertools.combinations(range(len(parents)), 2))
    sums: dict[tuple[int, int], dict[str, _Sums]] = {pair: {} for pair in pairs}
    everyone = [*parents, base] if base is not None else list(parents)
    _check_names(everyone)
    for name in everyone[0]:
        tensors = [each[name] for each in everyone]
        _check_shapes(name, tensors)
        if not tensors[0].is_floating_point():
            continue
        for pair in pairs:
            sums[pair][name] = _Sums()
        for values in _pieces(tensors):
            on_piece()
            origin = values.pop() if base is not None else None
            for first, second in pairs:
                sums[first, second][name].add(values[first], values[second], origin)
    found = []
    for (first, second), by_name in sums.items():
        layers = {name: each.relation(base is not None) for name, each in by_name.items()}
        order = sorted(layers, key=lambda name: -layers[name].distance)  # stable: ties in order of the model
        overall = sum(by_name.values(), _Sums()).relation(base is not None)
        found.append(Comparison(first, second, overall, {name: layers[name] for name in order[:worst]}))
    return found


@dataclass
class _Sums:
    """Sums over pairs of values, from which a relation follows."""

    apart: float = 0.0  # |a - b|^2
    first: float = 0.0  # |a|^2
    second: float = 0.0
    inner: float = 0.0  # of the changes, or of the weights without a base
    first_change: float = 0.0
    second_change: float = 0.0
    agreed: int = 0
    changed: int = 0  # by both

    def add(self, a: torch.Tensor, b: torch.Tensor, base: torch.Tensor | None) -> None:
        self.apart += _squared(a - b)
        self.first += _squared(a)
        self.second += _squared(b)
        if base is not None:
            a, b = a - base, b - base
            signs = a.sign() * b.sign()  # their product could underflow
            self.agreed += int((signs > 0).sum())
            self.changed += int((signs != 0).sum())
        self.inner += float(a @ b)
        self.first_change += _squared(a)
        self.second_change += _squared(b)

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    def relation(self, based: bool) -> Relation:
        size = (math.sqrt(self.first) + math.sqrt(self.second)) / 2
        lengths = math.sqrt(self.first_change) * math.sqrt(self.second_change)
        return Relation(
            distance=math.sqrt(self.apart) / size if size else 0.0,
            cosine=self.inner / lengths if lengths else None,
            agreement=self.agreed / self.changed if based and self.changed else None,
        )


@dataclass(frozen=True)
class LinearPath:
    """Losses along the straight line between two parents."""

    positions: list[float]
    """From 0, the first parent, to 1, the second."""
    losses: list[float]
    barrier: float
    """How far the loss rises above the straight line between the losses of the ends, at most; never below 0. Infinite where a loss
    between finite ends is not finite; NaN where that of an end is not."""


def linear_path(
    evaluate: Callable[[dict[str, torch.Tensor]], float], first: Weights, second: Weights, points: int = 5
) -> LinearPath:
    """Losses at so many points from one parent to the other, ends included, and the barrier between them.

    Parents without a barrier lie in one basin, and averages between them work (Frankle et al. 2020, "Linear Mode
    Connectivity and the Lottery Ticket Hypothesis"; the barrier as in Entezari et al. 2022, "The Role of Permutation
    Invariance in Linear Mode Connectivity"). `evaluate` gives the loss of a state dict; in a model with batch norm it should
    `recalibrate` first, as statistics do not interpolate (Jordan et al. 2023, "REPAIR"). What is not a floating number is that of the
    nearer parent.

    Raises `InvalidCommandError` for fewer than two points, `StateMismatchError` for parents that do not fit.
    """
    if points < 2:
        raise InvalidCommandError(f"a path takes two points or more, its ends, not {points}")
    _check_names([first, second])
    positions = [index / (points - 1) for index in range(points)]
    losses = [float(evaluate(_between(first, second, position))) for position in positions]
    return LinearPath(positions, losses, _barrier(positions, losses))


def _between(first: Weights, second: Weights, position: float) -> dict[str, torch.Tensor]:
    found = {}
    for name in first:
        a, b = first[name], second[name]
        _check_shapes(name, [a, b])
        if position in (0, 1) or not a.is_floating_point():
            found[name] = (a if position <= 0.5 else b).clone()
        else:
            wide = torch.float64 if a.dtype == torch.float64 else torch.float32
            found[name] = torch.lerp(a.to(wide), b.to(wide), position).to(a.dtype)
    return found


def _barrier(positions: Sequence[float], losses: Sequence[float]) -> float:
    start, end = losses[0], losses[-1]
    if not (math.isfinite(start) and math.isfinite(end)):
        return math.nan
    if not all(map(math.isfinite, losses)):
        return math.inf
    between = list(zip(positions, losses, strict=True))[1:-1]
    return max([0.0, *(loss - ((1 - position) * start + position * end) for position, loss in between)])


# -- parts -----------------------------------------------------------------------------------------------------------


def _pieces(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Tensors flat, in float64 on the CPU, some values of each at a time."""
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), _PIECE):
        yield [tensor[start : start + _PIECE].cpu().double() for tensor in flat]


def _squared(values: torch.Tensor) -> float:
    return float(values @ values)


def _check_names(parents: Sequence[Weights]) -> None:
    names = set(parents[0])
    for other in parents[1:]:
        if differing := sorted(names ^ set(other)):
            raise StateMismatchError(f"the parents have different tensors; only one of them has {differing[0]}")


def _check_shapes(name: str, tensors: Sequence[torch.Tensor]) -> None:
    shape = tensors[0].shape
    for other in tensors[1:]:
        if other.shape != shape:
            raise StateMismatchError(f"{name} has shape {list(shape)} in one parent and {list(other.shape)} in another")
