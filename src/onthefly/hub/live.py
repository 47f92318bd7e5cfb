"""The WebSocket of a tab: what has changed since its last frame, as soon as that is drawn.

Nothing is queued for a tab. A frame is made when the tab has drawn the one before and something has changed, of what is the
case then: a slow page gets fewer frames, and a hidden one costs nothing. docs/api.md has the messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sqlite3
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.concurrency import run_in_threadpool

from onthefly.errors import InvalidCommandError, OnTheFlyError, said
from onthefly.hub import columns, events
from onthefly.hub.api.common import problem
from onthefly.hub.api.events import EventView, event_view
from onthefly.hub.api.metrics import SeriesBody
from onthefly.hub.api.sessions import SessionView, session_view
from onthefly.hub.api.stores import store_view
from onthefly.hub.charts import Drawn, Question
from onthefly.hub.events import Cursor
from onthefly.hub.stores import ChangeWatch, OpenStore, Stores

router = APIRouter()
_log = logging.getLogger("onthefly")

_LOOK = 0.05  # seconds between two looks whether a store has changed
_CARRY = 0.1  # seconds between two looks into the journals of live sessions
_PULSE = 1.0  # seconds between two looks for what changes without a commit: a process that dies
_EVENTS = 500  # in a frame
_CHARTS = 64  # of a store, in a tab
_LONGEST = 1 << 16  # bytes of a message


class Follow(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["follow"]
    store: str
    cursor: str | None = None
    sessions: bool = True
    events: bool = True


class Unfollow(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["unfollow"]
    store: str


class Chart(SeriesBody):
    id: str = Field(max_length=200)


class Charting(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["charts"]
    store: str
    charts: list[Chart] = Field(max_length=_CHARTS)


class Drawing(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["drawn"]
    frame: int


_MESSAGE: TypeAdapter[Follow | Unfollow | Charting | Drawing] = TypeAdapter(
    Annotated[Follow | Unfollow | Charting | Drawing, Field(discriminator="type")]
)


@dataclass(frozen=True)
class Snapshot:
    """A store at one moment, made once for all tabs."""

    version: int
    sessions: list[SessionView]
    runs: int
    now: Cursor


class Feed:
    """Watches one store while tabs follow it, and tells them when it has changed."""

    def __init__(self, store: OpenStore) -> None:
        self.store = store
        self.version = 0
        self._listeners: set[asyncio.Event] = set()
        self._task: asyncio.Task[None] | None = None
        self._snapshot: Snapshot | None = None
        self._making = asyncio.Lock()

    def listen(self, event: asyncio.Event) -> None:
        self._listeners.add(event)
        if self._task is None or self._task.done():
            self.version += 1  # nobody has looked since the last tab went
            self._task = asyncio.create_task(self._watch())

    def leave(self, event: asyncio.Event) -> None:
        self._listeners.discard(event)
        if not self._listeners and self._task is not None:
            self._task.cancel()
            self._task = None

    async def snapshot(self) -> Snapshot:
        """The store as it is now. Raises `StoreError`."""
        async with self._making:
            kept, version = self._snapshot, self.version
            if kept is None or kept.version != version:
                kept = self._snapshot = await run_in_threadpool(_snapshot, self.store, version)
            return kept

    async def _watch(self) -> None:
        watch: ChangeWatch | None = None
        pulse = carried = time.monotonic()
        try:
            while True:
                try:
                    if watch is None:
                        watch = ChangeWatch(self.store.path)
                    if time.monotonic() - carried >= _CARRY:
                        carried = time.monotonic()
                        await run_in_threadpool(self.store.carrier.carry)
                    changed = watch.changed()
                    if time.monotonic() - pulse >= _PULSE:
                        pulse = time.monotonic()
                        await run_in_threadpool(self.store.recover)
                except (sqlite3.Error, OSError, OnTheFlyError):  # every tab finds it, too, and says so
                    changed = True
                    if watch is not None:
                        watch.close()
                        watch = None
                    await asyncio.sleep(_PULSE)
                if changed:
                    self.version += 1
                    for event in self._listeners:
                        event.set()
                await asyncio.sleep(_LOOK)
        finally:
            if watch is not None:
                watch.close()


class Feeds:
    """The feeds of all stores of a hub, and how many tabs there are."""

    def __init__(self, stores: Stores, most: int) -> None:
        self.stores = stores
        self.most = most
        self.tabs = 0
        self._feeds = {store.id: Feed(store) for store in stores}

    def get(self, id: str) -> Feed:
        """Raises `UnknownReferenceError`."""
        return self._feeds[self.stores.get(id).id]


@dataclass
class _Followed:
    """What a tab follows of a store, and what it was last sent of it."""

    feed: Feed
    cursor: Cursor | None = None
    with_sessions: bool = False
    with_events: bool = False
    charts: dict[str, Question] = field(default_factory=dict)
    version: int = -1
    sessions: list[SessionView] | None = None
    seen: set[int] = field(default_factory=set)
    """Sessions that lived at some time since the tab follows: it is told how they ended."""
    runs: int | None = None
    drawn: dict[str, tuple[Question, str]] = field(default_factory=dict)
    failed: dict[str, OnTheFlyError] = field(default_factory=dict)
    """Charts that could not be drawn because of a defect, until they can be."""
    error: dict[str, str] | None = None
    more: bool = False


@dataclass
class _Frame:
    """A frame in the making: what of each store, and the columns of its charts."""

    stores: dict[str, dict[str, Any]] = field(default_factory=dict)
    columns: dict[str, np.ndarray] = field(default_factory=dict)


class Tab:
    """One WebSocket. A task reads what the page says, and another sends frames."""

    def __init__(self, socket: WebSocket, feeds: Feeds) -> None:
        self._socket = socket
        self._feeds = feeds
        self._followed: dict[str, _Followed] = {}
        self._changed = asyncio.Event()
        self._drawn = asyncio.Event()
        self._drawn.set()
        self._frame = 0

    async def run(self, hub: str) -> None:
        """Until the page goes, or says what cannot be understood."""
        stores = await run_in_threadpool(lambda: [store_view(store).model_dump() for store in self._feeds.stores])
        await self._say({"type": "welcome", "hub": hub, "version": version("onthefly"), "stores": stores})
        sender = asyncio.create_task(self._send())
        try:
            await self._read(sender)
        finally:
            for followed in self._followed.values():
                followed.feed.leave(self._changed)
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError, WebSocketDisconnect, RuntimeError):
                await sender

    async def _read(self, sender: asyncio.Task[None]) -> None:
        while not sender.done():
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            text = message.get("text")
            try:
                if text is None or len(text) > _LONGEST:
                    raise ValueError
                content = json.loads(text)
            except (ValueError, RecursionError):
                await self._socket.close(1008)
                return
            try:
                self._take(_MESSAGE.validate_python(content))
            except ValidationError as e:
                wrong = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in e.errors()[:5])
                await self._say({"type": "error", "error": problem(InvalidCommandError(wrong))})
            except OnTheFlyError as e:
                await self._say({"type": "error", "error": problem(e)})

    def _take(self, message: Follow | Unfollow | Charting | Drawing) -> None:
        if isinstance(message, Drawing):
            if message.frame == self._frame:
                self._drawn.set()
            return
        feed = self._feeds.get(message.store)
        if isinstance(message, Unfollow):
            self._followed.pop(message.store, None)
            feed.leave(self._changed)
            return
        followed = self._followed.setdefault(message.store, _Followed(feed))
        if isinstance(message, Follow):
            followed.cursor = events.read(message.cursor) if message.cursor is not None else None
            followed.with_sessions, followed.with_events = message.sessions, message.events
            followed.sessions = followed.runs = None
        else:
            followed.charts = {chart.id: chart.question() for chart in message.charts}
            followed.drawn = {id: drawn for id, drawn in followed.drawn.items() if id in followed.charts}
        followed.version = -1
        feed.listen(self._changed)
        self._changed.set()

    async def _send(self) -> None:
        while True:
            await self._drawn.wait()
            await self._changed.wait()
            self._changed.clear()
            frame = _Frame()
            for id, followed in list(self._followed.items()):
                if found := await self._of(id, followed, frame):
                    frame.stores[id] = found
            if not frame.stores:
                continue
            self._frame += 1
            self._drawn.clear()
            meta = {"type": "frame", "frame": self._frame, "time": time.time(), "stores": frame.stores}
            await self._socket.send_bytes(await run_in_threadpool(columns.pack, frame.columns, meta))

    async def _of(self, id: str, followed: _Followed, frame: _Frame) -> dict[str, Any]:
        """What has changed of a store since the tab's last frame."""
        if followed.version == followed.feed.version and followed.error is None and not followed.more:
            return {}
        cursor = followed.cursor
        try:
            snapshot = await followed.feed.snapshot()
            found: dict[str, Any] = {}
            if followed.with_sessions:
                found |= _sessions(followed, snapshot)
            if followed.with_events:
                found |= await self._events(followed, snapshot)
            found |= await run_in_threadpool(_charts, id, followed, frame)
        except Exception as e:  # noqa: BLE001  a defect, too: this task sends what there is of the tab's other stores
            # Nothing of this is sent, so all of it is still to be sent.
            followed.cursor, followed.sessions, followed.runs = cursor, None, None
            followed.drawn.clear()
            asyncio.get_running_loop().call_later(_PULSE, self._changed.set)
            before, followed.error = followed.error, problem(e if isinstance(e, OnTheFlyError) else _defect(e))
            if followed.error == before:
                return {}
            if not isinstance(e, OnTheFlyError):
                _log.exception("store %s could not be looked at", id)
            return {"error": followed.error}
        charts = followed.charts  # the page may have asked for others meanwhile
        failed = next((problem(error) for chart, error in followed.failed.items() if chart in charts), None)
        if followed.error != failed:
            found["error"] = followed.error = failed
        followed.version = snapshot.version
        return found

    async def _events(self, followed: _Followed, snapshot: Snapshot) -> dict[str, Any]:
        if followed.cursor is None:  # from now on
            followed.cursor = snapshot.now
            return {"events": [], "cursor": events.write(snapshot.now), "more": False}
        store = followed.feed.store.client.store
        page = await run_in_threadpool(events.after, store, followed.cursor, snapshot.now, _EVENTS)
        followed.cursor, followed.more = page.cursor, page.more
        if page.more:
            self._changed.set()
        if not page.events:
            return {}
        shown: list[EventView] = [event_view(row) for row in page.events]
        return {
            "events": [event.model_dump() for event in shown],
            "cursor": events.write(page.cursor),
            "more": page.more,
        }

    async def _say(self, message: Mapping[str, Any]) -> None:
        await self._socket.send_text(json.dumps(columns.finite(message)))


