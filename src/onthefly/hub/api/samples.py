"""Single samples: scans, training dynamics, selections. What a picture or a text looks like only the training process knows."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from onthefly import sample_values
from onthefly.errors import CommandError, InvalidCommandError, MissingPartError, StoreError, UnknownReferenceError
from onthefly.hub import columns
from onthefly.hub.api.common import ChildrenHere, Here, Id, View
from onthefly.hub.api.metrics import BINARY
from onthefly.hub.stores import OpenStore
from onthefly.samples import layout, recipes
from onthefly.samples.selection import Selection
from onthefly.samples.table import SampleTable
from onthefly.store.queries import ScanRow

router = APIRouter(prefix="/stores/{store}", tags=["samples"])

Data = Literal["train", "val", "test"]

_MAPPING = 3600.0  # seconds
_PIECE = 1 << 16


class ScanView(View):
    """Values of every sample of a data set under one state; `checkpoint` is that state's hash."""

    id: int
    run: str
    generation: int
    step: int
    epoch: int
    time: float
    checkpoint: str
    data: str
    columns: list[str]
    length: int
    seconds: float
    session: int


class HistogramView(View):
    """How many of the finite values lie between each two edges, and how many are not finite."""

    edges: list[float]
    counts: list[int]
    missing: int


class SelectionRowView(View):
    digest: str
    count: int
    length: int
    recipe: dict[str, Any]


class ChooseBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    recipe: Annotated[str, Field(max_length=100_000)] | dict[str, Any]
    source: Literal["scan", "dynamics"] | None = None


class Suspects(View):
    """How many of the chosen samples are likely label errors, which part of all samples is, and whether to warn."""

    count: int
    everywhere: float
    warn: bool


class ChosenView(View):
    indices: list[int]
    count: int
    length: int
    suspects: Suspects | None


class TagsView(View):
    """Words that people have given to a project's samples, each with the indices of its samples."""

    project: str
    data: str
    tags: dict[str, list[int]]


class TagBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    project: Annotated[str, Field(max_length=200)]
    data: Data = "train"
    tag: Annotated[str, Field(min_length=1, max_length=100)]
    indices: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=100_000)]
    tagged: bool = True


def _row(store: OpenStore, id: int) -> ScanRow:
    for row in store.client.scans():
        if row.id == id:
            return row
    raise UnknownReferenceError(f"there is no scan {id}")


def _binary(found: dict[str, np.ndarray], meta: dict[str, Any]) -> Response:
    return Response(columns.pack(found, meta), media_type=columns.MEDIA_TYPE)


@router.get("/scans")
def get_scans(
    store: Here,
    run: Annotated[str | None, Query(max_length=100)] = None,
    data: Annotated[str | None, Query(max_length=10)] = None,
) -> list[ScanView]:
    """Scans of a run, or of all, oldest first."""
    name = store.client.run(run).name if run is not None else None
    return [ScanView.model_validate(row) for row in store.client.scans(name) if data in (None, row.data)]


@router.get("/scans/{scan}/columns", response_class=Response, responses=BINARY)
def get_columns(
    store: Here,
    scan: Id,
    name: Annotated[list[str], Query(max_length=1000)] = [],  # noqa: B006  FastAPI copies it
) -> Response:
    """A scan's columns, all or some. Row i is the sample of index i."""
    table = store.scan(_row(store, scan))
    return _binary({key: _column(table, key) for key in name or table.columns}, dict(table.about))


@router.get("/scans/{scan}/map", response_class=Response, responses=BINARY)
async def get_map(
    store: Here, children: ChildrenHere, request: Request, scan: Id, method: Literal["pca", "umap"] = "pca"
) -> Response:
    """Where each sample's embedding lies in two dimensions: on the first two principal components of all, or by UMAP, which takes up to
    minutes the first time, in a process of its own."""
    row = await run_in_threadpool(_row, store, scan)
    if method == "umap":
        path = sample_values.map_path(store.client.store, row.hash, method)
        async with children.making(str(path)):
            if not path.is_file():
                if await request.is_disconnected():  # while it was waited for
                    raise CommandError("nobody waits for the answer any more")
                if method not in layout.methods():
                    raise MissingPartError("the hub has no umap-learn: pip install 'onthefly[umap]' where it runs")
                await children.ask(["map", f"--method={method}"], [str(scan)], store.path, request, timeout=_MAPPING)
    return await run_in_threadpool(_map, store, row, method)


def _map(store: OpenStore, row: ScanRow, method: str) -> Response:
    found = sample_values.sample_map(store.client.store, row, method, table=lambda: store.scan(row))
    return _binary(dict(found.columns), {**found.about, "methods": layout.methods()})


