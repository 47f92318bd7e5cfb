"""Gram matrices of the inputs of linear layers: what RegMean merges by (Jin et al. 2023, "Dataless Knowledge Fusion")."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from onthefly.errors import CommandError
from onthefly.samples.embeddings import eager
from onthefly.samples.loading import SEED, device_of, pairs
from onthefly.state.parts import plain_names, unwrapped
from onthefly.state.undisturbed import undisturbed

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_OTHERS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Bilinear, nn.MultiheadAttention)
_SLICE = 1 << 26  # bytes of an unfolded input at once


@dataclass(frozen=True)
class Grams:
    """Gram matrices of layers' inputs, and which layers have none."""

    matrices: dict[str, torch.Tensor]
    """X^T X / rows, float32 [in, in], by the name of the weight; a convolution's `in` is (channels, *kernel), flattened."""
    rows: dict[str, int]
    """Rows that each is the mean over: samples, times tokens or places of a convolution, times calls of the layer."""
    left_out: dict[str, str]
    """Why a layer with weights has none, by the name of the module."""
    samples: int


def gram_matrices(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    samples: int = 256,
    device: torch.device | str | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] | None = None,
) -> Grams:
    """X^T X / rows of what every `nn.Linear` and `nn.Conv1d`, `2d`, `3d` is fed by the first so many samples.

    Of a linear layer, each position of each sample is a row of X; of a convolution, each place that the kernel is put on,
    unfolded, so that both compute X W^T. Layers that run several times in a pass add up, and so do layers that share a
    weight. The model runs in evaluation mode, and nothing of it is changed.

    Left out, with the reason: grouped and transposed convolutions, `nn.Bilinear`, `nn.MultiheadAttention` (it multiplies inside, where its
    inputs cannot be seen), layers that did not run, weights that are computed (parametrized), and a weight that is
    also that of another kind of module, such as a head tied to an embedding: its inputs say nothing about the other use.

    Raises `MissingPartError` for batches that are not (inputs, targets) pairs, and `CommandError` for inputs that are not finite.
    """
    bare = unwrapped(model)
    layers, left_out = _served(bare)
    totals = {name: _Total() for name in layers.values()}
    on = torch.device(device) if device is not None else device_of(bare)
    done = 0
    with undisturbed(bare), eager(model), ExitStack() as hooks:
        for layer, name in layers.items():
            hook = layer.register_forward_pre_hook(totals[name].watch, with_kwargs=True)
            hooks.callback(hook.remove)
        for count, inputs, _ in pairs(batches, samples, on):
            torch.default_generator.manual_seed(SEED + done)  # a model may draw, too
            with torch.no_grad(), (autocast or nullcontext)():
                bare(inputs)
            done += count
    plain = plain_names(bare)
    for layer, name in layers.items():
        if not totals[name].rows:
            left_out[_name(bare, layer)] = "it did not run as a module, so its inputs were not seen"
    found = {plain(name): total for name, total in totals.items() if total.rows}
    matrices = {name: total.mean() for name, total in found.items()}
    for name, matrix in matrices.items():
        if not matrix.isfinite().all():
            raise CommandError(
                f"what {name} is multiplied with is not finite: the model's weights or its inputs are not"
            )
    return Grams(
        matrices,
        {name: total.rows for name, total in found.items()},
        {plain(name): reason for name, reason in left_out.items()},
        done,
    )


class _Total:
    """The sum of X^T X for one weight."""

    def __init__(self) -> None:
        self.rows = 0
        self._sum: torch.Tensor | None = None

    def watch(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else kwargs["input"]
        # What a step of mixed precision multiplies is rounded; here it is not.
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            for rows in _rows(layer, inputs):
                product = rows.T @ rows
                # float64, so that the order of the sum does not show, where the device has it.
                product = product if product.device.type == "mps" else product.double()
                self._sum = product if self._sum is None else self._sum.add_(product)
                self.rows += len(rows)

    def mean(self) -> torch.Tensor:
        assert self._sum is not None
        return (self._sum / self.rows).float()


def _rows(layer: nn.Module, inputs: torch.Tensor) -> Iterable[torch.Tensor]:
    if not isinstance(layer, _Conv):
        return [inputs.float().reshape(-1, inputs.shape[-1])]
    batched = inputs.float().unsqueeze(0) if inputs.dim() == len(layer.kernel_size) + 1 else inputs.float()
    padded = _padded(layer, batched)
    places = math.prod(
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, dilation in zip(
            padded.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True
        )
    )
    each = 4 * places * layer.in_channels * math.prod(layer.kernel_size)
    return (_unfolded(layer, part) for part in torch.split(padded, max(1, _SLICE // max(1, each))))


def _unfolded(layer: _Conv, padded: torch.Tensor) -> torch.Tensor:
    """The patch under the kernel at each of its places, [N * places, in], of padded inputs [N, channels, ...]."""
    windows, dimensions = padded, len(layer.kernel_size)
    for dimension in range(dimensions):
        kernel, dilation = layer.kernel_size[dimension], layer.dilation[dimension]
        windows = windows.unfold(2 + dimension, dilation * (kernel - 1) + 1, layer.stride[dimension])
        windows = windows[..., ::dilation]
    # [N, channels, *places, *kernel]
    order = (0, *range(2, 2 + dimensions), 1, *range(2 + dimensions, 2 + 2 * dimensions))
    return windows.permute(order).reshape(-1, layer.in_channels * math.prod(layer.kernel_size))


def _padded(layer: _Conv, inputs: torch.Tensor) -> torch.Tensor:
    """Inputs with the padding that the layer gives them."""
    around: list[int] = []
    for dimension in reversed(range(len(layer.kernel_size))):  # F.pad wants the last dimension first
        if isinstance(layer.padding, str):
            whole = layer.dilation[dimension] * (layer.kernel_size[dimension] - 1) if layer.padding == "same" else 0
            around += [whole // 2, whole - whole // 2]
        else:
            around += [layer.padding[dimension]] * 2
    if not any(around):
        return inputs
    return F.pad(inputs, around, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)


# -- which layers --------------------------------------------------------------------------------------------------


def _served(model: nn.Module) -> tuple[dict[nn.Module, str], dict[str, str]]:
    """The layers that can be served, with the first name of their weight; the others by name, with the reason."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(module)
    layers: dict[nn.Module, str] = {}
    left_out: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | _Conv):
            weight = module._parameters.get("weight")
            others = [] if weight is None else [user for user in users[id(weight)] if type(user) is not type(module)]
            if weight is None:
                left_out[name] = "its weight is computed from others (parametrized)"
            elif isinstance(module, _Conv) and module.groups > 1:
                left_out[name] = f"a convolution in {module.groups} groups is no single product"
            elif others:
                left_out[name] = f"its weight is also that of {_name(model, others[0])} ({type(others[0]).__name__})"
            else:
                layers[module] = names[id(weight)]
        elif isinstance(module, _OTHERS):
            left_out[name] = f"the inputs of an nn.{type(module).__name__} do not tell by themselves what it computes"
    return layers, left_out


def _name(model: nn.Module, wanted: nn.Module) -> str:
    found: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return found[wanted]
