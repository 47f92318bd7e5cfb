"""Runs, their lineage, what is written about them, and what two of them differ in."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from onthefly.errors import OnTheFlyError, StoreError, UnknownReferenceError, said
from onthefly.hub import columns
from onthefly.hub.api.common import ChildrenHere, Here, RunName, View
from onthefly.hub.api.metrics import BINARY
from onthefly.hub.stores import OpenStore
from onthefly.runs import manifest as manifests
from onthefly.runs.lineage import Lineage
from onthefly.runs.manifest import Manifest
from onthefly.store import charts, notes, queries
from onthefly.store.notes import Annotations
from onthefly.store.queries import RunRow

router = APIRouter(prefix="/stores/{store}", tags=["runs"])

_OVERRIDE = re.compile(r"knobs/overrides/(.+)\.(\d+)\.([^./]+)/mode")
_LOG = 256 << 10  # bytes of a log in one answer
_COMPARING = 300.0  # seconds
_SCANNING = 3600.0


class ParentView(View):
    run: str
    hash: str


class RunView(View):
    """A run. `step` and `epoch` are the last that are recorded; `session` is the one that trains it now."""

    name: str
    project: str
    kind: str
    created: float
    status: str
    generation: int
    parents: list[ParentView]
    base: dict[str, Any] | None
    archived: float | None
    step: int
    epoch: int
    session: int | None
    tags: list[str]
    latest: dict[str, float]


class SegmentView(View):
    run: str
    first_step: int
    last_step: int | None


class SelectionView(View):
    digest: str
    count: int
    length: int
    recipe: dict[str, Any]


class RunDetail(RunView):
    """A run, with all that is known of where it comes from."""

    manifest: dict[str, Any] | None
    children: list[str]
    ancestors: list[str]
    path: list[SegmentView]
    notes: str
    metrics: list[str]
    selection: SelectionView | None
    settings: dict[str, Any]
    problems: list[str] = Field(description="What of it cannot be read.")


class ScanBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    ref: str = Field(max_length=1000, description="A run, for its newest checkpoint, or a checkpoint.")
    data: Literal["train", "val", "test"] = "train"
    embeddings: bool = False


class AnnotationsBody(BaseModel):
    notes: str = Field("", max_length=65536)
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]] = Field(default_factory=list, max_length=32)


class ArchiveBody(BaseModel):
    archived: bool = True


class Removed(View):
    run: str
    freed: int
    kept: int


class LogView(View):
    """A piece of a log: the text, where it ends, and how long the log is."""

    text: str
    next: int
    size: int


class ValuesView(View):
    """Knobs and values of optimizers, as of a checkpoint."""

    values: dict[str, Any]
    checkpoint: str
    step: int


class SubsetView(View):
    """Samples that a run was begun on: `count` of `length`, and the recipe that chose them."""

    count: int
    length: int
    recipe: dict[str, Any]


class NodeView(View):
    """A run. `subset` is what it was begun on, null for all samples; `generation` counts its resets."""

    id: str
    kind: str
    status: str
    step: int
    created: float
    archived: float | None
    generation: int
    subset: SubsetView | None


class EdgeView(View):
    """From a parent to a run that goes on from it, at a step if that is known, with what was changed there, and how it was merged."""

    from_: str = Field(serialization_alias="from")
    to: str
    kind: str
    hash: str
    step: int | None
    changes: dict[str, Any]
    strategy: str | None


class GraphView(View):
    nodes: list[NodeView]
    edges: list[EdgeView]


def run_views(
    store: OpenStore, rows: list[RunRow], latest: Mapping[str, Mapping[str, float]] | None = None
) -> list[RunView]:
    client = store.client
    heads = client.heads()
    live = {session.run: session for session in client.sessions(alive=True)}
    tags = notes.read_all(store.path)
    found = []
    for row in rows:
        step, epoch = heads.get(row.name, (0, 0))
        session = live.get(row.name)
        if session is not None:
            step, epoch = max(step, session.step), max(epoch, session.epoch)
        found.append(
            RunView(
                name=row.name,
                project=row.project,
                kind=row.kind,
                created=row.created,
                status=row.status,
                generation=row.generation,
                parents=[ParentView(run=run, hash=hash) for run, hash in row.parents],
                base=row.base,
                archived=row.archived,
                step=step,
                epoch=epoch,
                session=session.id if session is not None else None,
                tags=list(tags.get(row.name, Annotations()).tags),
                latest=dict((latest or {}).get(row.name, {})),
            )
        )
    return found


@router.get("/runs")
def get_runs(
    store: Here,
    archived: bool | None = None,
    metrics: Annotated[str, Query(max_length=2000, description="At most 8 names, with commas between them.")] = "",
) -> list[RunView]:
    """Every run, oldest first; with `archived`, only those that are, or are not; with `metrics`, their last values, too."""
    store.recover()
    names = [name for name in metrics.split(",") if name][:8]
    rows = [row for row in store.client.runs() if archived is None or (row.archived is not None) == archived]
    return run_views(store, rows, charts.last_values(store.client.store, names) if names else None)


@router.get("/runs/{run}")
def get_run(store: Here, run: RunName) -> RunDetail:
    """One run."""
    store.recover()
    client = store.client
    row = client.run(run)
    (view,) = run_views(store, [row])
    lineage = Lineage(client.runs())
    problems: list[str] = []
    manifest: dict[str, Any] | None = None
    if row.manifest is not None:
        try:
            manifest = asdict(manifests.read(client.store.manifests_dir / f"{row.manifest[:16]}.json"))
        except StoreError as e:
            problems.append(said(e))
    selection = None
    try:
        found = client.selection(run)
        selection = SelectionView(
            digest=found.digest, count=len(found.indices), length=found.length, recipe=dict(found.recipe)
        )
    except UnknownReferenceError:
        pass  # it is trained on all samples
    except OnTheFlyError as e:
        problems.append(said(e))
    try:
        path = [SegmentView(run=s.run, first_step=s.first_step, last_step=s.last_step) for s in lineage.path(run)]
    except StoreError as e:
        path = []
        problems.append(said(e))
    return RunDetail(
        **view.model_dump(),
        manifest=manifest,
        children=list(lineage.children(run)),
        ancestors=list(lineage.ancestors(run)),
        path=path,
        notes=notes.read(store.path, row.name).notes,
        metrics=client.metric_names(run),
        selection=selection,
        settings=queries.configs(client.store).get(run, {}),
        problems=problems,
    )


@router.put("/runs/{run}/annotations")
def put_annotations(store: Here, run: RunName, body: AnnotationsBody) -> AnnotationsBody:
    """Replace the notes and tags of a run."""
    row = store.client.run(run)
    tags = tuple(dict.fromkeys(body.tags))
    notes.write(store.path, row.name, Annotations(body.notes, tags))
    return AnnotationsBody(notes=body.notes, tags=list(tags))


@router.post("/runs/{run}/archive")
def archive_run(store: Here, run: RunName, body: ArchiveBody) -> RunView:
    """Leave a run out of lists, or take it in again. Nothing of it is removed."""
    (view,) = run_views(store, [store.client.archive(run, body.archived)])
    return view


@router.delete("/runs/{run}")
def remove_run(store: Here, run: RunName) -> Removed:
    """Remove what a run has on disk, but for what another run goes on from. Its history stays."""
    return Removed(**store.client.remove_run(run))


@router.get("/runs/{run}/log")
def get_log(store: Here, run: RunName, after: Annotated[int, Query(ge=-(2**53), le=2**53)] = 0) -> LogView:
    """What a run that was started beside another has printed, from a byte on; a negative one counts from the end."""
    path = store.client.store.log_path(store.client.run(run).name)
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            begin = min(size, after if after >= 0 else max(0, size + after))
            file.seek(begin)
            content = file.read(_LOG)
    except FileNotFoundError:
        raise UnknownReferenceError(f"{run!r} has no log: only a run that was started beside another has one") from None
    except OSError as e:
        raise StoreError(f"{path}: {said(e)}") from e
    return LogView(text=content.decode("utf-8", "replace"), next=begin + len(content), size=size)


@router.get("/runs/{run}/values")
def get_values(store: Here, run: RunName) -> ValuesView:
    """Knobs, and the plain values of optimizers (learning rates and the like), in the newest checkpoint of a run, or in the one that
    it began from. A value that was set stands in place of what its scheduler says; a warm-up after a merge is not in it.
    """
    row = store.client.run(run)
    rows = [own for own in store.client.checkpoints(row.name) if own.path.exists()]
    if not rows and row.base is not None:
        began = store.client.store.full_path(row.base["path"])
        rows = [other for other in store.client.checkpoints() if other.path == began and other.path.exists()]
    if not rows:
        raise UnknownReferenceError(f"{run!r} has no checkpoint yet")
    contents = store.client.show(str(rows[-1].path))
    values = {
        f"{part.name}/{path}": value
        for part in contents.parts
        if part.name in ("knobs", "optimizer", "scheduler")
        for path, value in part.values.items()
    }
    return ValuesView(values={**values, **_overridden(values)}, checkpoint=rows[-1].hash, step=rows[-1].step)


def _overridden(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of optimizers' groups that are not what the groups have: held ones, and factors of it (`state.knobs`)."""
    found = {}
    for path, mode in values.items():
        if override := _OVERRIDE.fullmatch(path):
            place = "{}/param_groups/{}/{}".format(*override.groups())
            given = values.get(path.removesuffix("mode") + "value")
            if place in values and given is not None:
                found[place] = values[place] * given if mode == "factor" else given
    return found


