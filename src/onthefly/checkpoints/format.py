"""The checkpoint file: one safetensors file that proves itself. What stands where in it, `header` says.

Equal state gives equal bytes. Nothing in a file is ever executed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import json
import math
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from onthefly.checkpoints.aside import Aside, Buffers
from onthefly.checkpoints.durable import replacing, reserve, write_all
from onthefly.checkpoints.header import (
    ALIGNMENT,
    DIGITS,
    FORMAT_VERSION,
    MAX_HEADER,
    ZEROS,
    TensorInfo,
    check_bytes,
    opened,
    parse,
)
from onthefly.errors import CorruptCheckpointError, HalfRestoredError, UnsupportedValueError
from onthefly.state.train_state import copy_tensors

__all__ = ["CheckpointFile", "Layout", "Written", "digest", "open_checkpoint", "write", "write_image"]

_CHUNK = 16 * 2**20  # O_DIRECT is ten times slower in chunks of 1 MiB
_READERS = 4  # threads that read into live tensors; more than memory can take in gain nothing
_SMALL = 2**16  # bytes below which a read of its own costs more than a copy
_O_DIRECT: int = getattr(os, "O_DIRECT", 0)  # Linux only
# Without it Linux refuses to map a file that is larger than the memory. Python names it since 3.13.
_NO_RESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Written:
    """What a file became: its content hash (64 hex digits) and its size in bytes."""

    hash: str
    size: int


# -- writing ---------------------------------------------------------------------------------------------------


class Layout:
    """Where everything goes in the file. Made at the moment of capture; of the tensors only their form is read.

    Raises `UnsupportedValueError` for a dtype or a name that has no place in the format.
    """

    def __init__(self, tree: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name == "__metadata__":
                raise UnsupportedValueError(f"a tensor cannot be named {name}: safetensors keeps the name for itself")
            if tensor.dtype not in _CODES:
                raise UnsupportedValueError(f"{name}: the dtype {tensor.dtype} has no place in a safetensors file")
        self._tree = tree
        order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        self.tensors = [tensors[name] for name in order]
        sizes = [tensor.nbytes for tensor in self.tensors]
        ends = list(itertools.accumulate(sizes))
        self.data_size = ends[-1] if ends else 0
        """Bytes of all tensors together."""
        self.entries = [
            TensorInfo(name, _CODES[tensor.dtype], tuple(tensor.shape), end - size, end)
            for name, tensor, size, end in zip(order, self.tensors, sizes, ends, strict=True)
        ]
        """Every tensor's place, counted from the start of the data."""

    def header(self) -> bytes:
        """The file's first bytes, with zeros for the hash. Raises `UnsupportedValueError` when there are too many."""
        state = json.dumps({"format": FORMAT_VERSION, "state": self._tree}, separators=(",", ":"), allow_nan=False)
        entries: dict[str, Any] = {"__metadata__": {"blake3": ZEROS, "onthefly": state}}
        for info in self.entries:
            entries[info.name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [info.begin, info.end]}
        text = json.dumps(entries, separators=(",", ":")).encode("ascii")
        length = -(8 + len(text)) % ALIGNMENT + len(text)
        if length > MAX_HEADER:
            raise UnsupportedValueError(
                f"the state's structure takes {length:,} bytes; a checkpoint's header holds {MAX_HEADER:,}"
            )
        return length.to_bytes(8, "little") + text.ljust(length)


def write(path: str | os.PathLike[str], tree: Any, tensors: Mapping[str, torch.Tensor]) -> Written:
    """Write a checkpoint so that it is there whole, or not at all; on return it is durable.

    `tree` and `tensors` are what `onthefly.state.tree.flatten` gives. A file of that name is replaced at the end.
    Raises `CheckpointWriteError` (disk full, permission, I/O), leaving no partial file and the older one untouched, and
    `UnsupportedValueError`, before anything is written, for a dtype that has no place in the format.
    """
    layout = Layout(tree, tensors)
    buffers = Buffers([memoryview(mmap.mmap(-1, _CHUNK)) for _ in range(3)])
    return _write(path, layout, _gathered(_pieces(layout), buffers), buffers, set())


