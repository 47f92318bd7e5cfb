"""Milliseconds from asking for a pause to its acknowledgement, beyond the step that was under way."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness import Report, percentile, ratio
from torch import nn

import onthefly

STEP = 0.02  # seconds


def train(store: Path) -> None:
    """The child: a training whose step takes a known time."""
    model = nn.Linear(8, 8)
    config = onthefly.SessionConfig(store=store, ckpt_every_minutes=None)
    session = onthefly.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), config=config)
    for _ in session.steps(10**9):
        began = time.perf_counter()
        session.log(loss=0.0)
        time.sleep(max(0.0, STEP - (time.perf_counter() - began)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pauses", type=int, default=200)
    parser.add_argument("--train", type=Path)
    options = parser.parse_args()
    if options.train:
        train(options.train)
    report = Report("pause_latency")
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen([sys.executable, __file__, "--train", folder], stderr=subprocess.DEVNULL)
        try:
            waits = measure(Path(folder), options.pauses)
        finally:
            process.terminate()
            process.wait()
    report.note("step", STEP * 1000, "ms")
    report.note("median", statistics.median(waits), "ms")
    report.judge("p99", percentile(waits, 0.99), STEP * 1000 + 50, "ms")
    report.note("A/A ratio, odd to even pauses", ratio(waits[1::2], waits[::2]))
    report.end()


def measure(store: Path, pauses: int) -> list[float]:
    while not (store / "onthefly.db").exists():
        time.sleep(0.1)
    waits = []
    with onthefly.connect(store) as client:
        while not any(session.step for session in client.sessions()):
            time.sleep(0.1)
        for number in range(pauses):
            time.sleep(0.03 + 0.001 * (number % 23))  # not in step with the training
            began = time.perf_counter()
            client.command("pause", save=False)
            waits.append((time.perf_counter() - began) * 1000)
            client.command("resume")
    return waits


if __name__ == "__main__":
    main()
