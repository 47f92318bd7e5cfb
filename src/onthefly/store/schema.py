"""The database's tables.

Times are Unix seconds. A checkpoint's path is stored relative to the store when it lies inside it, so that a store
can be moved. Types and names are portable; what only SQLite has is in `store`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
)

SCHEMA_VERSION = 3

UPGRADES: Mapping[int, Sequence[str]] = {
    2: (  # who asked, through which door, and on which run it was carried out
        "ALTER TABLE command ADD COLUMN door VARCHAR",
        "ALTER TABLE command ADD COLUMN asker VARCHAR",
        "ALTER TABLE command ADD COLUMN run VARCHAR",
        # charts of what was recorded before are read from its points
        "ALTER TABLE metric_chunk ADD COLUMN rollup_256 BLOB",
        "ALTER TABLE metric_chunk ADD COLUMN rollup_16 BLOB",
    ),
}
"""What makes a database of an older version one of the next. It only ever adds: who has the store open goes on with it."""

metadata = MetaData()

_JSON = JSON(none_as_null=True)

session = Table(
    "session",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("project", String, nullable=False),
    Column("run", String, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("host", String, nullable=False),
    Column("status", String, nullable=False),
    Column("outcome", String),
    Column("step", Integer, nullable=False, default=0),
    Column("epoch", Integer, nullable=False, default=0),
    Column("loss", Float),
    Column("started", Float, nullable=False),
    Column("heartbeat", Float, nullable=False),
    Column("ended", Float),
    Column("launch", _JSON),
    Column("environment", _JSON, nullable=False),
    Column("inexact", _JSON, nullable=False),
    Column("config", _JSON, nullable=False),
    # The projection's own: bytes of the journal that are in the tables, and the series that it has named, by id.
    Column("journal_offset", Integer, nullable=False, default=0),
    Column("metric_names", _JSON, nullable=False, default=dict),
    # An id is never used again: journals and lock files are named by it.
    sqlite_autoincrement=True,
)

run = Table(
    "run",
    metadata,
    Column("name", String, primary_key=True),
    Column("project", String, nullable=False),
    Column("kind", String, nullable=False),
    Column("created", Float, nullable=False),
    Column("status", String, nullable=False),
    Column("generation", Integer, nullable=False, default=0),
    Column("base", _JSON),
    Column("manifest", String),  # the digest of it
    Column("archived", Float),
)

run_parent = Table(
    "run_parent",
    metadata,
    Column("run", String, ForeignKey("run.name"), nullable=False),
    Column("position", Integer, nullable=False),
    Column("parent", String, nullable=False),
    Column("hash", String, nullable=False),
    PrimaryKeyConstraint("run", "position"),
)

checkpoint = Table(
    "checkpoint",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("run", String, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("step", Integer, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("time", Float, nullable=False),
    Column("path", String, nullable=False),
    Column("hash", String, nullable=False),
    Column("size", Integer, nullable=False),
    Column("reason", String, nullable=False),
    Column("pinned", Boolean, nullable=False),
    Column("metrics", _JSON, nullable=False),
    Column("session", Integer, nullable=False),
    Column("captured", Integer, nullable=False),
    Column("evicted", Float),
    Column("evicted_reason", String),
    Index("checkpoint_by_run", "run"),
    Index("checkpoint_by_path", "path"),
    Index("checkpoint_by_hash", "hash"),
)

scan = Table(
    "scan",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("run", String, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("step", Integer, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("time", Float, nullable=False),
    Column("checkpoint", String, nullable=False),  # the hash of the state that was scanned
    Column("data", String, nullable=False),
    Column("columns", _JSON, nullable=False),
    Column("length", Integer, nullable=False),
    Column("path", String, nullable=False),
    Column("hash", String, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("session", Integer, nullable=False),
    Index("scan_by_checkpoint", "checkpoint"),
)

sample_tag = Table(
    "sample_tag",
    metadata,
    Column("project", String, nullable=False),
    Column("data", String, nullable=False),
    Column("tag", String, nullable=False),
    Column("samples", LargeBinary, nullable=False),  # packed <i8, sorted
    PrimaryKeyConstraint("project", "data", "tag"),
)

event = Table(
    "event",
    metadata,
    Column("session", Integer, nullable=False),
    Column("seq", Integer, nullable=False),
    Column("run", String),
    Column("generation", Integer),
    Column("step", Integer),
    Column("epoch", Integer),
    Column("time", Float, nullable=False),
    Column("kind", String, nullable=False),
    Column("data", _JSON, nullable=False),
    PrimaryKeyConstraint("session", "seq"),
    Index("event_by_run", "run", "kind"),
)

command = Table(
    "command",
    metadata,
    Column("id", String, primary_key=True),
    # Order of arrival. Clocks of several writers would not give it.
    Column("number", Integer, nullable=False, unique=True),
    Column("session", Integer, nullable=False),
    Column("kind", String, nullable=False),
    Column("arguments", _JSON, nullable=False),
    Column("created", Float, nullable=False),
    Column("status", String, nullable=False),
    Column("result", _JSON),
    Column("error", _JSON),
    Column("step", Integer),
    Column("epoch", Integer),
    Column("finished", Float),
    # Through which door it came, and who that was: `user@host`, or the address of a browser. None: from before they were recorded.
    Column("door", String),
    Column("asker", String),
    # The run that the session was on when it carried it out.
    Column("run", String),
    Index("command_by_session", "session", "status", "number"),
)

metric_chunk = Table(
    "metric_chunk",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("run", String, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("name", String, nullable=False),
    Column("level", Integer, nullable=False),
    Column("first_step", Integer, nullable=False),
    Column("last_step", Integer, nullable=False),
    Column("count", Integer, nullable=False),
    # What is left of a full chunk at a lower resolution, as packed points (step, value, time). These stand before the points
    # themselves: SQLite comes to what is behind them only through every page of them.
    Column("rollup_4096", LargeBinary),
    Column("rollup_256", LargeBinary),
    Column("rollup_16", LargeBinary),
    # Packed columns of the points, in the order in which they were recorded: <i8, <f8, <f8.
    Column("steps", LargeBinary, nullable=False),
    Column("values", LargeBinary, nullable=False),
    Column("times", LargeBinary, nullable=False),
    Index("metric_chunk_by_series", "run", "generation", "name", "count", "level"),
)
