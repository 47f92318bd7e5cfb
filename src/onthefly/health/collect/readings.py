"""Numbers on their way from a device: taken now, read together later."""

from __future__ import annotations

from collections.abc import Callable

import torch

Take = Callable[[list[float]], None]


class Readings:
    """Holds one-element tensors, each group with what is to be done with its numbers, until `read`.

    Reading one by one would make the training wait for its device as many times.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[list[torch.Tensor], Take]] = []

    def add(self, values: list[torch.Tensor], take: Take) -> None:
        self._waiting.append((values, take))

    def read(self) -> None:
        """Give every group its numbers, in the order in which they came."""
        waiting, self._waiting = self._waiting, []
        by_device: dict[torch.device, list[torch.Tensor]] = {}
        for values, _ in waiting:
            for value in values:
                by_device.setdefault(value.device, []).append(value.to(torch.float64).reshape(()))
        read = {device: iter(torch.stack(values).tolist()) for device, values in by_device.items()}
        for values, take in waiting:
            take([next(read[value.device]) for value in values])


def dense(value: object) -> torch.Tensor | None:
    """A tensor of real floating-point numbers with something in it; None for anything else, also for tensors of a subclass."""
    if not isinstance(value, torch.Tensor) or type(value) not in (torch.Tensor, torch.nn.Parameter):
        return None
    if value.layout == torch.sparse_coo:
        value = value.detach().coalesce().values()
    if value.layout != torch.strided or value.is_nested or not value.is_floating_point() or not value.numel():
        return None
    return value.detach()


def sampled(tensor: torch.Tensor, most: int) -> torch.Tensor:
    """A copy [at most `most`] of evenly spaced elements, in float32."""
    flat = tensor.detach().reshape(-1)
    return flat[:: -(-flat.numel() // most)].to(torch.float32, copy=True)
