"""Seconds to save (durably) and to load (verified) a model with AdamW, as a ratio to `torch.save` + fsync and `torch.load`."""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Report, ratio, seconds
from torch import nn

from onthefly.checkpoints import load_checkpoint, save_checkpoint


def training(parameters: int) -> dict[str, Any]:
    width = 1000
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(parameters // width**2)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer}


def torch_save(path: Path, live: dict[str, Any]) -> None:
    with open(path, "wb") as file:
        torch.save({name: part.state_dict() for name, part in live.items()}, file)
        file.flush()
        os.fsync(file.fileno())


def torch_load(path: Path, live: dict[str, Any]) -> None:
    stored = torch.load(path)
    for name, part in live.items():
        part.load_state_dict(stored[name])


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def measure(live: dict[str, Any], folder: Path, rounds: int) -> dict[str, list[float]]:
    ours, theirs = folder / "ours.safetensors", folder / "theirs.pt"
    saves: dict[str, Callable[[], object]] = {
        "save": lambda: save_checkpoint(ours, live),
        "torch.save": lambda: torch_save(theirs, live),
        "save again": lambda: save_checkpoint(ours, live),
    }
    loads: dict[str, Callable[[], object]] = {
        "load": lambda: load_checkpoint(ours, live),
        "torch.load": lambda: torch_load(theirs, live),
    }
    times: dict[str, list[float]] = {name: [] for name in (*saves, *loads, *(f"{name}, cold" for name in loads))}
    for round in range(rounds + 1):  # the first one only warms up
        for name, block in saves.items():
            times[name].append(seconds(block))
        for name, block in loads.items():
            # Our writes go around the page cache, so a first load is always cold: both are measured both ways.
            forget(ours), forget(theirs)
            times[f"{name}, cold"].append(seconds(block))
            times[name].append(seconds(block))
        if round == 0:
            for values in times.values():
                values.clear()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", help="where to write (a real disk: tmpfs has nothing to sync)")
    options = parser.parse_args()
    report = Report("save_load")
    for label, parameters, rounds in (("10M", 10_000_000, options.rounds), ("100M", 100_000_000, options.rounds // 2)):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            times = measure(training(parameters), Path(folder), rounds)
        for name, values in times.items():
            report.note(f"{label}: {name}, median", statistics.median(values), "s")
        saving, loading = ratio(times["save"], times["torch.save"]), ratio(times["load"], times["torch.load"])
        cold = ratio(times["load, cold"], times["torch.load, cold"])
        report.judge(f"{label}: save, ratio to torch.save + fsync", saving.median, 0.6)
        report.note(f"{label}: save, ratio with interval", saving)
        report.judge(f"{label}: load, warm, ratio to torch.load + load_state_dict", loading.median, 0.6)
        report.note(f"{label}: load, ratio with interval", loading)
        report.note(f"{label}: load, cold, ratio with interval", cold)
        report.note(f"{label}: A/A ratio of save", ratio(times["save again"], times["save"]))
    report.end()


if __name__ == "__main__":
    main()
