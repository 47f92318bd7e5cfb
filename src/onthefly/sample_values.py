"""What a store knows of single samples, read without a session: scans, dynamics, selections. Loads no torch."""

from __future__ import annotations

import logging
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

from onthefly.checkpoints.header import read_header
from onthefly.errors import InvalidCommandError, StoreError, UnknownReferenceError, said
from onthefly.runs.references import IMPORTED
from onthefly.samples import layout, recipes
from onthefly.samples.dynamics_columns import read_columns
from onthefly.samples.export import Exported
from onthefly.samples.export import export as write
from onthefly.samples.selection import Selection, find
from onthefly.samples.table import SampleTable
from onthefly.store import queries, tags

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from onthefly.store.queries import CheckpointRow, EventRow, RunRow, ScanRow
    from onthefly.store.store import Store

_KEY = re.compile(r"[0-9a-f]{32}")
_VALUES = "dynamics/values"
"""The tensor of a checkpoint that holds what training has recorded of each sample."""


@dataclass(frozen=True)
class Scanned:
    """Values of one data set under one state."""

    table: SampleTable
    path: Path
    hash: str
    data: str
    checkpoint: str
    step: int
    seconds: float
    again: bool  # it was there already

    def told(self) -> dict[str, Any]:
        """It, as an answer."""
        about = {"data": self.data, "samples": len(self.table), "columns": list(self.table.columns)}
        losses = self.table.columns["loss"]
        finite = losses[np.isfinite(losses)]
        mean = float(finite.mean()) if len(finite) else None
        where = {"path": str(self.path), "checkpoint": self.checkpoint, "step": self.step}
        return {**about, "loss": mean, "seconds": self.seconds, "again": self.again, **where}


def known(store: Store, checkpoint: str, data: str, *, embeddings: bool) -> Scanned | None:
    """The newest good scan of `data` under the state of that hash. One that is damaged is passed over, and said."""
    for row in reversed(queries.scans(store, checkpoint=checkpoint)):
        if row.data == data and row.path.exists() and (not embeddings or "embedding" in row.columns):
            try:
                table = SampleTable.read(row.path, content=row.hash)
            except StoreError as e:
                logging.getLogger("onthefly").warning("the state is scanned again: %s", said(e))
                continue
            return Scanned(table, row.path, row.hash, data, checkpoint, row.step, row.seconds, again=True)
    return None


def place(store: Store, checkpoint: str, data: str, *, embeddings: bool) -> Path:
    """Where the scan of a state is kept."""
    return store.scans_dir / f"{checkpoint[:16]}-{data}{'-embeddings' if embeddings else ''}.arrow"


def shown_key(session: int, data: str, length: int, indices: Sequence[int]) -> str:
    """What the contents of some samples are known by: the data set that a session has, and which of its samples."""
    told = f"{session} {data} {length} {','.join(map(str, indices))}"
    return blake3(told.encode()).hexdigest(32)[:32]


def shown_path(store: Store, key: str) -> Path:
    """Where the contents of samples are kept. Nothing needs them: they can be read again."""
    return store.scans_dir / f"shown-{key}.arrow"


def forget_shown(store: Store, keep: int = 100) -> None:
    """Remove the contents of samples that were read long ago, but for the newest files."""
    files = [path for path in caches(store) if path.name.startswith("shown-")]
    for path in files[: max(0, len(files) - keep)]:
        path.unlink(missing_ok=True)


def caches(store: Store) -> list[Path]:
    """Files that are made again when they are asked for: contents of samples, and maps. The oldest first."""
    found = []
    for pattern in ("shown-*.arrow", "map-*.arrow"):
        for path in store.scans_dir.glob(pattern):
            with suppress(FileNotFoundError):
                found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found)]


def shown(store: Store, key: str) -> SampleTable:
    """The contents of samples that a session has read: see `onthefly.samples.contents.columns`.

    Raises `UnknownReferenceError` when there are none under that key, and `StoreError` for a damaged file.
    """
    if not _KEY.fullmatch(key) or not (path := shown_path(store, key)).is_file():
        raise UnknownReferenceError(
            f"there are no samples {key!r}; `onthefly show` reads samples from a session's data set"
        )
    return SampleTable.read(path)


