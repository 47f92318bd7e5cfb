"""What optimizers do to parameters: gradients before a step, the weights before and after."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from onthefly.health import activations, numerics
from onthefly.health import gradients as slopes
from onthefly.health.collect.readings import Readings, dense, sampled
from onthefly.state.train_state import unwrapped

Guard = Callable[..., None]
"""Calls a function with its arguments, and sees to it that no error of ours reaches the training."""

_SAMPLED = 4096  # weights of one parameter: their share that changed, and by how much, is known to a few percent
_COORDINATES = 2**17  # of all gradients together, for the noise scale
_HALF = (torch.float16, torch.bfloat16)


@dataclass
class _Weight:
    name: str
    parameter: torch.Tensor
    numbers: numerics.Parameter
    norms: list[float] = field(default_factory=list)
    rows: torch.Tensor | None = None
    """Whether each row of a weight had a gradient in some step."""
    before: torch.Tensor | None = None
    moving: torch.Tensor | None = None
    """Where the sampled gradient was not 0."""
    tiny: list[float] = field(default_factory=list)


class Weights:
    """Takes norms of gradients and updates at every optimizer step; with `noise`, also what the noise scale needs, with `units`
    which rows of a weight get a gradient.

    With a `scaler` gradients are looked at as they come, too: a step that it passes over never comes to the optimizer.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        readings: Readings,
        *,
        step: int,
        scaler: Any,
        noise: bool,
        units: bool,
        guard: Guard,
    ) -> None:
        self._readings = readings
        self._guard = guard
        self._optimizers = dict(optimizers)
        self._noise = noise
        self._step = step
        self._weights: dict[int, _Weight] = {}
        rows = set()
        for root, module in modules.items():
            prefix = "" if len(modules) == 1 else f"{root}/"
            for path, part in unwrapped(module).named_modules():
                for name, p in part.named_parameters(path, recurse=False):
                    if p.requires_grad and id(p) not in self._weights and not nn.parameter.is_lazy(p):
                        dtype = str(p.dtype).removeprefix("torch.")
                        numbers = numerics.Parameter(prefix + name, dtype, p.dim())
                        self._weights[id(p)] = _Weight(prefix + name, p, numbers)
                        if (
                            units
                            and isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
                            and name.endswith("weight")
                        ):
                            rows.add(id(p))
        self._with_rows = rows
        self._every = -(-sum(w.parameter.numel() for w in self._weights.values()) // _COORDINATES) or 1
        self._samples: list[torch.Tensor] = []
        self._sum: torch.Tensor | None = None
        self._squares: list[float] = []
        self._batches: list[int] = []
        self._waiting_samples = 0  # handed out since the last optimizer step
        self.totals: list[tuple[int, float]] = []
        self.scales: list[tuple[int, float]] = []
        self._scaler = scaler
        if scaler is not None:
            self.scales.append((step, float(scaler.get_scale())))
        for weight in self._weights.values():
            self._check(weight, step)  # one before the first that is looked at
        readings.read()

    def handles(self) -> list[Any]:
        """Put the hooks on; gives what takes them off."""
        found: list[Any] = []
        for optimizer in self._optimizers.values():
            found.append(optimizer.register_step_pre_hook(lambda o, a, k: self._guard(self._before, o)))
            found.append(optimizer.register_step_post_hook(lambda o, a, k: self._guard(self._after, o)))
        if self._scaler is not None:
            for weight in self._weights.values():
                if weight.parameter.is_leaf:
                    hook = weight.parameter.register_post_accumulate_grad_hook(self._came)  # type: ignore[no-untyped-call]
                    found.append(hook)
        return found

    def handed_out(self, samples: int | None, step: int) -> None:
        """A batch of so many samples goes to the training, as this step."""
        self._step = step
        self._waiting_samples += samples or 0

    def end_step(self) -> None:
        """The step is over: sums that need the whole of it. Numbers have been read."""
        if self._scaler is not None:
            self.scales.append((self._step, float(self._scaler.get_scale())))
        samples, self._samples = self._samples, []
        if samples and self._noise:
            vector = torch.cat([sample.to(samples[0].device) for sample in samples])
            square = float(vector.double().square().sum())
            if math.isfinite(square) and (self._sum is None or self._sum.shape == vector.shape):
                self._sum = vector if self._sum is None else self._sum + vector
                self._squares.append(square)
                self._batches.append(self._waiting_samples)
        if samples:
            self._waiting_samples = 0

    # -- what was found ----------------------------------------------------------------------------------------

    def parameters(self) -> list[numerics.Parameter]:
        for weight in self._weights.values():
            weight.numbers.tiny_gradients = math.fsum(weight.tiny) / len(weight.tiny) if weight.tiny else 0.0
        return [weight.numbers for weight in self._weights.values()]

    def gradients(self) -> list[slopes.Weight]:
        return [slopes.Weight(w.name, w.parameter.numel(), w.parameter.dim(), w.norms) for w in self._weights.values()]

    def silent(self) -> list[activations.Silent]:
        found = [
            activations.Silent(w.name, w.rows.numel(), int((~w.rows).sum()))
            for w in self._weights.values()
            if w.rows is not None
        ]
        return [one for one in found if one.silent]

    def noise(self) -> slopes.Noise | None:
        if self._sum is None or not all(self._batches):
            return None
        steps = len(self._squares)
        square_of_mean = float((self._sum.double() / steps).square().sum())
        batch = math.fsum(self._batches) / steps
        return slopes.Noise(steps, batch, math.fsum(self._squares) / steps, square_of_mean)

    # -- hooks -------------------------------------------------------------------------------------------------

    def _came(self, parameter: torch.Tensor) -> None:
        self._guard(self._look_at_gradient, parameter)

    def _look_at_gradient(self, parameter: torch.Tensor) -> None:
        weight, step = self._weights[id(parameter)], self._step
        gradient = dense(parameter.grad)
        if gradient is None or weight.numbers.bad_gradient_step is not None:
            return

        def take(read: list[float]) -> None:
            if not math.isfinite(read[0]) and weight.numbers.bad_gradient_step is None:
                weight.numbers.bad_gradient_step = step

        self._readings.add([gradient.sum(dtype=torch.float32)], take)

    def _before(self, optimizer: torch.optim.Optimizer) -> None:
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer under a scaler unscales in its kernel
        squares: list[torch.Tensor] = []
        for group in optimizer.param_groups:
            for p in group["params"]:
                weight = self._weights.get(id(p))
                gradient = dense(p.grad)
                if weight is None or gradient is None:
                    continue
                if scale is not None:
                    gradient = gradient / scale
                norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
                squares.append(norm.double().square())
                self._take_gradient(weight, gradient, norm, p)
                weight.numbers.rates.append(float(group.get("lr", 0.0)))
        if squares:
            step = self._step
            total = torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()
            self._readings.add([total], lambda read: self.totals.append((step, read[0])))

    def _take_gradient(self, weight: _Weight, gradient: torch.Tensor, norm: torch.Tensor, p: torch.Tensor) -> None:
        step = self._step

        def take(read: list[float]) -> None:
            weight.norms.append(read[0])
            if not math.isfinite(read[0]) and weight.numbers.bad_gradient_step is None:
                weight.numbers.bad_gradient_step = step

        self._readings.add([norm], take)
        if gradient.dtype in _HALF:
            size = gradient.abs()
            some = size > 0
            tiny = (some & (size < torch.finfo(gradient.dtype).tiny)).sum() / some.sum().clamp(min=1)
            self._readings.add([tiny], weight.tiny.extend)
        if id(p) in self._with_rows and gradient.dim() > 1:
            rows = (gradient != 0).flatten(1).any(1)
            weight.rows = rows if weight.rows is None else weight.rows | rows
        if self._noise:
            flat = gradient.reshape(-1)
            self._samples.append(flat[:: self._every].to(torch.float32, copy=True))
        if not p.is_sparse and p.grad is not None and p.grad.layout == torch.strided:
            weight.before = sampled(p, _SAMPLED)
            weight.moving = sampled(gradient, _SAMPLED) != 0

    def _after(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                weight = self._weights.get(id(p))
                if weight is None or weight.before is None or weight.moving is None:
                    continue
                before, moving, weight.before, weight.moving = weight.before, weight.moving, None, None
                now = sampled(p, _SAMPLED)
                self._take_update(weight, before, now, moving, math.sqrt(p.numel() / now.numel()))

    def _take_update(
        self, weight: _Weight, before: torch.Tensor, now: torch.Tensor, moving: torch.Tensor, scale: float
    ) -> None:
        step, numbers = self._step, weight.numbers

        def take(read: list[float]) -> None:
            size, update, after, unchanged = read
            numbers.norms.append(size * scale)
            if not math.isfinite(after) and numbers.bad_step is None:
                numbers.bad_step = step
            if size > 0:
                numbers.steps.append(step)
                numbers.ratios.append(update / size if math.isfinite(update) else math.inf)
            numbers.unchanged = unchanged

        unchanged = (moving & (now == before)).sum() / moving.sum().clamp(min=1)
        vector_norm = torch.linalg.vector_norm
        self._readings.add([vector_norm(before), vector_norm(now - before), vector_norm(now), unchanged], take)

    def _check(self, weight: _Weight, step: int) -> None:
        tensor = dense(weight.parameter)
        if tensor is None:
            return

        def take(read: list[float]) -> None:
            if not all(map(math.isfinite, read)):
                weight.numbers.bad_step = step

        self._readings.add(list(torch.aminmax(tensor)), take)