@router.websocket("/live")
async def live(socket: WebSocket) -> None:
    """A tab: see docs/api.md."""
    feeds = socket.app.state.feeds
    assert isinstance(feeds, Feeds)
    if feeds.tabs >= feeds.most:
        await socket.accept()
        await socket.close(1013)
        return
    feeds.tabs += 1
    try:
        await socket.accept()
        await Tab(socket, feeds).run(socket.app.state.keys.hub)
    except WebSocketDisconnect:
        pass
    except RuntimeError as e:  # it was closed between a look and a word
        _log.debug("a tab has gone: %s", e)
    finally:
        feeds.tabs -= 1


def _snapshot(store: OpenStore, version: int) -> Snapshot:
    client = store.client
    store.recover()
    runs = client.runs()
    generations = {run.name: run.generation for run in runs}
    sessions = [session_view(store, row, generations) for row in client.sessions()]
    told = [(r.name, r.status, r.generation, r.manifest, r.archived, r.parents) for r in runs]
    return Snapshot(version, sessions, zlib.crc32(repr(told).encode()), events.positions(client.store))


def _sessions(followed: _Followed, snapshot: Snapshot) -> dict[str, Any]:
    found: dict[str, Any] = {}
    followed.seen |= {session.id for session in snapshot.sessions if session.alive}
    shown = [session for session in snapshot.sessions if session.id in followed.seen]
    if shown != followed.sessions:
        followed.sessions = shown
        found["sessions"] = [session.model_dump() for session in shown]
    if snapshot.runs != followed.runs:
        followed.runs = snapshot.runs
        found["runs"] = snapshot.runs
    return found


