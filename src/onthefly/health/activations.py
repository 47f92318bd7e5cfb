"""Activations: dead and saturated units, and the range of every layer's outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from onthefly.health.findings import Cell, Column, Finding, Severity, Table, number

DEAD_NOTE, DEAD_WARNING, DEAD_ERROR = 0.1, 0.5, 0.95
"""Share of a layer's units that were 0 for every sample in the last half of the steps. A few are usual, and sparse features cost nothing but room;
with half of them gone a layer is narrower than it was built, and with all of them nothing passes (Lu et al. 2019)."""
SATURATED_SHARE = 0.5
"""Of outputs of tanh or sigmoid at the flat ends, where the derivative is below a fiftieth of its largest (Glorot & Bengio 2010)."""


@dataclass
class Layer:
    """One layer's outputs over the steps that were looked at."""

    name: str
    kind: str
    """The module's class."""
    low: float
    high: float
    units: int | None = None
    """Of an activation that can be dead: its channels or features."""
    dead: int = 0
    """Units that were 0 for every sample of the last half of the steps."""
    shares: list[tuple[int, float]] = field(default_factory=list)
    """(step, share of units that were 0 for its whole batch)."""
    saturated: float | None = None
    """Share of outputs at the flat ends; only for activations that have such ends."""


@dataclass
class Silent:
    """A weight of which some rows, one for each unit, got a gradient of exactly 0 in every step."""

    name: str
    units: int
    silent: int


@dataclass
class Numbers:
    first_step: int
    last_step: int
    layers: list[Layer] = field(default_factory=list)
    silent: list[Silent] = field(default_factory=list)


def judge(numbers: Numbers) -> list[Finding]:
    return [*_dead(numbers), *_saturated(numbers)]


def facts(numbers: Numbers) -> list[str]:
    rows = []
    for layer in numbers.layers:
        words = [f"{number(layer.low)} to {number(layer.high)}"]
        if layer.units is not None:
            words.append(f"{layer.dead} of {layer.units} units dead")
        if layer.saturated is not None:
            words.append(f"{layer.saturated:.0%} saturated")
        rows.append(f"{layer.name} ({layer.kind}): {', '.join(words)}")
    return rows if len(rows) <= 40 else [*rows[:20], f"... {len(rows) - 40} layers ...", *rows[-20:]]


def tables(numbers: Numbers) -> list[Table]:
    ranges: list[tuple[Cell, ...]] = [
        # without one finite output there is no range
        (layer.name, *((layer.low, layer.high) if layer.low <= layer.high else (None, None)), layer.kind)
        for layer in numbers.layers
    ]
    units: list[tuple[Cell, ...]] = [
        (layer.name, layer.dead / layer.units, layer.dead, layer.units, layer.kind)
        for layer in numbers.layers
        if layer.units
    ]
    flat: list[tuple[Cell, ...]] = [
        (layer.name, layer.saturated, layer.kind) for layer in numbers.layers if layer.saturated is not None
    ]
    share = Column("share", "share")
    found = [
        Table(
            "Range of outputs",
            (Column("layer"), Column("lowest"), Column("highest"), Column("kind")),
            (*ranges,),
            "range",
        ),
        Table("Dead units", (Column("layer"), share, Column("dead"), Column("units"), Column("kind")), (*units,)),
        Table("Outputs at the flat ends", (Column("layer"), share, Column("kind")), (*flat,)),
    ]
    return [table for table in found if table.rows]


def _dead(numbers: Numbers) -> Iterator[Finding]:
    for layer in numbers.layers:
        if not layer.units or layer.dead / layer.units < DEAD_NOTE:
            continue
        share = layer.dead / layer.units
        since = numbers.first_step
        for step, now in reversed(layer.shares):  # as far back as it was no better
            if now < share - 1e-9:
                break
            since = step
        yield Finding(
            "activations",
            _severity(share),
            "dead units: 0 for every sample",
            layer.name,
            since,
            before=since == numbers.first_step,
            evidence={"dead": f"{layer.dead} of {layer.units}", "steps": numbers.last_step - since + 1},
            advice="no gradient reaches what is before a dead unit: look at the bias and learning rate of the layer before; "
            "LeakyReLU or GELU, or a normalisation before it, keep units alive",
        )
    if any(layer.units for layer in numbers.layers):
        return  # the same units, seen from the other side
    for one in numbers.silent:
        share = one.silent / one.units
        if share >= DEAD_NOTE:
            yield Finding(
                "activations",
                _severity(share),
                "units that get no gradient at all: what follows them is dead, or unused",
                one.name,
                numbers.first_step,
                before=True,
                evidence={"units": f"{one.silent} of {one.units}", "steps": numbers.last_step - numbers.first_step + 1},
                advice="if a ReLU follows, look at the bias and learning rate of this layer",
            )


def _severity(share: float) -> Severity:
    if share >= DEAD_ERROR:
        return Severity.ERROR
    return Severity.WARNING if share >= DEAD_WARNING else Severity.NOTE


def _saturated(numbers: Numbers) -> Iterator[Finding]:
    for layer in numbers.layers:
        if layer.saturated is not None and layer.saturated >= SATURATED_SHARE:
            yield Finding(
                "activations",
                Severity.WARNING,
                "saturated: most outputs are at the flat ends",
                layer.name,
                numbers.first_step,
                before=True,
                evidence={"share": layer.saturated, "low": layer.low, "high": layer.high},
                advice="normalise what comes in, or begin with smaller weights",
            )
