"""Is what the store promises still there? Every checkpoint is held against its row, every file against the rows.

Looking changes nothing; `repairs` does what the findings' remedies say. Runs that a live session trains are its own
business: what is found about them has no remedy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import select

from onthefly import provenance_check
from onthefly.checkpoints import durable, sidecar
from onthefly.checkpoints.header import Header, read_header, recorded_hash
from onthefly.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError
from onthefly.runs import replay
from onthefly.runs.lineage import Lineage
from onthefly.runs.references import describe
from onthefly.store import journal, queries, schema
from onthefly.store.queries import CheckpointRow, RunRow, SessionRow
from onthefly.store.store import Store

Kind = Literal[
    "damaged",  # a recorded checkpoint whose bytes do not match its hash
    "replaced",  # a recorded checkpoint whose file has another content
    "unreadable",  # the disk or its permissions do not let it be read
    "lost",  # a recorded checkpoint without a file
    "broken link",  # a run stands on a checkpoint that is not there
    "leftover",  # the file of a checkpoint that was removed
    "sidecar",  # missing, damaged, or of another content
    "litter",  # a sidecar without a checkpoint
    "stray",  # an unfinished file that nobody writes any more, or the folder of a killed scan or verify
    "unrecorded",  # a whole checkpoint that no row knows
    "foreign",  # called like a checkpoint, and none
    "journal",  # a journal that cannot be read to its end
    "manifest",  # a run's manifest that is missing, damaged, or of another run
    "edge",  # a parent that is not there, or that the manifest and the store name differently
    "selection",  # the samples that a run was begun on, missing or damaged
    "scan",  # per-sample values that are missing or damaged
    "statistics",  # what was measured of a merge's parent, missing or damaged
]
ERRORS: frozenset[Kind] = frozenset(
    {"damaged", "replaced", "unreadable", "lost", "broken link", "manifest", "edge", "selection", "scan", "statistics"}
)
"""What makes a store unsound. All else is a note: nothing that was reported saved is missing."""
LOST = "lost"
"""The reason on the tombstone of a checkpoint whose file was not there any more."""

Progress = Callable[[Path, int, int], None]
"""Is told which checkpoint is read next, how many bytes are done, and of how many."""

_SUFFIX = ".safetensors"
_RECORDS = 20_000  # of a journal, in memory at once


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be. `checkpoint` is the id of its row.

    `remedy` is what `repair` would do about it; where there is none, `advice` is what can be done by hand.
    """

    kind: Kind
    path: Path
    message: str
    remedy: str | None = None
    advice: str | None = None
    run: str | None = None
    step: int | None = None
    hash: str | None = None
    size: int = 0
    checkpoint: int | None = None
    severity: Literal["error", "note"] = "note"


@dataclass(frozen=True)
class Report:
    """What was looked at, and what was found. `size` is in bytes; `full` tells whether every byte was read."""

    store: Path
    checkpoints: int
    size: int
    full: bool
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What is missing or damaged."""
        return tuple(finding for finding in self.findings if finding.severity == "error")


def check(store: Store, *, full: bool = True, progress: Progress | None = None) -> Report:
    """Look at every checkpoint, every file beside them, every link between runs, and every journal.

    With `full` every byte is read and held against the hashes; otherwise only the headers. Nothing is changed.
    """
    view = _View.of(store)
    sound, problems = _rows(view, full, progress or (lambda path, done, total: None))
    findings = [*problems, *_links(view), *_sidecars(view, sound)]
    for folder in view.folders():
        findings += _files(view, folder, full)
    findings += _journals(store, view, full)
    findings += _provenance(store, view, full)
    later = _View.of(store)  # sessions go on saving and removing while this looks
    there = tuple(finding for finding in findings if _holds(finding, later))
    return Report(store.root, len(later.live), sum(size_of(row.path) for row in later.live), full, there)


@dataclass(frozen=True)
class _View:
    """The rows of one moment."""

    own: Path
    sessions: list[SessionRow]
    runs: list[RunRow]
    live: list[CheckpointRow]
    tombstones: list[CheckpointRow]
    lineage: Lineage

    @classmethod
    def of(cls, store: Store) -> _View:
        sessions = queries.sessions(store)
        for session in sessions:
            if session.ended is None:
                from onthefly.store import projection  # brings NumPy

                # A file goes after the fact that says so was written to the journal, and the tables come behind both.
                projection.project(store, session.id)
        rows = queries.checkpoints(store, evicted=True)
        runs = queries.runs(store)
        return cls(
            own=store.checkpoints_dir.resolve(),
            sessions=sessions,
            runs=runs,
            live=[row for row in rows if row.evicted is None],
            tombstones=[row for row in rows if row.evicted is not None],
            lineage=Lineage(runs),
        )

    def folders(self) -> list[Path]:
        """The store's own folder, then all others in which something of it was saved."""
        others = {place(row.path).parent for row in (*self.live, *self.tombstones)} - {self.own}
        return [folder for folder in (self.own, *sorted(others)) if folder.is_dir()]

    def session_on(self, run: str | None) -> SessionRow | None:
        """The session that is on a run and has not ended."""
        return next((row for row in self.sessions if row.ended is None and row.run == run), None)

    def is_ours(self, path: Path) -> bool:
        """Whether a file belongs to this store, by its place or by its name."""
        name = sidecar.parse_name(path.name)
        return path.parent == self.own or (name is not None and any(run.name == name[0] for run in self.runs))


