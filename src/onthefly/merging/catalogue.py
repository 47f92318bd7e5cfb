"""Catalogue: every strategy by name, with its options and what it needs, in words. Loads no torch; `registry` has what each does."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from onthefly.errors import InvalidCommandError

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
class Description:
    """A strategy in words. `parents` is how many it merges, if not any number from two on."""

    name: str
    summary: str
    needs: frozenset[Need] = frozenset()
    options: tuple[Option, ...] = ()
    takes_weights: bool = True
    parents: int | None = None

    def configured(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options, those that were not given by default. Raises `InvalidCommandError`."""
        names = [option.name for option in self.options]
        for name in given:
            if name not in names:
                raise InvalidCommandError(f"{self.name} has no option {name!r}{nearest(name, names)}")
        return {option.name: option.read(given.get(option.name, option.default)) for option in self.options}


def nearest(name: str, names: Sequence[str]) -> str:
    """The end of a sentence that says what is not there: what was meant, perhaps, or what there is."""
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


DESCRIPTIONS: tuple[Description, ...] = (
    Description("swa", "the average", takes_weights=False),
    Description("weighted", "the average by given weights", frozenset({"weights"})),
    Description(
        "fisher",
        "the average by how much each parent's own data care",
        frozenset({"fishers"}),
        (
            Option("floor", "number", 1e-6, "the least Fisher information", 0, open_low=True),
            Option("normalize", "yes or no", False, "divide each parent's by its norm"),
        ),
    ),
    Description("adapter", "adapters averaged, all else from the first"),
    Description(
        "lora",
        "products of LoRA factors averaged, and factored again",
        options=(
            Option("rank", "whole number", 0, "of the result; 0: that of the first parent", 0, 2**31),
            Option("alpha", "numbers", (), "of each parent, or of all; none: its rank", 0, open_low=True),
        ),
    ),
    Description("task_arithmetic", "the sum of all differences to a base", frozenset({"base"}), (_SUMMED,)),
    Description(
        "ties", "the largest differences to a base, where signs agree", frozenset({"base"}), (_DENSITY, _ELECTED)
    ),
    Description("dare", "random differences to a base, rescaled", frozenset({"base"}), (_DROP, _SUMMED, _SEED)),
    Description(
        "dare_ties", "random differences to a base, where signs agree", frozenset({"base"}), (_DROP, _ELECTED, _SEED)
    ),
    Description(
        "slerp",
        "two parents along an arc",
        options=(Option("t", "number", 0.5, "0 is the first parent, 1 the second", 0, 1),),
        takes_weights=False,
        parents=2,
    ),
    Description(
        "regmean",
        "linear layers that agree with every parent on its own data",
        frozenset({"grams"}),
        (
            Option("shrink", "number", 0.9, "what is off the diagonal is multiplied by it", 0, 1),
            Option("ridge", "number", 1e-6, "of the mean of the diagonal, added to it", 0),
        ),
    ),
)
"""Every strategy. `greedy`, which needs an evaluation, is apart."""

GREEDY = Description("greedy", "the average of those parents that make it better")
"""The greedy soup. Only a session, which can judge, makes it."""
