"""Writing chosen samples, with what is known of each, for other tools: Parquet, CSV or JSON."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from pyarrow import csv, parquet

from onthefly.errors import InvalidCommandError, StoreError, said
from onthefly.samples.table import Columns

_ROWS = 65_536  # written at once
_FIRST = ("name", "label", "prediction", "loss")


@dataclass(frozen=True)
class Exported:
    """What was written: the file, how many samples it tells of, and "parquet", "csv" or "json"."""

    path: Path
    rows: int
    format: str


def export(
    columns: Columns,
    indices: np.ndarray,
    path: str | os.PathLike[str],
    *,
    columns_wanted: Sequence[str] | None = None,
) -> Exported:
    """Write a table of the chosen samples: `index` first, then name, label, prediction, loss, and whatever else there is.

    `columns` are [N], or [N, D] for embeddings, which only Parquet takes; `indices` are int [K], and rows come in their order. With
    `columns_wanted` only those are written, in that order. The kind of file is told by its name: ``.parquet``; ``.csv``, where NaN is
    an empty cell; or ``.json``, a list of records, where what is not finite is null. Besides the columns it needs memory for 65,536 rows.

    Raises `InvalidCommandError` for another name, a file that is there already, indices out of range, and a column that
    there is not, or that the file cannot hold; `StoreError` when the disk does not take it. Then there is no file.
    """
    target = Path(path)
    kind = target.suffix.lower().removeprefix(".")
    if kind not in _WRITERS:
        raise InvalidCommandError(f"{target}: samples are written to a .parquet, .csv or .json file")
    if target.exists():
        raise InvalidCommandError(
            f"{target}: there is such a file already, and it is not replaced; choose another name"
        )
    names = _names(columns, columns_wanted, kind)
    rows = _rows(columns, indices)
    batches = (
        _batch(columns, names, rows[start : start + _ROWS], kind) for start in range(0, max(len(rows), 1), _ROWS)
    )
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            _WRITERS[kind](batches, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as e:
        raise StoreError(f"{target}: cannot write the samples: {said(e)}") from e
    finally:
        with suppress(OSError):
            temporary.unlink()
    return Exported(target, len(rows), kind)


def _names(columns: Columns, wanted: Sequence[str] | None, kind: str) -> list[str]:
    """The columns to write, in their order."""
    known = [name for name in (*_FIRST, *columns) if name in columns and name != "index"]
    chosen = [name for name in wanted if name != "index"] if wanted is not None else known
    unknown = [name for name in chosen if name not in columns]
    if unknown:
        raise InvalidCommandError(f"there is no column {unknown[0]!r}; there are: {', '.join(dict.fromkeys(known))}")
    flat = [name for name in chosen if columns[name].ndim == 1]
    if wanted is not None and kind != "parquet" and len(flat) < len(chosen):
        several = next(name for name in chosen if name not in flat)
        raise InvalidCommandError(f"{several!r} is several numbers a sample: only a .parquet file holds that")
    return list(dict.fromkeys(chosen if kind == "parquet" else flat))


def _rows(columns: Columns, indices: np.ndarray) -> np.ndarray:
    rows = np.asarray(indices)
    if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
        raise InvalidCommandError(f"indices are whole numbers in one dimension, not {rows.dtype}{list(rows.shape)}")
    length = min((len(column) for column in columns.values()), default=0)
    if rows.size and not 0 <= rows.min() <= rows.max() < length:
        raise InvalidCommandError(f"there are no samples {rows.min()} to {rows.max()}: there are {length}, from 0 on")
    return rows.astype(np.int64, copy=False)


def _batch(columns: Columns, names: list[str], rows: np.ndarray, kind: str) -> Any:
    arrays = [pa.array(rows), *(_arrow(columns[name][rows], missing=kind != "parquet") for name in names)]
    return pa.RecordBatch.from_arrays(arrays, names=["index", *names])


def _arrow(values: np.ndarray, *, missing: bool) -> Any:
    """As Arrow; with `missing`, NaN is no value."""
    if values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    if values.dtype.kind in "fiub":
        return pa.array(values, from_pandas=missing)
    texts = [None if value is None else str(value) for value in values]
    # The names of files can hold bytes that are no Unicode.
    return pa.array([t and t.encode("utf-8", "backslashreplace").decode() for t in texts], pa.string())


def _parquet(batches: Iterator[Any], file: BinaryIO) -> None:
    first = next(batches)
    with parquet.ParquetWriter(file, first.schema) as writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(batch)


def _csv(batches: Iterator[Any], file: BinaryIO) -> None:
    first = next(batches)
    with csv.CSVWriter(file, first.schema) as writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(batch)


def _json(batches: Iterator[Any], file: BinaryIO) -> None:
    file.write(b"[")
    between = "\n"
    for batch in batches:
        parts: list[Any] = []
        for name, array in zip(batch.schema.names, batch.columns, strict=True):
            parts += [("{" if not parts else ", ") + json.dumps(name) + ": ", _json_values(array)]
        records = pc.binary_join_element_wise(*parts, "}", "").to_pylist()
        if records:
            file.write((between + ",\n".join(records)).encode())
            between = ",\n"
    file.write(b"\n]\n")


def _json_values(array: Any) -> Any:
    """Each value as JSON. A float32 gets the digits that a float32 needs."""
    if pa.types.is_string(array.type):
        return pa.array([json.dumps(text) for text in array.to_pylist()], pa.string())
    if pa.types.is_floating(array.type):
        array = pc.if_else(pc.is_finite(array), array, pa.scalar(None, array.type))
    return array.cast(pa.string()).fill_null("null")


_WRITERS = {"parquet": _parquet, "csv": _csv, "json": _json}
