"""Registry: what every strategy of the catalogue does. A new strategy is one entry in each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from onthefly.errors import InvalidCommandError
from onthefly.merging import strategies
from onthefly.merging.catalogue import DESCRIPTIONS, Description, nearest
from onthefly.merging.strategies import Part

Reach = Literal["elementwise", "two-pass", "whole"]
"""What a strategy must see at once: a number of each parent; the same after a survey of all; or whole tensors."""


@dataclass(frozen=True, kw_only=True)
class Strategy(Description):
    """How to merge. `merge` is given a `Part` and the options.

    A two-pass strategy has a `survey`, which sees all tensors first and returns what it found for each. What it does not `cover`,
    such as a tensor without statistics, is averaged. `free_axis` is the axis along which parents may differ, to be as
    long as the option `rank` says.
    """

    merge: Callable[..., Tensor]
    reach: Reach
    survey: Callable[..., dict[str, Any]] | None = None
    covers: Callable[[Part], bool] = lambda part: True
    free_axis: Callable[[str], int | None] = lambda name: None


def strategy_named(name: str) -> Strategy:
    """A strategy by its name. Raises `InvalidCommandError` with the nearest ones."""
    for strategy in STRATEGIES:
        if strategy.name == name:
            return strategy
    raise InvalidCommandError(f"there is no strategy {name!r}{nearest(name, [one.name for one in STRATEGIES])}")


def _has_statistics(part: Part) -> bool:
    return part.statistics is not None


_HOW: dict[str, dict[str, Any]] = {
    "swa": {"merge": strategies.mean, "reach": "elementwise"},
    "weighted": {"merge": strategies.mean, "reach": "elementwise"},
    "fisher": {
        "merge": strategies.fisher,
        "reach": "two-pass",
        "survey": strategies.fisher_norms,
        "covers": _has_statistics,
    },
    "adapter": {"merge": strategies.adapter, "reach": "elementwise"},
    "lora": {
        "merge": strategies.lora,
        "reach": "whole",
        "survey": strategies.lora_pairs,
        "covers": lambda part: part.found is not None,
        "free_axis": strategies.rank_axis,
    },
    "task_arithmetic": {"merge": strategies.task_arithmetic, "reach": "elementwise"},
    "ties": {"merge": strategies.ties, "reach": "two-pass", "survey": strategies.ties_thresholds},
    "dare": {"merge": strategies.dare, "reach": "elementwise"},
    "dare_ties": {"merge": strategies.dare_ties, "reach": "elementwise"},
    "slerp": {"merge": strategies.slerp, "reach": "two-pass", "survey": strategies.slerp_factors},
    "regmean": {"merge": strategies.regmean, "reach": "whole", "covers": _has_statistics},
}

STRATEGIES: tuple[Strategy, ...] = tuple(
    Strategy(**vars(description), **_HOW[description.name]) for description in DESCRIPTIONS
)
"""Every strategy. `greedy`, which needs an evaluation, is apart."""
