"""Microseconds a call of `session.log` with five scalars, next to a JSON line written and flushed; rows left after SIGKILL."""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness import Report, ratio
from torch import nn

import onthefly

NUMBERS = {"loss": 0.5, "accuracy": 0.9, "lr": 1e-3, "grad_norm": 2.5, "throughput": 1000.0}
CALLS = 2000
ROWS = 1000


def session_for(store: Path) -> onthefly.Session:
    model = nn.Linear(2, 2)
    config = onthefly.SessionConfig(store=store, ckpt_every_minutes=None, handle_signals=False)
    return onthefly.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), config=config)


def killed(store: Path) -> None:
    """The child: logs rows, then dies as hard as a process can."""
    session = session_for(store)
    for _ in session.steps(ROWS):
        session.log(**NUMBERS)
        if session.step == ROWS:
            os.kill(os.getpid(), signal.SIGKILL)


def rows_left(store: Path) -> int:
    subprocess.run([sys.executable, __file__, "--killed", str(store)], check=False, stderr=subprocess.DEVNULL)
    with onthefly.connect(store) as client:
        run = client.runs()[-1].name
        return min(len(client.series(run, name).steps) for name in NUMBERS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--killed", type=Path)
    options = parser.parse_args()
    if options.killed:
        killed(options.killed)
    report = Report("log_call")
    with tempfile.TemporaryDirectory() as folder:
        ours, again, lines = [], [], []
        with session_for(Path(folder)) as session, open(Path(folder) / "lines.jsonl", "w") as file:
            for _ in session.steps(1):
                for _ in range(options.rounds):
                    for times in (ours, again):
                        began = time.perf_counter()
                        for _ in range(CALLS):
                            session.log(**NUMBERS)
                        times.append((time.perf_counter() - began) / CALLS * 1e6)
                    began = time.perf_counter()
                    for step in range(CALLS):
                        file.write(json.dumps({"step": step, "time": time.time(), **NUMBERS}) + "\n")
                        file.flush()
                    lines.append((time.perf_counter() - began) / CALLS * 1e6)
    report.judge("session.log of five scalars, median", statistics.median(ours), 15, "us")
    report.note("a JSON line written and flushed, median", statistics.median(lines), "us")
    report.note("ratio to the JSON line", ratio(ours, lines))
    report.note("A/A ratio", ratio(again, ours))
    with tempfile.TemporaryDirectory() as folder:
        left = rows_left(Path(folder))
    report.judge(f"rows lost of {ROWS} after SIGKILL", ROWS - left, 0)
    report.end()


if __name__ == "__main__":
    main()
