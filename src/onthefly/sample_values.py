"""What a store knows of single samples, read without a session: scans, dynamics, selections. Loads no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onthefly.checkpoints.header import read_header
from onthefly.errors import InvalidCommandError, UnknownReferenceError
from onthefly.runs.references import IMPORTED
from onthefly.samples import recipes
from onthefly.samples.dynamics_columns import read_columns
from onthefly.samples.export import Exported
from onthefly.samples.export import export as write
from onthefly.samples.selection import Selection, find
from onthefly.samples.table import SampleTable
from onthefly.store import queries

if TYPE_CHECKING:
    from onthefly.store.queries import CheckpointRow, EventRow, RunRow
    from onthefly.store.store import Store

_VALUES = "dynamics/values"
"""The tensor of a checkpoint that holds what training has recorded of each sample."""


def of(store: Store, run: str | None, *, dynamics: bool = False, data: str = "train") -> SampleTable:
    """The newest scan of `data`, of a run or of any; with `dynamics`, what the newest checkpoint has recorded.

    Raises `UnknownReferenceError` when there is none, `StoreError` for a damaged file, and `CheckpointError`.
    """
    return _dynamics(store, run) if dynamics else _scan(store, run, data)


def selection(store: Store, name: str) -> Selection:
    """The samples that a run is trained on now, or the selection of that digest.

    Raises `UnknownReferenceError` for a run that is trained on all samples, and for a name that is neither.
    """
    run = queries.run(store, name)
    if run is None:
        return find(store.scans_dir, name)
    branched: CheckpointRow | None = None  # where the run below leaves this one: what came after is no business of it
    while run is not None:
        changes = [
            event
            for event in queries.events(store, run.name, kinds=["command"])
            if event.data.get("kind") == "subset" and _is_of(event, run, branched)
        ]
        if changes:
            digest = changes[-1].data["arguments"].get("selection")
            if digest is None:
                break
            return find(store.scans_dir, str(digest))
        rows = queries.checkpoints(store, evicted=True)
        base, parents = run.base, [parent for parent, _ in run.parents]
        branched = next((row for row in rows if base and row.hash == base["hash"] and row.run in parents), None)
        run = queries.run(store, branched.run) if branched is not None else None
    raise UnknownReferenceError(f"{name!r} is trained on all samples")


def export(store: Store, path: Path, name: str | None, recipe: recipes.Recipe | None) -> Exported:
    """Write chosen samples, with the values of the newest scan and what training has recorded, as far as they are there.

    Raises `InvalidCommandError` when both a name and a recipe are given, and as `samples.export.export`.
    """
    if name is not None and recipe is not None:
        raise InvalidCommandError("give a selection or a recipe, not both")
    columns: dict[str, np.ndarray] = {}
    for known in (True, False):
        try:
            columns |= of(store, None, dynamics=known).columns
        except UnknownReferenceError:
            continue
    chosen = selection(store, name) if name is not None else None
    if chosen is not None:
        columns = {key: values for key, values in columns.items() if len(values) == chosen.length}
        indices = chosen.indices
    else:
        if not columns:
            raise UnknownReferenceError("nothing is known of any sample yet; `onthefly scan` computes it")
        length = len(next(iter(columns.values())))
        columns = {key: values for key, values in columns.items() if len(values) == length}
        indices = recipes.choose(recipe, columns, length) if recipe is not None else np.arange(length)
    return write(columns, indices, path)


def _is_of(event: EventRow, run: RunRow, until: CheckpointRow | None) -> bool:
    """Whether a run stands behind this change of it: now, or at a checkpoint of it."""
    if until is None:
        return event.generation == run.generation
    changed, saved = (event.epoch or 0, event.step or 0), (until.epoch, until.step)
    before = changed < saved or (changed == saved and (event.session, event.seq) <= (until.session, until.captured))
    return event.generation == until.generation and before


def _scan(store: Store, run: str | None, data: str) -> SampleTable:
    rows = [row for row in queries.scans(store, run=run) if row.data == data and row.path.exists()]
    if not rows:
        of_run = f" of {run!r}" if run is not None else ""
        raise UnknownReferenceError(f"there is no scan{of_run} of the {data} data yet; `onthefly scan` makes one")
    return SampleTable.read(rows[-1].path, content=rows[-1].hash)


def _dynamics(store: Store, run: str | None) -> SampleTable:
    rows = [row for row in queries.checkpoints(store, run) if row.reason != IMPORTED and row.path.exists()]
    for row in reversed(rows):
        header = read_header(row.path)
        found = next((tensor for tensor in header.tensors if tensor.name == _VALUES), None)
        if found is None:
            break
        with open(row.path, "rb") as file:
            content = os.pread(file.fileno(), found.end - found.begin, found.begin)
        values = np.frombuffer(content, np.float32).reshape(found.shape)
        about = {"run": row.run, "step": row.step, "epoch": row.epoch, "checkpoint": row.hash, "data": "train"}
        return SampleTable(read_columns(values), about)
    raise UnknownReferenceError(
        "training has recorded nothing of single samples as of the newest checkpoint: the Trainer does by itself, another loop by "
        "session.log_samples(losses); `onthefly save` makes a newer one"
    )
