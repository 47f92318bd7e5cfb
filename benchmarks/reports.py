"""What a report costs a step, by collector, and what one costs that is not there.

Loops with a report under way and loops without take turns in one process; the A/A ratio is of two loops without. A report is
asked for when a person wants to know, for some tens of steps: its cost is told, and judged only where it is absurd. Without one
there is one attribute to read; what a step costs then is judged by `step_overhead`, and told here of these models.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Report, percentile, ratio
from torch import nn

import onthefly
from onthefly.control.commands import ReportRun
from onthefly.health.findings import KINDS

_ABSURD = 5.0  # times a step


def mlp() -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(256, 256), nn.ReLU()))), (64, 256)


def cnn() -> tuple[nn.Module, tuple[int, ...]]:
    layers = (nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(*layers, nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()), (16, 16, 16, 16)


def transformer() -> tuple[nn.Module, tuple[int, ...]]:
    layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), (16, 32, 128)


class Loop:
    """A session's loop, a stretch of steps at a time, with or without a report over the whole stretch."""

    def __init__(self, make: Callable[[], tuple[nn.Module, tuple[int, ...]]], store: Path) -> None:
        torch.manual_seed(0)
        self.model, shape = make()
        self.batch = torch.randn(shape)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        config = onthefly.SessionConfig(
            store=store, ckpt_every_minutes=None, ckpt_every_epoch=False, max_epochs=1, handle_signals=False
        )
        self.session = onthefly.attach(self.model, self.optimizer, train_loader=[self.batch] * 10**6, config=config)
        self.batches = iter(self.session)
        next(self.batches)

    def stretch(self, steps: int, kind: str | None) -> list[float]:
        """Seconds of each step."""
        if kind is not None:
            self.session.reporting.begin(ReportRun(report=kind, steps=steps))
            self.session._raise_gate()  # it is begun between two boundaries here, and not at one
        self.step(next(self.batches))
        times = []
        for _ in range(steps - 2):
            began = time.perf_counter()
            self.step(next(self.batches))
            times.append(time.perf_counter() - began)
        self.step(next(self.batches))
        self.session.reporting.end("the stretch is over")
        return times

    def alone(self, steps: int) -> list[float]:
        """Seconds in the iterator alone."""
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            batch = next(self.batches)
            times.append(time.perf_counter() - began)
            self.step(batch)
        return times

    def step(self, batch: torch.Tensor) -> None:
        loss = self.model(batch).square().mean()
        self.session.log(loss=loss)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = Report("reports")
    for name, make in (("MLP", mlp), ("CNN", cnn), ("transformer", transformer)):
        with tempfile.TemporaryDirectory() as folder:
            loop = Loop(make, Path(folder))
            loop.stretch(options.steps, None)
            plain = statistics.median(loop.stretch(options.steps, None))
            report.note(f"{name}: a step without a report", plain * 1e3, "ms")
            report.note(f"{name}: inside the iterator, without", percentile(loop.alone(50), 0.5) * 1e6, "us")
            for kind in KINDS:
                if kind == "distribution":
                    continue  # it looks once, at a boundary
                on, off, again = [], [], []
                for _ in range(options.rounds):
                    off.append(statistics.median(loop.stretch(options.steps, None)))
                    on.append(statistics.median(loop.stretch(options.steps, kind)))
                    again.append(statistics.median(loop.stretch(options.steps, None)))
                cost = statistics.median(a - b for a, b in zip(on, off, strict=True))
                report.note(f"{name}: {kind}, a step more", cost * 1e6, "us")
                report.judge(f"{name}: {kind}, a step with it to one without", ratio(on, off).median, _ABSURD)
            report.note(f"{name}: A/A ratio of a step without", ratio(again, off))
            loop.session.close()
    report.end()


if __name__ == "__main__":
    main()
