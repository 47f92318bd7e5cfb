"""Microseconds a step inside `Dynamics.record`: random batches of 256 of a million samples.

Batches are applied 16 at a time. So what is judged is the mean of 16 steps in a row, each share of that work in it, and of
those means the median; single steps, and the processor's time (which other processes disturb less), are printed beside it.
Between the calls something large is written, as a training step would, so that the caches are not ours alone.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from harness import Report, percentile, ratio

from onthefly.samples.dynamics import Dynamics

GROUP = 16  # steps
SAMPLES, BATCH = 1_000_000, 256
CACHE = 1 << 17  # numbers of 8 bytes: the second-level cache of most cores


def microseconds(
    dynamics: Dynamics, steps: int, draw: np.random.Generator, *, whole: bool
) -> tuple[list[float], list[float]]:
    """Of each step, by the clock and of the processor; `whole`: with correctness and margins."""
    times: list[float] = []
    busy: list[float] = []
    other = np.zeros(CACHE)
    batches = draw.integers(0, SAMPLES, (steps, BATCH))
    for batch in batches:
        losses = torch.rand(BATCH, requires_grad=True) * 2
        correct = torch.rand(BATCH) < 0.5 if whole else None
        margins = torch.randn(BATCH) if whole else None
        other += 1
        worked, began = time.thread_time_ns(), time.perf_counter_ns()
        dynamics.record(batch, losses, correct, margins)
        times.append((time.perf_counter_ns() - began) / 1000)
        busy.append((time.thread_time_ns() - worked) / 1000)
    return times, busy


def grouped(times: list[float]) -> list[float]:
    """The mean of every 16 steps in a row."""
    return [statistics.mean(times[start : start + GROUP]) for start in range(0, len(times), GROUP)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=640)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = Report("dynamics")
    draw = np.random.default_rng(0)
    dynamics = Dynamics(SAMPLES)
    began = time.perf_counter()
    dynamics.record(np.arange(BATCH), torch.rand(BATCH))
    dynamics.flush()
    report.note("the first recording, which allocates", (time.perf_counter() - began) * 1e3, "ms")
    every: dict[bool, list[float]] = {False: [], True: []}
    busy: dict[bool, list[float]] = {False: [], True: []}
    medians: dict[bool, list[float]] = {False: [], True: []}
    again: list[float] = []
    for _ in range(options.rounds):
        for whole in (False, True):
            times, processor = microseconds(dynamics, options.steps, draw, whole=whole)
            every[whole] += times
            busy[whole] += processor
            medians[whole].append(statistics.median(grouped(times)))
        again.append(statistics.median(grouped(microseconds(dynamics, options.steps, draw, whole=False)[0])))
    for whole, name in ((False, "record, losses"), (True, "record, losses, correctness, margins")):
        report.judge(f"{name}: a step, mean of 16", percentile(grouped(every[whole]), 0.5), 100, "us")
        report.note(f"{name}: processor's time, the same", percentile(grouped(busy[whole]), 0.5), "us")
        report.note(f"{name}: median step", percentile(every[whole], 0.5), "us")
        report.note(f"{name}: p99", percentile(every[whole], 0.99), "us")
    report.note("A/A ratio", ratio(again, medians[False]))
    state = dynamics.state_dict()["values"]
    report.note("bytes a sample", state.nbytes / SAMPLES)
    began = time.perf_counter()
    dynamics.columns()
    report.note("reading the columns", (time.perf_counter() - began) * 1e3, "ms")
    report.end()


if __name__ == "__main__":
    main()