def _subset(manifest: Manifest | None) -> SubsetView | None:
    found = None if manifest is None else manifest.selection
    if found is None:
        return None
    return SubsetView(count=found["count"], length=found["length"], recipe=dict(found["recipe"]))


@router.get("/graph")
def get_graph(store: Here) -> GraphView:
    """Every run, and which comes from which. How it is laid out is the page's business."""
    rows = store.client.runs()
    steps = {row.hash: row.step for row in store.client.checkpoints(evicted=True)}
    views = run_views(store, rows)
    begun = {row.name: store.manifest(row) for row in rows}
    nodes = [
        NodeView(
            id=v.name,
            kind=v.kind,
            status=v.status,
            step=v.step,
            created=v.created,
            archived=v.archived,
            generation=v.generation,
            subset=_subset(begun[v.name]),
        )
        for v in views
    ]
    known = {row.name for row in rows}
    edges = []
    for row in rows:
        based = int(row.base["step"]) if row.base is not None and len(row.parents) == 1 else None
        manifest = begun[row.name]
        changes = {} if manifest is None else {k: v for k, v in manifest.changes.items() if k != "selection"}
        merge = None if manifest is None else manifest.merge
        edges += [
            EdgeView(
                from_=parent,
                to=row.name,
                kind=row.kind,
                hash=hash,
                step=steps.get(hash, based),
                changes=changes,
                strategy=None if merge is None else str(merge.get("strategy")),
            )
            for parent, hash in row.parents
            if parent in known
        ]
    return GraphView(nodes=nodes, edges=edges)


