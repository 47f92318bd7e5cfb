"""Numerics: NaN, inf, overflow and underflow, by layer and dtype; the scaler of fp16; how far each step moves the weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

from onthefly.health.findings import Cell, Column, Finding, Severity, Table, number

NEAR_LIMIT = 0.25
"""Of the largest number of a half-precision type: one batch's largest output is easily four times another's."""
TINY_SHARE = 0.5
"""Of outputs or gradients that are subnormal in their type: they have lost digits, and half as large ones are zero."""
RATIO_NOTE, RATIO_WARNING, RATIO_ERROR = 0.1, 0.3, 1.0
"""Median |update| / |weight| of a step. About 1e-3 is common; at 1 every step replaces the weights by others."""
OTHER_RATES = 100.0
"""How much larger than the median of its optimizer's a learning rate must be to be named as the reason."""
UNCHANGED_SHARE = 0.5
"""Of weights with a gradient that an optimizer step leaves as they are: the update is below the rounding of their type."""
DRIFT_NOTE, DRIFT_WARNING = 2.0, 10.0
"""Growth of a weight's norm within the steps that were looked at. What begins small may double; tenfold in some tens of steps does not settle."""
SKIPPED_SHARE = 0.25
"""Of steps passed over by the scaler. One now and then is how it finds its scale: by default once in 2,000 steps."""


@dataclass
class BadInput:
    """A batch with something that is not finite."""

    step: int
    where: str
    count: int
    samples: Sequence[int] = ()
    """Indices into the data set, where they are known, else places in the batch."""
    known: bool = False
    position: Sequence[int] = ()
    """Of the first bad value, within its sample."""


@dataclass
class Layer:
    """A layer's outputs over the steps that were looked at."""

    name: str
    dtype: str
    order: int
    """Its place in the forward pass."""
    limit: float
    """The largest number of its dtype."""
    peak: float = 0.0
    """The largest finite |output|."""
    tiny: float = 0.0
    """Share of outputs other than 0 that are subnormal in their dtype; half precision only."""
    bad_step: int | None = None
    bad: str = ""
    """`NaN` or `inf`."""


@dataclass
class Parameter:
    """A parameter over the optimizer steps that were looked at."""

    name: str
    dtype: str
    dimensions: int
    steps: list[int] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    """|update| / |weight| of each optimizer step."""
    norms: list[float] = field(default_factory=list)
    unchanged: float = 0.0
    """Share of sampled weights with a gradient that the last step left as they were."""
    rates: list[float] = field(default_factory=list)
    """Its learning rate in each step."""
    bad_step: int | None = None
    """The first step after which it was not finite; one before the first: it was so when looking began."""
    bad_gradient_step: int | None = None
    tiny_gradients: float = 0.0


@dataclass
class Numbers:
    """What is judged here."""

    first_step: int
    last_step: int
    layers: list[Layer] = field(default_factory=list)
    parameters: list[Parameter] = field(default_factory=list)
    inputs: list[BadInput] = field(default_factory=list)
    scales: list[tuple[int, float]] = field(default_factory=list)
    """(step, scale of the loss after it), of a gradient scaler; the first one is of before the first step."""

    @property
    def skipped(self) -> list[int]:
        """Steps after which the scaler had lowered its scale: it had met a gradient that overflowed, and passed the step over."""
        return [step for (_, before), (step, after) in itertools.pairwise(self.scales) if after < before]


def judge(numbers: Numbers) -> list[Finding]:
    """Everything that is wrong with the numbers. What only follows from an earlier finding is its evidence."""
    return [*_broken(numbers), *_scaler(numbers), *_ranges(numbers), *_updates(numbers)]


def facts(numbers: Numbers) -> list[str]:
    found = []
    ratios = sorted((median(p.ratios), p.name) for p in numbers.parameters if p.ratios and p.dimensions > 1)
    if ratios:
        low, high = ratios[0], ratios[-1]
        found.append(
            f"update to weight, median by parameter: {number(low[0])} ({low[1]}) to {number(high[0])} ({high[1]})"
        )
    if numbers.layers:
        top = max(numbers.layers, key=lambda layer: layer.peak / layer.limit)
        found.append(
            f"largest output, next to its type: {number(top.peak)} of {number(top.limit)} ({top.dtype}, {top.name})"
        )
    if numbers.scales:
        found.append(f"scale of the loss: {number(numbers.scales[0][1])} to {number(numbers.scales[-1][1])}")
    return found


