"""What a checkpoint costs a training: the step that it holds up, the processor, the memory, the seconds until it is durable.

Every figure is a ratio of blocks that took turns in one run, with its A/A ratio (two equal blocks against each other)
and a 95 % interval. The figures of docs/benchmarks.md come from here.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from harness import Ratio, Report, ratio, seconds
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import onthefly
from onthefly.checkpoints import load_checkpoint
from onthefly.state.train_state import TrainState
from onthefly.state.tree import flatten

SIZES = {"10M": 10_000_000, "100M": 100_000_000, "300M": 300_000_000}
BATCH = 8
GB12 = 1.2e9


class Training:
    """A model of wide layers with AdamW, and one batch, to be used again and again."""

    def __init__(self, parameters: int) -> None:
        torch.manual_seed(0)
        width = 2000 if parameters >= 100_000_000 else 1000
        layers = [nn.Linear(width, width, bias=False) for _ in range(parameters // width**2)]
        self.model = nn.Sequential(*layers)
        with torch.no_grad():
            for layer in layers:
                layer.weight.mul_(0.9)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.batch = torch.randn(BATCH, width)
        self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.batch).square().mean().backward()
        self.optimizer.step()

    def live(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}

    def tensors(self) -> list[torch.Tensor]:
        state = TrainState.of(self.live())
        return list(flatten(state.capture())[1].values())


class Steered:
    """The training under a session that saves only when it is told to, step by step."""

    def __init__(self, training: Training, folder: Path, staging: str) -> None:
        self.training = training
        config = onthefly.SessionConfig(
            store=folder, ckpt_every_minutes=None, ckpt_keep=1, handle_signals=False, ckpt_staging=staging
        )
        self.session = onthefly.attach(training.model, training.optimizer, config=config)
        self.steps = self.session.steps(10**9)
        self.step()
        self.durable(self.step(saves=True))
        self.settle()

    def step(self, saves: bool = False) -> Cost:
        """One boundary and one step."""
        cost = Cost()
        began, cpu = time.perf_counter(), time.thread_time()
        if saves:
            cost.future = self.session.save("benchmark")
        next(self.steps)
        cost.stall = time.perf_counter() - began
        wait = Waiting(self.training.optimizer)
        self.training.step()
        cost.stall += wait.seconds
        cost.wall, cost.cpu, cost.began = time.perf_counter() - began, time.thread_time() - cpu, began
        wait.close()
        return cost

    def durable(self, cost: Cost) -> float:
        assert cost.future is not None
        cost.future.result()
        return time.perf_counter() - cost.began

    def settle(self) -> None:
        self.session._checkpointer.settle()

    def close(self) -> None:
        self.session.close()


class Waiting:
    """Seconds that `optimizer.step()` spends in pre-step hooks: there the training waits for what is still being copied."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.seconds = 0.0
        hooks = optimizer._optimizer_step_pre_hooks
        self._optimizer, self._before = optimizer, dict(hooks)
        for key, hook in self._before.items():
            hooks[key] = self._timed(hook)

    def _timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = hook(*arguments)
            self.seconds += time.perf_counter() - began
            return result

        return timed

    def close(self) -> None:
        self._optimizer._optimizer_step_pre_hooks.update(self._before)


@dataclass
class Cost:
    stall: float = 0.0
    wall: float = 0.0
    cpu: float = 0.0
    began: float = 0.0
    future: Any = None


@dataclass
class Times:
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)

    def __getitem__(self, name: str) -> list[float]:
        return self.values[name]

    def ratio(self, first: str, second: str) -> Ratio:
        return ratio(self[first], self[second])


def process_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Copy:
    """The bound: a copy of the same tensors into memory that was prepared and touched."""

    def __init__(self, training: Training) -> None:
        self._sources = training.tensors()
        self._targets = [torch.empty_like(tensor) for tensor in self._sources]
        self()

    def __call__(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self._targets, self._sources)


def forked_workers(training: Training) -> None:
    """Two loader workers are forked, give a batch, and end."""
    for _ in DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4, num_workers=2):
        pass


