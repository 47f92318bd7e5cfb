"""The header of a checkpoint file: read, checked whole, and held against the file's bytes. Without torch.

    8 bytes    length of the header, little endian
    header     JSON: __metadata__ first, then every tensor in the order of its data; padded with spaces
    data       at a multiple of 4096: tensors by item size (largest first), then name, without gaps

``__metadata__`` holds ``blake3``, the hash of the whole file with those 64 digits as zeros, and ``onthefly``, JSON of the
format's version and the rest of the state. Nothing is built from a header before all of it was checked, and nothing
larger than the file is ever allocated for it.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from onthefly.checkpoints.aside import Aside, Buffers
from onthefly.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError

FORMAT_VERSION = 1
ALIGNMENT = 4096
MAX_HEADER = 100_000_000  # the limit of the safetensors library
PREFIX = '{"__metadata__":{"blake3":"'
DIGITS = slice(8 + len(PREFIX), 8 + len(PREFIX) + 64)
"""Where the hash stands in the file."""
ZEROS = "0" * 64
"""What stands there while the hash is computed."""

ITEM_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "U16": 2,
    "I16": 2,
    "U32": 4,
    "I32": 4,
    "U64": 8,
    "I64": 8,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F16": 2,
    "BF16": 2,
    "F32": 4,
    "F64": 8,
}
"""Bytes of one element, by the name that safetensors gives a dtype."""

_PIECE = 2**20  # small enough to be hashed while it is still in the processor's cache


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: its dtype's code, and where its bytes stand, counted from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a checkpoint says of itself, checked. `hash` is what it claims; `verify` holds it against the bytes."""

    path: Path
    size: int
    hash: str
    tree: Any
    tensors: tuple[TensorInfo, ...]


def read_header(path: str | os.PathLike[str], *, verify: bool = False) -> Header:
    """The header of a checkpoint; with `verify` every byte of the file was checked against its hash.

    Raises `CheckpointNotFoundError`, `CorruptCheckpointError`, which says what is wrong with which file, or plain
    `CheckpointError` for a file that cannot be read at all.
    """
    path = Path(path)
    with opened(path) as file:
        header = parse(file, path)
        if verify:
            check_bytes(file, header)
    return header