def place(path: Path) -> Path:
    """Where a file stands, whichever way leads there. The file itself may be a link."""
    return path.parent.resolve() / path.name


def _rows(view: _View, full: bool, progress: Progress) -> tuple[dict[int, Header], list[Finding]]:
    """The headers of the sound checkpoints by their rows' ids, and what is wrong with the others."""
    sound: dict[int, Header] = {}
    findings: list[Finding] = []
    done, total = 0, sum(row.size for row in view.live)
    for row in view.live:
        progress(row.path, done, total)
        done += row.size
        try:
            header = read_header(row.path, verify=full)
        except CheckpointNotFoundError:
            findings.append(_lost(view, row))
        except CorruptCheckpointError as e:
            message = str(e).removeprefix(f"{row.path}: ")
            findings.append(_unusable(row, "damaged", message, "if there is a copy of it, put it back at this path"))
        except CheckpointError as e:
            message = str(e).removeprefix(f"{row.path}: ")
            findings.append(_unusable(row, "unreadable", message, "make it readable, and check again"))
        else:
            if header.hash == row.hash:
                sound[row.id] = header
            else:
                findings.append(_replaced(view, row, header))
    return sound, findings


def _lost(view: _View, row: CheckpointRow) -> Finding:
    copy = "if there is a copy of it, put it back at this path first"
    if not row.path.parent.is_dir():
        advice = f"bring the folder {row.path.parent} back (a disk that is not mounted?); if it is gone for good, make it anew"
        return _about(row, "lost", "its whole folder is gone", advice=advice)
    if (session := view.session_on(row.run)) is not None:
        return _about(row, "lost", "its file is gone", advice=f"{copy}; {_left_to(session)}")
    return _about(row, "lost", "its file is gone", remedy=f"make its row a tombstone ({LOST})", advice=copy)


def _unusable(row: CheckpointRow, kind: Kind, message: str, advice: str) -> Finding:
    return _about(row, kind, message, advice=f"{advice}; `onthefly checkpoint rm` gives it up")


def _replaced(view: _View, row: CheckpointRow, header: Header) -> Finding:
    known = [other for other in (*view.live, *view.tombstones) if other.hash == header.hash]
    whose = f", that of {describe(known[-1])}" if known else ""
    message = f"its file has another content, {header.hash[:12]}{whose}; what was recorded is {row.hash[:12]}"
    return _unusable(row, "replaced", message, "move that file away, and put the right one at this path")


def _links(view: _View) -> Iterator[Finding]:
    there = {row.hash for row in view.live}
    for run in view.runs:
        if run.status == "removed":  # what it stood on may have gone with it
            continue
        for parent, content in run.parents:
            if content not in there:
                message = f"{run.name} comes from {content[:12]} of {parent}, which is not in the store"
                yield _broken(view, run, content, message)
        if run.base is not None and run.base["hash"] not in there and not has(Path(run.base["path"]), run.base["hash"]):
            content = run.base["hash"]
            message = f"{run.name} goes on from {content[:12]} at step {run.base['step']}, which is not there"
            yield _broken(view, run, content, message, Path(run.base["path"]), run.base["step"])


