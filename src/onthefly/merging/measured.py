"""What is measured of a parent on its own data, in a file: what was measured once is not measured again."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from blake3 import blake3
from torch import nn

from onthefly.checkpoints.format import CheckpointFile, digest, open_checkpoint, write
from onthefly.errors import CheckpointError
from onthefly.merging.bench import Bench, Tensors
from onthefly.merging.fisher import diagonal_fisher
from onthefly.merging.grams import gram_matrices
from onthefly.samples.loading import batches, device_of

Kind = Literal["fisher-empirical", "fisher-true", "grams"]


def measured(
    folder: Path,
    bench: Bench,
    tensors: Tensors,
    *,
    of: str,
    part: str,
    kind: Kind,
    among: np.ndarray | None,
    samples: int,
    loss: Any,
) -> CheckpointFile:
    """The statistics of a model with these weights, on so many samples among those that it was trained on (None: all).

    `of` is the hash of the checkpoint that its `part` stands in. They are computed where `folder` has no sound file of the same
    checkpoint, kind, number of samples, size of the data, precision and `loss`. A loss that is a function is known by its name and
    arguments: one that was edited under its old name is taken for the same.
    """
    about = {
        "of": of,
        "part": part,
        "kind": kind,
        "samples": samples,
        "data": len(bench.train.dataset),
        "precision": _precision(bench),
        "loss": "" if kind == "grams" else _described(loss),
    }
    key = blake3(repr(sorted(about.items())).encode()).hexdigest()
    path = folder / f"{of[:16]}-{kind}-{key[:8]}.safetensors"
    try:
        return open_checkpoint(path)
    except CheckpointError:  # there is none, or it is damaged: it can be measured again
        folder.mkdir(exist_ok=True)
        write(path, *_measure(bench, tensors, kind, bench.some(among, samples), about))
        return open_checkpoint(path)


def _measure(
    bench: Bench, tensors: Tensors, kind: Kind, chosen: np.ndarray, about: Mapping[str, Any]
) -> tuple[dict[str, Any], Tensors]:
    bench.load(tensors)
    with closing(bench.watched(batches(bench.train, chosen))) as data:
        if kind == "grams":
            grams = gram_matrices(bench.model, data, samples=len(chosen), autocast=bench.autocast)
            return {**about, "left_out": grams.left_out}, grams.matrices
        labels: Literal["empirical", "true"] = "true" if kind == "fisher-true" else "empirical"
        fisher = diagonal_fisher(
            bench.model, data, bench.losses, kind=labels, samples=len(chosen), autocast=bench.autocast
        )
        return {**about, "counted": fisher.samples, "path": fisher.path}, fisher.diagonal


def _precision(bench: Bench) -> str:
    kind = device_of(bench.model).type
    with bench.autocast():
        return str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else ""


def _described(loss: Any) -> str:
    """A loss, as far as it can be told from another: a module by its settings and buffers, a function by its name and arguments."""
    inner = getattr(loss, "func", loss)  # of a functools.partial
    name = f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', type(inner).__qualname__)}"
    if isinstance(loss, nn.Module):
        plain = bool | int | float | str | None
        settings = sorted((key, value) for key, value in vars(loss).items() if isinstance(value, plain))
        tensors = {key: v.detach() for key, v in loss.state_dict().items() if isinstance(v, torch.Tensor)}
        return f"{name} {settings} {digest(None, tensors)}"
    return f"{name} {[getattr(loss, key, None) for key in ('args', 'keywords')]}"