def map_path(store: Store, scan: str, method: str) -> Path:
    """Where a map is kept that took long to make. `scan` is the hash of the scan's table."""
    return store.scans_dir / f"map-{method}-{scan[:32]}.arrow"


def sample_map(
    store: Store, scan: ScanRow, method: str, *, table: Callable[[], SampleTable] | None = None
) -> SampleTable:
    """Where each sample of a scan lies in two dimensions: columns x, y. One by umap is made once, and kept.

    `table` gives the scan's values, when somebody has them. Raises `UnknownReferenceError` for a scan without embeddings, `StoreError`,
    and as `onthefly.samples.layout.places`.
    """
    path = map_path(store, scan.hash, method)
    if method != "pca" and path.is_file():
        return SampleTable.read(path)
    values = table() if table is not None else SampleTable.read(scan.path, content=scan.hash)
    name = next((name for name, column in values.columns.items() if column.ndim == 2), None)
    if name is None:
        raise UnknownReferenceError(f"scan {scan.id} has no embeddings; a scan makes them when it is asked to")
    x, y = layout.places(values.columns[name], method)
    made = SampleTable({"x": x, "y": y}, {"by": method, "column": name, "scan": scan.hash})
    if method != "pca":
        made.write(path)
    return made


def of(store: Store, run: str | None, *, dynamics: bool = False, data: str = "train") -> SampleTable:
    """The newest scan of `data`, of a run or of any; with `dynamics`, what the newest checkpoint has recorded.

    Raises `UnknownReferenceError` when there is none, `StoreError` for a damaged file, and `CheckpointError`.
    """
    if dynamics:
        return _dynamics([row for row in queries.checkpoints(store, run) if row.reason != IMPORTED])
    of_run = f" of {run!r}" if run is not None else ""
    return _scan(queries.scans(store, run=run), data, of_run)


def of_state(store: Store, checkpoint: str, *, dynamics: bool = False, data: str = "train") -> SampleTable:
    """The newest scan of `data` under the state of that hash; with `dynamics`, what training had recorded there. Raises as `of`."""
    if dynamics:
        return _dynamics([row for row in queries.checkpoints(store) if row.hash == checkpoint])
    return _scan(queries.scans(store, checkpoint=checkpoint), data, f" of {checkpoint[:12]}", f" {checkpoint[:12]}")


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
            table = of(store, None, dynamics=known)
        except UnknownReferenceError:
            continue
        columns |= {**table.columns, **tag_column(store, str(table.about.get("run")), len(table))}
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


def tag_column(store: Store, run: str, length: int) -> dict[str, np.ndarray]:
    """The column `tags` of the train data of a run's project; no column when nobody has tagged any of it."""
    row = queries.run(store, run)
    found = tags.read(store, row.project, "train") if row is not None else {}
    return {"tags": tags.column(found, length)} if found else {}


def _is_of(event: EventRow, run: RunRow, until: CheckpointRow | None) -> bool:
    """Whether a run stands behind this change of it: now, or at a checkpoint of it."""
    if until is None:
        return event.generation == run.generation
    changed, saved = (event.epoch or 0, event.step or 0), (until.epoch, until.step)
    before = changed < saved or (changed == saved and (event.session, event.seq) <= (until.session, until.captured))
    return event.generation == until.generation and before


def _scan(rows: Sequence[ScanRow], data: str, of: str, ref: str = "") -> SampleTable:
    there = [row for row in rows if row.data == data and row.path.exists()]
    if not there:
        raise UnknownReferenceError(f"there is no scan{of} of the {data} data yet; `onthefly scan{ref}` makes one")
    return SampleTable.read(there[-1].path, content=there[-1].hash)


def _dynamics(rows: Sequence[CheckpointRow]) -> SampleTable:
    for row in reversed([row for row in rows if row.path.exists()]):
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
        "training has recorded nothing of single samples as of that checkpoint, or the newest: the Trainer does by itself, another loop by "
        "session.log_samples(losses); `onthefly save` makes a newer one"
    )
