"""Memory and time of merges of files: every case in a process of its own, beside plain I/O.

The parents' files are written first and are in the page cache where they fit in it. Plain I/O is one buffer of 1 MiB that every
parent is read into, and from which as many bytes as the result has are written and synced. Anonymous memory is over that of the
process before the merge.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from harness import Report, ratio, seconds
from safetensors.torch import save_file

from onthefly.merging import merge_files

_MIB = 2**20
_SLICE = 64  # MiB
_PLAIN = ("swa", "weighted", "fisher", "task_arithmetic", "ties", "dare", "dare_ties", "slerp")
_NEEDS_BASE = ("task_arithmetic", "ties", "dare", "dare_ties")


def model(parameters: int, seed: int) -> dict[str, torch.Tensor]:
    """A transformer's worth of tensors: the largest is a tenth of all."""
    draw = torch.Generator().manual_seed(seed)
    width, tensors, left = 2048, {}, parameters
    tensors["embedding"] = torch.randn(max(1, parameters // 10 // width), width, generator=draw)
    left -= tensors["embedding"].numel()
    while left > 0:
        rows = max(1, min(width, left // width))
        tensors[f"layers.{len(tensors):03}.weight"] = torch.randn(rows, width, generator=draw)
        left -= rows * width
    return tensors


def prepare(folder: Path, parameters: int, parents: int) -> None:
    """The parents, a base, and positive numbers that serve as Fisher information: noise of its own for each."""
    base = model(parameters, 0)
    save_file(base, folder / "base.safetensors")
    for number in range(parents):
        draw = torch.Generator().manual_seed(number + 1)
        moved = {name: t + 0.01 * torch.randn(t.shape, generator=draw) for name, t in base.items()}
        save_file(moved, folder / f"{number}.safetensors")


def given(folder: Path, strategy: str, parents: int) -> dict[str, object]:
    files = [folder / f"{number}.safetensors" for number in range(parents)]
    options: dict[str, object] = {"parents": files, "strategy": strategy, "out": folder / "out.safetensors"}
    if strategy in _NEEDS_BASE:
        options["base"] = folder / "base.safetensors"
    if strategy == "weighted":
        options["weights"] = range(1, parents + 1)
    if strategy == "fisher":
        options["statistics"] = [folder / "fisher.safetensors"] * parents
    return options


def rss() -> tuple[int, int]:
    """Anonymous and file-backed bytes of this process in memory."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anonymous, mapped = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return anonymous, mapped


class Peak(threading.Thread):
    """The most memory that was seen, looked at every 5 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous = self.mapped = 0
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.005):
            anonymous, mapped = rss()
            self.anonymous, self.mapped = max(self.anonymous, anonymous), max(self.mapped, mapped)

    def end(self) -> None:
        self._ended.set()
        self.join()


def plain(inputs: list[Path], out: Path, size: int) -> None:
    """Read every input and write as many bytes as the result has, durably: what a merge cannot do without."""
    buffer = bytearray(_MIB)
    view = memoryview(buffer)
    for path in inputs:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    with open(out, "wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, size)
        for begin in range(0, size, _MIB):
            file.write(view[: size - begin])
        os.fsync(file.fileno())
    out.unlink()


def child(folder: Path, strategy: str, parents: int, rounds: int) -> None:
    """One case: a merge that is measured in memory, then the same in turns with plain I/O."""
    options = given(folder, strategy, parents)
    inputs = [*options["parents"], *options.get("statistics", []), *([options["base"]] if "base" in options else [])]  # type: ignore[misc]
    torch.zeros(2**16).double().sum()  # what torch sets up once
    base, peak = rss(), Peak()
    peak.start()
    began, spent = time.perf_counter(), time.process_time()
    size = merge_files(**options).size  # type: ignore[arg-type]
    times = {"first": time.perf_counter() - began, "merge": [], "plain": [], "again": []}
    peak.end()
    times["cpu"] = time.process_time() - spent
    for _ in range(rounds):
        times["plain"].append(seconds(lambda: plain(inputs, folder / "plain", size)))
        times["again"].append(seconds(lambda: plain(inputs, folder / "plain", size)))
        times["merge"].append(seconds(lambda: merge_files(**options, force=True)))  # type: ignore[arg-type]
    Path(options["out"]).unlink()  # type: ignore[arg-type]
    print(json.dumps({"anonymous": peak.anonymous - base[0], "mapped": peak.mapped - base[1], **times}))


def measured(folder: Path, strategy: str, parents: int, rounds: int) -> dict[str, list[float]]:
    words = [sys.executable, __file__, "--case", str(folder), strategy, str(parents), str(rounds)]
    return json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--parents", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--strategies", nargs="+", default=["swa", "ties", "dare", "slerp"], choices=_PLAIN)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to write (a real disk: tmpfs is memory)")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        child(Path(options.case[0]), options.case[1], int(options.case[2]), int(options.case[3]))
        return
    report = Report("merge")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        prepare(folder, options.parameters, max(options.parents))
        if "fisher" in options.strategies:
            save_file({n: t.square() for n, t in model(options.parameters, 0).items()}, folder / "fisher.safetensors")
        for strategy in options.strategies:
            for parents in options.parents if strategy != "slerp" else [2]:
                found = measured(folder, strategy, parents, options.rounds)
                label = f"{strategy}, {parents} parents"
                largest = max(_SLICE, options.parameters // 10 * 4 / _MIB)
                report.judge(f"{label}: memory", found["anonymous"] / _MIB, (parents + 2) * largest + 100, "MiB")
                report.note(f"{label}: file-backed pages", found["mapped"] / _MIB, "MiB")
                report.judge(f"{label}: time / plain I/O", ratio(found["merge"], found["plain"]).median, 1.5)
                report.note(f"{label}: CPU of a merge, all threads", found["cpu"], "s")
                report.note(f"{label}: merge", statistics.median(found["merge"]), "s")
                report.note(f"{label}: plain I/O", statistics.median(found["plain"]), "s")
                report.note(f"{label}: A/A ratio of plain I/O", ratio(found["again"], found["plain"]))
    report.end()


if __name__ == "__main__":
    main()