@router.get("/compare")
async def compare(
    store: Here,
    children: ChildrenHere,
    request: Request,
    a: Annotated[str, Query(max_length=100)],
    b: Annotated[str, Query(max_length=100)],
) -> dict[str, Any]:
    """What two runs differ in. It takes seconds: the weights of their newest checkpoints are compared, too."""
    for run in (a, b):
        store.client.run(run)
    found = await children.ask(["diff"], [a, b], store.path, request, timeout=_COMPARING)
    assert isinstance(found, dict)
    return found


@router.get("/compare/samples", response_class=Response, responses=BINARY)
def compare_samples(
    store: Here,
    a: Annotated[str, Query(max_length=100)],
    b: Annotated[str, Query(max_length=100)],
    data: Literal["train", "val", "test"] = "train",
) -> Response:
    """What became of every sample between the newest scans of two runs: its losses, and 1 for learned, -1 for forgotten."""
    found = store.client.sample_changes(a, b, data)
    learned, forgotten = int(found.learned.sum()), int(found.forgotten.sum())
    meta = {
        "by": found.by,
        "samples": len(found.before),
        "learned": learned,
        "forgotten": forgotten,
        "unchanged": len(found.before) - learned - forgotten,
    }
    change = found.learned.astype(np.int8) - found.forgotten.astype(np.int8)
    values = {"before": found.before, "after": found.after, "change": change}
    return Response(columns.pack(values, meta), media_type=columns.MEDIA_TYPE)


@router.post("/scan")
async def scan(store: Here, children: ChildrenHere, request: Request, body: ScanBody) -> dict[str, Any]:
    """Compute the loss of every sample under a checkpoint, in a process of its own: its run's command line is started again, and ends
    before it trains. For runs that no session is on; a session is asked by the command scanSamples."""
    options = ["scan", f"--data={body.data}", *(["--embeddings"] if body.embeddings else [])]
    found = await children.ask(options, [body.ref], store.path, request, timeout=_SCANNING)
    assert isinstance(found, dict)
    return found