def _charts(id: str, followed: _Followed, frame: _Frame) -> dict[str, Any]:
    """The charts that have changed; their columns go into the frame. One that a defect keeps from being drawn is in `failed`.

    Raises `OnTheFlyError` where the store cannot be read.
    """
    asked = dict(followed.charts)
    if not asked:
        return {}
    charts = followed.feed.store.charts
    found: dict[str, Any] = {}
    for (name, question), about in zip(asked.items(), charts.look(list(asked.values())), strict=True):
        if followed.drawn.get(name) == (question, about.version):
            continue
        followed.drawn[name] = (question, about.version)
        before = followed.failed.pop(name, None)
        try:
            drawn = charts.draw(question, about)
        except OnTheFlyError:
            raise
        except Exception as e:  # noqa: BLE001  the others go on, and this one is tried again when it has changed
            error = followed.failed[name] = _defect(e, f"chart {name!r}: ")
            if str(error) != str(before):  # once, not for every step of a run that is under way
                _log.exception("chart %r of store %s could not be drawn", name, id)
            continue
        prefix = f"{id}/{name}/"
        frame.columns.update(_prefixed(prefix, drawn))
        found[name] = {"series": drawn.series, "x": question.x, "grid": question.grid, "columns": prefix}
    return {"charts": found} if found else {}


def _defect(error: Exception, where: str = "") -> OnTheFlyError:
    """An error that nobody has thought of, as one that can be said to a page."""
    return OnTheFlyError(f"{where}{type(error).__name__}: {said(error)}")


def _prefixed(prefix: str, drawn: Drawn) -> Iterable[tuple[str, np.ndarray]]:
    return ((f"{prefix}{name}", column) for name, column in drawn.columns.items())
