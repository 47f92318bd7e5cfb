"""Nested Python values <-> a JSON document plus named tensors, with every type kept.

`flatten` and `unflatten` are inverse: what comes back has the same types, bits, key order, aliasing and
memory order. Plain JSON values stand for themselves; everything else is a *tag*, an object with one key that
begins with ``$`` (so a user's dict with such a key is tagged, too). No tag names a class to import: a stored
tree can only ever become the types listed in this module.
"""

from __future__ import annotations

import math
import struct
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch

from onthefly.errors import CorruptCheckpointError, UnsupportedValueError

Json = Any
"""A value that `json` writes and reads back unchanged."""

MAX_DEPTH = 200
_LONG_LIST = 64  # from this length on, numbers travel as a tensor: JSON would be slow and large
_SAFE_INT = 2**53  # beyond it other JSON readers lose digits
_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_DEFAULT_FACTORIES: dict[str, Any] = {"none": None, "dict": dict, "list": list, "set": set, "int": int, "float": float}
_FACTORY_NAMES = {factory: name for name, factory in _DEFAULT_FACTORIES.items()}
_Identity = tuple[Any, ...]


def flatten(value: Any, prefix: str = "") -> tuple[Json, dict[str, torch.Tensor]]:
    """Split a value into JSON and tensors.

    The tensors are *views* of the live ones wherever that is possible (no copy is made here), contiguous, and
    named by their path, joined with ``/``. A tensor met twice is named once, by its first path.

    Raises `UnsupportedValueError`, naming the path, for what has no exact stored form.
    """
    flattener = _Flattener()
    return flattener.visit(value, prefix, 0), flattener.tensors


