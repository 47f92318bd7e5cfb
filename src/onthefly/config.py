"""What a session can be told when it starts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class SessionConfig:
    """Settings of a session. Every one has a default that is right for a first run.

    Raises `ValueError` for a count or an interval that is not positive.
    """

    project: str = "default"
    """Label that groups runs in a store."""
    run: str | None = None
    """Name of the run; a name that is taken gets a number. Default: `baseline`, `baseline2`, ..."""
    store: PathLike | None = None
    """Folder of the store. Default: `ONTHEFLY_STORE`, or `.onthefly` in the working directory."""
    save_dir: PathLike | None = None
    """Folder for checkpoints. Default: `checkpoints` in the store."""
    ckpt_keep: int = 3
    """How many of the newest checkpoints are kept, besides the origin, the best, and the pinned ones."""
    ckpt_keep_every: int | None = None
    """Keep, besides, every checkpoint whose step is a multiple of this."""
    ckpt_every_steps: int | None = None
    """Save each time this many steps were done."""
    ckpt_every_minutes: float | None = 5.0
    """Save at the first step boundary after this many minutes without a save."""
    ckpt_every_epoch: bool = True
    """Save at the end of each epoch, after the code that follows the epoch's last batch."""
    ckpt_staging: Literal["auto", "overlap", "boundary"] = "auto"
    """When a state is copied before it is written: `boundary`, all of it between two steps; `overlap`, what only
    `optimizer.step()` changes while the next forward and backward run. `auto` overlaps on CUDA, and on the CPU when torch
    leaves a core free. A script that writes to parameters by `.data` or NumPy before that step wants `boundary`."""
    ckpt_slots: int = 1
    """States that may be on their way to the disk at once; each takes as much memory as the state."""
    ckpt_when_busy: Literal["wait", "skip"] = "wait"
    """What a save that is due by steps or minutes does while all slots are in use; either way it is an event."""
    beside: int = 2
    """How many runs that this session started beside itself may run at once; more wait for their turn."""
    undo: bool = True
    """Save the state before a value or the samples are changed, so that the change can be taken back."""
    best_metric: str = "val_loss"
    """The logged number whose lowest value marks the best checkpoint. It must be logged in the step that is saved."""
    max_epochs: int | None = None
    """Where `for batch in session`, outside `epochs`, ends."""
    max_steps: int | None = None
    """Where any loop ends, whatever else it was told."""
    grad_clip: float | None = None
    """Largest gradient norm, applied just before each optimizer step; `onthefly set grad_clip=` changes it live."""
    exact_augmentation: bool = True
    """Seed every sample's augmentation by its position, so that loader workers can be repeated exactly."""
    ui: bool = False
    """Start the dashboard as a process of its own, if none serves the store, and say its URL. `ONTHEFLY_UI=1` does so, too."""
    handle_signals: bool = True
    """Finish the step, save and leave on SIGINT and SIGTERM (only in the main thread)."""

    def __post_init__(self) -> None:
        positive = ("ckpt_keep", "ckpt_keep_every", "ckpt_every_steps", "ckpt_every_minutes", "ckpt_slots", "beside")
        for name in (*positive, "max_epochs", "max_steps", "grad_clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"SessionConfig.{name} must be positive, not {value!r}")
        if self.ckpt_when_busy not in ("wait", "skip"):
            raise ValueError(f"SessionConfig.ckpt_when_busy is 'wait' or 'skip', not {self.ckpt_when_busy!r}")
        if self.ckpt_staging not in ("auto", "overlap", "boundary"):
            raise ValueError(
                f"SessionConfig.ckpt_staging is 'auto', 'overlap' or 'boundary', not {self.ckpt_staging!r}"
            )
