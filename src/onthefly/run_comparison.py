"""What two runs differ in: where they began, values, weights, metrics, and what each makes of single samples. Loads torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from onthefly import comparison, sample_values
from onthefly.errors import UnknownReferenceError
from onthefly.runs.lineage import Lineage
from onthefly.samples.changes import changes
from onthefly.samples.table import Columns

if TYPE_CHECKING:
    from onthefly.client import Client
    from onthefly.store.queries import RunRow

_LISTED = 50  # samples of one kind that are named


@dataclass(frozen=True)
class MetricDiff:
    """One metric at the last step that both runs have it at."""

    name: str
    step: int
    a: float
    b: float


@dataclass(frozen=True)
class SampleDiff:
    """What `b` has learned and forgotten, seen from `a`: by whether each sample is right, or else by its loss.

    `learned` and `forgotten` are indices, those that changed most first, and at most 50 of them; the counts are whole.
    """

    by: str
    samples: int
    learned_count: int
    forgotten_count: int
    learned: list[int]
    forgotten: list[int]
    loss_a: float
    loss_b: float


@dataclass(frozen=True)
class RunDiff:
    """The runs `a` and `b`. `weights` is what differs between their newest checkpoints; None when one has none."""

    a: str
    b: str
    ancestor: str | None
    values: dict[str, tuple[Any, Any]]
    data: tuple[str, str]
    metrics: list[MetricDiff] = field(default_factory=list)
    weights: comparison.Diff | None = None
    samples: SampleDiff | None = None


def compare(client: Client, a: RunRow, b: RunRow) -> RunDiff:
    """Compare two runs by what is recorded of them: see `RunDiff`. Each sample needs a scan of both (`onthefly scan`)."""
    newest = [
        rows[-1] if (rows := [r for r in client.checkpoints(run.name) if r.path.exists()]) else None for run in (a, b)
    ]
    weights, values = None, {}
    if newest[0] is not None and newest[1] is not None:
        weights = comparison.diff(newest[0].path, newest[1].path)
        values = {one.path: one.values for one in weights.values if one.values is not None}
    return RunDiff(
        a=a.name,
        b=b.name,
        ancestor=Lineage(client.runs()).common_ancestor(a.name, b.name),
        values=values,
        data=(_data(client, a.name), _data(client, b.name)),
        metrics=list(_metrics(client, a.name, b.name)),
        weights=weights,
        samples=_samples(client, a.name, b.name),
    )


def sample_diff(a: Columns, b: Columns) -> SampleDiff:
    """What changed between two scans of one data set of N samples. Raises `UnknownReferenceError` for different lengths."""
    found = changes(a, b)
    moved = found.moved()
    return SampleDiff(
        by=found.by,
        samples=len(moved),
        learned_count=int(found.learned.sum()),
        forgotten_count=int(found.forgotten.sum()),
        learned=_most(found.learned, moved),
        forgotten=_most(found.forgotten, moved),
        loss_a=float(np.nanmean(found.before)),
        loss_b=float(np.nanmean(found.after)),
    )


def _most(chosen: np.ndarray, moved: np.ndarray) -> list[int]:
    indices = np.flatnonzero(chosen)
    return [int(i) for i in indices[np.argsort(-moved[indices], kind="stable")][:_LISTED]]


def _data(client: Client, run: str) -> str:
    try:
        found = client.selection(run)
    except UnknownReferenceError:
        return "all samples"
    return f"{len(found.indices):,} of {found.length:,} samples ({found.digest[:12]})"


def _metrics(client: Client, a: str, b: str) -> list[MetricDiff]:
    found = []
    for name in sorted(set(client.metric_names(a)) & set(client.metric_names(b))):
        one, other = client.series(a, name), client.series(b, name)
        common = np.intersect1d(one.steps, other.steps)
        if len(common):
            step = int(common[-1])
            found.append(MetricDiff(name, step, _at(one, step), _at(other, step)))
    return found


def _at(series: Any, step: int) -> float:
    return float(series.values[np.flatnonzero(series.steps == step)[-1]])


def _samples(client: Client, a: str, b: str) -> SampleDiff | None:
    tables: list[Mapping[str, np.ndarray]] = []
    for run in (a, b):
        try:
            tables.append(sample_values.of(client.store, run).columns)
        except UnknownReferenceError:
            return None
    return sample_diff(*tables)
