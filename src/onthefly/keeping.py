"""Why a checkpoint stays: retention's reasons, and lineage's, found from what a store has recorded. Values in, values out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onthefly.checkpoints import retention
from onthefly.config import SessionConfig
from onthefly.errors import CommandError
from onthefly.runs.lineage import Lineage
from onthefly.runs.references import IMPORTED, describe, in_order, stands

if TYPE_CHECKING:
    from onthefly.store.queries import CheckpointRow, RunRow


def kept_because(
    checkpoints: Iterable[CheckpointRow],
    runs: Sequence[RunRow],
    configs: Mapping[str, Mapping[str, Any]],
    keep: int | None = None,
) -> dict[int, tuple[str, ...]]:
    """For the id of every live checkpoint, retention's words for why it stays; without a word, it may go.

    Each run is judged by the settings of its newest session, `configs`, and by those that are usual when it never had one;
    with `keep`, so many of the newest are kept whatever was set.
    """
    lineage = Lineage(lasting(runs))
    live = [row for row in checkpoints if row.evicted is None]
    found: dict[int, tuple[str, ...]] = {}
    for run in runs:
        config = configs.get(run.name, {})
        best_by = config.get("best_metric", SessionConfig.best_metric)
        candidates = [
            retention.Candidate(
                id=row.id,
                step=row.step,
                order=number,
                reason=row.reason,
                metric=row.metrics.get(best_by) if stands(row, run) else None,
                pinned=row.pinned,
                needed=lineage.needs(row),
                foreign=row.reason == IMPORTED,
            )
            for number, row in enumerate(in_order(row for row in live if row.run == run.name))
        ]
        newest = keep if keep is not None else config.get("ckpt_keep", SessionConfig.ckpt_keep)
        told = retention.reasons(candidates, newest, config.get("ckpt_keep_every"))
        found.update({candidate.id: words for candidate, words in told})
    return found


def lasting(runs: Iterable[RunRow]) -> Iterator[RunRow]:
    """The runs that need what they stand on: all but those that were removed."""
    return (run for run in runs if run.status != "removed")


def refuse_removal(
    row: CheckpointRow, checkpoints: Iterable[CheckpointRow], runs: Sequence[RunRow], *, force: bool = False
) -> None:
    """Raises `CommandError` for a checkpoint that must stay: an origin, one that a lineage needs, and, unless `force`, the
    newest of its run."""
    if row.reason == retention.ORIGIN:
        raise CommandError(
            f"{describe(row)} is the origin of {row.run!r}: only from there can each of its steps be reached again"
        )
    if (run := Lineage(lasting(runs)).run_on(row)) is not None:
        raise CommandError(f"{describe(row)} cannot be removed: the run {run!r} goes on from it")
    own = [c for c in checkpoints if c.run == row.run and c.evicted is None and c.reason != IMPORTED]
    if own and in_order(own)[-1].id == row.id and not force:
        raise CommandError(
            f"{describe(row)} is the newest of {row.run!r}, and what a resume would begin with; --force removes it all the same"
        )
