"""Sessions: the training processes, alive or not."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from onthefly.hub.api.common import Here, Id, View, session_of
from onthefly.hub.stores import OpenStore, Pace
from onthefly.store.queries import SessionRow

router = APIRouter(prefix="/stores/{store}/sessions", tags=["sessions"])


class SessionView(View):
    """A training process. `speed` is steps a second, `memory` the bytes it has resident; null where they are not known."""

    id: int
    project: str
    run: str
    pid: int
    host: str
    status: str
    outcome: str | None
    alive: bool
    step: int
    epoch: int
    loss: float | None
    started: float
    heartbeat: float
    ended: float | None
    inexact: list[Any]
    config: dict[str, Any]
    environment: dict[str, Any]
    resumable: bool
    speed: float | None
    memory: int | None


def session_view(store: OpenStore, row: SessionRow, generations: dict[str, int]) -> SessionView:
    alive = row.ended is None and store.client.store.is_alive(row)
    pace = store.pace(row, generations.get(row.run, 0)) if alive else Pace(None, None)
    own = {name: getattr(row, name) for name in SessionView.model_fields if hasattr(row, name)}
    return SessionView(**own, alive=alive, resumable=row.launch is not None, speed=pace.speed, memory=pace.memory)


@router.get("")
def get_sessions(store: Here, alive: bool | None = None) -> list[SessionView]:
    """Sessions in the order in which they started; with `alive`, only those that live, or only those that do not."""
    store.recover()
    generations = {run.name: run.generation for run in store.client.runs()}
    return [session_view(store, row, generations) for row in store.client.sessions(alive=alive)]


@router.get("/{session}")
def get_session(store: Here, session: Id) -> SessionView:
    """One session."""
    store.recover()
    generations = {run.name: run.generation for run in store.client.runs()}
    return session_view(store, session_of(store, session), generations)
