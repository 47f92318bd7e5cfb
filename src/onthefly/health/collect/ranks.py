"""What this rank holds, by hash; and every rank's, where all of them ask at once."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

import torch
from blake3 import blake3
from torch import nn

from onthefly.health.distribution import Numbers, Rank
from onthefly.state import rng
from onthefly.state.train_state import unwrapped


def world() -> tuple[int, int]:
    """(rank, number of ranks) of this process; (0, 1) where nothing is distributed."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def this_rank(modules: Mapping[str, nn.Module], step: int, indices: Any = None) -> Rank:
    """Hashes of what this process holds. `indices`: the samples of its last batch, int64 [N], or None."""
    parameters: dict[str, str] = {}
    buffers: dict[str, str] = {}
    for root, module in modules.items():
        bare, prefix = unwrapped(module), "" if len(modules) == 1 else f"{root}/"
        parameters |= {prefix + name: digest(p) for name, p in bare.named_parameters()}
        buffers |= {prefix + name: digest(b) for name, b in bare.named_buffers()}
    data = None if indices is None else blake3(indices.tobytes()).hexdigest()
    # A hash of this process's own state, never read back: its form may be anything that is the same in equal processes.
    random = blake3(pickle.dumps(_plain(rng.capture()), protocol=5)).hexdigest()
    return Rank(world()[0], step, parameters, buffers, random, data)


def gathered(mine: Rank, group: Any = None) -> Numbers:
    """Every rank's hashes. A collective call: every rank of the group must make it, at the same boundary."""
    size = world()[1]
    if size == 1:
        return Numbers([mine], 1)
    ranks: list[Any] = [None] * size
    torch.distributed.all_gather_object(ranks, mine, group=group)
    return Numbers(ranks, size)


def digest(tensor: torch.Tensor) -> str:
    """The hash of a tensor's dtype, shape and bytes. One that is sharded, or not there yet, has none."""
    if nn.parameter.is_lazy(tensor) or tensor.layout != torch.strided or hasattr(tensor, "to_local"):
        return ""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return blake3(f"{tensor.dtype}{list(tensor.shape)}".encode() + flat.numpy().tobytes()).hexdigest()


def _plain(value: Any) -> Any:
    """Tensors as bytes, arrays as lists: what equals has one form."""
    if isinstance(value, torch.Tensor):
        return value.cpu().numpy().tobytes()
    if isinstance(value, Mapping):
        return [(str(name), _plain(item)) for name, item in sorted(value.items())]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tobytes() if hasattr(value, "tobytes") else value
