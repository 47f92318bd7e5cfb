"""The checkpoint file: one safetensors file that proves itself.

    8 bytes    length of the header, little endian
    header     JSON: __metadata__ first, then every tensor in the order of its data; padded with spaces
    data       at a multiple of 4096: tensors by item size (largest first), then name, without gaps

``__metadata__`` holds ``blake3``, the hash of the whole file with those 64 digits as zeros, and ``onthefly``, JSON of the
format's version and the rest of the state (see `onthefly.state.tree`). Equal state gives equal bytes. Nothing in a
file is ever executed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import mmap
import os
import stat
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from onthefly.checkpoints.durable import remove_stray, replace_durably, replacing, sync_folder, write_all
from onthefly.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError, UnsupportedValueError

__all__ = [
    "ALIGNMENT",
    "FORMAT_VERSION",
    "MAX_HEADER",
    "CheckpointFile",
    "Written",
    "digest",
    "open_checkpoint",
    "recorded_hash",
    "remove_stray",
    "replace_durably",
    "sync_folder",
    "write",
]

FORMAT_VERSION = 1
ALIGNMENT = 4096
MAX_HEADER = 100_000_000  # the limit of the safetensors library
_CHUNK = 16 * 2**20  # O_DIRECT is ten times slower in chunks of 1 MiB
_READ = 64 * 2**20
_MADV_POPULATE_READ = 22
_PREFIX = '{"__metadata__":{"blake3":"'
_DIGITS = slice(8 + len(_PREFIX), 8 + len(_PREFIX) + 64)
_ZEROS = "0" * 64
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


@dataclass(frozen=True)
class CheckpointFile:
    """An open checkpoint. `tensors` are views of the file, in memory of their own once written to; the file may go."""

    path: Path
    hash: str
    size: int
    tree: Any
    tensors: dict[str, torch.Tensor]


def write(path: str | os.PathLike[str], tree: Any, tensors: Mapping[str, torch.Tensor]) -> Written:
    """Write a checkpoint so that it is there whole, or not at all; on return it is durable.

    `tree` and `tensors` are what `onthefly.state.tree.flatten` gives. A file of that name is replaced at the end.
    Raises `CheckpointWriteError` (disk full, permission, I/O), leaving no partial file and the older one untouched, and
    `UnsupportedValueError`, before anything is written, for a dtype that has no place in the format.
    """
    layout = _Layout(tree, tensors)
    with replacing(Path(path)) as handle:
        found = _write_hashing(_File(handle, layout.size), layout)
    return Written(found, layout.size)


def digest(tree: Any, tensors: Mapping[str, torch.Tensor]) -> str:
    """The hash that `write` would give."""
    layout = _Layout(tree, tensors)
    hasher = blake3(layout.header)
    for piece in layout.pieces():
        hasher.update(piece)
    return str(hasher.hexdigest())


def open_checkpoint(path: str | os.PathLike[str], *, verify: str = "full") -> CheckpointFile:
    """Open a checkpoint after checking it.

    The header is checked whole before anything is built from it, and with ``verify="full"`` every byte against the
    hash; ``verify="header"`` trusts the data. Raises `CheckpointNotFoundError`, `CorruptCheckpointError`, which says what is
    wrong with which file, or plain `CheckpointError` for a file that cannot be read at all.
    """
    if verify not in ("full", "header"):
        raise ValueError(f"verify is 'full' or 'header', not {verify!r}")
    path = Path(path)
    with _opened(path) as file:
        size = os.fstat(file).st_size
        if size < 8:
            raise CorruptCheckpointError(f"{path}: {size} bytes are not a checkpoint")
        # Copy on write: views may be written to, and the file never changes by it.
        data = mmap.mmap(file, 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    try:
        header, start = _read_header(data, size)
        tree, recorded = _read_metadata(header, data)
        infos = list(_check_layout(header, size - start))
        if verify == "full":
            _verify(data, recorded)
        tensors = {name: _view(data, dtype, shape, start + begin) for name, dtype, shape, begin in infos}
    except CorruptCheckpointError as e:
        raise CorruptCheckpointError(f"{path}: {e}") from None
    return CheckpointFile(path, recorded, size, tree, tensors)


def recorded_hash(path: str | os.PathLike[str]) -> str:
    """The hash that a checkpoint says it has; only its first bytes are read. Raises as `open_checkpoint` does."""
    path = Path(path)
    with _opened(path) as file:
        start = os.pread(file, _DIGITS.stop, 0)
    digits = start[_DIGITS]
    if start[8 : _DIGITS.start] != _PREFIX.encode() or len(digits) != 64 or digits.strip(b"0123456789abcdef"):
        raise CorruptCheckpointError(f"{path}: its hash is not where it belongs")
    return digits.decode()


# -- writing ---------------------------------------------------------------------------------------------------


class _Layout:
    """Where everything goes in the file."""

    def __init__(self, tree: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name == "__metadata__":
                raise UnsupportedValueError(f"a tensor cannot be named {name}: safetensors keeps the name for itself")
            if tensor.dtype not in _CODES:
                raise UnsupportedValueError(f"{name}: the dtype {tensor.dtype} has no place in a safetensors file")
        order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        self._tensors = [tensors[name] for name in order]
        state = json.dumps({"format": FORMAT_VERSION, "state": tree}, separators=(",", ":"), allow_nan=False)
        entries: dict[str, Any] = {"__metadata__": {"blake3": _ZEROS, "onthefly": state}}
        offset = 0
        for name, tensor in zip(order, self._tensors, strict=True):
            end = offset + tensor.numel() * tensor.element_size()
            entries[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode("ascii")
        length = -(8 + len(text)) % ALIGNMENT + len(text)
        if length > MAX_HEADER:
            raise UnsupportedValueError(
                f"the state's structure takes {length:,} bytes; a checkpoint's header holds {MAX_HEADER:,}"
            )
        self.header = length.to_bytes(8, "little") + text.ljust(length)
        self.size = len(self.header) + offset

    def pieces(self) -> Iterator[memoryview]:
        """The data, tensor by tensor."""
        for tensor in self._tensors:
            if tensor.numel():
                flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                yield memoryview(flat.numpy())  # type: ignore[arg-type]

    def chunks(self, buffers: _Buffers) -> Iterator[tuple[mmap.mmap, int]]:
        """The data again, gathered into aligned buffers: (buffer, bytes used)."""
        buffer, used = buffers.take(), 0
        for piece in self.pieces():
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


class _Buffers:
    """Three page-aligned buffers, so that filling, hashing and writing overlap."""

    def __init__(self) -> None:
        self._free = [mmap.mmap(-1, _CHUNK) for _ in range(3)]
        self._busy: deque[tuple[mmap.mmap, list[Future[Any]]]] = deque()

    def take(self) -> mmap.mmap:
        if not self._free:
            buffer, tasks = self._busy.popleft()
            for task in tasks:
                task.result()
            return buffer
        return self._free.pop()

    def occupy(self, buffer: mmap.mmap, *tasks: Future[Any]) -> None:
        self._busy.append((buffer, list(tasks)))

    def drain(self) -> None:
        while self._busy:
            for task in self._busy.popleft()[1]:
                task.result()


class _Aside:
    """Runs calls in a thread of their own, one after the other; in the caller's where no thread can be started any more.

    That is so while the interpreter shuts down, and a checkpoint may well be saved then (`atexit`).
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(1)

    def __enter__(self) -> _Aside:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def run(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        if self._pool is not None:
            try:
                return self._pool.submit(call, *arguments)
            except RuntimeError:
                self._pool.shutdown(cancel_futures=True)  # the call may be queued already
                self._pool = None
        done: Future[Any] = Future()
        done.set_result(call(*arguments))
        return done


def _write_hashing(file: _File, layout: _Layout) -> str:
    with _Aside() as hashing, _Aside() as writing:
        hasher = blake3(layout.header)
        buffers = _Buffers()
        offset = len(layout.header)
        for buffer, used in layout.chunks(buffers):
            view = memoryview(buffer)[:used]
            buffers.occupy(buffer, hashing.run(hasher.update, view), writing.run(file.write, buffer, used, offset))
            offset += used
        buffers.drain()
    found = str(hasher.hexdigest())
    # The first block comes last: until then the file cannot be taken for a checkpoint.
    file.finish(layout.header[: _DIGITS.start] + found.encode() + layout.header[_DIGITS.stop :])
    return found


class _File:
    """A new file of known size, written around the page cache where the file system allows it."""

    def __init__(self, handle: int, size: int) -> None:
        self._handle = handle
        self._size = size
        self._direct = False
        if _O_DIRECT:
            with suppress(OSError):  # tmpfs, for one
                self._set_direct(True)
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(handle, 0, size)
            except OSError as e:
                if e.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise

    def write(self, buffer: mmap.mmap, used: int, offset: int) -> None:
        if self._direct:
            whole = -(-used // ALIGNMENT) * ALIGNMENT  # the last block's tail is cut off in `finish`
            try:
                write_all(self._handle, memoryview(buffer)[:whole], offset)
                return
            except OSError as e:
                if e.errno != errno.EINVAL:
                    raise
            self._set_direct(False)
        write_all(self._handle, memoryview(buffer)[:used], offset)

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


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # or a pipe would be waited for
    except (FileNotFoundError, NotADirectoryError) as e:
        raise CheckpointNotFoundError(e.errno, "there is no such checkpoint", str(path)) from e
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror or e}") from e
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise CorruptCheckpointError(f"{path}: is not a file, so not a checkpoint")
        yield file
    except OSError as e:
        if isinstance(e, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be read: {e.strerror or e}") from e
    finally:
        os.close(file)


def _read_header(data: mmap.mmap, size: int) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(data[:8], "little")
    if length > min(MAX_HEADER, size - 8):
        raise CorruptCheckpointError(
            f"its header claims {length:,} bytes, the file has {size:,}: truncated, or not a checkpoint"
        )
    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as e:
        raise CorruptCheckpointError(f"its header is not JSON ({e}): not a checkpoint, or damaged") from None
    if not isinstance(header, dict):
        raise CorruptCheckpointError("its header is not a JSON object")
    if (8 + length) % ALIGNMENT:
        raise CorruptCheckpointError(f"its data does not begin at a multiple of {ALIGNMENT}")
    return header, 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _read_metadata(header: dict[str, Any], data: mmap.mmap) -> tuple[Any, str]:
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(metadata.get("onthefly"), str):
        raise CorruptCheckpointError("it is not a checkpoint of OnTheFly (a safetensors file of another kind?)")
    recorded = metadata.get("blake3")
    if not isinstance(recorded, str) or data[: _DIGITS.stop][8:] != (_PREFIX + recorded).encode("utf-8", "replace"):
        raise CorruptCheckpointError("its hash is not where it belongs")
    try:
        state = json.loads(metadata["onthefly"], object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as e:
        raise CorruptCheckpointError(f"its state is not JSON ({e})") from None
    if not isinstance(state, dict) or state.keys() != {"format", "state"} or state["format"] != FORMAT_VERSION:
        version = state.get("format") if isinstance(state, dict) else None
        raise CorruptCheckpointError(f"its format is {version!r}; this version of OnTheFly reads {FORMAT_VERSION}")
    return state["state"], recorded


def _check_layout(header: dict[str, Any], available: int) -> Iterator[tuple[str, torch.dtype, list[int], int]]:
    """Every tensor's place, after checking that they fill the data without gap or overlap."""
    expected = 0
    for name, info in header.items():
        if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
            raise CorruptCheckpointError(f"tensor {name!r}: its entry is malformed")
        dtype, shape, offsets = _DTYPES.get(str(info["dtype"])), info["shape"], info["data_offsets"]
        if dtype is None:
            raise CorruptCheckpointError(f"tensor {name!r}: unknown dtype {info['dtype']!r}")
        if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2 or len(shape) > 64:
            raise CorruptCheckpointError(f"tensor {name!r}: its shape or place is malformed")
        begin, end = offsets
        if (
            begin != expected
            or end - begin != math.prod(shape) * dtype.itemsize
            or end > available
            or begin % dtype.itemsize
        ):
            raise CorruptCheckpointError(
                f"tensor {name!r}: its place {offsets} does not fit its shape {shape}, or the file"
            )
        expected = end
        yield name, dtype, shape, begin
    if expected != available:
        raise CorruptCheckpointError(f"its tensors fill {expected:,} bytes, the file has {available:,}")


def _are_counts(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)


def _verify(data: mmap.mmap, recorded: str) -> None:
    view = memoryview(data)
    hasher = blake3(bytes(view[: _DIGITS.start]) + _ZEROS.encode(), max_threads=blake3.AUTO)
    for begin in range(_DIGITS.stop, len(view), _READ):
        aligned = begin // ALIGNMENT * ALIGNMENT
        _advise(data, getattr(mmap, "MADV_WILLNEED", None), aligned + _READ)  # read on while this piece is hashed
        _advise(data, _MADV_POPULATE_READ, aligned)
        hasher.update(view[begin : begin + _READ])
    view.release()
    if hasher.hexdigest() != recorded:
        raise CorruptCheckpointError(
            f"its bytes do not match its hash {recorded[:12]}: the file was altered or damaged"
        )


def _advise(data: mmap.mmap, advice: int | None, begin: int) -> None:
    """Map a piece of the file at once, or read ahead: page by page, its faults would cost more than the hash."""
    if advice is not None and begin < len(data):
        with suppress(OSError, ValueError):  # only a matter of speed: Linux before 5.14 and macOS lack some advice
            data.madvise(advice, begin, min(_READ, len(data) - begin))


def _view(data: mmap.mmap, dtype: torch.dtype, shape: list[int], offset: int) -> torch.Tensor:
    count = math.prod(shape)
    if count == 0:
        try:
            return torch.empty(shape, dtype=dtype)
        except RuntimeError as e:  # zero elements, but strides beyond 64 bits
            raise CorruptCheckpointError(f"a tensor cannot have the shape {shape}: {e}") from None
    return torch.frombuffer(data, dtype=dtype, count=count, offset=offset).view(shape)