def _broken(
    view: _View, run: RunRow, content: str, message: str, path: Path | None = None, step: int | None = None
) -> Finding:
    gone = next((row for row in reversed(view.tombstones) if row.hash == content), None)
    if gone is not None:
        path, step = path or gone.path, gone.step if step is None else step
        message += f" any more ({gone.evicted_reason})"
    return Finding(
        kind="broken link",
        severity="error",
        path=path or view.own,
        message=message,
        advice="`onthefly checkpoint import` brings a copy of it back",
        run=run.name,
        step=step,
        hash=content,
    )


def has(path: Path, content: str) -> bool:
    """Whether a file says that it has this content; a run may stand on one that the store does not know."""
    try:
        return recorded_hash(path) == content
    except CheckpointError:
        return False


def _sidecars(view: _View, sound: Mapping[int, Header]) -> Iterator[Finding]:
    for row in view.live:
        if row.id not in sound:
            continue
        found = sidecar.read_sidecar(row.path)
        if found is not None and found.hash == row.hash:
            continue
        missing = not sidecar.path_of(row.path).exists()
        message = "its sidecar is missing" if missing else "its sidecar is damaged, or tells of another content"
        session = view.session_on(row.run)
        remedy = "write it from the row" if session is None else None
        yield _about(row, "sidecar", message, remedy=remedy, advice=None if session is None else _left_to(session))


def _files(view: _View, folder: Path, full: bool) -> Iterator[Finding]:
    """What is in a folder besides the files of the rows."""
    try:
        names = [name for name in sorted(os.listdir(folder)) if os.path.isfile(folder / name)]
        strays = durable.strays(folder)
        workrooms = replay.left_workrooms(folder)
    except OSError as e:
        yield Finding("unreadable", folder, f"cannot be listed: {e.strerror or e}", severity="error")
        return
    live = {place(row.path) for row in view.live}
    removed: dict[Path, list[CheckpointRow]] = {}
    for row in view.tombstones:
        removed.setdefault(place(row.path), []).append(row)
    for name in names:
        path = folder / name.removesuffix(".meta.json")
        if not path.name.endswith(_SUFFIX) or path in live:
            continue
        if name == path.name:
            yield from _file(view, path, removed.get(path, []), full)
        elif not os.path.lexists(path) and (path in removed or view.is_ours(path)):
            beside, message = folder / name, "a sidecar without its checkpoint"
            yield _spare(view, "litter", beside, message, run=_run_in(path), size=size_of(beside))
    for stray in strays:
        message = "an unfinished file that nobody writes any more"
        yield Finding("stray", stray, message, remedy="remove it", size=size_of(stray))
    for room in workrooms:
        message = "the folder of a scan or a verify that was killed"
        size = sum(size_of(path) for path in room.rglob("*") if path.is_file())
        yield Finding("stray", room, message, remedy="remove it", size=size)


def _file(view: _View, path: Path, removed: list[CheckpointRow], full: bool) -> Iterator[Finding]:
    """A file that is called like a checkpoint and that no live row knows."""
    for row in removed:
        if has(path, row.hash):
            yield _leftover(view, path, row)
            return
    if not view.is_ours(path):
        return
    run, size = _run_in(path), size_of(path)
    try:
        header = read_header(path, verify=full)
    except CheckpointNotFoundError:
        return
    except CheckpointError as e:
        message = f"called like a checkpoint, but {str(e).removeprefix(f'{path}: ')}"
        yield Finding("foreign", path, message, advice="it is not used, and is left where it is", run=run, size=size)
        return
    session = view.session_on(run)
    message = "a whole checkpoint that is not in the list: its process was killed, or the file was put here"
    advice = "`onthefly checkpoint import` makes use of it"
    if run is not None and path.parent == view.own:
        advice += ", `onthefly gc` removes it"
    yield Finding(
        kind="unrecorded",
        path=path,
        message=message,
        advice=advice if session is None else _left_to(session),
        run=run,
        step=_step_in(path),
        hash=header.hash,
        size=size,
    )


