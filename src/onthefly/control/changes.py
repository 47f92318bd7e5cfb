"""What commands change about the steps to come: live values, and the samples that are trained on.

A change is recorded with its boundary, and applied again there when steps are repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from onthefly.control import commands
from onthefly.control.start import Change, Due
from onthefly.errors import MissingPartError
from onthefly.samples.selection import Selection, find
from onthefly.state.knobs import Knobs
from onthefly.state.loader import ExactLoader

Changed = list[dict[str, Any]]
"""What became other than it was: each a name, with the value before and after."""


class Changes:
    """Applies changes, and knows those that are still to be applied again."""

    def __init__(
        self,
        knobs: Knobs,
        loader: ExactLoader | None,
        selections: Path,
        again: Iterable[Due],
        changed: Callable[[], None],
    ) -> None:
        self._knobs = knobs
        self._loader = loader
        self._selections = selections
        self._again = list(again)
        self._changed = changed  # called when the live state is no longer what was saved last

    def check(self, change: Change) -> None:
        """Raise what `apply` would raise, and change nothing."""
        if isinstance(change, commands.SetValue):
            self._knobs.plan(change.values, hold=change.hold, release=change.release)
        else:
            selection = self._selection(change)
            self._rebindable().check_subset(None if selection is None else selection.indices)

    def apply(self, change: Change) -> Changed:
        """Carry out a change. Raises, with nothing changed, what knobs and the loader raise.

        A `Subset` names a selection that was made before, or none for all samples.
        """
        if isinstance(change, commands.SetValue):
            found = self._knobs.set(change.values, hold=change.hold, release=change.release)
            changed = [asdict(one) for one in found]
        else:
            loader, selection = self._rebindable(), self._selection(change)
            before = loader.active
            loader.rebind(None if selection is None else selection.indices)
            changed = [{"name": "samples", "before": before, "after": loader.active}]
        if changed:
            self._changed()
        return changed

    def expect(self, again: Iterable[Due]) -> None:
        """From here on, these are to be applied again, each at its boundary; and no others."""
        self._again = list(again)

    def repeat(self, step: int, epoch: int) -> None:
        """Apply what an earlier process was told at this very boundary."""
        while self._again and self._again[0].is_due(step, epoch):
            self.apply(self._again.pop(0).command)

    @property
    def next_step(self) -> float:
        """The step of the boundary at which something is to be applied again."""
        return self._again[0].step if self._again else float("inf")

    def _rebindable(self) -> ExactLoader:
        if self._loader is None:
            raise MissingPartError("attach was given no train_loader, so there are no samples to choose from")
        return self._loader

    def _selection(self, change: commands.Subset) -> Selection | None:
        return None if change.selection is None else find(self._selections, change.selection)