def tables(numbers: Numbers) -> list[Table]:
    updates: list[tuple[Cell, ...]] = [
        (p.name, median(p.ratios), max(p.ratios), p.norms[-1], p.rates[-1] if p.rates else None, p.dtype)
        for p in numbers.parameters
        if p.ratios
    ]
    outputs: list[tuple[Cell, ...]] = [
        (layer.name, layer.peak, layer.peak / layer.limit, layer.tiny, layer.dtype)
        for layer in sorted(numbers.layers, key=lambda layer: layer.order)
    ]
    names = ("parameter", "update / weight", "largest", "norm", "lr", "type")
    limit = (Column("of the largest of its type", "share"), Column("subnormal", "share"), Column("type"))
    found = [
        Table("Update to weight, in the median step", tuple(map(Column, names)), (*updates,), "log"),
        Table("Largest output", (Column("layer"), Column("largest"), *limit), (*outputs,), "log"),
    ]
    return [table for table in found if table.rows]


def _broken(numbers: Numbers) -> Iterator[Finding]:
    """NaN and inf, each traced back to where it was first seen: data, then a layer, then parameters, then gradients."""
    for where in dict.fromkeys(one.where for one in numbers.inputs):
        of_it = [one for one in numbers.inputs if one.where == where]
        first = of_it[0]
        samples = list(dict.fromkeys(sample for one in of_it for sample in one.samples))
        label = "sample" if first.known else "place in the batch"
        evidence: dict[str, float | int | str] = {
            "values": sum(one.count for one in of_it),
            label: ", ".join(map(str, samples[:5])),
        }
        if first.position:
            evidence["at"] = str(list(first.position))
        yield Finding(
            "numerics",
            Severity.ERROR,
            "the data is not finite: a batch holds NaN or inf",
            where,
            first.step,
            evidence=evidence,
            advice="mend or leave out these samples; one is enough to make every weight NaN",
        )
    start = next((p for p in numbers.parameters if p.bad_step is not None and p.bad_step < numbers.first_step), None)
    if start is not None:
        yield Finding(
            "numerics",
            Severity.ERROR,
            "the weights are not finite",
            start.name,
            numbers.first_step,
            before=True,
            evidence={"parameters": sum(p.bad_step is not None for p in numbers.parameters)},
            advice="nothing trains from here: `onthefly load RUN@STEP` of before the first bad loss, with a lower learning rate",
        )
        return
    first_data = min((one.step for one in numbers.inputs), default=math.inf)
    bad = sorted(
        (layer for layer in numbers.layers if layer.bad_step is not None),
        key=lambda layer: (layer.bad_step, layer.order),
    )
    if bad and (bad[0].bad_step or 0) < first_data:
        layer = bad[0]
        half = layer.dtype == "float16"
        what = (
            f"float16 overflow: outputs beyond {layer.limit:.0f} are inf"
            if half and layer.bad == "inf"
            else f"outputs are {layer.bad} in {layer.dtype}"
        )
        yield Finding(
            "numerics",
            Severity.ERROR,
            what,
            layer.name,
            layer.bad_step,
            before=layer.bad_step == numbers.first_step,
            evidence={"layers": len(bad), "largest before": layer.peak},
            advice="use bfloat16, or keep this layer in float32: an overflow is the usual reason"
            if half
            else "first in forward order; its inputs were finite: look at its weights, a division, a log or an exp there",
        )
    gradients = [p for p in numbers.parameters if p.bad_gradient_step is not None]
    if gradients and not numbers.scales:
        began = min(p.bad_gradient_step or 0 for p in gradients)
        if not numbers.inputs and (not bad or (bad[0].bad_step or 0) > began):
            # Backward goes from the outputs to the inputs: the last one in the model's order was the first to break.
            of_first = [p for p in gradients if p.bad_gradient_step == began]
            yield Finding(
                "numerics",
                Severity.ERROR,
                "its gradient is not finite, though every output was",
                of_first[-1].name,
                began,
                before=began == numbers.first_step,
                evidence={"parameters": len(of_first)},
                advice="look at the loss, and at the derivative of sqrt, log, norm or division at 0",
            )


def _scaler(numbers: Numbers) -> Iterator[Finding]:
    skipped, steps = numbers.skipped, len(numbers.scales) - 1
    if not skipped:
        return
    overflowed = [p.name for p in numbers.parameters if p.bad_gradient_step is not None]
    share = len(skipped) / max(steps, 1)
    evidence: dict[str, float | int | str] = {
        "passed over": f"{len(skipped)} of {steps}",
        "scale": f"{number(numbers.scales[0][1])} to {number(numbers.scales[-1][1])}",
    }
    if overflowed:
        evidence["overflowed"] = ", ".join(overflowed[-3:])
    severity = Severity.NOTE
    if len(skipped) > 1 and share >= SKIPPED_SHARE:
        severity = Severity.ERROR if len(skipped) == steps else Severity.WARNING
    yield Finding(
        "numerics",
        severity,
        "fp16 overflow in gradients: the scaler passes steps over",
        overflowed[-1] if overflowed else "",
        skipped[0],
        before=skipped[0] == numbers.first_step,
        evidence=evidence,
        advice=""
        if severity == Severity.NOTE
        else "the scale halves until it fits; if it goes on, use bfloat16, or a smaller init_scale and loss",
    )


