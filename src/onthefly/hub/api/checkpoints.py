"""Checkpoints: listed, looked into, downloaded, kept and removed. A file is reached by its id in the list, and in no other way."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from onthefly.control.commands import LoadCheckpoint
from onthefly.errors import CheckpointNotFoundError, UnknownReferenceError
from onthefly.hub.api.commands import CommandView, Key, Wait, give
from onthefly.hub.api.common import LARGEST, AskerHere, Here, Id, View
from onthefly.hub.stores import OpenStore
from onthefly.store.queries import CheckpointRow

router = APIRouter(prefix="/stores/{store}/checkpoints", tags=["checkpoints"])


class CheckpointView(View):
    """A checkpoint, or what is left to say of one that was removed. `kept` are the reasons for which retention leaves it."""

    id: int
    run: str
    generation: int
    step: int
    epoch: int
    time: float
    path: str
    hash: str
    size: int
    reason: str
    pinned: bool
    metrics: dict[str, float]
    session: int
    kept: list[str]
    on_disk: bool
    evicted: float | None
    evicted_reason: str | None


class ContentsView(View):
    """What a checkpoint holds: its tensors and its plain values, part by part."""

    path: str
    hash: str
    size: int
    counters: dict[str, Any]
    parts: list[dict[str, Any]]


class CheckedView(View):
    hash: str
    size: int
    seconds: float


class PinBody(BaseModel):
    pinned: bool = True


class LoadBody(BaseModel):
    session: int = Field(ge=0, le=LARGEST)
    name: str | None = Field(None, max_length=100)


def checkpoint_views(store: OpenStore, rows: list[CheckpointRow]) -> list[CheckpointView]:
    kept = store.client.kept_because()
    found = []
    for row in rows:
        own = {
            name: getattr(row, name) for name in CheckpointView.model_fields if name not in ("path", "kept", "on_disk")
        }
        on_disk = row.evicted is None and row.path.is_file()
        found.append(CheckpointView(**own, path=str(row.path), kept=list(kept.get(row.id, ())), on_disk=on_disk))
    return found


def checkpoint_row(store: OpenStore, id: int) -> CheckpointRow:
    """Raises `UnknownReferenceError`."""
    for row in store.client.checkpoints(evicted=True):
        if row.id == id:
            return row
    raise UnknownReferenceError(f"there is no checkpoint {id}")


def _file_of(store: OpenStore, id: int) -> CheckpointRow:
    row = checkpoint_row(store, id)
    if row.evicted is not None or not row.path.is_file():
        raise CheckpointNotFoundError(f"checkpoint {id} ({row.path.name}) is gone: {row.evicted_reason or 'lost'}")
    return row


@router.get("")
def get_checkpoints(
    store: Here, run: Annotated[str | None, Query(max_length=100)] = None, evicted: bool = False
) -> list[CheckpointView]:
    """Checkpoints of a run, or of all, oldest first; `evicted` ones are gone but for their rows."""
    name = store.client.run(run).name if run is not None else None
    return checkpoint_views(store, store.client.checkpoints(name, evicted=evicted))


@router.get("/{checkpoint}")
def get_checkpoint(store: Here, checkpoint: Id) -> CheckpointView:
    """One checkpoint."""
    (view,) = checkpoint_views(store, [checkpoint_row(store, checkpoint)])
    return view


@router.get(
    "/{checkpoint}/file",
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {}}},
        206: {"content": {"application/octet-stream": {}}, "description": "The part that was asked for."},
        416: {"content": {"text/plain": {}}, "description": "The file has no such part."},
    },
)
def get_file(store: Here, checkpoint: Id) -> FileResponse:
    """The checkpoint's file, whole or in parts (`Range`)."""
    row = _file_of(store, checkpoint)
    headers = {"ETag": f'"{row.hash}"', "Cache-Control": "private, no-cache"}
    return FileResponse(row.path, media_type="application/octet-stream", filename=row.path.name, headers=headers)


@router.get("/{checkpoint}/contents")
def get_contents(store: Here, checkpoint: Id) -> ContentsView:
    """What the checkpoint holds, from its header alone."""
    found = store.client.show(str(_file_of(store, checkpoint).path))
    return ContentsView(
        path=str(found.path),
        hash=found.hash,
        size=found.size,
        counters=found.counters,
        parts=[asdict(part) for part in found.parts],
    )


@router.post("/{checkpoint}/check")
def check_checkpoint(store: Here, checkpoint: Id) -> CheckedView:
    """Hold every byte of the file against the hash that was recorded."""
    began = time.perf_counter()
    found = store.client.show(str(_file_of(store, checkpoint).path), verify=True)
    return CheckedView(hash=found.hash, size=found.size, seconds=time.perf_counter() - began)


@router.post("/{checkpoint}/pin")
def pin_checkpoint(store: Here, checkpoint: Id, body: PinBody, asker: AskerHere) -> CheckpointView:
    """Keep a checkpoint whatever retention says, or let retention have it again."""
    store.client.through(asker.door, asker.name).pin(str(_file_of(store, checkpoint).path), body.pinned)
    return get_checkpoint(store, checkpoint)


@router.delete("/{checkpoint}")
def remove_checkpoint(store: Here, checkpoint: Id, asker: AskerHere, force: bool = False) -> CheckpointView:
    """Remove a checkpoint with its file; its row stays. `force` also removes the newest of its run."""
    store.client.through(asker.door, asker.name).remove(str(_file_of(store, checkpoint).path), force=force)
    return get_checkpoint(store, checkpoint)


@router.post(
    "/{checkpoint}/load",
    responses={202: {"model": CommandView, "description": "It is queued, and not answered yet."}},
)
async def load_checkpoint(
    store: Here,
    checkpoint: Id,
    body: LoadBody,
    response: Response,
    asker: AskerHere,
    wait: Wait = 0.0,
    key: Key = None,
) -> CommandView:
    """Put the state of a checkpoint back into a live session, which goes on from there as a new run."""
    row = await run_in_threadpool(_file_of, store, checkpoint)
    command = LoadCheckpoint(path=str(row.path), hash=row.hash, name=body.name)
    return await give(store, body.session, command, wait, key, response, asker)
