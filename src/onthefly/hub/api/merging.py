"""Merging, as far as it needs no session: which strategies there are, with their options, and what parents come from."""

from __future__ import annotations

import math
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import Field

from onthefly.hub.api.checkpoints import CheckpointView, checkpoint_row, checkpoint_views
from onthefly.hub.api.common import LARGEST, Here, View
from onthefly.merging.catalogue import DESCRIPTIONS, GREEDY, Option

router = APIRouter(tags=["merging"])


class OptionView(View):
    """A value that a strategy can be given, within `low` and `high` (null: without end), or above `low` with `open_low`."""

    name: str
    kind: str
    default: Any
    help: str
    low: float | None
    high: float | None
    open_low: bool


class StrategyView(View):
    """`needs` are weights, base, fishers or grams; the last two are measured. `parents` is how many it merges; null: two or more."""

    name: str
    summary: str
    needs: list[str]
    options: list[OptionView]
    takes_weights: bool
    parents: int | None


def _option(option: Option) -> OptionView:
    low, high = (bound if math.isfinite(bound) else None for bound in (option.low, option.high))
    return OptionView(
        name=option.name,
        kind=option.kind,
        default=option.default,
        help=option.help,
        low=low,
        high=high,
        open_low=option.open_low,
    )


@router.get("/merging/strategies")
def get_strategies() -> list[StrategyView]:
    """Every strategy that mergeRuns knows. Each is given those of its options that it has."""
    return [
        StrategyView(
            name=one.name,
            summary=one.summary,
            needs=sorted(one.needs),
            options=[_option(option) for option in one.options],
            takes_weights=one.takes_weights,
            parents=one.parents,
        )
        for one in (*DESCRIPTIONS, GREEDY)
    ]


@router.get("/stores/{store}/merging/base")
def get_base(
    store: Here, parent: Annotated[list[Annotated[int, Field(ge=0, le=LARGEST)]], Query(min_length=1, max_length=100)]
) -> CheckpointView | None:
    """The checkpoint from which the differences of these are taken, if they have one in common that is still there."""
    row = store.client.merge_base([checkpoint_row(store, id) for id in parent])
    return None if row is None else checkpoint_views(store, [row])[0]