def unflatten(tree: Json, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The value that `flatten` split. Tensors in it share memory with `tensors`.

    Raises `CorruptCheckpointError` for a tree that `flatten` cannot have made.
    """
    try:
        return _Unflattener(tensors).visit(tree, 0)
    except CorruptCheckpointError:
        raise
    except (
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        OverflowError,
        struct.error,
    ) as e:
        raise CorruptCheckpointError(f"the stored tree is malformed: {type(e).__name__}: {e}") from e


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the strides are a permutation of contiguous ones: no gap, no overlap."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


class _Flattener:
    """Owns the tensors found so far, and which live object each came from."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._seen: dict[_Identity, Json] = {}
        self._alive: list[torch.Tensor] = []  # an address identifies a tensor only while that tensor lives

    def visit(self, value: Any, path: str, depth: int) -> Json:
        if depth > MAX_DEPTH:
            raise UnsupportedValueError(f"{path}: nested more than {MAX_DEPTH} deep (does it contain itself?)")
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return self._text(value, path) if kind is str else value
        if kind is int:
            return value if abs(value) <= _SAFE_INT else {"$int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"$float": struct.pack("<d", value).hex()}
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if kind in (list, tuple):
            items = self._sequence(value, path, depth)
            return items if kind is list else {"$tuple": items}
        if isinstance(value, dict):
            return self._dict(value, path, depth)
        return self._leaf(value, path, depth)

    def _text(self, value: str, path: str) -> Json:
        try:
            value.encode()
        except UnicodeEncodeError:  # a lone surrogate, as in an undecodable file name
            return {"$str": value.encode("utf-8", "surrogatepass").hex()}
        return value

    def _leaf(self, value: Any, path: str, depth: int) -> Json:
        kind = type(value)
        if kind is complex:
            return {"$complex": struct.pack("<dd", value.real, value.imag).hex()}
        if kind in (bytes, bytearray):
            return {"$" + kind.__name__: value.hex()}
        if kind in (set, frozenset):
            items = [self.visit(item, f"{path}/{i}", depth + 1) for i, item in enumerate(value)]
            return {"$" + kind.__name__: sorted(items, key=repr)}  # a set's own order changes from process to process
        if kind is torch.dtype:
            return {"$dtype": str(value).removeprefix("torch.")}
        if kind is torch.device:
            return {"$device": str(value)}
        if kind is torch.Size:
            return {"$size": list(value)}
        if kind is np.ndarray and not value.dtype.hasobject and value.dtype.names is None:
            return self._ndarray(value, path)
        if isinstance(value, np.generic) and not value.dtype.hasobject and value.dtype.names is None:
            return {"$npscalar": [value.dtype.str, value.tobytes().hex()]}
        raise UnsupportedValueError(
            f"{path or 'the value'}: a {kind.__module__}.{kind.__qualname__} has no exact stored form; "
            "leave it out of the state, or give its owner a state_dict of numbers, strings, tensors and arrays"
        )

    def _sequence(self, value: Any, path: str, depth: int) -> Json:
        if len(value) >= _LONG_LIST:
            kinds = set(map(type, value))
            if kinds == {float}:
                return {"$numbers": self._add(path, torch.tensor(value, dtype=torch.float64)), "of": "float"}
            if kinds == {int} and all(-(2**63) <= number < 2**63 for number in value):
                return {"$numbers": self._add(path, torch.tensor(value, dtype=torch.int64)), "of": "int"}
        return [self.visit(item, f"{path}/{i}", depth + 1) for i, item in enumerate(value)]

    def _dict(self, value: dict[Any, Any], path: str, depth: int) -> Json:
        kind = type(value)
        if kind is dict and all(type(key) is str and not key.startswith("$") and key.isprintable() for key in value):
            return {key: self.visit(item, f"{path}/{key}" if path else key, depth + 1) for key, item in value.items()}
        pairs = [
            [
                self.visit(key, f"{path}/key", depth + 1),
                self.visit(item, f"{path}/{key!s}" if path else str(key), depth + 1),
            ]
            for key, item in value.items()
        ]
        if kind is dict:
            return {"$dict": pairs}
        if kind is Counter:
            return {"$counter": pairs}
        if kind is OrderedDict:
            # A module's state dict carries its versions in an attribute that load_state_dict reads.
            metadata = getattr(value, "_metadata", None)
            tree = {"$ordereddict": pairs}
            return (
                tree if metadata is None else {**tree, "metadata": self.visit(metadata, f"{path}/_metadata", depth + 1)}
            )
        if isinstance(value, defaultdict) and kind is defaultdict and value.default_factory in _FACTORY_NAMES:
            return {"$defaultdict": pairs, "factory": _FACTORY_NAMES[value.default_factory]}
        return self._leaf(value, path, depth)

    def _ndarray(self, array: np.ndarray[Any, Any], path: str) -> Json:
        order: Literal["C", "F"] = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
        data = np.frombuffer(array.tobytes(order), dtype=np.uint8).copy()
        name = self._add(path, torch.from_numpy(data))
        return {"$ndarray": name, "dtype": array.dtype.str, "shape": list(array.shape), "order": order}

    def _tensor(self, tensor: torch.Tensor, path: str) -> Json:
        kind = type(tensor)
        if kind not in (torch.Tensor, torch.nn.Parameter):
            raise UnsupportedValueError(f"{path}: tensors of type {kind.__qualname__} have no exact stored form here")
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
            raise UnsupportedValueError(
                f"{path}: a {tensor.layout} tensor of {tensor.dtype} on {tensor.device} cannot be stored; make it dense first"
            )
        plain = tensor.detach()
        identity = (
            plain.data_ptr(),
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
            tensor.device,
            plain.is_conj(),
            plain.is_neg(),
        )
        # Two empty tensors share the null address without being tied.
        if plain.numel() and identity in self._seen:
            stored = dict(self._seen[identity])
        else:
            stored = self._store(plain, path)
            self._seen[identity] = stored
            self._alive.append(plain)
        if kind is torch.nn.Parameter:
            stored = {**stored, "parameter": True}
        if tensor.requires_grad:
            stored = {**stored, "requires_grad": True}
        return stored

    def _store(self, plain: torch.Tensor, path: str) -> dict[str, Json]:
        tag: dict[str, Json] = {}
        if _is_dense(plain) and not plain.is_contiguous():
            # The bytes go out in memory order; the shape is put back with the strides.
            tag = {"shape": list(plain.shape), "stride": list(plain.stride())}
        plain = plain.resolve_conj().resolve_neg()
        if tag:
            plain = plain.as_strided((plain.numel(),), (1,)) if _is_dense(plain) else plain.contiguous()
        plain = plain.contiguous()
        if plain.is_complex():
            tag["complex"] = True
            plain = torch.view_as_real(plain)
        return {"$tensor": self._add(path, plain), **tag}

    def _add(self, path: str, tensor: torch.Tensor) -> str:
        name = path or "value"
        while name in self.tensors:  # {1: t, "1": t} would otherwise collide
            name += "'"
        self.tensors[name] = tensor
        return name


class _Unflattener:
    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._made: dict[tuple[Any, ...], torch.Tensor] = {}

    def visit(self, tree: Json, depth: int) -> Any:
        if depth > MAX_DEPTH * 3:  # a tag adds up to two levels
            raise CorruptCheckpointError("the stored tree is nested too deep")
        if isinstance(tree, list):
            return [self.visit(item, depth + 1) for item in tree]
        if not isinstance(tree, dict):
            return tree
        tag = next((key for key in tree if key.startswith("$")), None)
        if tag is None:
            return {key: self.visit(item, depth + 1) for key, item in tree.items()}
        return self._tagged(tag, tree[tag], tree, depth)

    def _tagged(self, tag: str, body: Json, tree: dict[str, Json], depth: int) -> Any:
        if tag == "$tensor":
            return self._tensor(body, tree)
        if tag == "$ndarray":
            data = self._tensors[body].numpy().tobytes()
            flat = np.frombuffer(data, dtype=np.dtype(tree["dtype"])).copy()
            return flat.reshape(tree["shape"], order="F" if tree["order"] == "F" else "C")
        if tag == "$numbers":
            return self._tensors[body].tolist()
        if tag == "$tuple":
            return tuple(self.visit(body, depth + 1))
        if tag in ("$dict", "$ordereddict", "$counter", "$defaultdict"):
            return self._mapping(tag, body, tree, depth)
        if tag in ("$set", "$frozenset"):
            items = self.visit(body, depth + 1)
            return set(items) if tag == "$set" else frozenset(items)
        return self._scalar(tag, body)

    def _mapping(self, tag: str, body: Json, tree: dict[str, Json], depth: int) -> Any:
        pairs = [(self.visit(key, depth + 1), self.visit(item, depth + 1)) for key, item in body]
        if tag == "$dict":
            return dict(pairs)
        if tag == "$counter":
            return Counter(dict(pairs))
        if tag == "$defaultdict":
            return defaultdict(_DEFAULT_FACTORIES[tree["factory"]], pairs)
        ordered = OrderedDict(pairs)
        if "metadata" in tree:
            ordered._metadata = self.visit(tree["metadata"], depth + 1)  # type: ignore[attr-defined]
        return ordered

    def _scalar(self, tag: str, body: Json) -> Any:
        if tag == "$int":
            return int(body, 16)
        if tag == "$float":
            return struct.unpack("<d", bytes.fromhex(body))[0]
        if tag == "$complex":
            return complex(*struct.unpack("<dd", bytes.fromhex(body)))
        if tag == "$str":
            return bytes.fromhex(body).decode("utf-8", "surrogatepass")
        if tag == "$bytes":
            return bytes.fromhex(body)
        if tag == "$bytearray":
            return bytearray.fromhex(body)
        if tag == "$dtype":
            return _DTYPES[body]
        if tag == "$device":
            return torch.device(body)
        if tag == "$size":
            return torch.Size(body)
        if tag == "$npscalar":
            return np.frombuffer(bytes.fromhex(body[1]), dtype=np.dtype(body[0]))[0]
        raise CorruptCheckpointError(f"the stored tree has an unknown tag {tag!r}")

    def _tensor(self, name: str, tree: dict[str, Json]) -> torch.Tensor:
        key = (name, bool(tree.get("parameter")), bool(tree.get("requires_grad")))
        if key in self._made:
            return self._made[key]
        tensor = self._tensors[name]
        if tree.get("complex"):
            tensor = torch.view_as_complex(tensor)
        if "stride" in tree:
            shape, stride = tree["shape"], tree["stride"]
            if math.prod(shape) != tensor.numel():
                raise CorruptCheckpointError(
                    f"tensor {name!r} has {tensor.numel()} elements, its shape {shape} wants others"
                )
            tensor = tensor.as_strided(shape, stride)
        if tree.get("parameter"):
            tensor = torch.nn.Parameter(tensor, requires_grad=bool(tree.get("requires_grad")))
        elif tree.get("requires_grad"):
            tensor = tensor.detach().requires_grad_()
        self._made[key] = tensor
        return tensor
