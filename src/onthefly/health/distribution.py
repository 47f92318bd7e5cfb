"""Distribution: whether the ranks of a training are still one training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from onthefly.health.findings import Finding, Severity


@dataclass(frozen=True)
class Rank:
    """What one rank holds, by hash."""

    rank: int
    step: int
    parameters: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)
    random: str = ""
    """Of the process-wide random state."""
    data: str | None = None
    """Of the sample indices of its last batch; None where they are not known."""


@dataclass(frozen=True)
class Numbers:
    """Every rank at one boundary. One alone: there is nothing to compare."""

    ranks: Sequence[Rank]
    world: int


def judge(numbers: Numbers) -> list[Finding]:
    if numbers.world == 1:
        return []
    ranks = sorted(numbers.ranks, key=lambda rank: rank.rank)
    return [*_equal(ranks, "parameters"), *_equal(ranks, "buffers"), *_random(ranks), *_data(ranks)]


def facts(numbers: Numbers) -> list[str]:
    if numbers.world == 1:
        return ["there is one rank: nothing to compare with"]
    found = [f"{len(numbers.ranks)} of {numbers.world} ranks compared"]
    for rank in sorted(numbers.ranks, key=lambda rank: rank.rank):
        data = "not known" if rank.data is None else rank.data[:12]
        found.append(
            f"rank {rank.rank}: step {rank.step}, {len(rank.parameters)} parameters, random state {rank.random[:12]}, data {data}"
        )
    return found


def _equal(ranks: Sequence[Rank], what: str) -> Iterator[Finding]:
    names = dict.fromkeys(name for rank in ranks for name in getattr(rank, what))
    different = []
    for name in names:
        values = [getattr(rank, what).get(name) for rank in ranks]
        if len(set(values)) > 1:
            common = Counter(values).most_common(1)[0][0]
            different.append((name, [rank.rank for rank, value in zip(ranks, values, strict=True) if value != common]))
    if not different:
        return
    buffers = what == "buffers"
    yield Finding(
        "distribution",
        Severity.WARNING if buffers else Severity.ERROR,
        f"{what} differ between ranks",
        different[0][0],
        ranks[0].step,
        before=True,
        evidence={what: len(different), "ranks": ", ".join(map(str, different[0][1]))},
        advice="SyncBatchNorm, or DDP's broadcast_buffers=True, keeps them one"
        if buffers
        else "the ranks train different models: begin from one state, and let every rank step on the same, averaged gradients",
    )


def _random(ranks: Sequence[Rank]) -> Iterator[Finding]:
    if len({rank.random for rank in ranks}) < len(ranks):
        yield Finding(
            "distribution",
            Severity.NOTE,
            "ranks share one random state: dropout and augmentation draw alike in them",
            since=ranks[0].step,
            before=True,
            advice="add the rank to the seed once the model is made",
        )


def _data(ranks: Sequence[Rank]) -> Iterator[Finding]:
    shares = Counter(rank.data for rank in ranks if rank.data is not None)
    twice = [share for share, count in shares.items() if count > 1]
    if twice:
        same = [rank.rank for rank in ranks if rank.data == twice[0]]
        yield Finding(
            "distribution",
            Severity.WARNING,
            "ranks were given the same samples",
            "train_loader",
            ranks[0].step,
            before=True,
            evidence={"ranks": ", ".join(map(str, same))},
            advice="a DistributedSampler gives each rank its share; call its set_epoch",
        )