def write_image(
    path: str | os.PathLike[str],
    layout: Layout,
    image: memoryview,
    handles: set[int],
    confirm: Callable[[], None] = lambda: None,
) -> Written:
    """Write a checkpoint whose data stand in memory as they shall stand in the file. As `write` otherwise.

    `image` begins at a page and goes on at least to the end of the data's last block. While the file is open its handle is
    in `handles`, for who forks meanwhile. `confirm` is called when all is written and nothing is renamed yet: what it raises
    leaves no file.
    """
    chunks = (
        (image[begin : begin + _CHUNK], min(_CHUNK, layout.data_size - begin))
        for begin in range(0, layout.data_size, _CHUNK)
    )
    return _write(path, layout, chunks, Buffers([]), handles, confirm)


def digest(tree: Any, tensors: Mapping[str, torch.Tensor]) -> str:
    """The hash that `write` would give."""
    layout = Layout(tree, tensors)
    hasher = blake3(layout.header())
    for piece in _pieces(layout):
        hasher.update(piece)
    return str(hasher.hexdigest())


def _pieces(layout: Layout) -> Iterator[memoryview]:
    """The data, tensor by tensor."""
    for tensor in layout.tensors:
        if tensor.numel():
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            yield memoryview(flat.numpy())  # type: ignore[arg-type]


def _gathered(pieces: Iterable[memoryview], buffers: Buffers[memoryview]) -> Iterator[tuple[memoryview, int]]:
    """Pieces in aligned buffers: (buffer, bytes used)."""
    buffer, used = buffers.take(), 0
    for piece in pieces:
        while piece:
            count = min(len(piece), _CHUNK - used)
            # Through torch, which copies without the interpreter's lock.
            torch.frombuffer(buffer, dtype=torch.uint8, count=count, offset=used).copy_(
                torch.frombuffer(piece, dtype=torch.uint8, count=count)
            )
            piece, used = piece[count:], used + count
            if used == _CHUNK:
                yield buffer, used
                buffer, used = buffers.take(), 0
    if used:
        yield buffer, used


def _write(
    path: str | os.PathLike[str],
    layout: Layout,
    chunks: Iterator[tuple[memoryview, int]],
    buffers: Buffers[memoryview],
    handles: set[int],
    confirm: Callable[[], None] = lambda: None,
) -> Written:
    header = layout.header()
    size = len(header) + layout.data_size
    with replacing(Path(path), handles) as handle, Aside() as hashing, Aside() as writing:
        file = _File(handle, size)
        hasher = blake3(header)
        offset = len(header)
        for buffer, used in chunks:
            calls = hashing.run(hasher.update, buffer[:used]), writing.run(file.write, buffer, used, offset)
            buffers.occupy(buffer, *calls)
            offset += used
        buffers.drain()
        found = str(hasher.hexdigest())
        # The first block comes last: until then the file cannot be taken for a checkpoint.
        file.finish(header[: DIGITS.start] + found.encode() + header[DIGITS.stop :])
        confirm()
    return Written(found, size)


