"""Scanning a checkpoint beside the training: the recorded command line is started again, and scans instead of training.

Whoever asks records what comes of it. Nothing here loads torch; the process that scans does.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onthefly.errors import CheckpointNotFoundError, StoreError
from onthefly.runs import replay as replaying
from onthefly.samples.table import SampleTable
from onthefly.store import queries
from onthefly.store.store import Store

if TYPE_CHECKING:
    from onthefly.store.queries import CheckpointRow

Tell = Callable[[str], object]
"""It is told what the process is doing: "starting", "scanning 40%"."""


@dataclass(frozen=True)
class Job:
    """What is to be scanned, and how its run was started. `autocast`: the device and dtype with which it was trained."""

    checkpoint: CheckpointRow
    data: str
    embeddings: bool
    launch: Mapping[str, Any]
    autocast: Mapping[str, str] | None = None


def scan(job: Job, scans: Path, *, timeout: float | None = None, tell: Tell | None = None) -> SampleTable:
    """The table of a checkpoint, computed in a fresh process. Selections are read from `scans`; `timeout` is in seconds.

    Raises `CheckpointNotFoundError` when its file is gone, and `ResumeError`, quoting the process's last words, when that ends
    without a table.
    """
    row = job.checkpoint
    if not row.path.is_file():
        raise CheckpointNotFoundError(errno.ENOENT, "the checkpoint to scan is gone", str(row.path))
    with replaying.workroom(row.path, ".scan-") as folder, ExitStack() as stack:
        out = folder / "scanned.arrow"
        orders = {
            "checkpoint": str(replaying.held(row.path, folder / "start.safetensors")),
            "hash": row.hash,
            "run": row.run,
            "generation": row.generation,
            "until": [row.step, row.epoch],
            "commands": [],
            "out": str(out),
            "scans": str(scans.absolute()),
            "scan": {"data": job.data, "embeddings": job.embeddings},
            "autocast": job.autocast,
        }
        look = None
        if tell is not None:
            progress = _Progress(replaying.store_in(folder), tell)
            stack.callback(progress.close)
            look = progress.look
        replaying.run(job.launch, orders, folder, aim=f"scanned {row.run}@{row.step}", timeout=timeout, look=look)
        return SampleTable.read(out)


class _Progress:
    """Reads how far the process is from the store that it writes to. Owns its connection to that."""

    def __init__(self, folder: Path, tell: Tell) -> None:
        self._folder = folder
        self._tell = tell
        self._store: Store | None = None

    def look(self) -> None:
        with suppress(StoreError):  # it is not there yet, or busy: what is shown is old for a moment
            self._store = self._store or Store.open(self._folder)
            for session in queries.sessions(self._store):
                self._tell(session.status)

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
