"""The plan of a merge: parents, strategy and options, checked before anything is computed or written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from onthefly.checkpoints.weights import few, form
from onthefly.errors import InvalidCommandError, StateMismatchError, UnsupportedValueError
from onthefly.merging import strategies
from onthefly.merging.parents import Parent, check_compatible, check_different, first_names
from onthefly.merging.registry import Strategy, strategy_named
from onthefly.merging.strategies import SLICE, Part

Mapped = Callable[[Callable[[Part], Tensor], Iterable[Part]], Iterable[Tensor]]
"""`map`, or something like it."""


@dataclass(frozen=True)
class Plan:
    """A merge that can be computed, tensor by tensor.

    `kept` are the tensors that come from the first parent: those of whole numbers and truths, which have no average. `averaged` are
    those that the strategy does not cover. `firsts` says under which name each is merged.
    """

    strategy: Strategy
    options: Mapping[str, Any]
    parents: tuple[Parent, ...]
    base: Parent | None
    statistics: tuple[Parent, ...]
    firsts: Mapping[str, str]
    parts: Mapping[str, Part]
    kept: tuple[str, ...]
    averaged: tuple[str, ...]
    warnings: tuple[str, ...]

    def form(self, name: str) -> Tensor:
        """A tensor without memory that has the dtype and shape of the result."""
        tensor = self.parents[0].tensors[name]
        shape = list(tensor.shape)
        if (axis := self.strategy.free_axis(name)) is not None:
            shape[axis] = self.options["rank"] or shape[axis]
        return torch.empty(shape, dtype=tensor.dtype, device="meta")

    def pieces(self, name: str, size: int = SLICE, mapped: Mapped = map) -> Iterator[Tensor]:
        """The result's numbers, flat, in order, in its dtype. `mapped` is `map`, or what computes some slices ahead.

        Raises `InvalidCommandError` where a number of a parent is not finite.
        """
        tensor = self.parents[0].tensors[name]
        if name in self.kept:
            return _cut(tensor.cpu(), size)
        part = self.parts[self.firsts[name]]
        if self.strategy.reach == "whole" and self.strategy.covers(part):
            self._check(part)
            return _cut(self._stored(part, self.strategy.merge(part, **self.options), tensor.dtype), size)
        return iter(mapped(lambda piece: self._merged(piece, tensor.dtype), part.slices(size)))

    def _merged(self, piece: Part, dtype: torch.dtype) -> Tensor:
        if not self.strategy.covers(piece):
            return self._stored(piece, strategies.mean(piece), dtype)
        if "fishers" in self.strategy.needs:
            for tensor, parent in zip(piece.statistics or (), self.statistics, strict=True):
                if float(tensor.min()) < 0:
                    raise InvalidCommandError(
                        f"{parent.label}: {piece.name} is below zero, which no Fisher information is"
                    )
        return self._stored(piece, self.strategy.merge(piece, **self.options), dtype)

    def _stored(self, part: Part, result: Tensor, dtype: torch.dtype) -> Tensor:
        """The result in its dtype. It is not finite where a parent is not: only then the parents are looked at."""
        stored = result.to(dtype.to_real())
        if not _is_finite(stored):
            self._check(part)
            raise InvalidCommandError(f"{part.name}: what {self.strategy.name} makes of it is too large for {dtype}")
        return stored

    def _check(self, part: Part) -> None:
        for tensor, parent in zip(part.parents, self.parents, strict=True):
            _check_finite(tensor, part.name, parent.label)
        if part.base is not None and self.base is not None:
            _check_finite(part.base, part.name, self.base.label)
        for tensor, parent in zip(part.statistics or (), self.statistics, strict=False):
            _check_finite(tensor, part.name, parent.label)


def planned(
    parents: Sequence[Parent],
    strategy: str,
    options: Mapping[str, Any],
    *,
    weights: Sequence[float] | None = None,
    base: Parent | None = None,
    statistics: Sequence[Parent] | None = None,
    different: bool = False,
    on_part: Callable[[], None] = lambda: None,
) -> Plan:
    """Check everything, and make the strategy's survey. `on_part` is called for each tensor of it, and may raise.

    With `different`, parents of equal content are refused.

    Raises `InvalidCommandError` for wrong arguments, and `StateMismatchError` for parents that do not fit each other.
    """
    chosen = strategy_named(strategy)
    configured = chosen.configured(options)
    if len(parents) < 2 or chosen.parents not in (None, len(parents)):
        wanted = f"{chosen.parents} parents" if chosen.parents else "two parents or more"
        raise InvalidCommandError(f"{chosen.name} merges {wanted}, not {len(parents)}")
    if not parents[0].tensors:
        raise InvalidCommandError(f"{parents[0].label} has no tensors: there is nothing to merge")
    shares = _weights(chosen, weights, len(parents))
    _check_needs(chosen, base, statistics, len(parents))
    check_compatible([*parents, base] if base is not None else parents, chosen)
    if different:
        check_different(parents)
    firsts = first_names(parents, base)
    kept = tuple(name for name, tensor in parents[0].tensors.items() if not _is_number(tensor))
    parts = {
        name: _part(name, parents, shares, base, statistics, firsts)
        for name in dict.fromkeys(firsts.values())
        if name not in kept
    }
    _check_parts(chosen, parents, parts)
    if chosen.survey is not None:
        found = chosen.survey(_told(parts.values(), on_part), **configured)
        parts = {name: replace(part, found=found.get(name)) for name, part in parts.items()}
    return Plan(
        strategy=chosen,
        options=configured,
        parents=tuple(parents),
        base=base,
        statistics=tuple(statistics or ()),
        firsts=firsts,
        parts=parts,
        kept=kept,
        averaged=tuple(name for name, first in firsts.items() if name not in kept and not chosen.covers(parts[first])),
        warnings=tuple(_warnings(chosen, parts)),
    )


def _told(parts: Iterable[Part], on_part: Callable[[], None]) -> Iterator[Part]:
    for part in parts:
        on_part()
        yield part


def _part(
    name: str,
    parents: Sequence[Parent],
    weights: tuple[float, ...],
    base: Parent | None,
    statistics: Sequence[Parent] | None,
    firsts: Mapping[str, str],
) -> Part:
    return Part(
        name=name,
        parents=tuple(_computable(parent.tensors[name]) for parent in parents),
        weights=weights,
        base=None if base is None else _computable(base.tensors[name]),
        statistics=_statistics(name, parents, statistics, firsts),
    )


def _statistics(
    name: str, parents: Sequence[Parent], statistics: Sequence[Parent] | None, firsts: Mapping[str, str]
) -> tuple[Tensor, ...] | None:
    """What was measured of a tensor for each parent, under any name that is tied to it; None when nothing was."""
    if statistics is None:
        return None
    names = [alias for alias, first in firsts.items() if first == name]
    found = [next((one.tensors[alias] for alias in names if alias in one.tensors), None) for one in statistics]
    if all(tensor is None for tensor in found):
        return None
    for tensor, one in zip(found, statistics, strict=True):
        if tensor is None:
            raise StateMismatchError(f"{one.label} lacks {name}, which the statistics of another parent have")
        if not tensor.is_floating_point() or parents[0].tensors[name].is_complex():
            raise UnsupportedValueError(f"{one.label}: {name} is {form(tensor)}: statistics are of real numbers")
    return tuple(tensor.cpu() for tensor in found if tensor is not None)


def _check_parts(strategy: Strategy, parents: Sequence[Parent], parts: Mapping[str, Part]) -> None:
    for name, part in parts.items():
        if strategy.reach == "whole" and parents[0].tensors[name].is_complex():
            raise UnsupportedValueError(f"{name} is complex; {strategy.name} merges real numbers")
        for tensor in part.statistics or ():
            if "fishers" in strategy.needs and tensor.shape != part.parents[0].shape:
                raise StateMismatchError(
                    f"{name} is {form(part.parents[0])}, and its Fisher information {form(tensor)}: there is one for each number"
                )


def _check_needs(strategy: Strategy, base: Parent | None, statistics: Sequence[Parent] | None, count: int) -> None:
    if ("base" in strategy.needs) != (base is not None):
        raise InvalidCommandError(
            f"{strategy.name} needs a base: what the parents were fine-tuned from"
            if base is None
            else f"{strategy.name} uses no base"
        )
    measured = next((need for need in ("fishers", "grams") if need in strategy.needs), None)
    if measured is None:
        if statistics is not None:
            raise InvalidCommandError(f"{strategy.name} uses no statistics of the parents")
    elif statistics is None or len(statistics) != count:
        given = 0 if statistics is None else len(statistics)
        raise InvalidCommandError(
            f"{strategy.name} needs {measured} of each of the {count} parents, in their order; {given} were given"
        )


def _weights(strategy: Strategy, weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    if weights is None:
        if "weights" in strategy.needs:
            raise InvalidCommandError(f"{strategy.name} needs weights, one for each of the {count} parents")
        return (1.0,) * count
    if not strategy.takes_weights:
        raise InvalidCommandError(f"{strategy.name} takes no weights; `weighted` does")
    found = tuple(float(weight) for weight in weights)
    if len(found) != count:
        raise InvalidCommandError(f"there are {len(found)} weights for {count} parents")
    if not all(0 <= weight < math.inf for weight in found) or not 0 < math.fsum(found) < math.inf:
        raise InvalidCommandError(f"weights are zero or more, and not all zero, not {', '.join(map(str, found))}")
    return found


def _warnings(strategy: Strategy, parts: Mapping[str, Part]) -> Iterator[str]:
    factors = [name for name in parts if strategies.partner(name) in parts]
    if factors and strategy.name != "lora":
        yield (
            f"{few(factors)} are factors of LoRA pairs: the average of factors is not the average of their products; "
            "the strategy `lora` merges the products"
        )


def _is_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _computable(tensor: Tensor) -> Tensor:
    """The tensor in the processor's memory; a complex one as pairs of real numbers, on which every strategy is the same."""
    plain = tensor.cpu()
    return torch.view_as_real(plain.resolve_conj().resolve_neg()) if plain.is_complex() else plain.resolve_neg()


def _cut(tensor: Tensor, size: int) -> Iterator[Tensor]:
    flat = tensor.reshape(-1)
    return (flat[begin : begin + size] for begin in range(0, len(flat), size))


def _check_finite(tensor: Tensor, name: str, label: str) -> None:
    if not _is_finite(tensor):
        raise InvalidCommandError(f"{label}: {name} has numbers that are NaN or infinite: merge without this parent")


def _is_finite(tensor: Tensor) -> bool:
    """Whether all are. Their sum tells it much faster than a look at each; only where it overflows each is looked at."""
    numbers = tensor.to(torch.float32) if tensor.element_size() == 1 else tensor  # torch does not add float8
    return math.isfinite(float(numbers.sum())) or bool(numbers.isfinite().all())