def _leftover(view: _View, path: Path, row: CheckpointRow) -> Finding:
    if is_only_copy(view.live, view.tombstones, view.lineage, row.hash):
        message, advice = "was given up, and its file is there", "`onthefly checkpoint import` brings it back"
        return _about(row, "leftover", message, advice=advice, path=path)
    message = f"was removed ({row.evicted_reason}), and its file is still there"
    return _spare(view, "leftover", path, message, run=row.run, step=row.step, hash=row.hash, size=size_of(path))


def is_only_copy(
    live: Iterable[CheckpointRow], tombstones: Iterable[CheckpointRow], lineage: Lineage, content: str
) -> bool:
    """Whether no live checkpoint has this content, and somebody may want it: a run stands on it, or it was lost."""
    if any(row.hash == content for row in live):
        return False
    return lineage.needs_content(content) or any(
        row.hash == content and row.evicted_reason == LOST for row in tombstones
    )


def _spare(view: _View, kind: Kind, path: Path, message: str, *, run: str | None, **more: Any) -> Finding:
    session = view.session_on(run)
    advice = None if session is None else _left_to(session)
    return Finding(kind, path, message, "remove it" if session is None else None, advice, run, **more)


def _provenance(store: Store, view: _View, full: bool) -> Iterator[Finding]:
    for kind, run, path, message in provenance_check.problems(store, view.runs, full=full):
        yield Finding(kind, path, message, run=run, severity="error", advice="bring back a copy of the store's folder")


def _journals(store: Store, view: _View, full: bool) -> Iterator[Finding]:
    table = schema.session
    with store.read() as connection:
        offsets = {row.id: row.journal_offset for row in connection.execute(select(table.c.id, table.c.journal_offset))}
    for session in view.sessions:
        if session.ended is not None:
            path = store.journal_path(session.id)
            if (message := _unread(path, offsets.get(session.id, 0), full)) is not None:
                yield Finding("journal", path, message, advice="what is in the tables stands", run=session.run)


def _unread(path: Path, projected: int, full: bool) -> str | None:
    """What is wrong with a journal of which so many bytes are in the tables; it is read from there on, or whole."""
    try:
        size = path.stat().st_size
        end = _end(path, 0 if full else min(projected, size))
    except FileNotFoundError:
        return "it is gone" if projected else None
    except (OSError, ValueError) as e:
        return f"it cannot be read: {e}"
    if end < projected:
        return f"it can be read to byte {end:,}; the tables have more of it, to byte {projected:,}"
    if end < size:
        return f"its last {size - end:,} bytes are torn or damaged: what they said is not in the tables"
    return f"its last {size - projected:,} bytes make no sense, and are not in the tables" if projected < size else None


def _end(path: Path, begin: int) -> int:
    """How far a journal can be read."""
    while True:
        records, end = journal.read(path, begin, _RECORDS)
        if not records:
            return end
        begin = end


def _holds(finding: Finding, later: _View) -> bool:
    """Whether a finding is still true, or the work of a session that went on meanwhile."""
    live = any(row.id == finding.checkpoint for row in later.live)
    match finding.kind:
        case "damaged" | "replaced" | "lost" | "sidecar":
            return live
        case "unrecorded" | "foreign" | "leftover":
            recorded = any(place(row.path) == finding.path for row in later.live)
            return os.path.lexists(finding.path) and not recorded
        case "litter" | "stray":
            return os.path.lexists(finding.path)
        case _:
            return True


def _about(
    row: CheckpointRow,
    kind: Kind,
    message: str,
    *,
    remedy: str | None = None,
    advice: str | None = None,
    path: Path | None = None,
) -> Finding:
    return Finding(
        kind=kind,
        severity="error" if kind in ERRORS else "note",
        path=path or row.path,
        message=message,
        remedy=remedy,
        advice=advice,
        run=row.run,
        step=row.step,
        hash=row.hash,
        size=size_of(row.path),
        checkpoint=row.id,
    )


def _left_to(session: SessionRow) -> str:
    return (
        f"session {session.id} (pid {session.pid}) trains this run, so it is left alone; look again when that has ended"
    )


def _run_in(path: Path) -> str | None:
    name = sidecar.parse_name(path.name)
    return name[0] if name is not None else None


def _step_in(path: Path) -> int | None:
    name = sidecar.parse_name(path.name)
    return name[2] if name is not None else None


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # gone, or out of reach: it has a finding of its own
        return 0
