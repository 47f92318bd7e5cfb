"""The sidecar: what a list of checkpoints shows, read without opening the large files.

`<checkpoint>.meta.json` stands beside every checkpoint. It is a convenience: a checkpoint proves itself, and one whose
sidecar is missing or damaged is as good as before. This module owns the names of checkpoint files, too.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from onthefly.checkpoints.durable import replace_durably
from onthefly.checkpoints.header import FORMAT_VERSION, recorded_hash
from onthefly.errors import CheckpointError, CheckpointWriteError

Number = int | float | bool | None

_NAME = re.compile(
    r"(?P<run>.+?)(?:-g(?P<generation>[0-9]+))?-step(?P<step>[0-9]{8,})(?:-v(?P<variant>[0-9]+))?\.safetensors",
    re.DOTALL,
)
_LOOKS_NUMBERED = re.compile(r".+-g[0-9]+", re.DOTALL)


@dataclass(frozen=True)
class Sidecar:
    """What is known of a checkpoint file beside its content. `time` is in seconds since the epoch, `size` in bytes."""

    path: Path
    run: str | None
    generation: int
    step: int | None
    epoch: int | None
    time: float
    size: int
    hash: str
    reason: str
    counters: Mapping[str, Number] = field(default_factory=dict)
    format: int = FORMAT_VERSION


# -- names -----------------------------------------------------------------------------------------------------


def name_for(run: str, step: int, generation: int = 0, variant: int = 0) -> str:
    """The file name of a run's checkpoint: ``baseline-step00001200.safetensors``, ``baseline-g2-step00001200.safetensors``.

    A `variant` is another state of the same step, beside one that is to stay: ``baseline-step00001200-v1.safetensors``.
    Raises `ValueError` for a run that cannot be part of a file name, and for negative numbers.
    """
    if not run or run.startswith(".") or "/" in run or "\0" in run or step < 0 or generation < 0:
        raise ValueError(f"no file name for run {run!r}, generation {generation}, step {step}")
    # A run that is itself called "x-g2" says its generation always, or it could be taken for the third of "x".
    middle = f"-g{generation}" if generation or _LOOKS_NUMBERED.fullmatch(run) else ""
    return f"{run}{middle}-step{step:08d}{f'-v{variant}' if variant else ''}.safetensors"


def free_path(folder: Path, run: str, step: int, generation: int) -> Path:
    """Where another state of a step goes in a folder: the first variant of its name that nothing has yet."""
    variants = (folder / name_for(run, step, generation, variant) for variant in itertools.count())
    return next(path for path in variants if not os.path.lexists(path))


def parse_name(filename: str) -> tuple[str, int, int] | None:
    """The (run, generation, step) whose `name_for` gives this file name, or None for any other name."""
    found = _parse(filename)
    return None if found is None else found[:3]


def _parse(filename: str) -> tuple[str, int, int, int] | None:
    match = _NAME.fullmatch(filename)
    if match is None:
        return None
    run, generation, step, variant = match["run"], *(int(match[n] or 0) for n in ("generation", "step", "variant"))
    try:
        return (run, generation, step, variant) if name_for(run, step, generation, variant) == filename else None
    except ValueError:
        return None


def newest(folder: str | os.PathLike[str], run: str) -> Path | None:
    """The checkpoint of a run with the highest generation, and in it the highest step, going by the names alone."""
    found: list[tuple[int, int, int, Path]] = []
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return None
    for entry in entries:
        parsed = _parse(entry.name)
        if parsed is not None and parsed[0] == run and entry.is_file():
            found.append((*parsed[1:], Path(entry.path)))
    return max(found)[-1] if found else None


# -- sidecars --------------------------------------------------------------------------------------------------


def path_of(path: str | os.PathLike[str]) -> Path:
    """Where the sidecar of a checkpoint stands."""
    return Path(f"{os.fspath(path)}.meta.json")


def write_sidecar(path: str | os.PathLike[str], sidecar: Sidecar) -> None:
    """Write the sidecar of the checkpoint at `path`, whole or not at all. Raises `CheckpointWriteError`.

    A counter that is not finite becomes null, since JSON has no word for it.
    """
    record = asdict(sidecar) | {"path": str(sidecar.path), "counters": _plain(sidecar.counters)}
    text = json.dumps(record, indent=1, allow_nan=False)
    replace_durably(path_of(path), text.encode("ascii"))


def describe(
    path: str | os.PathLike[str],
    hash: str,
    size: int,
    counters: Mapping[str, Any],
    *,
    run: str | None,
    generation: int,
    step: int | None,
    epoch: int | None,
    reason: str,
) -> None:
    """Write the sidecar of a checkpoint that is saved. Where that fails it is logged: the checkpoint is whole without it."""
    path = Path(path)
    sidecar = Sidecar(
        path=path.absolute(),
        run=run,
        generation=generation,
        step=step,
        epoch=epoch,
        time=time.time(),
        size=size,
        hash=hash,
        reason=reason,
        counters=counters,
    )
    try:
        write_sidecar(path, sidecar)
    except CheckpointWriteError as e:
        logging.getLogger(__name__).warning("%s is saved, its sidecar is not: %s", path, e)


def read_sidecar(path: str | os.PathLike[str]) -> Sidecar | None:
    """The sidecar of the checkpoint at `path`, or None when it is missing, damaged, or tells of another content.

    Its `path` is where the checkpoint is now, wherever it was written. Of the checkpoint, a hundred bytes are read.
    """
    try:
        record = json.loads(path_of(path).read_bytes())
        sidecar = Sidecar(**{f.name: record[f.name] for f in fields(Sidecar)} | {"path": Path(path)})
        if not _is_sound(sidecar) or recorded_hash(path) != sidecar.hash or os.path.getsize(path) != sidecar.size:
            return None  # killed between a checkpoint and its sidecar, the older sidecar would be believed
    except (OSError, CheckpointError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return sidecar


def _plain(counters: Mapping[str, Any]) -> dict[str, Number]:
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in counters.items()}  # NumPy's
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in plain.items()}


def _is_sound(sidecar: Sidecar) -> bool:
    return (
        isinstance(sidecar.hash, str)
        and isinstance(sidecar.reason, str)
        and (sidecar.run is None or isinstance(sidecar.run, str))
        and all(type(n) is int for n in (sidecar.generation, sidecar.size, sidecar.format))
        and all(n is None or type(n) is int for n in (sidecar.step, sidecar.epoch))
        and type(sidecar.time) in (int, float)
        and isinstance(sidecar.counters, dict)
        and all(v is None or isinstance(v, int | float) for v in sidecar.counters.values())
    )
