"""What every layer gives out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from onthefly.health import activations, numerics
from onthefly.health.collect.readings import Readings, dense
from onthefly.state.train_state import unwrapped

CAN_DIE = (nn.ReLU, nn.ReLU6, nn.Threshold, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardshrink, nn.Softshrink)
"""Activations that give exactly 0, and no gradient, for what is far enough on one side."""
_CHANNELS_FIRST = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d)
_HALF = (torch.float16, torch.bfloat16)
_TANH_END, _SIGMOID_END = 0.99, 0.995  # the derivative is a fiftieth of its largest there


@dataclass
class _Layer:
    name: str
    kind: str
    order: int = -1
    dtype: torch.dtype = torch.float32
    low: float = math.inf
    high: float = -math.inf
    peak: float = 0.0
    tiny: list[float] = field(default_factory=list)
    saturated: list[float] = field(default_factory=list)
    alive: torch.Tensor | None = None
    latest: int = 0
    shares: list[tuple[int, float]] = field(default_factory=list)
    bad_step: int | None = None
    bad: str = ""


def is_compiled(module: nn.Module) -> bool:
    """Whether parts of a module run as compiled code, which no hook sees into, and which hooks would have compiled anew."""
    return any(
        hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None
        for part in module.modules()
    )


def named_layers(modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """The layers to look at, by identity: modules without children, or with parameters of their own."""
    found: dict[int, str] = {}
    for root, module in modules.items():
        prefix = "" if len(modules) == 1 else f"{root}/"
        for name, part in unwrapped(module).named_modules():
            if not any(part.children()) or any(True for _ in part.parameters(recurse=False)):
                found.setdefault(id(part), prefix + (name or type(part).__name__))
    return found


class Layers:
    """Takes the ranges of all layers' outputs; with `units`, also which of their units are dead, and what is saturated."""

    def __init__(self, modules: Mapping[str, nn.Module], readings: Readings, *, units: bool, settled: int) -> None:
        self._names = named_layers(modules)
        self._readings = readings
        self._units = units
        self._settled = settled  # the step from which a unit that gives nothing is dead
        self._layers: dict[int, _Layer] = {}
        self._weighted: nn.Module | None = None  # the last layer with parameters: it tells which axis the units are
        self._strange: set[str] = set()

    def after(self, module: nn.Module, output: object, step: int) -> None:
        """A module of the training has given this out."""
        name = self._names.get(id(module))
        if name is None:
            return
        if any(True for _ in module.parameters(recurse=False)):
            self._weighted = module
        outputs = list(output) if isinstance(output, list | tuple) else [output]
        outputs = list(output.values()) if isinstance(output, dict) else outputs
        tensors = [tensor for value in outputs if (tensor := dense(value)) is not None]
        if not tensors:
            self._strange.add(name)
        for tensor in tensors:
            self._take(module, name, tensor, step)

    def layers(self) -> list[numerics.Layer]:
        return [
            numerics.Layer(
                name=layer.name,
                dtype=str(layer.dtype).removeprefix("torch."),
                order=layer.order,
                limit=torch.finfo(layer.dtype).max,
                peak=layer.peak,
                tiny=_mean(layer.tiny),
                bad_step=layer.bad_step,
                bad=layer.bad,
            )
            for layer in self._in_order()
        ]

    def activations(self) -> list[activations.Layer]:
        found = []
        for layer in self._in_order():
            alive = layer.alive
            found.append(
                activations.Layer(
                    name=layer.name,
                    kind=layer.kind,
                    low=layer.low,
                    high=layer.high,
                    units=None if alive is None else alive.numel(),
                    dead=0 if alive is None else int((~alive).sum()),
                    shares=layer.shares,
                    saturated=_mean(layer.saturated) if layer.saturated else None,
                )
            )
        return found

    @property
    def missing(self) -> list[str]:
        if not self._layers:
            return ["layers: no forward pass of a tracked model with gradients was seen"]
        never = self._strange - {layer.name for layer in self._layers.values()}
        return [f"{', '.join(sorted(never))}: gives out no plain tensor of floating-point numbers"] if never else []

    # -- parts -------------------------------------------------------------------------------------------------

    def _in_order(self) -> list[_Layer]:
        return sorted(self._layers.values(), key=lambda layer: layer.order)

    def _take(self, module: nn.Module, name: str, tensor: torch.Tensor, step: int) -> None:
        layer = self._layers.get(id(module))
        if layer is None:
            layer = self._layers[id(module)] = _Layer(name, type(module).__name__, len(self._layers))
        layer.dtype = tensor.dtype
        has_weights = any(True for _ in module.parameters(recurse=False))
        low, high = torch.aminmax(tensor)  # NaN if there is one
        self._readings.add([low, high], lambda read: _range(layer, read, step, masks=not has_weights))
        if tensor.dtype in _HALF:
            size = tensor.abs()
            some = size > 0
            tiny = (some & (size < torch.finfo(tensor.dtype).tiny)).sum() / some.sum().clamp(min=1)
            self._readings.add([tiny], layer.tiny.extend)
        if not self._units:
            return
        if isinstance(module, nn.Tanh | nn.Sigmoid):
            ends = (
                tensor.abs() > _TANH_END if isinstance(module, nn.Tanh) else (tensor - 0.5).abs() > _SIGMOID_END - 0.5
            )
            self._readings.add([ends.float().mean()], layer.saturated.extend)
        if isinstance(module, CAN_DIE) and tensor.dim() > 1:
            axis = self._unit_axis(tensor)
            alive = (tensor != 0).any(0) if tensor.dim() == 2 else (tensor != 0).transpose(0, axis).flatten(1).any(1)
            new = layer.alive is None or layer.alive.shape != alive.shape or layer.latest < self._settled <= step
            layer.alive = alive if new or layer.alive is None else layer.alive | alive
            layer.latest = step
            self._readings.add([1 - alive.float().mean()], lambda read: layer.shares.append((step, read[0])))

    def _unit_axis(self, tensor: torch.Tensor) -> int:
        """[N, F] and [N, C, H, W] have it second; [N, T, F] last, unless a convolution made it an [N, C, L]."""
        if tensor.dim() == 3 and not isinstance(self._weighted, _CHANNELS_FIRST):
            return 2
        return 1


def _range(layer: _Layer, read: list[float], step: int, *, masks: bool) -> None:
    low, high = read
    finite = [value for value in read if math.isfinite(value)]
    layer.low, layer.high = min([layer.low, *finite]), max([layer.high, *finite])
    layer.peak = max([layer.peak, *(abs(value) for value in finite)])
    # A function without weights may give out -inf on purpose: a mask, the logarithm of 0.
    if layer.bad_step is None and (math.isnan(low) or high == math.inf or (low == -math.inf and not masks)):
        layer.bad_step, layer.bad = step, "NaN" if math.isnan(low) else "inf"


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
