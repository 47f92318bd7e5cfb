"""The store: opening it, and what is written to it at once. What happened in training comes by `projection`."""

from __future__ import annotations

import logging
import os
import socket
import sqlite3
import time as clock
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    case,
    create_engine,
    event,
    exists,
    func,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError

from onthefly.errors import NoLiveSessionError, SchemaVersionError, StoreBusyError, StoreError
from onthefly.runs import names
from onthefly.store import liveness, queries, schema
from onthefly.store.queries import CommandRow, SessionRow

DATABASE = "onthefly.db"


class Store:
    """A folder with a database, checkpoints, journals and lock files. Threads may share it; a forked child may not.

    Every method may raise `StoreBusyError` when another process holds the database for longer than the busy timeout,
    and `StoreError` when it cannot be read or written.
    """

    def __init__(self, root: Path, engine: Engine) -> None:
        self.root = root
        self._engine = engine

    @classmethod
    def open(cls, root: str | Path | None = None, *, create: bool = False, busy_timeout: float = 10.0) -> Store:
        """The store in the folder `root`; by default `$ONTHEFLY_STORE`, or else `.onthefly` in the working directory.

        Raises `StoreError` if there is none and `create` is not given, and `SchemaVersionError` if another version
        of OnTheFly made it. `busy_timeout` is in seconds.
        """
        folder = Path(root or os.environ.get("ONTHEFLY_STORE") or ".onthefly").resolve()
        if not create and not (folder / DATABASE).is_file():
            raise StoreError(
                f"there is no store in {folder}. A training that attaches makes one; if it is elsewhere, "
                "go to its folder or set ONTHEFLY_STORE to it"
            )
        store = cls(folder, _sqlite(folder / DATABASE, busy_timeout))
        try:
            for part in (
                store.checkpoints_dir,
                store.scans_dir,
                store.manifests_dir,
                folder / "journals",
                folder / "sessions",
            ):
                part.mkdir(parents=True, exist_ok=True)
            store._prepare(clock.monotonic() + busy_timeout)
        except BaseException as e:
            store.close()
            if isinstance(e, OSError) and not isinstance(e, StoreError):
                raise StoreError(f"cannot make a store in {folder}: {e}") from e
            raise
        return store

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @property
    def checkpoints_dir(self) -> Path:
        return self.root / "checkpoints"

    @property
    def scans_dir(self) -> Path:
        """Per-sample values, and selections."""
        return self.root / "scans"

    @property
    def manifests_dir(self) -> Path:
        return self.root / "manifests"

    @property
    def statistics_dir(self) -> Path:
        """What was measured of checkpoints for merges: Fisher information, Gram matrices."""
        return self.root / "statistics"

    def log_path(self, run: str) -> Path:
        """What a run that was started beside another prints."""
        return self.root / "logs" / f"{run}.log"

    def journal_path(self, session: int) -> Path:
        return self.root / "journals" / f"{session}.journal"

    def lock_path(self, session: int) -> Path:
        return self.root / "sessions" / f"{session}.lock"

    def stored_path(self, path: str | Path) -> str:
        """`path` as rows have it: relative to the store if it lies inside it, otherwise absolute."""
        full = Path(path).parent.resolve() / Path(path).name
        return str(full.relative_to(self.root) if full.is_relative_to(self.root) else full)

    def full_path(self, stored: str) -> Path:
        """The absolute path that a row means."""
        return self.root / stored

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """One write transaction, committed at the end and rolled back by an exception. It holds the write lock throughout."""
        with self._typed_errors(), self._engine.connect().execution_options(onthefly_write=True) as connection:
            yield connection
            connection.commit()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A short read that sees one state of the database. Keep it short: while it lasts the WAL cannot be reset."""
        with self._typed_errors(), self._engine.connect() as connection:
            yield connection

    def create_run(
        self,
        name: str | None,
        *,
        project: str,
        kind: str = "root",
        parents: Sequence[tuple[str, str]] = (),
        status: str = "running",
    ) -> str:
        """Make a run and give its name: the next default one, or `name`, with a number added if it is taken.

        `parents` are the runs it comes from, each with the hash of its checkpoint, or "" while that is being written.
        Raises `InvalidCommandError` (a `ValueError`) for a name that cannot be part of a file's name.
        """
        with self.begin() as connection:
            taken = set(connection.scalars(select(schema.run.c.name)))
            name = names.next_name(kind, taken, os.environ) if name is None else names.free_name(name, taken)
            row = {"name": name, "project": project, "kind": kind, "created": clock.time(), "status": status}
            connection.execute(insert(schema.run).values(row))
            if parents:
                rows = [
                    {"run": name, "position": i, "parent": parent, "hash": digest}
                    for i, (parent, digest) in enumerate(parents)
                ]
                connection.execute(insert(schema.run_parent), rows)
        return name

    def create_session(
        self,
        *,
        project: str,
        run: str,
        pid: int,
        host: str,
        launch: Mapping[str, Any] | None,
        environment: Mapping[str, Any],
        inexact: Sequence[Any],
        config: Mapping[str, Any],
        time: float,
    ) -> int:
        """Make a session and give its id. Take its lock at once: until then it is alive for as long as `pid` is."""
        row = {
            "project": project,
            "run": run,
            "pid": pid,
            "host": host,
            "status": "running",
            "started": time,
            "heartbeat": time,
            "launch": launch,
            "environment": environment,
            "inexact": inexact,
            "config": config,
        }
        with self.begin() as connection:
            made = insert(schema.session).values(row).returning(schema.session.c.id)
            return int(connection.execute(made).scalar_one())

    def heartbeat(
        self, session: int, *, status: str, step: int, epoch: int, time: float, loss: float | None = None
    ) -> None:
        """Show where a session is. Once it has ended its status stays."""
        table = schema.session
        shown = case((table.c.ended.is_(None), status), else_=table.c.status)
        values = {"status": shown, "step": step, "epoch": epoch, "heartbeat": time, "loss": loss}
        with self.begin() as connection:
            connection.execute(update(table).where(table.c.id == session).values(values))

    def insert_command(
        self,
        session: int,
        id: str,
        kind: str,
        arguments: Mapping[str, Any],
        time: float,
        *,
        door: str | None = None,
        asker: str | None = None,
    ) -> None:
        """Queue a command; nothing happens if there is one with this id. Raises `NoLiveSessionError` if the session has ended.

        `door` and `asker` are for the audit trail: through which door it came, and who that was.
        A process that was killed is not noticed here: see `is_alive` and `recover`.
        """
        table = schema.command
        with self.begin() as connection:
            if connection.scalar(select(exists().where(table.c.id == id))):
                return
            alive = (schema.session.c.id == session) & schema.session.c.ended.is_(None)
            if not connection.scalar(select(exists().where(alive))):
                raise NoLiveSessionError(f"session {session} has ended; `onthefly resume` starts its run again")
            last = connection.scalar(select(func.max(table.c.number))) or 0
            row = {"id": id, "number": last + 1, "session": session, "kind": kind, "arguments": arguments}
            row |= {"created": time, "status": "queued", "door": door, "asker": asker}
            connection.execute(insert(table).values(row))

    def queued_commands(self, session: int, after: int = 0) -> list[CommandRow]:
        """The commands of a session that have no result yet, in their order, from behind the one with number `after`."""
        table = schema.command
        wanted = select(table).where(table.c.session == session, table.c.status == "queued", table.c.number > after)
        with self.read() as connection:
            return [CommandRow(**row) for row in connection.execute(wanted.order_by(table.c.number)).mappings()]

    def is_alive(self, session: SessionRow) -> bool:
        """Whether the session's process still runs and has not ended it."""
        if session.ended is not None:
            return False
        try:
            return liveness.is_held(self.lock_path(session.id))
        except FileNotFoundError:
            # Between its row and its lock. (On another host there is no telling.)
            return session.host != socket.gethostname() or _exists(session.pid)

    def recover(self, time: float) -> list[int]:
        """End every session whose process has died without doing so; gives their ids.

        The rest of its journal goes into the tables, its status becomes `killed`, its run `unfinished` unless it is finished
        or a later session has it, and its queued commands fail. Several processes may do it at once: each session is ended by one.
        """
        table, run = schema.session, schema.run
        ended = []
        for session in queries.sessions(self, alive=False):
            if session.ended is not None:
                continue
            from onthefly.store import projection  # brings NumPy, which most openings of a store do without

            try:
                projection.project(self, session.id)
            except StoreBusyError:
                raise
            except StoreError as e:  # one journal that makes no sense must not keep everybody out of the store
                logging.getLogger("onthefly").error(
                    "session %d is ended without the rest of its journal: %s", session.id, e
                )
            with self.begin() as connection:
                this = update(table).where(table.c.id == session.id, table.c.ended.is_(None))
                if connection.execute(this.values(status="killed", outcome="killed", ended=time)).rowcount == 0:
                    continue  # another process was faster, or the session's last words were still in its journal
                on = connection.execute(select(table.c.run).where(table.c.id == session.id)).scalar_one()
                name = self._standing_run(connection, on)
                if not connection.scalar(select(exists().where(table.c.run == name, table.c.id > session.id))):
                    left = update(run).where(run.c.name == name, run.c.status != "finished")
                    connection.execute(left.values(status="unfinished"))
                projection.fail_queued(connection, session.id, time)
                ended.append(session.id)
        return ended

    def _standing_run(self, connection: Connection, name: str) -> str:
        """The run that a killed session leaves unfinished: the one it was on, or, if that was a fork whose origin was not
        durable yet, its parent. Such a fork can never be gone on with, and is marked as failed."""
        run, edge = schema.run, schema.run_parent
        row = connection.execute(select(run).where(run.c.name == name)).one_or_none()
        own = select(exists().where(schema.checkpoint.c.run == name, schema.checkpoint.c.evicted.is_(None)))
        if row is None or row.kind == "root" or row.base is not None or connection.scalar(own):
            return name
        parent = connection.scalar(select(edge.c.parent).where(edge.c.run == name, edge.c.position == 0))
        connection.execute(update(run).where(run.c.name == name).values(status="failed"))
        return str(parent) if parent is not None else name

    def check_version(self, connection: Connection) -> None:
        """Raises `SchemaVersionError` when a newer OnTheFly has changed the tables since the store was opened."""
        self._version(connection)

    def _prepare(self, deadline: float) -> None:
        """Make the tables of a new database, or check the version of an old one. Several processes may do it at once."""
        with self.read() as connection:
            if self._version(connection) == schema.SCHEMA_VERSION:
                return
        # SQLite does not wait, whatever its busy timeout, when two processes switch to WAL at once.
        while True:
            try:
                with closing(sqlite3.connect(self.root / DATABASE)) as connection:
                    connection.execute("PRAGMA journal_mode=WAL")
                break
            except sqlite3.Error as e:
                error = _typed(e, self.root)
                if not isinstance(error, StoreBusyError) or clock.monotonic() > deadline:
                    raise error from e
                clock.sleep(0.01)
        with self.begin() as connection:
            version = self._version(connection)
            if version == schema.SCHEMA_VERSION:
                return
            if version:
                self._upgrade(connection, version)
                return
            schema.metadata.create_all(connection)
            connection.exec_driver_sql(f"PRAGMA user_version={schema.SCHEMA_VERSION}")
            # Journals of a database that was deleted must never be taken for those of new sessions.
            left = [int(path.stem) for path in (self.root / "journals").glob("*.journal") if path.stem.isdigit()]
            seed = "INSERT INTO sqlite_sequence (name, seq) VALUES ('session', ?)"
            connection.exec_driver_sql(seed, (max(left, default=0),))

    def _upgrade(self, connection: Connection, version: int) -> None:
        """Bring a database of an older version to this one, step by step."""
        for step in range(version, schema.SCHEMA_VERSION):
            for statement in schema.UPGRADES[step]:
                connection.exec_driver_sql(statement)
        schema.metadata.create_all(connection)  # whole tables that are new
        connection.exec_driver_sql(f"PRAGMA user_version={schema.SCHEMA_VERSION}")

    def _version(self, connection: Connection) -> int:
        """The database's schema version: this one's, an older one that can be upgraded, or 0 if the database is empty.

        Raises `SchemaVersionError` for any other.
        """
        version = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
        if (
            version == schema.SCHEMA_VERSION
            or version in schema.UPGRADES
            or (version == 0 and not inspect(connection).get_table_names())
        ):
            return version
        raise SchemaVersionError(
            f"{self.root / DATABASE} has schema version {version}, this OnTheFly writes {schema.SCHEMA_VERSION}: "
            "use the version of OnTheFly that made it, or another store"
        )

    @contextmanager
    def _typed_errors(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as e:
            raise _typed(e.orig, self.root) from e


class CommandWatch:
    """Tells cheaply whether a command was given to anybody in the store since it was last asked.

    It has a connection of its own, outside any transaction: inside one `PRAGMA data_version` would not move.
    """

    def __init__(self, store: Store) -> None:
        self._root = store.root
        self._version = -1
        self._newest: int | None = -1
        try:
            self._connection = sqlite3.connect(store.root / DATABASE, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as e:
            raise _typed(e, self._root) from e

    def changed(self) -> bool:
        """Whether a command has come since the last call; true the first time."""
        try:
            (version,) = self._connection.execute("PRAGMA data_version").fetchone()
            if version == self._version:
                return False
            # What this process records counts as a change, too, and comes far more often than a command.
            (newest,) = self._connection.execute("SELECT max(number) FROM command").fetchone()
        except sqlite3.Error as e:
            raise _typed(e, self._root) from e
        before, self._version, self._newest = self._newest, version, newest
        return bool(before != newest)

    def close(self) -> None:
        self._connection.close()


def _sqlite(path: Path, busy_timeout: float) -> Engine:
    # The driver's own transactions are off (isolation_level=None): it would begin them late, and a transaction that
    # first reads and then writes fails at once, without waiting, when another process wrote in between.
    arguments = {"timeout": busy_timeout, "isolation_level": None}
    engine = create_engine(URL.create("sqlite", database=str(path)), connect_args=arguments)

    @event.listens_for(engine, "connect")
    def connected(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute(
            "PRAGMA synchronous=NORMAL"
        )  # with WAL: a power cut may lose the last commits, never the file

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        write = connection.get_execution_options().get("onthefly_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def _typed(error: BaseException | None, root: Path) -> StoreError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without what extended codes add
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreBusyError(f"another process holds the store in {root} for too long; try again")
    return StoreError(f"the store in {root} cannot be used: {error}")


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True
