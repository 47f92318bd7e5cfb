"""A selection: the samples that a recipe chose, with what they were chosen from. Its manifest makes it again."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from blake3 import blake3

from onthefly.errors import (
    AmbiguousError,
    InexactError,
    InvalidCommandError,
    StoreError,
    UnknownReferenceError,
    said,
)
from onthefly.samples import recipes

_METADATA = b"onthefly.selection"
_NAME_DIGITS = 16
_COLUMN = pa.schema([pa.field("index", pa.int64(), nullable=False)])


@dataclass(frozen=True, eq=False)
class Selection:
    """Chosen samples of a data set of `length` samples. Two are equal when their manifests are.

    `indices` are sorted unique int64. `sources` say which scans or dynamics the recipe read: JSON objects with `kind`
    ("scan" or "dynamics") and `hash`. Raises `InvalidCommandError` for anything else.
    """

    recipe: recipes.Recipe
    indices: np.ndarray
    length: int
    sources: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        indices = np.array(self.indices)  # a copy: it must stay what its digest says
        if indices.ndim != 1 or indices.dtype.kind not in "iu" or not len(indices):
            raise InvalidCommandError("a selection needs a list of one or more whole numbers as its indices")
        if np.any(indices[1:] <= indices[:-1]) or indices[0] < 0 or indices[-1] >= self.length:
            raise InvalidCommandError(f"indices are sorted, each once, and 0 to {self.length - 1}")
        indices = indices.astype(np.int64)
        indices.flags.writeable = False
        object.__setattr__(self, "indices", indices)
        object.__setattr__(self, "recipe", recipes.check(self.recipe))
        object.__setattr__(self, "sources", tuple(json.loads(_canonical(list(self.sources)))))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Selection) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def manifest(self) -> dict[str, Any]:
        """What it takes to make it again, and to know that it is the same: JSON."""
        return {
            "recipe": self.recipe,
            "length": int(self.length),
            "count": len(self.indices),
            "indices": blake3(self.indices.astype("<i8").tobytes()).hexdigest(),
            "sources": [dict(source) for source in self.sources],
        }

    @property
    def digest(self) -> str:
        """The blake3 of its manifest, 64 hex digits."""
        return blake3(_canonical(self.manifest())).hexdigest()

    @property
    def _name(self) -> str:
        return f"selection-{self.digest[:_NAME_DIGITS]}.arrow"

    def write(self, folder: Path) -> Path:
        """Make it durable in a folder as ``selection-<first 16 digits of the digest>.arrow``, and give its path.

        One that is there already is left alone, unless it is damaged. Raises `StoreError` when the disk does not take it.
        """
        target = folder / self._name
        with suppress(StoreError):
            if target.exists() and Selection.read(target) == self:
                return target
        schema = _COLUMN.with_metadata({_METADATA: _canonical(self.manifest())})
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, schema) as writer:
                writer.write_batch(pa.record_batch([pa.array(self.indices)], schema=schema))
            _sync(temporary)
            os.replace(temporary, target)
            _sync(folder)
        except OSError as e:
            raise StoreError(f"{target}: cannot write the selection: {said(e)}") from e
        finally:
            with suppress(OSError):
                temporary.unlink()
        return target

    @classmethod
    def read(cls, path: Path) -> Selection:
        """The selection in a file. Raises `StoreError`, naming the file, for one that is missing, altered, renamed or foreign."""
        try:
            content = Path(path).read_bytes()
            with pa.ipc.open_file(pa.BufferReader(content)) as reader:
                manifest = json.loads((reader.schema.metadata or {})[_METADATA])
                if reader.schema.remove_metadata() != _COLUMN or reader.num_record_batches != 1:
                    raise ValueError("it does not hold one column of indices")
                batch = reader.get_batch(0)
                batch.validate(full=True)
                if batch.num_rows * 8 > len(content) or batch.column(0).null_count:
                    raise ValueError("it holds fewer indices than it says")
                indices = batch.column(0).to_numpy()
            found = cls(manifest["recipe"], indices, manifest["length"], tuple(manifest["sources"]))
            if found.manifest() != manifest:
                raise ValueError("its indices are not those of its manifest")
            if Path(path).name != found._name:  # the only proof of the manifest itself
                raise ValueError(f"by its content it would be called {found._name}")
            return found
        except FileNotFoundError as e:
            raise StoreError(f"{path}: there is no such selection") from e
        except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, MemoryError, RecursionError) as e:
            raise StoreError(f"{path}: this is no selection, or it is damaged: {said(e)}") from e


def find(folder: Path, digest: str) -> Selection:
    """The selection in a folder whose digest begins so; 6 digits or more.

    Raises `UnknownReferenceError`, `AmbiguousError`, and `StoreError` for one that is damaged.
    """
    digits = digest.lower()
    if not re.fullmatch(r"[0-9a-f]{6,64}", digits):
        raise UnknownReferenceError(f"{digest!r} is not the start of a selection's digest: 6 to 64 digits, 0-9 and a-f")
    paths = sorted(folder.glob(f"selection-{digits[:_NAME_DIGITS]}*.arrow"))
    if len(paths) > 1:
        names = ", ".join(_digits(path) for path in paths)
        raise AmbiguousError(f"{digest!r} is the start of several selections: {names}; write more digits")
    found = Selection.read(paths[0]) if paths else None
    if found is None or not found.digest.startswith(digits):
        there_are = ", ".join(_digits(path) for path in sorted(folder.glob("selection-*.arrow"))[:12]) or "none yet"
        raise UnknownReferenceError(f"there is no selection {digest!r}; there are: {there_are}")
    return found


def reproduce(manifest: Mapping[str, Any], columns: recipes.Columns) -> Selection:
    """Make a selection again from its manifest, and the columns of its sources.

    Raises `InexactError` when other samples come out, and `InvalidCommandError` for what is no manifest.
    """
    try:
        recipe, length, sources = manifest["recipe"], int(manifest["length"]), tuple(manifest["sources"])
    except (LookupError, TypeError, ValueError) as e:
        raise InvalidCommandError(f"this is no manifest of a selection: {e}") from e
    made = Selection(recipe, recipes.choose(recipe, columns, length), length, sources)
    if made.manifest() != manifest:
        raise InexactError(
            f"{recipes.describe(made.recipe)} now gives {len(made.indices)} samples that are not the "
            f"{manifest.get('count')} of the manifest: these columns are not those that it was made from"
        )
    return made


def _digits(path: Path) -> str:
    return path.stem.removeprefix("selection-")


def _canonical(value: Any) -> bytes:
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as e:
        raise InvalidCommandError(f"the manifest of a selection must be JSON: {e}") from e


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
