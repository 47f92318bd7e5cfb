"""Checkpoints of a live run: when one is due, where it goes, and which ones stay."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onthefly.checkpoints import format, retention, sidecar
from onthefly.config import SessionConfig
from onthefly.control.history import History
from onthefly.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    StateError,
    StateMismatchError,
)
from onthefly.state.train_state import TrainState, Value
from onthefly.state.tree import flatten, unflatten


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


class Checkpointer:
    """Saves the train state at a boundary, records it once it is durable, and evicts what retention lets go.

    Owns the list of the run's checkpoints on disk. A failed save leaves every older checkpoint where it is.
    """

    def __init__(
        self, state: TrainState, folder: Path, history: History, config: SessionConfig, kept: Iterable[Kept] = ()
    ) -> None:
        self._state = state
        self._folder = folder
        self._history = history
        self._config = config
        self._kept: list[Kept] = list(kept)
        self._latest: Kept | None = None  # made by this process, of a state that nothing has changed since
        self._needed: set[str] = set()
        self.next_step = float("inf")
        self.next_time = float("inf")
        self._log = logging.getLogger("onthefly")
        self.postpone()

    def postpone(self) -> None:
        """Count steps and minutes to the next save from now."""
        config, step = self._config, int(self._state.counters.get("step") or 0)
        if config.ckpt_every_steps:
            self.next_step = (step // config.ckpt_every_steps + 1) * config.ckpt_every_steps
        if config.ckpt_every_minutes:
            self.next_time = time.monotonic() + 60 * config.ckpt_every_minutes

    def need(self, paths: Iterable[Path]) -> None:
        """Say which files the lineage stands on; retention leaves them."""
        self._needed = {str(path) for path in paths}

    def changed(self) -> None:
        """The live state is not what was saved last, though the step is the same."""
        self._latest = None

    def save(self, reason: str, *, gradients: bool = False, pin: bool = False, path: Path | None = None) -> Kept:
        """Save the train state of this boundary; on return it is durable and recorded.

        A state that is already saved is not written again. Raises `CheckpointWriteError` or `UnsupportedValueError`,
        after recording a `checkpointFailed` event; nothing is lost by it but the new checkpoint.
        """
        self.postpone()
        step, epoch = self._coordinate()
        latest = self._latest
        if (
            latest is not None
            and path is None
            and (latest.step, latest.epoch) == (step, epoch)
            and latest.path.exists()
        ):
            if pin and not latest.pinned:
                latest = replace(latest, pinned=True)
                self._record(latest, self._history.seq)
                self._keep(latest)
            return latest
        captured = self._history.seq
        try:
            written, target = self._write(reason, gradients, path)
        except (CheckpointError, StateError) as e:
            self._history.event("checkpointFailed", step, epoch, reason=reason, error=type(e).__name__, message=str(e))
            self._log.error("checkpoint at step %d was not saved: %s", step, e)
            raise
        kept = Kept(
            path=target,
            hash=written.hash,
            size=written.size,
            generation=self._history.generation,
            step=step,
            epoch=epoch,
            reason=reason,
            pinned=pin or path is not None,
            metric=self._metric(step),
        )
        self._record(kept, captured)
        if path is None:
            self._latest = kept
            self._keep(kept)
        return kept

    def read(self, path: Path, content: str | None = None) -> tuple[Value, format.CheckpointFile]:
        """The whole value of a checkpoint, after checking every byte.

        Raises `CheckpointNotFoundError`, `CorruptCheckpointError`, or the latter when its hash is not the wanted one, and
        `StateMismatchError` for a checkpoint that no session made.
        """
        file = format.open_checkpoint(path)
        if content is not None and not file.hash.startswith(content):
            raise CorruptCheckpointError(f"{path}: its content is {file.hash[:12]}, not {content[:12]}")
        value = unflatten(file.tree, file.tensors)
        counters = value.get("counters") if isinstance(value, dict) else None
        if not isinstance(counters, dict) or not all(type(counters.get(name)) is int for name in ("step", "epoch")):
            raise StateMismatchError(f"{path}: it was not saved by a session: it does not tell its step and epoch")
        return value, file

    def origin(self) -> Kept:
        """The checkpoint that the run began with. Raises `CheckpointNotFoundError` when it could not be saved."""
        for kept in self._kept:
            if kept.reason == retention.ORIGIN:
                return kept
        raise CheckpointNotFoundError("this run has no origin checkpoint: it could not be saved when the run began")

    def clear(self) -> None:
        """Evict what the run saved so far, but for its origin and what is pinned or needed."""
        for kept in list(self._kept):
            if kept.reason != retention.ORIGIN and not kept.pinned and str(kept.path) not in self._needed:
                self._remove(kept, "reset")

    def keeps(self, path: Path) -> bool:
        """Whether this is a checkpoint of the run's own."""
        return any(kept.path == path for kept in self._kept)

    def adopt(self, path: Path) -> None:
        """The live state is that of this checkpoint."""
        self._latest = next((kept for kept in self._kept if kept.path == path), None)
        self.postpone()

    def leave_line(self, step: int) -> None:
        """The run went back to this step: none of the checkpoints behind it is its best any more."""
        self._kept = [replace(kept, metric=None) if kept.step > step else kept for kept in self._kept]

    # -- inside ------------------------------------------------------------------------------------------------

    def _coordinate(self) -> tuple[int, int]:
        counters = self._state.counters
        return int(counters["step"] or 0), int(counters["epoch"] or 0)

    def _metric(self, step: int) -> float | None:
        counters = self._state.counters
        name = self._config.best_metric
        value = counters.get(name)
        return float(value) if value is not None and counters.get(f"{name}_step") == step else None

    def _write(self, reason: str, gradients: bool, path: Path | None) -> tuple[format.Written, Path]:
        step, epoch = self._coordinate()
        generation = self._history.generation
        target = path or self._free_path(step, generation)
        tree, tensors = flatten(self._state.capture(gradients=gradients))
        written = format.write(target, tree, tensors)
        about: Mapping[str, Any] = {
            "run": self._history.run,
            "generation": generation,
            "step": step,
            "epoch": epoch,
            "reason": reason,
        }
        sidecar.describe(target, written.hash, written.size, self._state.counters, **about)
        return written, target

    def _free_path(self, step: int, generation: int) -> Path:
        """Where this state goes. One that is to stay is not overwritten by another of the same step."""
        staying = {
            k.path for k in self._kept if k.pinned or k.reason == retention.ORIGIN or str(k.path) in self._needed
        }
        for variant in itertools.count():
            path = self._folder / sidecar.name_for(self._history.run, step, generation, variant)
            if path not in staying:
                return path
        raise AssertionError("counting has come to an end")

    def _record(self, kept: Kept, captured: int) -> None:
        self._history.checkpoint(
            step=kept.step,
            epoch=kept.epoch,
            path=str(kept.path),
            hash=kept.hash,
            size=kept.size,
            reason=kept.reason,
            pinned=kept.pinned,
            captured=captured,
            metrics={} if kept.metric is None else {self._config.best_metric: kept.metric},
        )

    def _keep(self, kept: Kept) -> None:
        self._kept = [k for k in self._kept if k.path != kept.path] + [kept]
        candidates = [
            retention.Candidate(
                id=str(kept.path),
                step=kept.step,
                order=order,
                reason=kept.reason,
                metric=kept.metric,
                pinned=kept.pinned,
                needed=str(kept.path) in self._needed,
            )
            for order, kept in enumerate(self._kept)
        ]
        going = {candidate.id for candidate in retention.evict(candidates, self._config.ckpt_keep)}
        for kept in [k for k in self._kept if str(k.path) in going]:
            self._remove(kept, "retention")

    def _remove(self, kept: Kept, reason: str) -> None:
        # Written down first: a row without a file would be a promise, a file without a row is only litter.
        self._history.evicted(str(kept.path), kept.hash, reason)
        self._kept.remove(kept)
        try:
            kept.path.unlink(missing_ok=True)
            sidecar.path_of(kept.path).unlink(missing_ok=True)
        except OSError as e:
            self._log.warning("cannot remove the evicted checkpoint %s: %s", kept.path, e)
