"""Is what runs say of where they come from still there? Manifests, edges, selections and scans, each held against its hash."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from onthefly.checkpoints import header
from onthefly.errors import OnTheFlyError, said
from onthefly.runs import manifest
from onthefly.runs.lineage import Lineage
from onthefly.samples.selection import find
from onthefly.samples.table import SampleTable
from onthefly.store import queries

if TYPE_CHECKING:
    from onthefly.store.queries import RunRow
    from onthefly.store.store import Store

Kind = Literal["manifest", "edge", "selection", "scan", "statistics"]
Problem = tuple[Kind, str | None, Path, str]


def problems(store: Store, runs: list[RunRow], *, full: bool) -> Iterator[Problem]:
    """Each as (kind, run, path, message). Without `full`, scans are only looked for, and not read."""
    for name, problem in Lineage(runs).check():
        yield "edge", name, store.root, problem
    hashes = {row.hash for row in queries.checkpoints(store, evicted=True)}
    for run in runs:
        for parent, content in run.parents:
            if content and content not in hashes:
                yield (
                    "edge",
                    run.name,
                    store.root,
                    f"it begins from {parent} {content[:12]}, and no such checkpoint was ever recorded",
                )
        if run.manifest is not None:
            yield from _manifest(store, run, run.manifest, full)
    for scan in queries.scans(store):
        if not scan.path.exists():
            yield "scan", scan.run, scan.path, "the file of a recorded scan is not there"
        elif full and (damage := _unreadable(scan.path, scan.hash)) is not None:
            yield "scan", scan.run, scan.path, damage


def _manifest(store: Store, run: RunRow, digest: str, full: bool) -> Iterator[Problem]:
    path = store.manifests_dir / f"{digest[:16]}.json"
    try:
        found = manifest.read(path)
    except OnTheFlyError as e:
        yield "manifest", run.name, path, said(e)
        return
    if found.digest != digest or found.run != run.name:
        yield "manifest", run.name, path, f"it is the manifest of {found.run!r}, not the one that was recorded"
    told = [(parent.run, parent.hash) for parent in found.parents]
    if told != [edge for edge in run.parents if edge[1]]:
        yield "edge", run.name, path, "the manifest names other parents than the store does"
    if isinstance(found.selection, Mapping):
        yield from _selection(store, run, found.selection)
    for measured in (found.merge or {}).get("statistics", ()):
        path = store.statistics_dir / measured["file"]
        if (damage := _altered(path, measured["hash"], full)) is not None:
            yield "statistics", run.name, path, damage


def _selection(store: Store, run: RunRow, told: Mapping[str, object]) -> Iterator[Problem]:
    from blake3 import blake3

    digest = blake3(manifest.canonical(told)).hexdigest()
    try:
        find(store.scans_dir, digest)
    except OnTheFlyError as e:
        yield "selection", run.name, store.scans_dir / f"selection-{digest[:16]}.arrow", said(e)


def _altered(path: Path, content: str, full: bool) -> str | None:
    try:
        with header.opened(path) as file:
            found = header.parse(file, path)
            if full:
                header.check_bytes(file, found)
    except OnTheFlyError as e:
        return said(e)
    return None if found.hash == content else "it has another content than the merge was computed with"


def _unreadable(path: Path, content: str) -> str | None:
    try:
        SampleTable.read(path, content=content)
    except OnTheFlyError as e:
        return said(e)
    return None