def recorded_hash(path: str | os.PathLike[str]) -> str:
    """The hash that a checkpoint says it has; only its first bytes are read. Raises as `read_header` does."""
    path = Path(path)
    with opened(path) as file:
        start = os.pread(file, DIGITS.stop, 0)
    digits = start[DIGITS]
    if start[8 : DIGITS.start] != PREFIX.encode() or len(digits) != 64 or digits.strip(b"0123456789abcdef"):
        raise CorruptCheckpointError(f"{path}: its hash is not where it belongs")
    return digits.decode()


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A handle to read a regular file with. Raises as `read_header` does, also for an `OSError` inside the block."""
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


def parse(file: int, path: Path) -> Header:
    """The header of an open file. Raises `CorruptCheckpointError`."""
    try:
        return _parse(file, path)
    except CorruptCheckpointError as e:
        raise CorruptCheckpointError(f"{path}: {e}") from None


def check_bytes(file: int, header: Header) -> None:
    """Read the whole file and hold it against its hash. Raises `CorruptCheckpointError`, or `OSError`.

    The file is read, not mapped: a disk that fails then is an error, and not a signal that ends the process.
    """
    hasher = blake3()
    hasher.update(_read(file, DIGITS.start, 0) + ZEROS.encode())
    piece = min(_PIECE, header.size)
    buffers = Buffers([bytearray(piece) for _ in range(3)])
    if hasattr(os, "posix_fadvise"):  # the kernel reads farther ahead, while a piece is hashed
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    with Aside() as hashing:
        offset = DIGITS.stop
        while offset < header.size:
            buffer = buffers.take()
            count = os.preadv(file, [memoryview(buffer)[: header.size - offset]], offset)
            if not count:
                raise CorruptCheckpointError(f"{header.path}: it became shorter while it was read")
            buffers.occupy(buffer, hashing.run(hasher.update, memoryview(buffer)[:count]))
            offset += count
        buffers.drain()
    if hasher.hexdigest() != header.hash:
        raise CorruptCheckpointError(
            f"{header.path}: its bytes do not match its hash {header.hash[:12]}: the file was altered or damaged"
        )


# -- the header ------------------------------------------------------------------------------------------------


def _parse(file: int, path: Path) -> Header:
    size = os.fstat(file).st_size
    if size < 8:
        raise CorruptCheckpointError(f"{size} bytes are not a checkpoint")
    length = int.from_bytes(_read(file, 8, 0), "little")
    if length > min(MAX_HEADER, size - 8):
        raise CorruptCheckpointError(
            f"its header claims {length:,} bytes, the file has {size:,}: truncated, or not a checkpoint"
        )
    text = _read(file, length, 8)
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as e:
        raise CorruptCheckpointError(f"its header is not JSON ({e}): not a checkpoint, or damaged") from None
    if not isinstance(entries, dict):
        raise CorruptCheckpointError("its header is not a JSON object")
    if (8 + length) % ALIGNMENT:
        raise CorruptCheckpointError(f"its data does not begin at a multiple of {ALIGNMENT}")
    tree, recorded = _metadata(entries, text)
    return Header(path, size, recorded, tree, tuple(_places(entries, 8 + length, size)))


def _read(file: int, count: int, offset: int) -> bytes:
    parts = []
    while count:
        part = os.pread(file, count, offset)
        if not part:
            raise CorruptCheckpointError("it became shorter while it was read")
        parts.append(part)
        count, offset = count - len(part), offset + len(part)
    return b"".join(parts)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _metadata(entries: dict[str, Any], text: bytes) -> tuple[Any, str]:
    metadata = entries.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(metadata.get("onthefly"), str):
        raise CorruptCheckpointError("it is not a checkpoint of OnTheFly (a safetensors file of another kind?)")
    recorded = metadata.get("blake3")
    if not isinstance(recorded, str) or text[: DIGITS.stop - 8] != (PREFIX + recorded).encode("utf-8", "replace"):
        raise CorruptCheckpointError("its hash is not where it belongs")
    try:
        state = json.loads(metadata["onthefly"], object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as e:
        raise CorruptCheckpointError(f"its state is not JSON ({e})") from None
    if not isinstance(state, dict) or state.keys() != {"format", "state"} or state["format"] != FORMAT_VERSION:
        version = state.get("format") if isinstance(state, dict) else None
        raise CorruptCheckpointError(f"its format is {version!r}; this version of OnTheFly reads {FORMAT_VERSION}")
    return state["state"], recorded


def _places(entries: dict[str, Any], start: int, size: int) -> Iterator[TensorInfo]:
    """Every tensor's place, after checking that they fill the data without gap or overlap."""
    expected = 0
    for name, info in entries.items():
        if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
            raise CorruptCheckpointError(f"tensor {name!r}: its entry is malformed")
        code, shape, offsets = str(info["dtype"]), info["shape"], info["data_offsets"]
        if code not in ITEM_SIZES:
            raise CorruptCheckpointError(f"tensor {name!r}: unknown dtype {info['dtype']!r}")
        if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2 or len(shape) > 64:
            raise CorruptCheckpointError(f"tensor {name!r}: its shape or place is malformed")
        begin, end = offsets
        if (
            begin != expected
            or end - begin != math.prod(shape) * ITEM_SIZES[code]
            or start + end > size
            or begin % ITEM_SIZES[code]
        ):
            raise CorruptCheckpointError(
                f"tensor {name!r}: its place {offsets} does not fit its shape {shape}, or the file"
            )
        expected = end
        yield TensorInfo(name, code, tuple(shape), start + begin, start + end)
    if start + expected != size:
        raise CorruptCheckpointError(f"its tensors fill {expected:,} bytes, the file has {size - start:,}")


def _are_counts(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)
