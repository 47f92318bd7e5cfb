"""While somebody watches, the hub brings what live sessions have logged into the tables sooner than they do."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from sqlalchemy import select

from onthefly.errors import StoreBusyError, StoreError, said
from onthefly.store import schema
from onthefly.store.projection import project
from onthefly.store.store import Store

_BUSY = 0.05  # seconds that another process's write is waited for, to carry over what a session will carry anyhow
_log = logging.getLogger("onthefly")


class Carrier:
    """Brings into a store's tables what its live sessions have written down.

    They do it themselves, but less often, since they train meanwhile. So it never raises: what cannot be carried here and now is left to them, and
    the log has the reason, once.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._store: Store | None = None  # with connections of its own: they hardly wait for who else writes
        self._said: set[str] = set()
        self._lock = threading.Lock()

    def carry(self) -> None:
        """Whoever comes while another thread does it has nothing to do."""
        if self._lock.acquire(blocking=False):
            try:
                self._carry()
            finally:
                self._lock.release()

    def _carry(self) -> None:
        try:
            if self._store is None:
                self._store = Store.open(self._root, busy_timeout=_BUSY)
            with self._store.read() as connection:
                self._store.check_version(connection)  # a newer training's journal is not for this hub to read
                table = schema.session
                live = connection.scalars(select(table.c.id).where(table.c.ended.is_(None))).all()
        except (StoreError, OSError) as e:
            self.close()
            self._left(e)
            return
        for session in live:
            try:
                project(self._store, session)
            except (StoreError, OSError) as e:
                self._left(e)

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None

    def _left(self, error: StoreError | OSError) -> None:
        reason = said(error)
        if not isinstance(error, StoreBusyError) and reason not in self._said:
            self._said.add(reason)
            _log.warning("what a live session has written down is left to itself: %s", reason)
