"""A table of per-sample values: columns whose row *i* is the sample at index *i*, and what they are about.

On disk it is one Arrow IPC file, which pandas, Polars and DuckDB open as it is. It is there whole, or not at all, and no
content of a file can do more than raise `StoreError`: every length in it is checked before memory is taken for it.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from blake3 import blake3

from onthefly.errors import InvalidCommandError, StoreError, said

Columns = Mapping[str, np.ndarray]

_FORMAT = 1
_METADATA = b"onthefly"
_ROWS = 65_536  # in a record batch: the most that is in memory twice while a file is read
_CHUNK = 1 << 22  # bytes hashed at once
_NUMBERS = {"?": pa.bool_()} | {code: pa.from_numpy_dtype(np.dtype(code)) for code in "bBhHiIlLqQefd"}
_TYPES = set(_NUMBERS.values())
_TEXT = pa.large_string()  # its offsets have 64 bits: a million paths may be more than 2 GiB


@dataclass(frozen=True, eq=False)  # arrays have no == of their own that says yes or no
class SampleTable:
    """Columns of equal length, and `about`: JSON that says what they are values of.

    A column is a NumPy array of booleans, integers or floats, [N] or (an embedding) [N, D], or of strings, [N].
    Raises `InvalidCommandError` for anything else.
    """

    columns: Columns
    about: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name, column in self.columns.items():
            _check(name, column)
        lengths = {name: len(column) for name, column in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise InvalidCommandError(f"the columns of a table must be equally long, and these are {lengths}")

    def __len__(self) -> int:
        return next((len(column) for column in self.columns.values()), 0)

    def write(self, path: str | os.PathLike[str]) -> str:
        """Put the table at `path`, durable. Gives the blake3 hash of the file, in hex: equal tables, equal hashes.

        Raises `StoreError` when it cannot be written; nothing is left of it then, and an older file there is as it was.
        Raises `InvalidCommandError` for an `about` that is no JSON, and for a string that is no valid Unicode.
        """
        fields = [pa.field(name, _type(column), nullable=False) for name, column in self.columns.items()]
        schema = pa.schema(fields, metadata={_METADATA: self._note()})
        with _replacing(Path(path)) as temporary:
            with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, schema) as writer:
                for start in range(0, len(self), _ROWS):
                    arrays = [_to_arrow(name, c[start : start + _ROWS]) for name, c in self.columns.items()]
                    writer.write_batch(pa.record_batch(arrays, schema=schema))
            return _hash(temporary)

    @classmethod
    def read(cls, path: str | os.PathLike[str], *, content: str | None = None) -> SampleTable:
        """The table in a file; strings come as arrays of `str` objects.

        With `content`, the hash that `write` gave, a file of other bytes is refused before anything in it is looked
        at. Raises `StoreError`, naming the file, for one that is missing, truncated, altered or foreign.
        """
        try:
            if content is not None and (found := _hash(Path(path))) != content:
                raise StoreError(
                    f"{path}: the file has changed since it was written: its hash is {found}, not {content}"
                )
            with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
                return cls._from(reader, file.size())
        except FileNotFoundError as e:
            raise StoreError(f"{path}: there is no such file") from e
        except (pa.ArrowException, OSError, ValueError, LookupError, MemoryError, RecursionError) as e:
            raise StoreError(f"{path}: this is no table of samples, or it is damaged: {said(e)}") from e

    @classmethod
    def _from(cls, reader: pa.RecordBatchFileReader, size: int) -> SampleTable:
        rows, about = _read_note(reader.schema)
        # `size` bytes of file hold so many values and no more, whatever its header says.
        bits = sum(_bits(field.type) for field in reader.schema)
        if rows * bits > size * 8:
            raise ValueError(f"{rows} rows are more than its {size} bytes can hold")
        columns = {field.name: _empty(field.type, rows) for field in reader.schema}
        if len(columns) != len(reader.schema):
            raise ValueError("two of its columns have the same name")
        filled = 0
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            batch.validate(full=True)
            if filled + batch.num_rows > rows:
                raise ValueError(f"it has more than its {rows} rows")
            for field, array in zip(reader.schema, batch.columns, strict=True):
                columns[field.name][filled : filled + batch.num_rows] = _from_arrow(field.name, array)
            filled += batch.num_rows
        if filled != rows:
            raise ValueError(f"it has {filled} of its {rows} rows")
        return cls(columns, about)

    def _note(self) -> bytes:
        note = {"format": _FORMAT, "rows": len(self), "about": dict(self.about)}
        try:
            return json.dumps(note, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
        except (TypeError, ValueError) as e:
            raise InvalidCommandError(f"what a table is about must be JSON: {e}") from e


def _read_note(schema: pa.Schema) -> tuple[int, dict[str, Any]]:
    """The number of rows, and what they are about."""
    note = json.loads((schema.metadata or {})[_METADATA])
    if not isinstance(note, dict) or note.get("format") != _FORMAT:
        raise ValueError("its format is not one that this version knows")
    rows, about = note.get("rows"), note.get("about")
    if type(rows) is not int or rows < 0 or not isinstance(about, dict):
        raise ValueError("its header does not say how many rows it has, or what about")
    return rows, about


def _check(name: str, column: np.ndarray) -> None:
    if not isinstance(column, np.ndarray):
        raise InvalidCommandError(f"{name}: a column must be a NumPy array, not a {type(column).__name__}")
    text = column.dtype.kind in "OU"
    if column.dtype.kind == "O" and not all(isinstance(value, str) for value in column):
        raise InvalidCommandError(f"{name}: the objects in a column must be strings")
    if not text and column.dtype.char not in _NUMBERS:
        raise InvalidCommandError(f"{name}: a column cannot hold values of type {column.dtype}")
    if column.ndim != 1 and (text or column.ndim != 2 or not column.shape[1]):
        raise InvalidCommandError(f"{name}: a column has one value a sample, [N], or [N, D], not {list(column.shape)}")


def _type(column: np.ndarray) -> pa.DataType:
    if column.dtype.kind in "OU":
        return _TEXT
    value = _NUMBERS[column.dtype.char]
    return value if column.ndim == 1 else pa.list_(pa.field("item", value, nullable=False), column.shape[1])


def _to_arrow(name: str, column: np.ndarray) -> pa.Array:
    if column.dtype.kind in "OU":
        try:
            return pa.array(column.tolist(), _TEXT)
        except UnicodeEncodeError as e:
            raise InvalidCommandError(f"{name}: {e.object!r} is no valid Unicode") from e
    native = np.ascontiguousarray(column, column.dtype.newbyteorder("="))
    values = pa.array(native.reshape(-1))
    return values if column.ndim == 1 else pa.FixedSizeListArray.from_arrays(values, type=_type(column))


def _from_arrow(name: str, array: pa.Array) -> np.ndarray:
    if array.null_count:
        raise ValueError(f"{name}: some of its values are missing")
    if not pa.types.is_fixed_size_list(array.type):
        values: np.ndarray = array.to_numpy(zero_copy_only=False)
        return values
    return _from_arrow(name, array.flatten()).reshape(len(array), array.type.list_size)


def _bits(kind: pa.DataType) -> int:
    """The least that one value takes in a file. Raises `ValueError` for a type that no column has."""
    if kind == _TEXT:
        return 64
    if pa.types.is_fixed_size_list(kind) and kind.value_type in _TYPES and kind.list_size > 0:
        return int(kind.list_size * kind.value_type.bit_width)
    if kind not in _TYPES:
        raise ValueError(f"a column of type {kind} is none of a table of samples")
    return int(kind.bit_width)


def _empty(kind: pa.DataType, rows: int) -> np.ndarray:
    if kind == _TEXT:
        return np.empty(rows, object)
    if pa.types.is_fixed_size_list(kind):
        return np.empty((rows, kind.list_size), kind.value_type.to_pandas_dtype())
    return np.empty(rows, kind.to_pandas_dtype())


def _hash(path: Path) -> str:
    found = blake3(max_threads=1)  # the training thread may want the other cores
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to. When the block ends well its file stands at `target`, durable."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)
    except OSError as e:
        raise StoreError(f"{target}: cannot write the table: {said(e)}") from e
    finally:
        with suppress(OSError):
            temporary.unlink()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
