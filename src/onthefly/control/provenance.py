"""Where a run comes from, written down once: its manifest."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from onthefly.control import commands
from onthefly.control.start import Change, Start, environment
from onthefly.errors import OnTheFlyError, said
from onthefly.runs.manifest import Manifest, Parent, code_version
from onthefly.samples.selection import Selection

Kind = Literal["root", "fork", "rewind", "merge"]


_PATIENCE = 2.0  # seconds with git; it is the start of a training that waits


class Provenance:
    """Writes the manifests of the runs that a session begins.

    The version of the code is looked up here and now, before there are loader workers: one that is forked while git is being
    started on another thread would hold git's pipe open, and that thread would wait for it as long as the worker lives.
    """

    def __init__(self, begun: Start) -> None:
        self._start = begun
        self._seed = torch.initial_seed()
        self._code = code_version(Path((begun.launch or {}).get("cwd", Path.cwd())), timeout=_PATIENCE)

    def manifest(
        self,
        run: str,
        kind: Kind,
        parents: Sequence[Mapping[str, Any]],
        selection: Selection | None,
        born: Sequence[Change],
        merge: Mapping[str, Any] | None = None,
    ) -> str | None:
        """Write the manifest of a run, and give its digest; None when the disk does not take it, which is logged."""
        launch = self._start.launch or {}
        changes: dict[str, Any] = {}
        for change in born:
            if isinstance(change, commands.SetValue):
                changes |= change.values
            elif selection is None:
                changes["selection"] = change.selection
        try:
            made = Manifest(
                run=run,
                kind=kind,
                created=time.time(),
                seed=self._seed,
                argv=tuple(launch.get("argv", ())),
                code=self._code,
                environment=environment(),
                parents=tuple(Parent(**parent) for parent in parents),
                selection=None if selection is None else selection.manifest(),
                changes=changes,
                merge=merge,
            )
            made.write(self._start.store.manifests_dir)
        except (OnTheFlyError, OSError) as e:
            logging.getLogger("onthefly").error("the manifest of %s is not written: %s", run, said(e))
            return None
        return made.digest
