"""What people write about runs: notes and tags, one file a run, beside the history and no part of it.

<store>/notes/<run>.json  {"notes": "...", "tags": ["..."]}
"""

from __future__ import annotations

import json
import os
import secrets
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from onthefly.errors import StoreError, said


@dataclass(frozen=True)
class Annotations:
    """A text, and words to find a run by."""

    notes: str = ""
    tags: tuple[str, ...] = ()


def read(store: Path, run: str) -> Annotations:
    """What is written about a run; nothing, if nobody has. Raises `StoreError` for a file that cannot be read."""
    try:
        return _parse(_path(store, run))
    except FileNotFoundError:
        return Annotations()


def read_all(store: Path) -> dict[str, Annotations]:
    """What is written about every run that somebody has written about."""
    found = {}
    for path in (store / "notes").glob("*.json"):
        with suppress(FileNotFoundError):
            found[path.stem] = _parse(path)
    return found


def write(store: Path, run: str, annotations: Annotations) -> None:
    """Replace what is written about a run, which exists. Raises `StoreError` when the disk does not take it."""
    path = _path(store, run)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        temporary.write_text(json.dumps(asdict(annotations)), "utf-8")
        os.replace(temporary, path)
    except OSError as e:
        raise StoreError(f"{path}: {said(e)}") from e
    finally:
        with suppress(OSError):
            temporary.unlink()


def _path(store: Path, run: str) -> Path:
    return store / "notes" / f"{run}.json"


def _parse(path: Path) -> Annotations:
    try:
        value = json.loads(path.read_text("utf-8"))
        return Annotations(str(value["notes"]), tuple(map(str, value["tags"])))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as e:
        raise StoreError(f"{path} holds no notes: {e}; remove it") from e
