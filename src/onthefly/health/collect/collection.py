"""One report's collectors, from the boundary at which they are put on to the one at which they are taken off."""

from __future__ import annotations

import functools
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as hooks
from torch.utils.data import DataLoader

from onthefly.health import activations, gradients, numerics, throughput
from onthefly.health.collect import graph
from onthefly.health.collect.clock import Clock
from onthefly.health.collect.layers import Layers, is_compiled
from onthefly.health.collect.readings import Readings, dense
from onthefly.health.collect.weights import Weights
from onthefly.state.loader import END, ExactLoader

_LAYERS = {"health", "numerics", "activations"}
_UNITS = {"health", "activations"}
_WEIGHTS = {"health", "numerics", "activations", "gradients"}
_NOISE = {"health", "gradients"}
_CLOCK = {"health", "throughput"}
_GRAPH = {"health", "determinism"}
_MOST_INPUTS = 32  # bad batches that are described one by one


@dataclass(frozen=True)
class Subject:
    """What is looked at: the live objects of a training."""

    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, torch.optim.Optimizer]
    scaler: Any = None
    loader: ExactLoader | None = None
    train_loader: Any = None
    """The user's own."""
    clip: Callable[[], float | None] = lambda: None


@dataclass
class Collected:
    """What was read. A part that was not asked for is None."""

    steps: int
    numerics: numerics.Numbers | None = None
    activations: activations.Numbers | None = None
    gradients: gradients.Numbers | None = None
    throughput: throughput.Numbers | None = None
    operations: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


