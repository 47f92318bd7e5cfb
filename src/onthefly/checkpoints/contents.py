"""What a checkpoint holds, read from its header alone: every tensor and every plain value, by their paths. Without torch."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onthefly.checkpoints.header import ITEM_SIZES, Header, TensorInfo
from onthefly.errors import CorruptCheckpointError

DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}
"""torch's name of a dtype, by the name that safetensors gives it."""

_COMPLEX = {"float32": "complex64", "float64": "complex128", "float16": "complex32"}
_PAIRS = ("$dict", "$ordereddict", "$counter", "$defaultdict")
_SEQUENCES = ("$tuple", "$set", "$frozenset")
_TENSORS = ("$tensor", "$ndarray", "$numbers")
_DEEPEST = 600  # the tree of a checkpoint is nested less deep
_MALFORMED = (
    KeyError,
    IndexError,
    TypeError,
    ValueError,
    AttributeError,
    OverflowError,
    RecursionError,
    StopIteration,
    struct.error,
)
_NUMBERS = re.compile(r"(?<![^/.])[0-9]+(?![^/.])")


@dataclass(frozen=True)
class Tensor:
    """One tensor, array or long list of numbers. `path` is its place in the part; `size` is in bytes.

    `tied_to` is the path, in the whole state, under which its bytes stand, when that is another one: then its size is 0.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    tied_to: str | None = None

    @property
    def numbers(self) -> int:
        """How many numbers it holds; none when it is tied to another."""
        return 0 if self.tied_to is not None else math.prod(self.shape)


@dataclass(frozen=True)
class Part:
    """One part of the train state: ``model``, ``optimizer``, ... `values` are the plain values in it, by path."""

    name: str
    tensors: tuple[Tensor, ...]
    values: dict[str, Any]

    @property
    def numbers(self) -> int:
        """How many numbers its tensors hold, the tied ones once."""
        return sum(tensor.numbers for tensor in self.tensors)

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.size for tensor in self.tensors)


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds. `size` is that of the file; `verified` tells whether every byte was held against the hash."""

    path: Path
    hash: str
    size: int
    verified: bool
    counters: dict[str, Any]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Fold:
    """Tensors of one part and dtype whose paths differ in whole numbers only: ``blocks.*.weight``."""

    path: str
    tensors: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape that all have, or None."""
        shapes = {tensor.shape for tensor in self.tensors}
        return shapes.pop() if len(shapes) == 1 else None


def contents(header: Header, *, verified: bool) -> Contents:
    """What a header tells. Raises `CorruptCheckpointError` for a tree that no checkpoint has."""
    try:
        return _contents(header, verified)
    except CorruptCheckpointError as e:
        raise CorruptCheckpointError(f"{header.path}: {e}") from None
    except _MALFORMED as e:
        raise CorruptCheckpointError(f"{header.path}: its tree is malformed: {type(e).__name__}: {e}") from e


def folded(tensors: Iterable[Tensor]) -> list[Fold]:
    """Tensors whose paths differ only in whole numbers, such as those of layers, as one each, in the order of the first."""
    groups: dict[tuple[str, str], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((_NUMBERS.sub("*", tensor.path), tensor.dtype), []).append(tensor)
    return [Fold(pattern if len(group) > 1 else group[0].path, tuple(group)) for (pattern, _), group in groups.items()]


def _contents(header: Header, verified: bool) -> Contents:
    walk = _Walk({info.name: info for info in header.tensors})
    for name, tree in header.tree.items():
        walk.visit(tree, (name,), 0)
    parts = [walk.part(name) for name in header.tree if name != "counters"]
    return Contents(
        path=header.path,
        hash=header.hash,
        size=header.size,
        verified=verified,
        counters=walk.part("counters").values,
        parts=tuple(part for part in parts if part.tensors or part.values),
    )


class _Walk:
    """Finds the leaves of a tagged tree. Owns what it has found, each with its path."""

    def __init__(self, infos: dict[str, TensorInfo]) -> None:
        self.tensors: list[tuple[tuple[str, ...], Tensor]] = []
        self.values: list[tuple[tuple[str, ...], Any]] = []
        self._infos = infos
        self._met: dict[str, tuple[str, ...]] = {}

    def part(self, name: str) -> Part:
        """What was found below a name."""
        return Part(
            name,
            tuple(tensor for path, tensor in self.tensors if path[0] == name),
            {"/".join(path[1:]) or name: value for path, value in self.values if path[0] == name},
        )

    def visit(self, tree: Any, path: tuple[str, ...], depth: int) -> None:
        if depth > _DEEPEST:
            raise CorruptCheckpointError("its tree is nested too deep")
        tree = _untagged(tree)
        if plain := _plain(tree):
            self.values.append((path, plain[0]))
        elif _is_tensor(tree):
            self._tensor(tree, path)
        else:
            for key, below in _children(tree):
                self.visit(below, (*path, key), depth + 1)

    def _tensor(self, tree: dict[str, Any], path: tuple[str, ...]) -> None:
        name = next(tree[tag] for tag in _TENSORS if tag in tree)
        info = self._infos[name]
        first = self._met.setdefault(name, path)
        tied_to = "/".join(first) if first != path else None
        dtype, shape = DTYPES[info.dtype], tuple(tree.get("shape", info.shape))
        if "$ndarray" in tree:
            dtype = f"array {tree['dtype']}"
        elif tree.get("complex"):
            dtype, shape = _COMPLEX.get(dtype, dtype), tuple(tree.get("shape", info.shape[:-1]))
        size = 0 if tied_to else math.prod(info.shape) * ITEM_SIZES[info.dtype]
        self.tensors.append((path, Tensor("/".join(path[1:]) or path[0], dtype, shape, size, tied_to)))


def _children(tree: Any) -> Iterator[tuple[str, Any]]:
    """What is below a list or a mapping, by key."""
    if isinstance(tree, list):
        yield from ((str(number), item) for number, item in enumerate(tree))
    elif tag := _tag(tree):
        yield from ((str(_plain(key)[0]), item) for key, item in tree[tag])
    else:
        yield from tree.items()


def _untagged(tree: Any) -> Any:
    """The list, or the tensor of numbers, that a tuple or a set is made of; anything else as it is."""
    tag = _tag(tree) if isinstance(tree, dict) else None
    return tree[tag] if tag in _SEQUENCES else tree


def _is_tensor(tree: Any) -> bool:
    return isinstance(tree, dict) and _tag(tree) in _TENSORS


def _tag(tree: dict[str, Any]) -> str | None:
    return next((key for key in tree if key.startswith("$")), None)


def _plain(tree: Any) -> tuple[Any, ...]:
    """The plain value that a tree is, as a tuple of one; empty when there is a tensor or a mapping in it."""
    if isinstance(tree, list):
        items = [_plain(item) for item in tree]
        return ([item[0] for item in items],) if all(items) else ()
    if not isinstance(tree, dict):
        return (tree,)
    tag = _tag(tree)
    if tag is None or tag in _PAIRS or tag in _TENSORS:
        return ()
    return _plain(tree[tag]) if tag in _SEQUENCES else (_scalar(tag, tree[tag]),)


def _scalar(tag: str, body: Any) -> Any:
    if tag == "$int":
        return int(body, 16)
    if tag == "$float":
        return struct.unpack("<d", bytes.fromhex(body))[0]
    if tag == "$complex":
        return str(complex(*struct.unpack("<dd", bytes.fromhex(body))))
    if tag == "$str":
        return bytes.fromhex(body).decode("utf-8", "replace")
    if tag in ("$bytes", "$bytearray"):
        return f"{len(body) // 2} bytes"
    if tag in ("$dtype", "$device"):
        return str(body)
    if tag == "$size":
        return list(body)
    if tag == "$npscalar":
        import numpy as np

        return np.frombuffer(bytes.fromhex(body[1]), dtype=np.dtype(body[0]))[0].item()
    raise CorruptCheckpointError(f"its tree has an unknown tag {tag!r}")
