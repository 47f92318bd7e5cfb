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


class Provenance:
    """Writes the manifests of the runs that a session begins. The version of the code is looked up once."""

    def __init__(self, begun: Start) -> None:
        self._start = begun
        self._seed = torch.initial_seed()
        self._code: Mapping[str, Any] | None = None

    def manifest(
        self,
        run: str,
        kind: Kind,
        parents: Sequence[Mapping[str, Any]],
        selection: Selection | None,
        born: Sequence[Change],
    ) -> str | None:
        """Write the manifest of a run, and give its digest; None when the disk does not take it, which is logged.

        It may take as long as git does: call it on a thread that training does not wait for.
        """
        launch = self._start.launch or {}
        if self._code is None:
            self._code = code_version(Path(launch.get("cwd", Path.cwd())))
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
            )
            made.write(self._start.store.manifests_dir)
        except (OnTheFlyError, OSError) as e:
            logging.getLogger("onthefly").error("the manifest of %s is not written: %s", run, said(e))
            return None
        return made.digest