class _File:
    """A new file of known size, written around the page cache where the file system allows it."""

    def __init__(self, handle: int, size: int) -> None:
        self._handle = handle
        self._size = size
        self._direct = False
        if _O_DIRECT:
            with suppress(OSError):  # tmpfs, for one
                self._set_direct(True)
        reserve(handle, size)

    def write(self, buffer: memoryview, used: int, offset: int) -> None:
        if self._direct:
            whole = -(-used // ALIGNMENT) * ALIGNMENT  # the last block's tail is cut off in `finish`
            try:
                write_all(self._handle, buffer[:whole], offset)
                return
            except OSError as e:
                if e.errno != errno.EINVAL:
                    raise
            self._set_direct(False)
        write_all(self._handle, buffer[:used], offset)

    def finish(self, header: bytes) -> None:
        if self._direct:
            self._set_direct(False)
        write_all(self._handle, memoryview(header), 0)
        os.ftruncate(self._handle, self._size)

    def _set_direct(self, wanted: bool) -> None:
        flags = fcntl.fcntl(self._handle, fcntl.F_GETFL)
        fcntl.fcntl(self._handle, fcntl.F_SETFL, flags | _O_DIRECT if wanted else flags & ~_O_DIRECT)
        self._direct = wanted


# -- reading ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckpointFile:
    """An open checkpoint. `tensors` are views of the file, in memory of their own once written to; the file may go."""

    path: Path
    hash: str
    size: int
    tree: Any
    tensors: dict[str, torch.Tensor]
    _source: _Source = field(repr=False)

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy stored tensors into live ones, pair by pair (live, stored): what stands in the file is read straight into
        the live tensor's memory, by several threads.

        The pairs must fit (`TrainState.check`). Raises `HalfRestoredError` when the file, which could be read a moment ago,
        no longer can.
        """
        rest, reads = [], []
        for live, stored in pairs:
            begin = stored.data_ptr() - self._source.address
            if stored.nbytes >= _SMALL and 0 <= begin < self.size and _same_place(live, stored):
                reads.append((live, begin))
            else:
                rest.append((live, stored))
        copy_tensors(rest)
        try:
            self._source.read(reads)
        except OSError as e:
            raise HalfRestoredError(
                f"{self.path}: it could be checked, and then not read any more ({e.strerror or e}): the live state is half "
                "that of the file and half the one before; load another checkpoint, or start again"
            ) from e


def open_checkpoint(path: str | os.PathLike[str], *, verify: str = "full") -> CheckpointFile:
    """Open a checkpoint after checking it.

    The header is checked whole before anything is built from it, and with ``verify="full"`` every byte against the
    hash; ``verify="header"`` trusts the data. Raises `CheckpointNotFoundError`, `CorruptCheckpointError`, which says what is
    wrong with which file, or plain `CheckpointError` for a file that cannot be read at all.
    """
    if verify not in ("full", "header"):
        raise ValueError(f"verify is 'full' or 'header', not {verify!r}")
    path = Path(path)
    with opened(path) as file:
        header = parse(file, path)
        if verify == "full":
            check_bytes(file, header)
        source = _Source(file)
        try:
            tensors = {info.name: _view(source.data, info) for info in header.tensors}
        except CorruptCheckpointError as e:
            raise CorruptCheckpointError(f"{path}: {e}") from None
    return CheckpointFile(path, header.hash, header.size, header.tree, tensors, source)


class _Source:
    """A file that is mapped, and can be read. Owns a handle, which is closed when nobody refers to it any more."""

    def __init__(self, file: int) -> None:
        # Copy on write: views may be written to, and the file never changes by it.
        self.data = mmap.mmap(file, 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.data))
        self._file = os.dup(file)
        weakref.finalize(self, os.close, self._file)

    def read(self, reads: Iterable[tuple[torch.Tensor, int]]) -> None:
        """Fill each tensor with the bytes from an offset on. Raises `OSError`."""
        pieces, live = [], []
        for tensor, begin in reads:
            view = memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
            pieces += [(view[i : i + _CHUNK], begin + i) for i in range(0, tensor.nbytes, _CHUNK)]
            live.append(tensor)
        try:
            with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as pool:
                for _ in pool.map(self._read, *zip(*pieces, strict=True)) if pieces else ():
                    pass
        finally:
            torch.autograd.graph.increment_version(live)  # a graph that still needs the old values must notice

    def _read(self, view: memoryview, offset: int) -> None:
        while view:
            count = os.preadv(self._file, [view], offset)
            if not count:
                raise OSError(errno.EIO, "the file has become shorter")
            view, offset = view[count:], offset + count


def _same_place(live: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether both are in the processor's memory, and in the same order in it."""
    return (
        live.is_cpu
        and live.dtype == stored.dtype
        and live.shape == stored.shape
        and live.stride() == stored.stride()
        and not (live.is_conj() or live.is_neg())
        and (live.is_contiguous() or live.is_contiguous(memory_format=torch.channels_last))
    )


def _view(data: mmap.mmap, info: TensorInfo) -> torch.Tensor:
    dtype, count = _DTYPES[info.dtype], math.prod(info.shape)
    if count == 0:
        try:
            return torch.empty(info.shape, dtype=dtype)
        except RuntimeError as e:  # zero elements, but strides beyond 64 bits
            raise CorruptCheckpointError(f"a tensor cannot have the shape {list(info.shape)}: {e}") from None
    return torch.frombuffer(data, dtype=dtype, count=count, offset=info.begin).view(info.shape)
