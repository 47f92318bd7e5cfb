"""Microseconds a step that a training thread spends inside OnTheFly, one scalar logged, with and without a watcher.

The time is taken around our own calls (`next` of the session's iterator, `session.log`), with a loader that costs nothing.
The wall ratio to the plain loop is printed beside it, and not judged: identical loops differ by more on a busy machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from harness import Report, percentile, ratio
from torch import nn

import onthefly

WATCHER = (
    "import sys, time, onthefly\nwith onthefly.connect(sys.argv[1]) as c:\n  while True: c.sessions(); time.sleep(0.1)"
)


class Training:
    """A model, an optimizer and one batch, to be used again and again."""

    def __init__(self, width: int, depth: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        self.batch = torch.randn(8, width)
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def step(self, batch: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.model(batch).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss

    def plain(self, steps: int) -> float:
        began = time.perf_counter()
        for batch in [self.batch] * steps:
            self.step(batch)
        return time.perf_counter() - began


def inside(training: Training, steps: int, store: Path) -> tuple[list[float], float]:
    """Microseconds inside our calls for each step, and the seconds of the whole loop."""
    config = onthefly.SessionConfig(
        store=store, ckpt_every_minutes=None, ckpt_every_epoch=False, max_epochs=1, handle_signals=False
    )
    clock, times = time.perf_counter_ns, []
    with onthefly.attach(training.model, training.optimizer, train_loader=[training.batch] * steps, config=config) as s:
        batches = iter(s)
        next(batches)  # the origin checkpoint is not a step's cost
        began = time.perf_counter()
        while True:
            a = clock()
            batch = next(batches, None)
            b = clock()
            if batch is None:
                break
            loss = training.step(batch)
            c = clock()
            s.log(loss=loss)
            times.append((clock() - c + b - a) / 1000)
        return times, time.perf_counter() - began


def floor(training: Training, steps: int, file: Path) -> list[float]:
    """Microseconds for the two things that no recorder can do without: reading the loss, and one write of 60 bytes."""
    clock, times, line = time.perf_counter_ns, [], b"x" * 60
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for _ in range(steps):
        loss = training.step(training.batch)
        began = clock()
        loss.item()
        os.write(handle, line)
        times.append((clock() - began) / 1000)
    os.close(handle)
    return times


@contextmanager
def watcher(store: Path, on: bool) -> Iterator[None]:
    if not on:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", WATCHER, str(store)])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = Report("step_overhead")
    for name, training, steps in (("tiny MLP", Training(16, 2), 3000), ("5M parameters", Training(1120, 4), 150)):
        report.note(f"{name}: parameters", training.parameters)
        training.plain(steps)
        with tempfile.TemporaryDirectory() as folder:
            bare = floor(training, steps, Path(folder) / "floor")
        report.note(f"{name}: floor, a bare loss.item() and os.write", percentile(bare, 0.5), "us")
        for watched in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                store = Path(folder)
                inside(training, 10, store)  # makes the store
                means, medians, walls, plain, again = [], [], [], [], []
                with watcher(store, watched):
                    for _ in range(options.rounds):
                        plain.append(training.plain(steps))
                        times, wall = inside(training, steps, store)
                        again.append(training.plain(steps))
                        means.append(statistics.fmean(times))
                        medians.append(percentile(times, 0.5))
                        walls.append(wall)
            label = f"{name}, {'watched' if watched else 'alone'}"
            report.judge(f"{label}: median of a step, inside our calls", statistics.median(medians), 15, "us")
            report.judge(f"{label}: mean of a step, inside our calls", statistics.median(means), 15, "us")
            report.note(f"{label}: wall ratio to the plain loop", ratio(walls, plain))
            report.note(f"{label}: A/A ratio of the plain loop", ratio(again, plain))
    report.end()


if __name__ == "__main__":
    main()