class Collection:
    """Owns the hooks and the numbers of one report. All of it happens on the training thread.

    `step`: the boundary at which it begins; `steps`: for how many. The training loop's calls: `leave` when it goes from a boundary into a step, `fetch`
    for a batch, `enter` at the next boundary. `close` takes every hook off; `collected` is what came of it.
    """

    def __init__(self, subject: Subject, kind: str, step: int, steps: int, spent: Callable[[], float]) -> None:
        self._subject = subject
        self._kind = kind
        self._first = step + 1
        self._settled = self._first + steps // 2
        self._step = step
        self._spent = spent  # seconds that saves have held the training up for
        self._thread, self._pid = threading.get_ident(), os.getpid()
        self._readings = Readings()
        self._missing: list[str] = []
        self._failed = self._closed = False
        self._inside = False  # a step is under way
        self._depth = 0  # of forward passes of whole models, one within another
        self._epoch_start = self._disturbed = False
        self._inputs: list[numerics.BadInput] = []
        self._laps: list[Mapping[str, float]] = []
        self._first_batches: list[float] = []
        self._samples: int | None = None
        self._operations: set[str] = set()
        self._roots = {id(module) for module in subject.modules.values()}
        device = next((p.device for m in subject.modules.values() for p in m.parameters()), torch.device("cpu"))
        self._device = device
        self._clock = Clock(device) if kind in _CLOCK else None
        self._handles: list[Any] = []
        self._layers: Layers | None = None
        self._weights: Weights | None = None
        self._spent_before = spent()
        blind = [name for name, module in subject.modules.items() if is_compiled(module)]
        try:
            self._put_on(blind)
        except BaseException:
            self.close()
            raise

    def _put_on(self, blind: list[str]) -> None:
        subject, kind = self._subject, self._kind
        if kind in _LAYERS and not blind:
            self._layers = Layers(subject.modules, self._readings, units=kind in _UNITS, settled=self._settled)
        if blind and kind in _LAYERS | _CLOCK | _GRAPH:
            self._missing.append(
                f"layers of {', '.join(blind)}: it is compiled, and a hook would have it compiled anew"
            )
        if kind in _WEIGHTS:
            self._weights = Weights(
                subject.modules,
                subject.optimizers,
                self._readings,
                step=self._first - 1,
                scaler=subject.scaler if _tells_its_scale(subject.scaler) else None,
                noise=kind in _NOISE,
                units=kind in _UNITS,
                guard=self._guard,
            )
            self._handles += self._weights.handles()
        if self._clock is not None:
            for optimizer in subject.optimizers.values():
                self._handles.append(
                    optimizer.register_step_pre_hook(lambda o, a, k: self._guard(self._turn, "optimizer"))
                )
                self._handles.append(optimizer.register_step_post_hook(lambda o, a, k: self._guard(self._turn, "rest")))
        if not blind and kind in _LAYERS | _CLOCK | _GRAPH:
            # Process-wide ones: a hook on a module is seen by others. TransformerEncoderLayer, for one, takes another path in
            # evaluation when there is one on it, and a validation would come out differently.
            self._handles.append(hooks.register_module_forward_pre_hook(self._before_forward))
            self._handles.append(hooks.register_module_forward_hook(self._after_forward))

    @property
    def steps(self) -> int:
        """How many steps have been looked into."""
        return max(self._step - self._first + 1, 0) if not self._inside else max(self._step - self._first, 0)

    # -- the loop's calls --------------------------------------------------------------------------------------

    def leave(self) -> None:
        """From the boundary into a step."""
        if self._clock is not None:
            self._guard(self._turn, "rest")

    def fetch(self, loader: ExactLoader) -> Any:
        """The loader's next batch. What the loader raises comes through."""
        self._epoch_start = not loader.under_way
        if self._clock is not None:
            self._guard(self._turn, "data")
        batch = loader.next()
        if self._clock is not None:
            self._guard(self._turn, "rest")
        if batch is not END:
            self._guard(self._look_at_batch, batch, loader.indices)
            self.begin_step(self._step + 1)
        return batch

    def begin_step(self, step: int) -> None:
        """A step is under way."""
        self._step, self._inside, self._depth = step, True, 0
        if self._weights is not None:
            self._weights.handed_out(self._samples if self._subject.loader is not None else 0, step)

    def disturbed(self) -> None:
        """Something other than training happens at this boundary: the step's time says nothing."""
        self._disturbed = True

    @contextmanager
    def own(self) -> Iterator[None]:
        """Inside is what OnTheFly does in the middle of a step."""
        before = self._clock.turn("onthefly") if self._clock is not None else ""
        try:
            yield
        finally:
            if self._clock is not None:
                self._clock.turn(before)

    def enter(self, epoch_ended: bool) -> dict[str, float]:
        """At a boundary: the step is over. Gives its numbers, to be recorded as metrics."""
        found: dict[str, float] = {}
        if self._inside:
            self._inside = False
            self._guard(self._end_step, found, epoch_ended)
        if self._clock is not None:
            self._guard(self._turn, "onthefly")
        return found

    def close(self) -> None:
        """Take every hook off. What was read stays."""
        if self._closed:
            return
        self._closed = True
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def collected(self) -> Collected:
        """What was read, of the steps that are over."""
        first, last = self._first, self._first + self.steps - 1
        done = Collected(self.steps, operations=sorted(self._operations), missing=list(self._missing))
        layers, weights = self._layers, self._weights
        if self._kind in ("health", "numerics"):
            done.numerics = numerics.Numbers(
                first,
                last,
                layers=layers.layers() if layers else [],
                parameters=weights.parameters() if weights else [],
                inputs=self._inputs,
                scales=weights.scales if weights else [],
            )
        if self._kind in _UNITS:
            done.activations = activations.Numbers(
                first, last, layers.activations() if layers else [], weights.silent() if weights else []
            )
        if self._kind in _NOISE and weights is not None:
            done.gradients = gradients.Numbers(
                first,
                last,
                [step for step, _ in weights.totals],
                [norm for _, norm in weights.totals],
                weights.gradients(),
                self._subject.clip(),
                weights.noise(),
            )
        if self._clock is not None:
            done.throughput = self._times(first, last)
        if layers is not None:
            done.missing += layers.missing
        return done

    # -- parts -------------------------------------------------------------------------------------------------

    def _times(self, first: int, last: int) -> throughput.Numbers:
        loader = self._subject.train_loader
        known = isinstance(loader, DataLoader)
        exact = self._subject.loader
        return throughput.Numbers(
            first,
            last,
            steps=self._laps,
            first_batches=self._first_batches,
            batches=exact.batches if exact is not None else None,
            samples=self._samples,
            workers=loader.num_workers if known else None,
            persistent=known and loader.persistent_workers,
            pinned=known and loader.pin_memory,
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            device=self._device.type,
        )

    def _guard(self, function: Callable[..., None], *arguments: Any) -> None:
        """Do something of ours in the middle of somebody's training: whatever goes wrong with it must not reach them."""
        if self._failed or self._closed or os.getpid() != self._pid:
            return
        try:
            hidden = self._clock.hidden() if self._clock is not None and function != self._turn else nullcontext()
            with hidden, torch.no_grad():
                function(*arguments)
        except Exception as e:  # any tensor can come along here
            self._failed = True
            self._missing.append(f"all after step {self._step}: collecting failed ({type(e).__name__}: {e})")
            logging.getLogger("onthefly").exception("a report stopped collecting; training goes on")

    def _turn(self, part: str) -> None:
        assert self._clock is not None
        self._clock.turn(part)

    def _is_training(self, module: nn.Module) -> bool:
        return self._inside and torch.is_grad_enabled() and threading.get_ident() == self._thread

    def _before_forward(self, module: nn.Module, arguments: Any) -> None:
        if id(module) not in self._roots or not self._is_training(module):
            return
        self._depth += 1
        if self._depth == 1:
            if self._clock is not None:
                self._guard(self._turn, "forward")
            if self._subject.loader is None:
                self._guard(self._look_at_batch, arguments, None)

    def _after_forward(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if not self._is_training(module):
            return
        if self._layers is not None:
            self._guard(self._layers.after, module, output, self._step)
        if id(module) in self._roots and self._depth:
            self._depth -= 1
            if self._depth == 0:
                if self._kind in _GRAPH and not self._operations:
                    self._guard(self._look_at_graph, output)
                if self._clock is not None:
                    self._guard(self._turn, "backward")

    def _look_at_graph(self, output: Any) -> None:
        self._operations |= graph.operations(output)

    def _look_at_batch(self, batch: Any, indices: Any) -> None:
        tensors = list(_tensors(batch))
        self._samples = next((len(tensor) for _, tensor in tensors if tensor.dim()), None)
        if self._inside and self._weights is not None:  # a loop that draws its own batches
            self._weights.handed_out(self._samples, self._step)
        if self._kind not in ("health", "numerics"):
            return
        step = self._step + 1 if not self._inside else self._step
        for where, tensor in tensors:
            found = dense(tensor)
            if found is None or not found.dim():
                continue
            self._readings.add(
                list(torch.aminmax(found)),
                functools.partial(self._judge_input, tensor=found, where=where, indices=indices, step=step),
            )

    def _judge_input(self, read: list[float], tensor: torch.Tensor, where: str, indices: Any, step: int) -> None:
        if all(map(math.isfinite, read)) or len(self._inputs) >= _MOST_INPUTS:
            return
        bad = (~torch.isfinite(tensor)).nonzero()
        if not len(bad):  # the loop has mended it in place since
            return
        places = sorted(set(bad[:, 0].tolist()))
        known = indices is not None and len(indices) == len(tensor)
        samples = np.asarray(indices)[places].tolist() if known else places
        self._inputs.append(numerics.BadInput(step, where, len(bad), samples, known, bad[0, 1:].tolist()))

    def _end_step(self, found: dict[str, float], epoch_ended: bool) -> None:
        self._readings.read()
        if self._weights is not None:
            self._weights.end_step()
            if self._weights.totals and self._weights.totals[-1][0] == self._step:
                found["health/gradient_norm"] = self._weights.totals[-1][1]
            if self._weights.scales:
                found["health/loss_scale"] = self._weights.scales[-1][1]
        if self._clock is not None:
            saved, self._spent_before = self._spent() - self._spent_before, self._spent()
            lap = self._clock.lap()
            # A save takes its time at the boundary before this step, or in the hook before the optimizer's.
            moved = min(saved, lap["onthefly"] + lap["backward"])
            of_boundary = min(moved, lap["onthefly"])
            lap["onthefly"] -= of_boundary
            lap["backward"] -= moved - of_boundary
            lap["checkpoint"] += moved
            if self._epoch_start:
                self._first_batches.append(lap["data"])
            elif not (epoch_ended or self._disturbed):
                self._laps.append(lap)
                found["health/step_seconds"] = math.fsum(lap.values())
                found["health/data_seconds"] = lap["data"]
            self._disturbed = False


def _tells_its_scale(scaler: Any) -> bool:
    return scaler is not None and hasattr(scaler, "get_scale") and getattr(scaler, "is_enabled", lambda: True)()


def _tensors(value: Any, where: str = "batch") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a batch, each with where it is: ``batch[0]``, ``batch['image']``."""
    if isinstance(value, torch.Tensor):
        yield where, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _tensors(item, f"{where}[{number}]")
