"""A merge is proved: computed once more from its parents, and held against what was committed, bit by bit. Loads torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onthefly.checkpoints.format import open_checkpoint
from onthefly.checkpoints.weights import entry, value_of
from onthefly.comparison import differences
from onthefly.errors import CheckpointNotFoundError, CommandError, CorruptCheckpointError
from onthefly.merging.parents import Parent
from onthefly.merging.streaming import merge_mapped
from onthefly.runs import manifest
from onthefly.runs.replay import workroom
from onthefly.store import queries

if TYPE_CHECKING:
    from onthefly.store.queries import CheckpointRow, RunRow
    from onthefly.store.store import Store

_NAMED = 20  # differences that are written out


@dataclass(frozen=True)
class MergeProof:
    """What a merge gave when it was computed again. `equal` says it all; `differences` is empty then.

    `regmean`, `lora` and `slerp` promise equal bits for one machine only.
    """

    run: str
    strategy: str
    parents: tuple[str, ...]
    hash: str
    """Of the checkpoint that the merge was committed as."""
    tensors: int
    recalibrated: tuple[str, ...]
    """Buffers that were estimated on data after the merge: they are not computed again here, and not compared."""
    equal: bool
    differences: list[str]


def prove(store: Store, run: RunRow) -> MergeProof:
    """Compute the merge that a run began from again, from its manifest and its parents' checkpoints, and compare.

    Raises `CommandError` for a run that is no merge, and `CheckpointNotFoundError` when a parent, or what was measured of it, is
    no longer there.
    """
    if run.kind != "merge" or run.manifest is None or run.base is None:
        raise CommandError(f"{run.name} did not begin from a merge")
    told = manifest.read(store.manifests_dir / f"{run.manifest[:16]}.json")
    how = told.merge
    if how is None:
        raise CommandError(f"the manifest of {run.name} does not tell how it was merged")
    rows = queries.checkpoints(store)
    names = {parent.hash: f"{parent.run}@{parent.step}" for parent in told.parents}
    parents = [_parent(rows, content, names.get(content, content[:12]), how["part"]) for content in how["members"]]
    base = None if how["base"] is None else _parent(rows, how["base"], "the base", how["part"])
    origin = next((row for row in rows if row.hash == run.base["hash"] and row.path.exists()), None)
    if origin is None:
        raise _gone(run.base["hash"], f"the beginning of {run.name}")
    committed = _model(origin, how["part"])
    with workroom(origin.path, ".verify-") as folder:
        again = _merged(how, parents, base, _statistics(store, how["statistics"]), folder)
    calibrated = tuple(how["recalibrated"]["buffers"])
    one, other = ({name: t for name, t in each.items() if name not in calibrated} for each in (committed, again))
    found = [str(difference) for difference in differences(one, other, ("committed", "again"))]
    if len(found) > _NAMED:
        found = [*found[:_NAMED], f"and {len(found) - _NAMED} more"]
    merged_from = tuple(names.values())
    return MergeProof(run.name, how["strategy"], merged_from, origin.hash, len(other), calibrated, not found, found)


def _merged(
    how: Mapping[str, Any], parents: Sequence[Parent], base: Parent | None, statistics: Sequence[Parent], folder: Path
) -> dict[str, Any]:
    if len(parents) == 1:  # a soup in which nobody was better than its best
        return dict(parents[0].tensors)
    more = {"weights": how["weights"], "base": base, "statistics": statistics or None}
    return merge_mapped(parents, how["strategy"], how["options"], folder=folder, **more).tensors


def _parent(rows: Sequence[CheckpointRow], content: str, label: str, part: str) -> Parent:
    row = next((row for row in rows if row.hash == content and row.path.exists()), None)
    if row is None:
        raise _gone(content, label)
    return Parent(label, _model(row, part), row.path, content)


def _model(row: CheckpointRow, part: str) -> dict[str, Any]:
    found = entry(value_of(row.path), part)
    if not isinstance(found, dict):
        raise CorruptCheckpointError(f"{row.path} has no {part!r}")
    return found


def _statistics(store: Store, files: Sequence[Mapping[str, str]]) -> list[Parent]:
    found = []
    for told in files:
        path = store.statistics_dir / told["file"]
        file = open_checkpoint(path)
        if file.hash != told["hash"]:
            raise CorruptCheckpointError(f"{path}: it is not what was measured for the merge ({told['hash'][:12]})")
        found.append(Parent(path.name, file.tensors))
    return found


def _gone(content: str, label: str) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(
        f"{label} ({content[:12]}) is no longer there, so the merge cannot be computed again"
    )
