"""The hub itself, and the stores that it serves."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter, Request

from onthefly.hub.api.common import Here, StoresHere, View
from onthefly.hub.stores import OpenStore

router = APIRouter(tags=["stores"])


class StoreView(View):
    """A store. `sessions` are those that live."""

    id: str
    path: str
    name: str
    projects: list[str]
    sessions: int
    runs: int


class HubView(View):
    id: str
    version: str
    started: float
    stores: list[StoreView]


def store_view(store: OpenStore) -> StoreView:
    runs = store.client.runs()
    # A store is the folder .onthefly of a project, so its own name tells nothing.
    name = store.path.name if not store.path.name.startswith(".") else store.path.parent.name
    return StoreView(
        id=store.id,
        path=str(store.path),
        name=name,
        projects=sorted({run.project for run in runs}),
        sessions=len(store.client.sessions(alive=True)),
        runs=len(runs),
    )


@router.get("/hub")
def get_hub(request: Request, stores: StoresHere) -> HubView:
    """The hub, and what it serves."""
    return HubView(
        id=request.app.state.keys.hub,
        version=version("onthefly"),
        started=request.app.state.started,
        stores=[store_view(store) for store in stores],
    )


@router.get("/stores")
def get_stores(stores: StoresHere) -> list[StoreView]:
    """Every store that this hub serves."""
    return [store_view(store) for store in stores]


@router.get("/stores/{store}")
def get_store(store: Here) -> StoreView:
    """One store."""
    return store_view(store)
