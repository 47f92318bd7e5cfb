"""Throughput: where the time of a step goes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median

from onthefly.health.findings import Cell, Column, Finding, Severity, Table

DATA_SHARE = 0.2
"""Of a step spent waiting for data: what more loader workers could win back at most."""
DATA_SECONDS = 0.004
"""A batch's wait below which workers win little: handing a batch from process to process takes a millisecond or two."""
CHECKPOINT_SHARE = 0.05
OWN_SHARE, OWN_SECONDS = 0.05, 0.001
"""What we cost must not be felt; in steps of microseconds a share says little."""
REST_SHARE, REST_SECONDS = 0.3, 0.005
"""Of a step outside data, model and optimizer: logging, copies, metrics, `.item()`."""
WORKER_START_SHARE = 0.1
"""Of an epoch spent until its first batch."""

PARTS = ("data", "forward", "backward", "optimizer", "checkpoint", "onthefly", "rest")
NAMES: Mapping[str, str] = {
    "data": "waiting for data",
    "forward": "forward",
    "backward": "loss and backward",
    "optimizer": "optimizer",
    "checkpoint": "checkpoints",
    "onthefly": "our own overhead",
    "rest": "the rest of the loop",
}


@dataclass
class Numbers:
    """Seconds of each step by its parts (`PARTS`). Steps in which a command was carried out, and those that end an epoch, are left out."""

    first_step: int
    last_step: int
    steps: list[Mapping[str, float]] = field(default_factory=list)
    first_batches: list[float] = field(default_factory=list)
    """Seconds until an epoch's first batch; not part of `steps`."""
    batches: int | None = None
    """In an epoch."""
    samples: int | None = None
    """In a batch."""
    workers: int | None = None
    """Of the train loader; None where it is not a `DataLoader`."""
    persistent: bool = False
    pinned: bool = False
    cores: int = 1
    device: str = "cpu"


def judge(numbers: Numbers) -> list[Finding]:
    return [*_data(numbers), *_starts(numbers), *_others(numbers)] if numbers.steps else []


def facts(numbers: Numbers) -> list[str]:
    if not numbers.steps:
        return ["no whole step was timed"]
    whole = total(numbers)
    each = whole / len(numbers.steps)
    rate = f", {numbers.samples / each:,.0f} samples a second" if numbers.samples and each else ""
    found = [f"a step takes {_seconds(each)}{rate}; of that"]
    for part in PARTS:
        seconds = sum(step.get(part, 0.0) for step in numbers.steps) / len(numbers.steps)
        found.append(f"  {NAMES[part]:<22}{_seconds(seconds):>9}  {seconds / each if each else 0:>4.0%}")
    if numbers.device != "cpu":
        found.append(
            "the device was waited for at every mark, so that each part has its own time: the sum is an upper bound"
        )
    return found


def tables(numbers: Numbers) -> list[Table]:
    whole = total(numbers)
    if not whole:
        return []
    rows: list[tuple[Cell, ...]] = []
    for part in PARTS:
        seconds = math.fsum(step.get(part, 0.0) for step in numbers.steps)
        rows.append((NAMES[part], seconds / len(numbers.steps), seconds / whole))
    return [
        Table(
            "Where a step's time goes",
            (Column("part"), Column("a step", "s"), Column("share", "share")),
            (*rows,),
            "parts",
        )
    ]


def total(numbers: Numbers) -> float:
    return math.fsum(sum(step.values()) for step in numbers.steps)


def share(numbers: Numbers, part: str) -> float:
    whole = total(numbers)
    return math.fsum(step.get(part, 0.0) for step in numbers.steps) / whole if whole else 0.0


def _data(numbers: Numbers) -> Iterator[Finding]:
    waits = [step.get("data", 0.0) for step in numbers.steps]
    waiting, usual, mean = share(numbers, "data"), median(waits), math.fsum(waits) / len(waits)
    if waiting < DATA_SHARE or mean < DATA_SECONDS or (usual < DATA_SECONDS and numbers.workers == 0):
        return
    computing = total(numbers) / len(numbers.steps) - mean
    if numbers.workers is None:
        advice = "read ahead of training: a torch.utils.data.DataLoader with num_workers does"
    else:
        now = max(numbers.workers, 1)
        # Without workers a batch takes `mean`; with n of them one comes every 1/n of the time that it takes to make.
        made = mean if numbers.workers == 0 else now * (mean + computing)
        wanted = max(math.ceil(made / max(computing, 1e-9)), numbers.workers + 1)
        advice = f"num_workers={min(wanted, numbers.cores)} (now {numbers.workers})"
        if wanted > numbers.cores:
            advice += f"; it would take {wanted if wanted < 1000 else 'far more'}, and this machine has {numbers.cores} cores: make a sample cheaper to load (decode, resize or cache it once)"
    yield Finding(
        "throughput",
        Severity.WARNING,
        "training waits for its data: the loader is too slow",
        "train_loader",
        numbers.first_step,
        before=True,
        evidence={"share of a step": waiting, "wait": _seconds(mean), "step": _seconds(computing + mean)},
        advice=advice,
    )


def _starts(numbers: Numbers) -> Iterator[Finding]:
    if not (numbers.first_batches and numbers.workers and numbers.batches and not numbers.persistent):
        return
    start = median(numbers.first_batches)
    epoch = start + numbers.batches * total(numbers) / len(numbers.steps)
    if start >= WORKER_START_SHARE * epoch:
        yield Finding(
            "throughput",
            Severity.NOTE,
            "starting the loader's workers takes a good part of each epoch",
            "train_loader",
            evidence={"start": _seconds(start), "epoch": _seconds(epoch)},
            advice="persistent_workers=True",
        )


def _others(numbers: Numbers) -> Iterator[Finding]:
    each = total(numbers) / len(numbers.steps)
    if (part := share(numbers, "checkpoint")) >= CHECKPOINT_SHARE:
        yield Finding(
            "throughput",
            Severity.NOTE,
            "saving checkpoints takes a good part of the time",
            evidence={"share": part},
            advice="save less often (ckpt_every_steps, ckpt_every_minutes), or let copies overlap (ckpt_staging)",
        )
    if (part := share(numbers, "onthefly")) >= OWN_SHARE and part * each >= OWN_SECONDS:
        yield Finding(
            "throughput",
            Severity.NOTE,
            "our own overhead is felt",
            evidence={"share": part, "seconds": _seconds(part * each)},
            advice="log fewer numbers a step",
        )
    seen = share(numbers, "forward") > 0  # of a compiled model the forward pass is in the rest
    if seen and (part := share(numbers, "rest")) >= REST_SHARE and part * each >= REST_SECONDS:
        yield Finding(
            "throughput",
            Severity.NOTE,
            "a good part of a step is neither data, model nor optimizer",
            evidence={"share": part, "seconds": _seconds(part * each)},
            advice="look for copies, metrics and `.item()` calls in the loop",
        )
    if numbers.device == "cuda" and numbers.workers and not numbers.pinned:
        yield Finding(
            "throughput",
            Severity.NOTE,
            "batches are not pinned, so that their copies to the device wait",
            "train_loader",
            advice="pin_memory=True, and .to(device, non_blocking=True)",
        )


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} us"
