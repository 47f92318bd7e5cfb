"""The stores that a hub serves, each with what is kept in memory of it, which is all made from it again when it is gone."""

from __future__ import annotations

import hashlib
import os
import socket
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onthefly import reports
from onthefly.client import Client
from onthefly.errors import StoreError, UnknownReferenceError
from onthefly.hub.carrier import Carrier
from onthefly.hub.charts import Charts
from onthefly.runs import manifest as manifests
from onthefly.samples.table import SampleTable
from onthefly.store import queries
from onthefly.store.store import DATABASE

if TYPE_CHECKING:
    from onthefly.reports import KeptReport
    from onthefly.runs.manifest import Manifest
    from onthefly.store.queries import CommandRow, RunRow, ScanRow, SessionRow

_TABLES = 4  # scans that are kept in memory
_REPORTS = 64  # that are kept in memory
_RECOVERY = 1.0  # seconds between two looks for sessions that have died
_RECENT = 200  # steps that a speed is taken over


@dataclass(frozen=True)
class Pace:
    """How fast a live session is, in steps a second, and how many bytes it has resident; None where it is not known."""

    speed: float | None
    memory: int | None


class OpenStore:
    """A store of the hub. Owns its client, which several threads use."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.path: Path = client.store.root
        self.id = store_id(client.store.root)
        self.charts = Charts(client)
        self.carrier = Carrier(client.store.root)
        self._tables: OrderedDict[str, SampleTable] = OrderedDict()
        self._manifests: dict[str, Manifest] = {}
        self._reports: OrderedDict[str, KeptReport] = OrderedDict()
        self._paces: dict[int, tuple[int, Pace]] = {}
        self._recovered = time.monotonic()
        self._lock = threading.Lock()  # guards the five above

    def close(self) -> None:
        self.carrier.close()
        self.client.close()

    def recover(self) -> None:
        """Find sessions that have died, once a second at most. Raises `StoreError`."""
        with self._lock:
            if time.monotonic() - self._recovered < _RECOVERY:
                return
            self._recovered = time.monotonic()
        self.client.store.recover(time.time())

    def scan(self, row: ScanRow) -> SampleTable:
        """A scan's table. It never changes, so it is kept. Raises `StoreError`."""
        with self._lock:
            if row.hash in self._tables:
                self._tables.move_to_end(row.hash)
                return self._tables[row.hash]
        table = SampleTable.read(row.path, content=row.hash)
        with self._lock:
            self._tables[row.hash] = table
            while len(self._tables) > _TABLES:
                self._tables.popitem(last=False)
        return table

    def manifest(self, row: RunRow) -> Manifest | None:
        """What a run began with; None for one that has no manifest, or an unreadable one, which `onthefly fsck` tells of. It is named by
        the hash of its content, so it is read once."""
        if row.manifest is None:
            return None
        with self._lock:
            if row.manifest in self._manifests:
                return self._manifests[row.manifest]
        try:
            found = manifests.read(self.client.store.manifests_dir / f"{row.manifest[:16]}.json")
        except StoreError:
            return None
        with self._lock:
            self._manifests[row.manifest] = found
        return found

    def reports(self, rows: Sequence[CommandRow]) -> list[KeptReport]:
        """The reports that these commands were answered with. To judge one takes a while, and it never changes, so it is kept."""
        with self._lock:
            found = {row.id: self._reports[row.id] for row in rows if row.id in self._reports}
        made = {kept.id: kept for kept in reports.kept(self.client, [row for row in rows if row.id not in found])}
        with self._lock:
            for id in (row.id for row in reversed(rows)):
                self._reports[id] = {**found, **made}[id]
                self._reports.move_to_end(id)
            while len(self._reports) > _REPORTS:
                self._reports.popitem(last=False)
        return [{**found, **made}[row.id] for row in rows]

    def pace(self, row: SessionRow, generation: int) -> Pace:
        """How fast a live session is. It is measured again when the session has gone on."""
        with self._lock:
            known = self._paces.get(row.id)
        if known is not None and known[0] == row.step:
            return known[1]
        pace = Pace(self._speed(row, generation), _memory(row))
        with self._lock:
            self._paces[row.id] = (row.step, pace)
        return pace

    def _speed(self, row: SessionRow, generation: int) -> float | None:
        names = self.client.metric_names(row.run)
        name = next((name for name in names if "loss" in name), next(iter(names), None))
        if name is None or row.status == "paused":
            return None
        points = queries.recorded(self.client.store, row.run, generation, name, row.step - _RECENT)
        here = points.times >= row.started
        steps, times = points.steps[here], points.times[here]
        if len(steps) < 2 or times[-1] <= times[0]:
            return None
        return float((steps[-1] - steps[0]) / (times[-1] - times[0]))


class Stores:
    """All stores of a hub, by id."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self._stores = {store.id: store for store in map(OpenStore, clients)}

    def __iter__(self) -> Iterator[OpenStore]:
        return iter(self._stores.values())

    def get(self, id: str) -> OpenStore:
        """Raises `UnknownReferenceError`, listing those there are."""
        if id not in self._stores:
            raise UnknownReferenceError(f"there is no store {id!r}; there are: {', '.join(self._stores)}")
        return self._stores[id]

    def close(self) -> None:
        for store in self._stores.values():
            store.close()


class ChangeWatch:
    """Tells cheaply whether anything was committed to a store since it was last asked.

    It has a connection of its own, outside any transaction: inside one `PRAGMA data_version` would not move.
    """

    def __init__(self, store: Path) -> None:
        self._connection = sqlite3.connect(
            f"{(store / DATABASE).as_uri()}?mode=rw", uri=True, isolation_level=None, check_same_thread=False
        )
        self._version = -1

    def changed(self) -> bool:
        """True the first time. Raises `sqlite3.Error`."""
        (version,) = self._connection.execute("PRAGMA data_version").fetchone()
        before, self._version = self._version, version
        return bool(before != version)

    def close(self) -> None:
        self._connection.close()


def store_id(root: Path) -> str:
    """The id of the store in a folder: the same in every hub."""
    return hashlib.sha256(os.fsencode(root)).hexdigest()[:12]


def _memory(row: SessionRow) -> int | None:
    if row.host != socket.gethostname():
        return None
    try:
        pages = int(Path(f"/proc/{row.pid}/statm").read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):  # not Linux, or it has just ended
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
