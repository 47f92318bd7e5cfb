"""Health: the course of the run as a whole, from what is recorded of it: losses, checkpoints, schedulers, lost records."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from onthefly.health.findings import Finding, Severity, number

WINDOW = 32
"""Points of a loss that are taken together: single batches differ too much to compare."""
SPIKE = 10.0
"""Median absolute deviations of the points before, above their median: beyond what batches differ by."""
SPIKE_FACTOR = 2.0
"""And that many times the median: where a loss hardly varies, a deviation is nothing."""
DIVERGED = 2.0
"""The last window next to the best one: twice the loss that was reached already."""
FLAT = 0.005
"""Relative: a loss that fell by less than this in the last half of its points has stopped falling."""
OVERFIT = 1.1
"""The last validation loss next to the lowest."""
SLOWER = 1.5
"""Seconds a step, the last quarter next to the first."""
FEWEST_TIMES = 400
"""Points before a change of pace means anything."""


@dataclass
class Scheduler:
    """How often a scheduler has stepped; `rate` is the learning rate that it stands at."""

    name: str
    stepped: int
    rate: float


@dataclass
class Numbers:
    """Losses by name as (step, value), in order; times of the points of `loss`; facts from the events."""

    losses: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    times: Sequence[float] = ()
    step: int = 0
    epoch: int = 0
    schedulers: Sequence[Scheduler] = ()
    first_epoch_ended: int | None = None
    """The step that ended the first epoch, where it is known."""
    failed_saves: Sequence[tuple[int, str]] = ()
    """(step, message)."""
    saved_since: bool = True
    """Whether a save has succeeded after the last failure."""
    waited: Sequence[float] = ()
    """Seconds that saves waited for the one before."""
    lost: int = 0
    """Records that could not be written down."""
    outages: int = 0


def judge(numbers: Numbers) -> list[Finding]:
    return [
        *(f for name, points in numbers.losses.items() for f in _loss(name, points)),
        *_overfit(numbers),
        *_schedulers(numbers),
        *_saves(numbers),
        *_records(numbers),
        *_pace(numbers),
    ]


def _loss(name: str, points: Sequence[tuple[int, float]]) -> Iterator[Finding]:
    bad = next((step for step, value in points if not math.isfinite(value)), None)
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    if bad is not None:
        before = [value for step, value in finite if step < bad]
        evidence: dict[str, float | int | str] = {"bad": f"{len(points) - len(finite)} of {len(points)}"}
        if before:
            evidence["last good"] = before[-1]
        yield Finding(
            "health",
            Severity.ERROR,
            f"{name} is NaN or inf",
            name,
            bad,
            evidence=evidence,
            advice="`onthefly report numerics` says where it comes from; `onthefly load RUN@STEP` goes back before it",
        )
        return
    if len(finite) >= 2 * WINDOW:
        yield from _trend(name, finite)


def _trend(name: str, points: Sequence[tuple[int, float]]) -> Iterator[Finding]:
    windows = [
        (points[i][0], median(value for _, value in points[i : i + WINDOW]))
        for i in range(0, len(points) - WINDOW + 1, WINDOW)
    ]
    best_step, best = min(windows, key=lambda w: w[1])
    last = median(value for _, value in points[-WINDOW:])
    if best > 0 and last >= DIVERGED * best and last - best >= 0.1 * abs(windows[0][1]):
        since = next(step for step, value in windows if step > best_step and value >= DIVERGED * best)
        yield Finding(
            "health",
            Severity.ERROR if last > windows[0][1] else Severity.WARNING,
            f"{name} diverges",
            name,
            since,
            evidence={"lowest": best, "at step": best_step, "now": last},
            advice="`onthefly load RUN@STEP` of then, and a lower learning rate: `onthefly set 'lr*=0.1'`",
        )
        return
    half = len(windows) // 2
    before = min(value for _, value in windows[: max(half, 1)])
    after = min(value for _, value in windows[half:])
    if len(windows) >= 8 and before > 0 and (before - after) / before < FLAT:
        yield Finding(
            "health",
            Severity.NOTE,
            f"{name} has stopped falling",
            name,
            windows[half][0],
            evidence={"before": before, "since": after},
            advice="lower the learning rate, or stop: `onthefly set 'lr*=0.1'`",
        )
    spikes = []
    values = [value for _, value in points]
    for i in range(WINDOW, len(points)):
        window = values[i - WINDOW : i]
        if values[i] <= SPIKE_FACTOR * min(window):
            continue  # nor is it more than twice their median, which takes far longer to find
        middle = median(window)
        spread = median(abs(value - middle) for value in window)
        if points[i][1] > middle + SPIKE * spread and points[i][1] > SPIKE_FACTOR * middle > 0:
            spikes.append(points[i])
    if spikes:
        yield Finding(
            "health",
            Severity.NOTE,
            f"{name} has spikes",
            name,
            spikes[0][0],
            evidence={"spikes": len(spikes), "highest": max(value for _, value in spikes)},
            advice="`onthefly samples --dynamics --by max_loss` shows the samples behind them",
        )


def _overfit(numbers: Numbers) -> Iterator[Finding]:
    points = [(s, v) for s, v in numbers.losses.get("val_loss", ()) if math.isfinite(v)]
    training = [v for _, v in numbers.losses.get("loss", ()) if math.isfinite(v)]
    if len(points) < 4 or len(training) < 2 * WINDOW:
        return
    best_step, best = min(points, key=lambda p: p[1])
    falling = median(training[-WINDOW:]) < median(training[-2 * WINDOW : -WINDOW])
    if best > 0 and points[-1][1] >= OVERFIT * best and falling and best_step < points[-2][0]:
        yield Finding(
            "health",
            Severity.NOTE,
            "the validation loss rises while the training loss falls",
            "val_loss",
            best_step,
            evidence={"lowest": best, "now": points[-1][1]},
            advice="the best checkpoint is kept: RUN@best",
        )


def _schedulers(numbers: Numbers) -> Iterator[Finding]:
    if numbers.epoch < 1:
        return  # one that steps after every epoch could not have, yet
    for scheduler in numbers.schedulers:
        if scheduler.stepped == 0:
            yield Finding(
                "health",
                Severity.WARNING,
                "the scheduler was never stepped: the learning rate stands where it began",
                scheduler.name,
                numbers.first_epoch_ended,
                evidence={"epochs": numbers.epoch, "lr": scheduler.rate},
                advice="call scheduler.step() after every epoch, or every optimizer step; if it is meant to begin later, all is well",
            )


def _saves(numbers: Numbers) -> Iterator[Finding]:
    if numbers.failed_saves:
        step, message = numbers.failed_saves[0]
        yield Finding(
            "health",
            Severity.WARNING if numbers.saved_since else Severity.ERROR,
            "checkpoints could not be saved" + ("" if numbers.saved_since else ", and none has been since"),
            "checkpoints",
            step,
            evidence={"failures": len(numbers.failed_saves), "the last": numbers.failed_saves[-1][1] or message},
            advice="make room on the disk; `onthefly gc --dry-run` shows what may go",
        )
    if numbers.waited:
        yield Finding(
            "health",
            Severity.NOTE,
            "training has waited for checkpoints that were still being written",
            "checkpoints",
            evidence={"times": len(numbers.waited), "seconds": math.fsum(numbers.waited)},
            advice="save less often, or use ckpt_slots=2",
        )


def _records(numbers: Numbers) -> Iterator[Finding]:
    if numbers.lost:
        yield Finding(
            "health",
            Severity.WARNING,
            "records were lost: the store could not be written",
            evidence={"records": numbers.lost},
        )
    elif numbers.outages:
        yield Finding(
            "health",
            Severity.NOTE,
            "the store could not be used for a while; nothing was lost",
            evidence={"times": numbers.outages},
        )


def _pace(numbers: Numbers) -> Iterator[Finding]:
    times = numbers.times
    if len(times) < FEWEST_TIMES:
        return
    gaps = [after - before for before, after in itertools.pairwise(times) if after > before]
    quarter = len(gaps) // 4
    if not quarter:
        return
    early, late = median(gaps[:quarter]), median(gaps[-quarter:])
    if late >= SLOWER * early:
        yield Finding(
            "throughput",
            Severity.NOTE,
            "steps take longer than they did",
            evidence={"from": f"{number(early)} s", "to": f"{number(late)} s"},
            advice="memory that grows, a hotter machine, or other work on it",
        )