@router.get("/scans/{scan}/histogram")
def get_histogram(
    store: Here,
    scan: Id,
    column: Annotated[str, Query(max_length=1000)] = "loss",
    bins: Annotated[int, Query(ge=1, le=2000)] = 100,
) -> HistogramView:
    """How a column's values are spread."""
    values = _column(store.scan(_row(store, scan)), column)
    if values.dtype.kind not in "biuf" or values.ndim != 1:
        raise InvalidCommandError(f"{column!r} is no column of numbers")
    values = values.astype(np.float64)
    finite = values[np.isfinite(values)]
    counts, edges = np.histogram(finite, bins)
    return HistogramView(edges=edges.tolist(), counts=counts.tolist(), missing=len(values) - len(finite))


@router.get("/dynamics", response_class=Response, responses=BINARY)
def get_dynamics(store: Here, run: Annotated[str | None, Query(max_length=100)] = None) -> Response:
    """What training has recorded of every sample, as of the newest checkpoint: no columns where it has recorded nothing yet."""
    try:
        table = store.client.samples(run, dynamics=True)
    except UnknownReferenceError:
        if run is not None:
            store.client.run(run)  # there must be such a run
        return _binary({}, {})
    return _binary(dict(table.columns), dict(table.about))


@router.post("/samples/choose")
def choose(store: Here, body: ChooseBody) -> ChosenView:
    """Which samples a recipe gives, and how many of them are likely label errors. Nothing is changed."""
    recipe = recipes.parse(body.recipe) if isinstance(body.recipe, str) else recipes.check(body.recipe)
    known: dict[str, np.ndarray] = {}
    for dynamics in (True, False):
        if body.source in (None, "dynamics" if dynamics else "scan"):
            try:
                known |= store.client.samples(dynamics=dynamics).columns
            except UnknownReferenceError:
                continue
    if not known:
        raise UnknownReferenceError("nothing is known of any sample yet; a scan computes it")
    length = len(next(reversed(known.values())))
    fitting = {name: values for name, values in known.items() if len(values) == length}
    indices = recipes.choose(recipe, fitting, length)
    doubt = recipes.likely_label_errors(fitting, indices)
    return ChosenView(
        indices=indices.tolist(),
        count=len(indices),
        length=length,
        suspects=None if doubt is None else Suspects(count=doubt.chosen, everywhere=doubt.base, warn=doubt.rich),
    )


@router.get("/samples/shown/{key}", response_class=Response, responses=BINARY)
def get_shown(store: Here, key: Annotated[str, Path(pattern=r"^[0-9a-f]{32}$")]) -> Response:
    """What some samples are, as `showSamples` has read them: pixels, texts, first values, labels."""
    table = store.client.shown_samples(key)
    return _binary(dict(table.columns), dict(table.about))


@router.get("/samples/tags")
def get_tags(store: Here, project: Annotated[str, Query(max_length=200)], data: Data = "train") -> TagsView:
    """The tags of a project's samples."""
    return TagsView(project=project, data=data, tags=store.client.sample_tags(data, project=project))


@router.post("/samples/tags")
def post_tags(store: Here, body: TagBody) -> TagsView:
    """Give a tag to samples, or take it from them. `discarded` marks what nothing is to be trained on."""
    found = store.client.tag_samples(body.indices, body.tag, body.data, tagged=body.tagged, project=body.project)
    return TagsView(project=body.project, data=body.data, tags=found)


@router.get("/selections")
def get_selections(store: Here) -> list[SelectionRowView]:
    """Every selection that was made. One that is damaged is not listed: `onthefly fsck` tells of it."""
    found = []
    for path in sorted(store.client.store.scans_dir.glob("selection-*.arrow")):
        try:
            made = Selection.read(path)
        except StoreError:
            continue
        found.append(
            SelectionRowView(digest=made.digest, count=len(made.indices), length=made.length, recipe=dict(made.recipe))
        )
    return found


@router.get("/selections/{name}", response_class=Response, responses=BINARY)
def get_selection(store: Here, name: Annotated[str, Path(max_length=100)]) -> Response:
    """The samples that a run is trained on now, or the selection of that digest."""
    found = store.client.selection(name)
    return _binary({"index": found.indices}, {**found.manifest(), "digest": found.digest})


@router.get("/samples.csv", response_class=Response, responses={200: {"content": {"text/csv": {}}}})
def get_samples(store: Here, selection: Annotated[str | None, Query(max_length=100)] = None) -> StreamingResponse:
    """The samples of a run or of a selection, or all, with what is known of each, as CSV."""
    folder = tempfile.TemporaryDirectory(prefix="onthefly-")
    try:
        path = FilePath(folder.name) / "samples.csv"
        store.client.export_samples(path, selection=selection)
    except BaseException:
        folder.cleanup()
        raise

    def content() -> Iterator[bytes]:
        with folder, open(path, "rb") as file:
            while piece := file.read(_PIECE):
                yield piece

    headers = {"Content-Disposition": 'attachment; filename="samples.csv"'}
    return StreamingResponse(content(), media_type="text/csv; charset=utf-8", headers=headers)


def _column(table: SampleTable, name: str) -> np.ndarray:
    if name not in table.columns:
        raise UnknownReferenceError(f"there is no column {name!r}; there are: {', '.join(table.columns)}")
    return table.columns[name]
