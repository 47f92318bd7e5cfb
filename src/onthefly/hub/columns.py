"""Columns of numbers as bytes: what goes to a page without being turned into text. docs/api.md has the form."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

MEDIA_TYPE = "application/vnd.onthefly.columns"
_MAGIC = b"OTF1"
_TYPES = {"<f8": "f8", "<f4": "f4", "<i4": "i4", "|u1": "u1"}


def pack(columns: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> bytes:
    """Columns, [N] or [N, D], of numbers, booleans or texts, and what they are about, which must be JSON."""
    described, parts, offset = [], [], 0
    for name, column in columns.items():
        kind, content = _content(column)
        width = column.shape[1] if column.ndim > 1 else 1
        about: dict[str, Any] = {"name": name, "type": kind, "offset": offset, "length": len(column), "width": width}
        if kind == "json":
            about["bytes"] = len(content)
        described.append(about)
        fill = -len(content) % 8
        parts += [content, bytes(fill)]
        offset += len(content) + fill
    head = json.dumps({"columns": described, "meta": finite(meta)}, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([_MAGIC, len(head).to_bytes(4, "little"), head, *parts])


def unpack(content: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Columns and meta, as `pack` was given them. For programs and tests."""
    if content[:4] != _MAGIC:
        raise ValueError("these are no columns")
    begin = 8 + int.from_bytes(content[4:8], "little")
    head = json.loads(content[8:begin])
    columns: dict[str, Any] = {}
    for about in head["columns"]:
        at = begin + about["offset"]
        if about["type"] == "json":
            columns[about["name"]] = json.loads(content[at : at + about["bytes"]])
            continue
        found = np.frombuffer(content, f"<{about['type']}", about["length"] * about["width"], at)
        columns[about["name"]] = found.reshape(-1, about["width"]) if about["width"] > 1 else found
    return columns, head["meta"]


def finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _content(column: np.ndarray) -> tuple[str, bytes]:
    if column.dtype.kind in "OU":
        return "json", json.dumps(column.tolist()).encode()
    if column.dtype.kind == "b":
        column = column.view(np.uint8)
    elif column.dtype.kind in "iu" and column.dtype != np.uint8:
        small = not column.size or (column.min() >= -(2**31) and column.max() < 2**31)
        column = column.astype("<i4" if small else "<f8")
    elif column.dtype.kind == "f" and column.dtype.itemsize < 4:
        column = column.astype("<f4")
    column = np.ascontiguousarray(column, column.dtype.newbyteorder("<"))
    return _TYPES[column.dtype.str], column.tobytes()