def stalls(training: Training, folder: Path, rounds: int) -> Times:
    """Seconds that the training thread stands, at the boundary and in the step, beside a copy; one torch thread."""
    torch.set_num_threads(1)
    times = Times()
    for staging in ("boundary", "overlap"):
        steered = Steered(training, folder / staging, staging)
        bound = Copy(training)
        for _ in range(rounds):
            times.add(f"{staging}: copy", seconds(bound))
            cost = steered.step(saves=True)
            times.add(f"{staging}: stall", cost.stall)
            times.add(f"{staging}: durable", steered.durable(cost))
            steered.settle()
            times.add(f"{staging}: copy again", seconds(bound))
        for _ in range(max(3, rounds // 2)):
            times.add(f"{staging}: copy (fork)", seconds(bound))
            forked_workers(training)
            cost = steered.step(saves=True)
            times.add(f"{staging}: stall after a fork", cost.stall)
            steered.durable(cost)
            steered.settle()
        del bound
        steered.close()
    return times


def processor(training: Training, folder: Path, rounds: int) -> Times:
    """CPU seconds of the whole process for steps with a save among them, and for as many without; one torch thread."""
    torch.set_num_threads(1)
    times = Times()
    steered = Steered(training, folder, "auto")
    for _ in range(rounds):
        for name, saves in (("without", False), ("with", True), ("without again", False)):
            began = process_cpu()
            cost = steered.step(saves=saves)
            if saves:
                steered.durable(cost)
                steered.settle()
                times.add("stall", cost.stall)
            times.add(name, process_cpu() - began)
        began = process_cpu()
        for _ in range(10):
            steered.step()
        times.add("ten steps", process_cpu() - began)
    steered.close()
    return times


def beside(training: Training, folder: Path, rounds: int, threads: int) -> Times:
    """Wall seconds of a step while a save is being written, and alone."""
    torch.set_num_threads(threads)
    times = Times()
    steered = Steered(training, folder, "auto")
    for _ in range(rounds):
        times.add("alone", statistics.median(steered.step().wall for _ in range(3)))
        cost = steered.step(saves=True)
        walls = []
        while not cost.future.done():
            walls.append(steered.step().wall)
        if walls:
            times.add("beside", statistics.median(walls))
        else:
            times.add("beside", cost.wall)
        steered.settle()
        times.add("alone again", statistics.median(steered.step().wall for _ in range(3)))
    steered.close()
    return times


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


def files(training: Training, folder: Path, rounds: int) -> Times:
    """Seconds until a save is durable and hashed, and of loads into live objects, beside torch.save and torch.load."""
    torch.set_num_threads(os.cpu_count() or 1)
    times = Times()
    live, theirs, plain = training.live(), folder / "theirs.pt", folder / "plain"
    steered = Steered(training, folder / "store", "boundary")
    size = sum(tensor.nbytes for tensor in training.tensors())
    for _ in range(rounds):
        cost = steered.step(saves=True)
        times.add("save", steered.durable(cost))
        ours = cost.future.result().path
        times.add("torch.save", seconds(lambda: torch_save(theirs, live)))
        times.add("torch.save again", seconds(lambda: torch_save(theirs, live)))
        times.add("disk", seconds(lambda: bare_write(plain, size)))
        for cold in (", cold", ""):
            for name, load, path in (("load", load_checkpoint, ours), ("torch.load", torch_load, theirs)):
                if cold:
                    forget(path)
                times.add(name + cold, seconds(lambda load=load, path=path: load(path, live)))
        times.add("load again", seconds(lambda ours=ours: load_checkpoint(ours, live)))
        steered.settle()
    steered.close()
    return times


def bare_write(path: Path, size: int) -> None:
    """The disk's own pace: as many bytes, with O_DIRECT where there is one, into a new file, and one fsync."""
    import mmap

    chunk = 16 * 2**20
    with mmap.mmap(-1, chunk) as buffer:
        path.unlink(missing_ok=True)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_DIRECT", 0))
        except OSError:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.posix_fallocate(handle, 0, size)
        for offset in range(0, size, chunk):
            os.pwrite(handle, memoryview(buffer), offset)
        os.fsync(handle)
        os.close(handle)


def resident() -> int:
    ctypes.CDLL(None).malloc_trim(0)
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def memory(training: Training, folder: Path) -> tuple[int, int]:
    """Bytes that the process takes more for a session that has saved twice, and bytes of the state."""
    size = sum(tensor.nbytes for tensor in training.tensors())
    before = resident()
    steered = Steered(training, folder, "boundary")
    steered.durable(steered.step(saves=True))
    steered.settle()
    found = resident() - before
    steered.close()
    return found, size


def judge_all(report: Report, label: str, parameters: int, rounds: int, where: str | None) -> None:
    training = Training(parameters)
    with tempfile.TemporaryDirectory(dir=where) as name:
        folder = Path(name)
        extra, size = memory(training, folder / "memory")
        scale = GB12 / size
        report.judge(f"{label}: extra memory beyond 1.0 x state", (extra - size) / 2**20, 32, "MiB")
        times = stalls(training, folder / "stalls", rounds)
        for staging, limit in (("boundary", 1.1), ("overlap", 0.3)):
            found = times.ratio(f"{staging}: stall", f"{staging}: copy")
            report.judge(f"{label}: stall / copy, {staging}", found.median, limit)
            report.note(f"{label}: stall / copy, {staging}, interval", found)
            found = times.ratio(f"{staging}: stall after a fork", f"{staging}: copy (fork)")
            report.judge(f"{label}: stall / copy after a fork, {staging}", found.median, limit)
            again = times.ratio(f"{staging}: copy again", f"{staging}: copy")
            report.note(f"{label}: A/A ratio of the copy, {staging}", again)
        report.note(f"{label}: the copy itself, median", statistics.median(times["boundary: copy"]) * 1000, "ms")
        report.note(f"{label}: stall, overlap, median", statistics.median(times["overlap: stall"]) * 1000, "ms")
        times = processor(training, folder / "processor", rounds)
        spent = [a - b for a, b in zip(times["with"], times["without"], strict=True)]
        same = [a - b for a, b in zip(times["without again"], times["without"], strict=True)]
        report.judge(f"{label}: extra CPU for 1.2 GB", statistics.median(spent) * scale, 0.6, "s")
        report.note(f"{label}: the same between two steps without a save", statistics.median(same) * scale, "s")
        if label == "100M":
            shares = [(s + c) / t for s, c, t in zip(times["stall"], spent, times["ten steps"], strict=True)]
            report.judge(f"{label}: (stall + CPU) / CPU of 10 steps", statistics.median(shares), 0.05)
        times = files(training, folder / "files", max(3, rounds // 2))
        for name, first, second, limit in (
            ("durable + hashed / torch.save + fsync", "save", "torch.save", 0.3),
            ("load, hash verified / torch.load, warm", "load", "torch.load", 0.45),
            ("load, hash verified / torch.load, cold", "load, cold", "torch.load, cold", 1.0),
        ):
            found = times.ratio(first, second)
            report.judge(f"{label}: {name}", found.median, limit)
            report.note(f"{label}: {name}, interval", found)
        report.note(f"{label}: A/A ratio of torch.save", times.ratio("torch.save again", "torch.save"))
        report.note(f"{label}: A/A ratio of load", times.ratio("load again", "load"))
        report.note(f"{label}: save / bare O_DIRECT write + fsync of the same size", times.ratio("save", "disk"))
        report.note(f"{label}: torch.save / that write", times.ratio("torch.save", "disk"))
        for threads in (1, 2):
            times = beside(training, folder / f"beside{threads}", max(3, rounds // 2), threads)
            report.note(f"{label}: step beside a save / alone, {threads} threads", times.ratio("beside", "alone"))
            report.note(f"{label}: A/A ratio of it", times.ratio("alone again", "alone"))
    del training
    gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["10M", "100M"])
    parser.add_argument("--folder", help="where to write (a real disk: tmpfs has nothing to sync)")
    options = parser.parse_args()
    report = Report("checkpoint")
    for label in options.sizes:
        rounds = options.rounds if label != "300M" else max(3, options.rounds // 2)
        judge_all(report, label, SIZES[label], rounds, options.folder)
    report.end()


if __name__ == "__main__":
    main()
