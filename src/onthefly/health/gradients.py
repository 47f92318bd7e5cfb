"""Gradients: norms by layer, vanishing and exploding, how often they are clipped, and how noisy they are.

The noise scale is `B_simple` of McCandlish et al. 2018 (arXiv:1812.06162): the batch size at which the noise of a gradient is as
large as the gradient. They compare gradients of two batch sizes at one set of weights. The loop that we look at belongs to its
user, so here the small batch is that of one optimizer step, and the large one is all K steps together: unbiased as long
as the weights hardly move in K steps, and too large by what they do move. It is taken on evenly spaced coordinates of each
gradient, which changes both sides of the ratio alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median

from onthefly.health.findings import Cell, Column, Finding, Severity, Table, number

SPIKE = 20.0
"""Of the median norm: batches differ by a factor of a few; an update twenty times the usual undoes many others."""
EXPLODING = 100.0
"""Growth from the first to the last quarter of the steps that were looked at."""
VANISHING = 1e-6
"""RMS of a weight's gradient next to the median weight's: float32 keeps 7 digits, and under one learning rate such a layer stands still."""
CLIPPED_NOTE = 0.9
"""Share of steps: clipping that nearly always acts is a normalisation, and the learning rate means something else."""
SAME_NORM = 1e-4
"""Relative: norms this equal in most steps are not chance; something sets them."""
FEWEST_STEPS = 8
"""For what compares steps with each other."""
NOISE_FACTOR = 10.0
"""Between batch size and noise scale, until it is said: nearer, either choice is sound (the paper's fig. 4 is flat there)."""


@dataclass
class Weight:
    """A parameter's gradient over the optimizer steps that were looked at."""

    name: str
    size: int
    dimensions: int
    norms: list[float] = field(default_factory=list)
    """Of each step; empty: it never had a gradient."""


@dataclass
class Noise:
    """The sums behind the noise scale, on sampled coordinates: K gradients of `batch` samples each."""

    steps: int
    batch: float
    mean_square: float
    """The mean of |g|^2 over the steps."""
    square_of_mean: float
    """|mean of g|^2."""

    @property
    def scale(self) -> float | None:
        """tr(covariance of one sample's gradient) / |true gradient|^2, in samples; inf when the mean is all noise; None for one step."""
        if self.steps < 2:
            return None
        signal = (self.steps * self.square_of_mean - self.mean_square) / (self.steps - 1)
        trace = self.batch * (self.mean_square - self.square_of_mean) * self.steps / (self.steps - 1)
        return trace / signal if signal > 0 else math.inf


@dataclass
class Numbers:
    first_step: int
    last_step: int
    steps: list[int] = field(default_factory=list)
    """Those in which an optimizer stepped."""
    totals: list[float] = field(default_factory=list)
    """The norm of all gradients together, in each of them, as the optimizer saw it: after clipping."""
    weights: list[Weight] = field(default_factory=list)
    clip: float | None = None
    """`grad_clip` of the session."""
    noise: Noise | None = None


def judge(numbers: Numbers) -> list[Finding]:
    return [*_exploding(numbers), *_vanishing(numbers), *_clipping(numbers), *_noise(numbers)]


def facts(numbers: Numbers) -> list[str]:
    found = []
    finite = [norm for norm in numbers.totals if math.isfinite(norm)]
    if finite:
        found.append(
            f"norm of all gradients: {number(min(finite))} to {number(max(finite))}, median {number(median(finite))}, "
            f"in {len(numbers.steps)} optimizer steps"
        )
    if (share := clipped(numbers)) is not None:
        found.append(f"clipped in {share:.0%} of the steps")
    noise = numbers.noise
    if noise is None or noise.scale is None:
        found.append("noise scale: needs two optimizer steps, and a batch whose size can be seen")
    elif math.isfinite(noise.scale):
        found.append(
            f"noise scale: about {noise.scale:,.0f} samples, with {noise.batch:,.0f} in an optimizer step (over {noise.steps} steps)"
        )
    else:
        found.append(
            f"noise scale: more than {noise.batch * noise.steps:,.0f} samples; {noise.steps} steps are too few to see the gradient in its noise"
        )
    by_norm = sorted(
        ((median(w.norms), w.name) for w in numbers.weights if w.norms and math.isfinite(median(w.norms))), reverse=True
    )
    found += [f"{name}: {number(norm)}" for norm, name in by_norm[:20]]
    if len(by_norm) > 20:
        found.append(f"and {len(by_norm) - 20} smaller ones")
    return found


def tables(numbers: Numbers) -> list[Table]:
    rows: list[tuple[Cell, ...]] = []
    for w in numbers.weights:
        if w.norms:
            usual = median(w.norms)
            rows.append((w.name, usual, min(w.norms), max(w.norms), usual / math.sqrt(max(w.size, 1))))
    names = ("parameter", "median norm", "smallest", "largest", "RMS of a value")
    return [Table("Gradient norms", tuple(map(Column, names)), tuple(rows), "log")] if rows else []


def clipped(numbers: Numbers) -> float | None:
    """The share of steps in which gradients were clipped, by the session or the script; None where nothing tells of it."""
    if not numbers.totals:
        return None
    if numbers.clip is not None:
        return sum(norm >= numbers.clip * (1 - 1e-3) for norm in numbers.totals) / len(numbers.totals)
    top = max(numbers.totals)
    same = sum(math.isfinite(top) and norm >= top * (1 - SAME_NORM) for norm in numbers.totals)
    return same / len(numbers.totals) if same > len(numbers.totals) / 2 and same >= FEWEST_STEPS // 2 else None


def _exploding(numbers: Numbers) -> Iterator[Finding]:
    finite = [(s, n) for s, n in zip(numbers.steps, numbers.totals, strict=True) if math.isfinite(n)]
    bad = next((s for s, n in zip(numbers.steps, numbers.totals, strict=True) if not math.isfinite(n)), None)
    if bad is not None:
        yield Finding(
            "gradients",
            Severity.ERROR,
            "gradients are not finite",
            since=bad,
            before=bad == numbers.first_step,
            evidence={"steps": f"{len(numbers.totals) - len(finite)} of {len(numbers.totals)}"},
            advice="`onthefly report numerics` says where it begins",
        )
    if len(finite) < FEWEST_STEPS:
        return
    quarter = len(finite) // 4
    early, late = median(n for _, n in finite[:quarter]), median(n for _, n in finite[-quarter:])
    usual = median(n for _, n in finite)
    if early > 0 and late >= EXPLODING * early:
        yield Finding(
            "gradients",
            Severity.ERROR,
            "gradients explode",
            _largest(numbers),
            next(s for s, n in finite if n >= 10 * early),
            evidence={"from": early, "to": late},
            advice="lower the learning rate; clip (`onthefly set grad_clip=1`); look at `onthefly report numerics`",
        )
    elif usual > 0 and (spikes := [(s, n) for s, n in finite if n >= SPIKE * usual]):
        yield Finding(
            "gradients",
            Severity.WARNING,
            "a gradient far larger than the others",
            since=spikes[0][0],
            evidence={"norm": spikes[0][1], "median": usual, "steps": len(spikes)},
            advice="clip at a few times the median norm, or look at that batch: `onthefly samples --dynamics --by max_loss`",
        )


def _largest(numbers: Numbers) -> str:
    return max((w for w in numbers.weights if w.norms), key=lambda w: w.norms[-1], default=Weight("", 0, 0)).name


def _vanishing(numbers: Numbers) -> Iterator[Finding]:
    # A bias before a batch norm, or of attention's keys, changes nothing, and has no gradient but rounding.
    matrices = [w for w in numbers.weights if w.dimensions > 1]
    rms = {
        w.name: median(w.norms) / math.sqrt(w.size) for w in matrices if w.norms and all(map(math.isfinite, w.norms))
    }
    silent = [w for w in matrices if w.norms and not any(w.norms)]
    alive = [value for value in rms.values() if value > 0]
    if silent:
        yield Finding(
            "gradients",
            Severity.WARNING,
            "no gradient reaches it: exactly 0 in every step",
            silent[-1].name,
            numbers.first_step,
            before=True,
            evidence={"parameters": len(silent), "of": len(matrices), "first": silent[0].name},
            advice="something behind it is dead or detached: `onthefly report activations`",
        )
    if alive:
        usual = median(alive)
        faint = [name for name, value in rms.items() if 0 < value < VANISHING * usual]
        if faint:
            yield Finding(
                "gradients",
                Severity.WARNING,
                "its gradient vanishes next to the others'",
                faint[0],
                numbers.first_step,
                before=True,
                evidence={"rms": rms[faint[0]], "median": usual, "parameters": len(faint)},
                advice="residual connections, normalisation, or another activation carry gradients further back",
            )
    unused = [w.name for w in numbers.weights if not w.norms]
    if unused and numbers.steps:
        yield Finding(
            "gradients",
            Severity.NOTE,
            "parameters that had no gradient: unused in these steps",
            unused[0],
            evidence={"parameters": len(unused)},
        )


def _clipping(numbers: Numbers) -> Iterator[Finding]:
    share = clipped(numbers)
    if share is not None and share >= CLIPPED_NOTE and len(numbers.totals) >= FEWEST_STEPS:
        yield Finding(
            "gradients",
            Severity.NOTE,
            "nearly every step is clipped",
            evidence={"share": share, "norm": numbers.clip if numbers.clip is not None else max(numbers.totals)},
            advice="the norm carries no news then: raise the clip, or count it as part of the learning rate",
        )


def _noise(numbers: Numbers) -> Iterator[Finding]:
    noise = numbers.noise
    if noise is None or noise.scale is None or noise.steps < FEWEST_STEPS or not math.isfinite(noise.scale):
        return
    if noise.scale > NOISE_FACTOR * noise.batch:
        what, advice = (
            "the batch is small next to the noise",
            "a larger batch, or accumulation, would take fewer steps and hardly more samples",
        )
    elif noise.scale < noise.batch / NOISE_FACTOR:
        what, advice = (
            "the batch is large next to the noise",
            "a smaller batch would take hardly more steps, and fewer samples",
        )
    else:
        return
    yield Finding(
        "gradients",
        Severity.NOTE,
        what,
        evidence={"noise scale": noise.scale, "batch": noise.batch, "steps": noise.steps},
        advice=advice,
    )
