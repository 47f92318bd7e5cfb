"""The audit trail: who asked for what, through which door, and what came of it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from pydantic import Field
from sqlalchemy import select

from onthefly.errors import UnknownReferenceError
from onthefly.hub import events
from onthefly.hub.api.common import Here, View
from onthefly.store import queries, schema
from onthefly.store.queries import EventRow

router = APIRouter(prefix="/stores/{store}/events", tags=["events"])


class EventView(View):
    """A fact. Its id is unique in the store."""

    id: str
    session: int
    seq: int
    run: str | None
    generation: int | None
    step: int | None
    epoch: int | None
    time: float
    kind: str
    data: dict[str, Any]


Name = Annotated[str, Field(max_length=100)]


class EventPage(View):
    """Some events, the cursor behind them, and whether there are more now."""

    events: list[EventView]
    cursor: str
    more: bool


def event_view(row: EventRow) -> EventView:
    own = {name: getattr(row, name) for name in EventView.model_fields if name != "id"}
    return EventView(id=f"{row.session}.{row.seq}", **own)


@router.get("")
def get_events(
    store: Here,
    after: Annotated[str, Query(max_length=1 << 15, description="A cursor, or `now`.")] = "",
    newest: Annotated[int | None, Query(ge=1, le=1000, description="The last so many, instead.")] = None,
    run: Annotated[str | None, Query(max_length=100)] = None,
    kind: Annotated[list[Name], Query(max_length=50, description="Several times: any of them.")] = [],  # noqa: B006  FastAPI copies it
    limit: Annotated[int, Query(ge=1, le=1000)] = 500,
) -> EventPage:
    """Events from behind a cursor on. `run` and `kind` leave others out; the cursor goes past them."""
    store.recover()
    here = store.client.store
    now = events.positions(here)
    if newest is not None:
        rows = _newest(store, newest, run, kind)
        return EventPage(events=[event_view(row) for row in rows], cursor=events.write(now), more=False)
    if after == "now":
        return EventPage(events=[], cursor=events.write(now), more=False)
    page = events.after(here, events.read(after), now, limit)
    rows = [row for row in page.events if run in (None, row.run) and (not kind or row.kind in kind)]
    return EventPage(events=[event_view(row) for row in rows], cursor=events.write(page.cursor), more=page.more)


@router.get("/{event}")
def get_event(store: Here, event: Annotated[str, Path(pattern=r"^[0-9]{1,15}\.[0-9]{1,15}$")]) -> EventView:
    """One event, by its id."""
    session, seq = map(int, event.split("."))
    for row in queries.events(store.client.store, session=session, after=(session, seq - 1), limit=1):
        if row.seq == seq:
            return event_view(row)
    raise UnknownReferenceError(f"there is no event {event}")


def _newest(store: Here, count: int, run: str | None, kinds: list[str]) -> list[EventRow]:
    table = schema.event
    wanted = select(table).order_by(table.c.time.desc(), table.c.session.desc(), table.c.seq.desc()).limit(count)
    if run is not None:
        wanted = wanted.where(table.c.run == run)
    if kinds:
        wanted = wanted.where(table.c.kind.in_(kinds))
    with store.client.store.read() as connection:
        rows = [EventRow(**row) for row in connection.execute(wanted).mappings()]
    return rows[::-1]
