"""Registry: every strategy by name, with its options and what it needs. A new strategy is one line in `STRATEGIES`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from onthefly.errors import InvalidCommandError
from onthefly.merging import strategies
from onthefly.merging.strategies import Part

Reach = Literal["elementwise", "two-pass", "whole"]
"""What a strategy must see at once: a number of each parent; the same after a survey of all; or whole tensors."""

Need = Literal["weights", "base", "fishers", "grams"]


@dataclass(frozen=True)
class Option:
    """A value that a strategy can be given. Numbers are within [low, high], or above low with `open_low`."""

    name: str
    kind: Literal["number", "whole number", "yes or no", "numbers"]
    default: Any
    help: str
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False

    def read(self, value: Any) -> Any:
        """A value, or what was typed, in its own type. Raises `InvalidCommandError`."""
        try:
            found = _READ[self.kind](value)
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            raise InvalidCommandError(f"{self.name} is a {self.kind}, not {value!r}") from e
        for number in found if isinstance(found, tuple) else (found,):
            if not self.low <= number <= self.high or (self.open_low and number == self.low):
                least = f"{'above' if self.open_low else 'at least'} {self.low:g}"
                raise InvalidCommandError(f"{self.name} is {least} and at most {self.high:g}, not {number:g}")
        return found


@dataclass(frozen=True)
class Strategy:
    """How to merge. `merge` is given a `Part` and the options.

    A two-pass strategy has a `survey`, which sees all tensors first and returns what it found for each. What it does not `cover`,
    such as a tensor without statistics, is averaged. `free_axis` is the axis along which parents may differ, to be as
    long as the option `rank` says.
    """

    name: str
    merge: Callable[..., Tensor]
    reach: Reach
    summary: str
    needs: frozenset[Need] = frozenset()
    options: tuple[Option, ...] = ()
    survey: Callable[..., dict[str, Any]] | None = None
    covers: Callable[[Part], bool] = lambda part: True
    free_axis: Callable[[str], int | None] = lambda name: None
    takes_weights: bool = True
    parents: int | None = None

    def configured(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options, those that were not given by default. Raises `InvalidCommandError`."""
        names = [option.name for option in self.options]
        for name in given:
            if name not in names:
                raise InvalidCommandError(f"{self.name} has no option {name!r}{_nearest(name, names)}")
        return {option.name: option.read(given.get(option.name, option.default)) for option in self.options}


def strategy_named(name: str) -> Strategy:
    """A strategy by its name. Raises `InvalidCommandError` with the nearest ones."""
    for strategy in STRATEGIES:
        if strategy.name == name:
            return strategy
    raise InvalidCommandError(f"there is no strategy {name!r}{_nearest(name, [one.name for one in STRATEGIES])}")


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names)
    return f"; did you mean {' or '.join(near)}?" if near else f"; there are: {', '.join(names) or 'none'}"


def _number(value: Any) -> float:
    found = float(value)
    if not math.isfinite(found):
        raise ValueError(value)
    return found


def _whole_number(value: Any) -> int:
    if isinstance(value, float):
        raise TypeError(value)
    return int(value)


def _truth(value: Any) -> bool:
    return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[str(value).lower()]


def _numbers(value: Any) -> tuple[float, ...]:
    values = value.split(",") if isinstance(value, str) else value if isinstance(value, Iterable) else (value,)
    return tuple(_number(one) for one in values)


_READ: dict[str, Callable[[Any], Any]] = {
    "number": _number,
    "whole number": _whole_number,
    "yes or no": _truth,
    "numbers": _numbers,
}
_DENSITY = Option("density", "number", 0.2, "the share of each difference that stays", 0, 1, open_low=True)
_DROP = Option("drop", "number", 0.5, "the probability of a number to be dropped", 0, 0.999999)
_SEED = Option("seed", "whole number", 0, "of the mask", 0, 2**63)
_SUMMED = Option("scale", "number", 0.3, "what the sum of the differences is multiplied by")
_ELECTED = Option("scale", "number", 1.0, "what the merged difference is multiplied by")


def _has_statistics(part: Part) -> bool:
    return part.statistics is not None


STRATEGIES: tuple[Strategy, ...] = (
    Strategy("swa", strategies.mean, "elementwise", "the average", takes_weights=False),
    Strategy("weighted", strategies.mean, "elementwise", "the average by given weights", frozenset({"weights"})),
    Strategy(
        "fisher",
        strategies.fisher,
        "two-pass",
        "the average by how much each parent's own data care",
        frozenset({"fishers"}),
        (
            Option("floor", "number", 1e-6, "the least Fisher information", 0, open_low=True),
            Option("normalize", "yes or no", False, "divide each parent's by its norm"),
        ),
        survey=strategies.fisher_norms,
        covers=_has_statistics,
    ),
    Strategy("adapter", strategies.adapter, "elementwise", "adapters averaged, all else from the first"),
    Strategy(
        "lora",
        strategies.lora,
        "whole",
        "products of LoRA factors averaged, and factored again",
        options=(
            Option("rank", "whole number", 0, "of the result; 0: that of the first parent", 0, 2**31),
            Option("alpha", "numbers", (), "of each parent, or of all; none: its rank", 0, open_low=True),
        ),
        survey=strategies.lora_pairs,
        covers=lambda part: part.found is not None,
        free_axis=strategies.rank_axis,
    ),
    Strategy(
        "task_arithmetic",
        strategies.task_arithmetic,
        "elementwise",
        "the sum of all differences to a base",
        frozenset({"base"}),
        (_SUMMED,),
    ),
    Strategy(
        "ties",
        strategies.ties,
        "two-pass",
        "the largest differences to a base, where signs agree",
        frozenset({"base"}),
        (_DENSITY, _ELECTED),
        survey=strategies.ties_thresholds,
    ),
    Strategy(
        "dare",
        strategies.dare,
        "elementwise",
        "random differences to a base, rescaled",
        frozenset({"base"}),
        (_DROP, _SUMMED, _SEED),
    ),
    Strategy(
        "dare_ties",
        strategies.dare_ties,
        "elementwise",
        "random differences to a base, where signs agree",
        frozenset({"base"}),
        (_DROP, _ELECTED, _SEED),
    ),
    Strategy(
        "slerp",
        strategies.slerp,
        "two-pass",
        "two parents along an arc",
        options=(Option("t", "number", 0.5, "0 is the first parent, 1 the second", 0, 1),),
        survey=strategies.slerp_factors,
        takes_weights=False,
        parents=2,
    ),
    Strategy(
        "regmean",
        strategies.regmean,
        "whole",
        "linear layers that agree with every parent on its own data",
        frozenset({"grams"}),
        (
            Option("shrink", "number", 0.9, "what is off the diagonal is multiplied by it", 0, 1),
            Option("ridge", "number", 1e-6, "of the mean of the diagonal, added to it", 0),
        ),
        covers=_has_statistics,
    ),
)
"""Every strategy. `greedy`, which needs an evaluation, is apart."""
