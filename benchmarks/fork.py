"""What a fork costs the training that is forked: in place, and beside it.

In place, from a selection that is there already: the seconds from the boundary at which the command runs to the fork's first
batch, next to what cannot be saved, each measured alone in the same round: three median steps, the copy of a checkpoint at
a boundary, and a plain loader's two workers from their start to their first batch. Beside: the parent's steps while its child
starts on the same machine, next to its steps before.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import Report, percentile, ratio, seconds
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import onthefly
from onthefly.runs import manifest

WIDTH, DEPTH = 1024, 4
SAMPLES, BATCH, WORKERS = 8192, 32, 2
CHOSEN = f"random({SAMPLES // 2}, seed=1)"


def training(store: Path) -> tuple[nn.Module, Any, DataLoader[Any], onthefly.Session]:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    dataset = TensorDataset(torch.randn(SAMPLES, WIDTH), torch.randint(10, (SAMPLES,)))
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=WORKERS)
    config = onthefly.SessionConfig(
        store=store, ckpt_every_minutes=None, ckpt_every_epoch=False, max_epochs=10**6, handle_signals=False
    )
    return model, optimizer, loader, onthefly.attach(model, optimizer, train_loader=loader, config=config)


def trained(model: nn.Module, optimizer: Any, batch: Any) -> None:
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()
    optimizer.zero_grad()


# -- in place ---------------------------------------------------------------------------------------------------------


def in_place(report: Report, folder: Path, rounds: int) -> None:
    model, optimizer, loader, session = training(folder)
    batches = iter(session)
    steps: list[float] = []

    def step() -> float:
        """From boundary to boundary."""
        return seconds(lambda: trained(model, optimizer, next(batches)))

    def workers() -> float:
        began = time.perf_counter()
        iterator = iter(loader)
        next(iterator)
        taken = time.perf_counter() - began
        iterator._shutdown_workers()  # type: ignore[union-attr]
        return taken

    def stall() -> float:
        began = time.perf_counter()
        saving = session.save("benchmark", goes_on=False)
        taken = time.perf_counter() - began
        saving.result()
        return taken

    forks, stalls, starts, again, allowed = [], [], [], [], []
    with session, onthefly.connect(folder) as client:
        step()
        report.note("parameters", sum(p.numel() for p in model.parameters()))
        asked = ask(session, client, recipe=CHOSEN)
        step()
        digest = client.selection(answered(client, asked)["run"]).digest
        for _ in range(rounds + 1):
            mine = [step() for _ in range(9)]
            starts.append(workers())
            again.append(workers())
            stalls.append(stall())
            step()
            asked = ask(session, client, selection=digest)
            began = time.perf_counter()
            batch = next(batches)
            forks.append(time.perf_counter() - began)
            trained(model, optimizer, batch)
            complete(client, answered(client, asked))
            steps += mine
            allowed.append(3 * statistics.median(mine) + stalls[-1] + starts[-1])
    forks, stalls, starts, again, allowed = (
        x[1:] for x in (forks, stalls, starts, again, allowed)
    )  # the first allocates
    report.note("in place: a step, median", statistics.median(steps) * 1000, "ms")
    report.note("in place: stall of a checkpoint, median", statistics.median(stalls) * 1000, "ms")
    report.note("in place: starting the loader's workers, median", statistics.median(starts) * 1000, "ms")
    report.note("in place: to the fork's first batch, median", statistics.median(forks) * 1000, "ms")
    report.note("in place: the same, p90", percentile(forks, 0.9) * 1000, "ms")
    beyond = [(f - s - w) / statistics.median(steps) for f, s, w in zip(forks, stalls, starts, strict=True)]
    report.note("in place: beyond stall and workers, median", statistics.median(beyond), "steps")
    found = ratio(forks, allowed)
    report.note("in place: fork to what is allowed", found)
    report.judge("in place: fork to what is allowed, median", found.median, 1.0)
    report.note("in place: A/A ratio of starting the workers", ratio(again, starts))


def ask(session: onthefly.Session, client: Any, **chosen: Any) -> str:
    """Have the command at the gate when this returns; give its id."""
    command: str = client.fork(wait=False, **chosen)["id"]
    while not session._gate.raised:
        time.sleep(0.0005)
    return command


def answered(client: Any, command: str) -> dict[str, Any]:
    from onthefly.store import queries

    while (row := queries.command(client.store, command)).status == "queued":
        time.sleep(0.001)
    assert row.status == "done", row.error
    return dict(row.result)


def complete(client: Any, told: dict[str, Any]) -> None:
    """The hash has landed: the manifest must be whole, and name it."""
    run = client.run(told["run"])
    found = manifest.read(client.store.manifests_dir / f"{run.manifest[:16]}.json")
    assert found.digest == run.manifest
    assert [parent.hash for parent in found.parents] == [told["hash"]]
    assert found.selection["count"] == told["samples"]
    assert run.parents[0][1] == told["hash"]


# -- beside -----------------------------------------------------------------------------------------------------------


def train(folder: Path) -> None:
    """The parent, and each child: the same command line. Logs how long each of its steps took."""
    model, optimizer, _, session = training(folder)
    born, began = session.step, time.perf_counter()
    for batch in session:
        trained(model, optimizer, batch)
        now = time.perf_counter()
        session.log(seconds=now - began)
        began = now
        if session.run != "baseline" and session.step > born + 5:
            break
    session.close()


def beside(report: Report, folder: Path, rounds: int) -> None:
    command = [sys.executable, __file__, "--train", str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while not (folder / "onthefly.db").exists():
            time.sleep(0.1)
        with onthefly.connect(folder) as client:
            measured = list(children(client, rounds))
    finally:
        process.terminate()
        process.wait()
    earlier, before, during, starts = zip(*measured, strict=True)
    report.note("beside: a child's start, median", statistics.median(starts), "s")
    report.note("beside: the parent's step before, median", statistics.median(before) * 1000, "ms")
    report.note("beside: its step while the child starts, median", statistics.median(during) * 1000, "ms")
    report.note("beside: step while it starts to before", ratio(during, before))
    report.note("beside: A/A ratio of the steps before", ratio(earlier, before))


def children(client: Any, rounds: int) -> Iterator[tuple[float, float, float, float]]:
    """Of each child: the parent's mean step in two windows before its start, and in one from its start to its first step."""
    while not any(session.step > 20 for session in client.sessions()):
        time.sleep(0.1)
    length = child(client, 0)[1]
    for number in range(1, rounds + 1):
        window = length
        time.sleep(2 * window + 3)
        started, length = child(client, number)
        window = min(window, length)
        series = client.series("baseline", "seconds")
        means = []
        # What the fork itself takes of its parent, the checkpoint above all, comes before its child's start.
        for first in (started - 2 - 2 * window, started - 2 - window, started):
            inside = (series.times >= first) & (series.times < first + window)
            means.append(float(np.mean(series.values[inside])))
        yield means[0], means[1], means[2], length


def child(client: Any, number: int) -> tuple[float, float]:
    """Fork beside, and wait for the child's end: when its process started, and the seconds until it was at its first boundary."""
    run = client.fork(CHOSEN, beside=True)["run"]
    while client.run(run).status == "planned":
        time.sleep(0.02)
    end = time.time()
    started = client.events(kinds=["childStarted"])[-1]
    assert started.data["child"] == run
    while len(client.events(kinds=["childEnded"])) <= number:
        time.sleep(0.1)
    return started.time, end - started.time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--children", type=int, default=3)
    parser.add_argument("--train", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.train:
        train(options.train)
        return
    report = Report("fork")
    with tempfile.TemporaryDirectory() as folder:
        in_place(report, Path(folder) / "store", options.rounds)
        beside(report, Path(folder) / "beside", options.children)
    report.end()


if __name__ == "__main__":
    main()