def _ranges(numbers: Numbers) -> Iterator[Finding]:
    for layer in numbers.layers:
        half = layer.dtype in ("float16", "bfloat16")
        if half and layer.bad_step is None and layer.peak >= NEAR_LIMIT * layer.limit:
            yield Finding(
                "numerics",
                Severity.WARNING,
                f"outputs come near the largest {layer.dtype}",
                layer.name,
                evidence={"largest": layer.peak, "limit": layer.limit},
                advice="keep this layer in float32, or normalise before it",
            )
        if half and layer.tiny >= TINY_SHARE:
            yield Finding(
                "numerics",
                Severity.WARNING,
                f"underflow: most outputs are subnormal in {layer.dtype}",
                layer.name,
                evidence={"share": layer.tiny},
                advice="keep this layer in float32",
            )
    for p in numbers.parameters:
        if p.tiny_gradients >= TINY_SHARE:
            yield Finding(
                "numerics",
                Severity.WARNING,
                f"underflow: most of its gradient is subnormal in {p.dtype}",
                p.name,
                evidence={"share": p.tiny_gradients},
                advice="use torch.amp.GradScaler, or bfloat16",
            )


def _updates(numbers: Numbers) -> Iterator[Finding]:
    rates = [p.rates[-1] for p in numbers.parameters if p.rates]
    usual = median(rates) if rates else 0.0
    weights = [p for p in numbers.parameters if p.ratios and p.dimensions > 1 and p.bad_step is None]
    broken = [p for p in numbers.parameters if p.ratios and p.dimensions > 1 and p.bad_step is not None]
    for p in [*weights, *(p for p in broken if p.ratios[0] >= RATIO_ERROR)]:
        finite = [ratio for ratio in p.ratios if math.isfinite(ratio)]
        # Once the weights are enormous, a step is small next to them: what the first steps did counts as well.
        ratio = max(median(finite), finite[0] if finite[0] >= RATIO_ERROR else 0.0) if finite else math.inf
        if not p.norms[0]:  # it begins at 0, as a LoRA's does: its first steps are large next to it, and rightly so
            continue
        if ratio >= RATIO_NOTE:
            severity = (
                Severity.ERROR
                if ratio >= RATIO_ERROR
                else Severity.WARNING
                if ratio >= RATIO_WARNING
                else Severity.NOTE
            )
            limit = {Severity.ERROR: RATIO_ERROR, Severity.WARNING: RATIO_WARNING}.get(severity, RATIO_NOTE)
            first = next((s for s, r in zip(p.steps, p.ratios, strict=True) if not r < limit), p.steps[0])
            evidence: dict[str, float | int | str] = {
                "update / weight": ratio,
                "norm": f"{number(p.norms[0])} to {number(p.norms[-1])}",
            }
            advice = "lower its learning rate; about 0.001 is common"
            if p.rates and usual and p.rates[-1] >= OTHER_RATES * usual:
                evidence["lr"] = f"{number(p.rates[-1])}, {number(p.rates[-1] / usual)} times the others'"
                advice = "its learning rate is far from the others': look at the parameter groups"
            elif p.rates:
                evidence["lr"] = p.rates[-1]
            yield Finding(
                "numerics",
                severity,
                "a step changes it by a large part of itself",
                p.name,
                first,
                before=first == p.steps[0],
                evidence=evidence,
                advice=advice,
            )
        elif not 1 / DRIFT_NOTE < (drift := p.norms[-1] / p.norms[0]) < DRIFT_NOTE:
            yield Finding(
                "numerics",
                Severity.NOTE if 1 / DRIFT_WARNING < drift < DRIFT_WARNING else Severity.WARNING,
                "its norm drifts",
                p.name,
                p.steps[0],
                before=True,
                evidence={"from": p.norms[0], "to": p.norms[-1], "steps": len(p.norms)},
                advice="weight decay, normalisation or a lower learning rate hold it",
            )
        if p.unchanged >= UNCHANGED_SHARE and p.rates and p.rates[-1] > 0:
            yield Finding(
                "numerics",
                Severity.WARNING,
                f"most updates are lost to the rounding of {p.dtype}",
                p.name,
                evidence={"unchanged": p.unchanged, "lr": p.rates[-1]},
                advice="keep master weights in float32 (autocast), or use stochastic rounding",
            )
