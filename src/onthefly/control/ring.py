"""The checkpoints of a run that are on disk: their names, which of them stay, and which is the best."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from onthefly.checkpoints import retention, sidecar
from onthefly.config import SessionConfig
from onthefly.control.history import History
from onthefly.errors import InvalidCommandError
from onthefly.runs.references import IMPORTED


@dataclass(frozen=True)
class Kept:
    """A checkpoint of this run that is on disk."""

    path: Path
    hash: str
    size: int
    generation: int
    step: int
    epoch: int
    reason: str
    pinned: bool
    metric: float | None


class Ring:
    """Owns the list of a run's checkpoints. The training thread and the writer's thread share it."""

    def __init__(
        self,
        folder: Path,
        history: History,
        config: SessionConfig,
        kept: Iterable[Kept] = (),
        needed: Iterable[Path] = (),
    ) -> None:
        self.folder = folder
        self._history = history
        self._config = config
        self._kept: list[Kept] = list(kept)
        self._needed: set[str] = {str(path) for path in needed}
        self._held = ""
        self._lock = threading.RLock()
        self._log = logging.getLogger("onthefly")

    def need(self, path: Path) -> None:
        """Say that a run stands on this file; retention leaves it."""
        with self._lock:
            self._needed.add(str(path))

    @contextmanager
    def needing(self, paths: Iterable[Path]) -> Iterator[None]:
        """Leave these files while something is made of them."""
        with self._lock:
            lent = {str(path) for path in paths} - self._needed
            self._needed |= lent
        try:
            yield
        finally:
            with self._lock:
                self._needed -= lent

    def discard(self, kept: Kept) -> None:
        """A checkpoint is of no use after all."""
        with self._lock:
            self._remove(kept, "given up")

    def hold(self, path: Path) -> None:
        """Leave this file, too, so that the last change can be taken back; the one that was held before is free again."""
        with self._lock:
            self._held = str(path)

    def origin(self) -> Kept | None:
        """The checkpoint of the run's own that it began with."""
        with self._lock:
            return next((kept for kept in self._kept if kept.reason == retention.ORIGIN), None)

    def find(self, path: Path) -> Kept | None:
        """The checkpoint of the run's own that is at this path."""
        with self._lock:
            return next((kept for kept in self._kept if kept.path == path), None)

    def newest(self) -> Kept | None:
        """The checkpoint that was saved last."""
        with self._lock:
            return self._kept[-1] if self._kept else None

    def make_room(self, size: int, reason: str) -> None:
        """Where the disk has no room for a checkpoint of so many bytes, let go now what retention would let go after it.

        The newest one stays: until the new one is durable, it is the last.
        """
        with self._lock:
            incoming = Kept(Path(), "", size, 0, 0, 0, reason, False, None)
            for kept in self._going([*self._kept, incoming]):
                if shutil.disk_usage(self.folder).free >= size:
                    return
                if kept is not self._kept[-1]:
                    self._remove(kept, "room")

    def add(self, kept: Kept) -> None:
        """A checkpoint is durable and recorded. What retention lets go, and what it stands in for, goes."""
        with self._lock:
            self._kept = [k for k in self._kept if k.path != kept.path]
            place = (kept.generation, kept.step, kept.epoch)
            for old in [k for k in self._kept if (k.generation, k.step, k.epoch) == place and self._may_go(k)]:
                self._remove(old, "replaced")
            self._kept.append(kept)
            for old in self._going(self._kept):
                self._remove(old, "retention")

    def pin(self, path: Path, pinned: bool) -> Kept:
        """Pin or unpin a checkpoint. Raises `InvalidCommandError` for one that is not of this run."""
        with self._lock:
            kept = replace(self._own(path), pinned=pinned)
            self._kept = [kept if k.path == path else k for k in self._kept]
            return kept

    def remove(self, path: Path) -> Kept:
        """Remove a checkpoint. Raises `InvalidCommandError` for one that is not of this run, or that it stands on."""
        with self._lock:
            kept = self._own(path)
            if kept.reason == retention.ORIGIN or str(path) in self._needed:
                raise InvalidCommandError(f"{path}: the run stands on this checkpoint; it cannot be removed")
            self._remove(kept, "removed")
            return kept

    def clear(self) -> None:
        """Evict what the run saved so far, but for its origin, and what is pinned, needed or held."""
        with self._lock:
            for kept in [kept for kept in self._kept if self._may_go(kept)]:
                self._remove(kept, "reset")

    def leave_line(self, step: int) -> None:
        """The run went back to this step: none of the checkpoints behind it is its best any more."""
        with self._lock:
            self._kept = [replace(kept, metric=None) if kept.step > step else kept for kept in self._kept]

    def _own(self, path: Path) -> Kept:
        kept = self.find(path)
        if kept is None:
            raise InvalidCommandError(
                f"{path}: the session on {self._history.run} keeps no such checkpoint. One that was saved to a path of its own is "
                "left alone while the session lives; afterwards it can be pinned, unpinned and removed"
            )
        return kept

    def _may_go(self, kept: Kept) -> bool:
        return kept.reason != retention.ORIGIN and not kept.pinned and not self._is_needed(kept)

    def _is_needed(self, kept: Kept) -> bool:
        return str(kept.path) in self._needed or str(kept.path) == self._held

    def _going(self, kept: list[Kept]) -> list[Kept]:
        candidates = [
            retention.Candidate(
                id=number,
                step=k.step,
                order=number,
                reason=k.reason,
                metric=k.metric,
                pinned=k.pinned,
                needed=self._is_needed(k),
                foreign=k.reason == IMPORTED,
            )
            for number, k in enumerate(kept)
        ]
        config = self._config
        return [kept[c.id] for c in retention.evict(candidates, config.ckpt_keep, config.ckpt_keep_every)]

    def _remove(self, kept: Kept, reason: str) -> None:
        # Written down first: a row without a file would be a promise, a file without a row is only litter.
        self._history.evicted(str(kept.path), kept.hash, reason)
        self._kept = [k for k in self._kept if k is not kept]
        try:
            kept.path.unlink(missing_ok=True)
            sidecar.path_of(kept.path).unlink(missing_ok=True)
        except OSError as e:
            self._log.warning("cannot remove the evicted checkpoint %s: %s", kept.path, e)
