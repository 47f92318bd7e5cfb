"""The history from a place in it on. A place is a cursor: how far each session's events were seen.

Events of several sessions come in between each other, and one that has ended may get another (a pin, by a door). So no single
id says what was seen. A cursor is text that a page gives back as it is: ``1.90_2.5``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from onthefly.errors import InvalidCommandError
from onthefly.store import charts, queries
from onthefly.store.queries import EventRow
from onthefly.store.store import Store

_LONGEST = 1 << 15

Cursor = Mapping[int, int]
"""Session to the number of its last event that was seen."""


@dataclass(frozen=True)
class Page:
    """Some events, the cursor behind them, and whether there are more."""

    events: list[EventRow]
    cursor: Cursor
    more: bool


def positions(store: Store) -> Cursor:
    """The cursor of now: behind the last event of every session."""
    return dict(charts.positions(store))


def after(store: Store, cursor: Cursor, now: Cursor, limit: int) -> Page:
    """At most so many events from behind a cursor on, up to `now`, the older sessions' first."""
    found: list[EventRow] = []
    seen = dict(cursor)
    for session in sorted(now):
        if now[session] <= seen.get(session, 0):
            continue
        if len(found) >= limit:
            return Page(found, seen, True)
        left = limit - len(found)
        place = (session, seen.get(session, 0))
        rows = [
            row
            for row in queries.events(store, session=session, after=place, limit=left + 1)
            if row.seq <= now[session]
        ]
        found += rows[:left]
        if len(rows) > left:
            seen[session] = rows[left - 1].seq
            return Page(found, seen, True)
        seen[session] = now[session]
    return Page(found, seen, False)


def write(cursor: Cursor) -> str:
    return "_".join(f"{session}.{seq}" for session, seq in sorted(cursor.items()))


def read(text: str) -> Cursor:
    """Raises `InvalidCommandError` for what is no cursor."""
    if text == "":
        return {}
    if len(text) > _LONGEST or not re.fullmatch(r"[0-9]{1,15}\.[0-9]{1,15}(_[0-9]{1,15}\.[0-9]{1,15})*", text):
        raise InvalidCommandError("this is no cursor of events; give back one that this hub has given")
    pairs = (word.split(".") for word in text.split("_"))
    return {int(session): int(seq) for session, seq in pairs}
