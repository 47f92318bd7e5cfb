"""Merging of files: parents mapped, the result written slice by slice into a new file. Memory does not grow with the model."""

from __future__ import annotations

import errno
import json
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from onthefly.checkpoints.durable import replacing, reserve, write_all
from onthefly.checkpoints.format import Layout
from onthefly.errors import CheckpointWriteError, InvalidCommandError
from onthefly.merging.parents import Parent, open_parent
from onthefly.merging.plan import Plan, planned
from onthefly.merging.strategies import SLICE, Part

_THREADS = min(4, os.cpu_count() or 1)  # more than memory can feed gain nothing

PathLike = str | os.PathLike[str]
_ALIGNMENT = 64  # bytes


@dataclass(frozen=True)
class Merged:
    """A merge that was written, durable. `hash` is blake3 of the whole file.

    `kept` are the tensors of whole numbers and truths, which come from the first parent; `averaged` those that were averaged because
    the strategy does not cover them, such as tensors without statistics.
    """

    path: Path
    hash: str
    size: int
    strategy: str
    options: dict[str, Any]
    parents: tuple[str, ...]
    tensors: int
    averaged: tuple[str, ...]
    kept: tuple[str, ...]
    warnings: tuple[str, ...]


def merge_files(
    parents: Sequence[PathLike],
    strategy: str,
    options: Mapping[str, Any] | None = None,
    *,
    out: PathLike,
    weights: Sequence[float] | None = None,
    base: PathLike | None = None,
    statistics: Sequence[PathLike] | None = None,
    only: str | None = None,
    force: bool = False,
    slice_size: int = SLICE,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Merged:
    """Merge checkpoints and state dicts in files into a new ``.safetensors`` file: it is there whole, or not at all.

    `statistics` are files with what the strategy needs of each parent. Of a checkpoint its model is merged, or the part `only`. Tied
    tensors are equal under each of their names. Equal arguments give equal bytes. `slice_size` is in numbers.
    `on_progress` is told bytes done and in all, from time to time; what it raises ends the merge and leaves nothing.

    Raises `InvalidCommandError` for wrong arguments, parents of equal content, and numbers that are not finite;
    `StateMismatchError` for parents that do not fit each other; `CheckpointWriteError`, also for a file that is there already, unless
    `force`; and what `open_parent` raises.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise InvalidCommandError(f"{out}: a merge goes into a file that ends in .safetensors")
    if out.exists() and not force:
        raise CheckpointWriteError(errno.EEXIST, "there is such a file already; --force replaces it", str(out))
    opened = [open_parent(path, only=only) for path in parents]
    total = sum(tensor.nbytes for tensor in opened[0].tensors.values()) if opened else 0
    plan = planned(
        opened,
        strategy,
        options or {},
        weights=weights,
        base=None if base is None else open_parent(base, only=only),
        statistics=None if statistics is None else [open_parent(path) for path in statistics],
        different=True,
        on_part=lambda: on_progress(0, total),
    )
    found, size = _write(plan, out, slice_size, on_progress)
    return Merged(
        path=out,
        hash=found,
        size=size,
        strategy=plan.strategy.name,
        options=dict(plan.options),
        parents=tuple(parent.label for parent in plan.parents),
        tensors=len(plan.firsts),
        averaged=plan.averaged,
        kept=plan.kept,
        warnings=plan.warnings,
    )


@dataclass(frozen=True)
class Mapped:
    """A merge in a file without a name, and how it was made. The file is gone when nobody looks at `tensors` any more."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    averaged: tuple[str, ...]
    warnings: tuple[str, ...]


def merge_mapped(
    parents: Sequence[Parent],
    strategy: str,
    options: Mapping[str, Any] | None = None,
    *,
    folder: Path,
    weights: Sequence[float] | None = None,
    base: Parent | None = None,
    statistics: Sequence[Parent] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Mapped:
    """Merge into tensors that are views of a file in `folder` without a name: memory does not grow with the model, and nothing is left,
    not even by a process that is killed. Tied tensors stay tied. The rest is as in `merge_files`.
    """
    total = sum(tensor.nbytes for tensor in parents[0].tensors.values()) if parents else 0
    plan = planned(
        parents,
        strategy,
        options or {},
        weights=weights,
        base=base,
        statistics=statistics,
        on_part=lambda: on_progress(0, total),
    )
    forms = {name: plan.form(name) for name, first in plan.firsts.items() if name == first}
    places = dict(zip(forms, accumulate(_aligned(form.nbytes) for form in forms.values()), strict=True))
    size = max([*places.values(), _ALIGNMENT])
    try:
        with TemporaryFile(dir=folder) as file, ThreadPoolExecutor(_THREADS) as pool:
            reserve(file.fileno(), size)
            file.truncate(size)
            memory = mmap.mmap(file.fileno(), size)
            made: dict[str, Tensor] = {}
            done = 0
            for name, form in forms.items():
                begin = places[name] - _aligned(form.nbytes)
                numbers = torch.frombuffer(memory, dtype=torch.uint8, count=_aligned(form.nbytes), offset=begin)
                made[name] = numbers[: form.nbytes].view(form.dtype).view(form.shape)
                flat = (
                    torch.view_as_real(made[name]) if form.is_complex() and name not in plan.kept else made[name]
                ).view(-1)
                at = 0
                for piece in plan.pieces(name, mapped=partial(_ahead, pool)):
                    flat[at : at + piece.numel()] = piece
                    at += piece.numel()
                    done += piece.nbytes
                    on_progress(done, total)
    except OSError as e:
        raise CheckpointWriteError(e.errno, f"the merge could not be written: {e.strerror}", str(folder)) from e
    tensors = {name: made[first] for name, first in plan.firsts.items()}
    return Mapped(tensors, dict(plan.options), plan.averaged, plan.warnings)


def _aligned(nbytes: int) -> int:
    return max(1, -(-nbytes // _ALIGNMENT)) * _ALIGNMENT


def _write(plan: Plan, out: Path, slice_size: int, on_progress: Callable[[int, int], None]) -> tuple[str, int]:
    layout = Layout(None, {name: plan.form(name) for name in plan.firsts})
    header = _header(layout)
    hasher = blake3(header)
    offset, end = len(header), len(header) + layout.data_size
    with replacing(out) as handle, ThreadPoolExecutor(_THREADS) as pool:
        reserve(handle, end)
        write_all(handle, memoryview(header), 0)
        for entry in layout.entries:
            for piece in plan.pieces(entry.name, slice_size, partial(_ahead, pool)):
                data = _bytes(piece)
                hasher.update(data)
                write_all(handle, data, offset)
                offset += len(data)
                on_progress(offset - len(header), layout.data_size)
        assert offset == end
    return str(hasher.hexdigest()), end


def _ahead(pool: ThreadPoolExecutor, merge: Callable[[Part], Tensor], slices: Iterable[Part]) -> Iterator[Tensor]:
    """What `map` gives, some slices ahead of what is asked for: while one is written, the next are computed."""
    waiting: deque[Future[Tensor]] = deque()
    for piece in slices:
        waiting.append(pool.submit(merge, piece))
        if len(waiting) > 2 * _THREADS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _header(layout: Layout) -> bytes:
    """A plain state dict's, as the safetensors library writes it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for info in layout.entries:
        entries[info.name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [info.begin, info.end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = len(text) + -len(text) % 8
    return length.to_bytes(8, "little") + text.ljust(length)


def _bytes(piece: Tensor) -> memoryview:
    flat = piece.contiguous().view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]
