"""Determinism: what in this script can keep a run from coming out bit for bit the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onthefly.health.findings import Finding, Severity

NAMED = 5
"""Differences that are written out."""

NONDETERMINISTIC = frozenset(
    {
        "AdaptiveAvgPool2D",
        "AdaptiveAvgPool3D",
        "AdaptiveMaxPool2D",
        "AvgPool3D",
        "CtcLoss",
        "Cumsum",
        "EmbeddingBag",
        "FractionalMaxPool2D",
        "FractionalMaxPool3D",
        "GridSampler2D",
        "GridSampler3D",
        "IndexAdd",
        "IndexPut",
        "Index",
        "MaxPool3DWithIndices",
        "MaxUnpool2D",
        "MaxUnpool3D",
        "NllLoss2D",
        "Put",
        "ReflectionPad1D",
        "ReflectionPad2D",
        "ReflectionPad3D",
        "ReplicationPad1D",
        "ReplicationPad2D",
        "ReplicationPad3D",
        "ScatterAdd",
        "ScatterReduce",
        "UpsampleBicubic2D",
        "UpsampleBilinear2D",
        "UpsampleLinear1D",
        "UpsampleTrilinear3D",
    }
)
"""Nodes of a backward pass whose CUDA kernels add in no fixed order: from the documentation of `torch.use_deterministic_algorithms`."""


@dataclass
class Numbers:
    """What is known of a session. `environment` and `inexact` are as it recorded them when it began."""

    environment: Mapping[str, Any] = field(default_factory=dict)
    inexact: Sequence[str] = ()
    differences: Sequence[tuple[int, str]] = ()
    """(step, metric) of repeated steps that came out differently: the `inexact` events."""
    changes: Sequence[tuple[int, Mapping[str, Any]]] = ()
    """(step, what differed) of resumes in other surroundings."""
    operations: Sequence[str] = ()
    """Nodes of a backward pass that was looked at."""
    generators: Sequence[str] = ()
    """Private random generators that were found in data set, transforms and collate."""
    workers: int | None = None
    step: int = 0


@dataclass
class DoubleRun:
    """Steps that were trained a second time, in a fresh process, from the same state."""

    first_step: int
    last_step: int
    equal: bool
    recorded: str
    replayed: str
    differences: Sequence[str] = ()
    causes: Sequence[str] = ()


def judge(numbers: Numbers) -> list[Finding]:
    return [*_said(numbers), *_happened(numbers), *_flags(numbers)]


def facts(numbers: Numbers) -> list[str]:
    e = numbers.environment
    if not e:
        return []
    found = [
        f"torch {e.get('torch')} on {e.get('device')}, {e.get('threads')} threads; hash seed {e.get('hash_seed') or 'not fixed'}; "
        f"deterministic algorithms {_on(e.get('deterministic'))}, cuDNN benchmark {_on(e.get('cudnn_benchmark'))}, TF32 {_on(e.get('tf32'))}"
    ]
    if numbers.generators:
        where = "copied into each worker" if numbers.workers else "captured with every checkpoint"
        found.append(f"random generators of the data's own, {where}: {', '.join(numbers.generators)}")
    return found


def judge_double_run(run: DoubleRun) -> list[Finding]:
    if run.equal:
        return []
    evidence: dict[str, float | int | str] = {"recorded": run.recorded[:12], "repeated": run.replayed[:12]}
    if run.differences:
        evidence["differs"] = "; ".join(run.differences[:NAMED])
    return [
        Finding(
            "determinism",
            Severity.ERROR,
            "the same steps from the same state came out differently in a fresh process",
            since=run.first_step,
            evidence=evidence,
            advice="; ".join(run.causes[:3]),
        )
    ]


def double_run_facts(run: DoubleRun) -> list[str]:
    if not run.equal:
        return []
    return [
        f"steps {run.first_step} to {run.last_step}, trained again in a fresh process: equal, bit for bit ({run.recorded[:12]})"
    ]


def _said(numbers: Numbers) -> Iterator[Finding]:
    for reason in numbers.inexact:
        where, advice = "", "see docs/loops.md for what to pass instead"
        if "random generator of its own" in reason:
            where = reason.split(" ")[0]
            advice = (
                "draw from torch, numpy.random or random, which are seeded for every sample; "
                "or make the generator from torch.initial_seed() in __getitem__"
            )
        elif "in_order" in reason:
            advice = "in_order=True"
        elif "exact_augmentation" in reason:
            advice = "SessionConfig(exact_augmentation=True), the default"
        elif "CUDA" in reason:
            advice = "torch.use_deterministic_algorithms(True), and CUBLAS_WORKSPACE_CONFIG=:4096:8"
        elif "IterableDataset" in reason or "state_dict" in reason:
            advice = "give the data a state_dict (torchdata's StatefulDataLoader has one); until then a resume draws again what it skips"
        elif "scheduler" in reason:
            advice = "onthefly.attach(..., scheduler=scheduler)"
        yield Finding(
            "determinism",
            Severity.WARNING,
            f"the session said, when it began: {reason}",
            where,
            0,
            advice=advice,
        )


def _happened(numbers: Numbers) -> Iterator[Finding]:
    if numbers.differences:
        step, name = numbers.differences[0]
        yield Finding(
            "determinism",
            Severity.ERROR,
            "steps that were repeated came out differently",
            name,
            step,
            evidence={"numbers": len(numbers.differences)},
            advice="`onthefly verify` says what differs, and likely causes",
        )
    for step, what in numbers.changes:
        yield Finding(
            "determinism",
            Severity.NOTE,
            "the run went on in other surroundings",
            since=step,
            evidence={name: str(value) for name, value in what.items()},
        )


def _flags(numbers: Numbers) -> Iterator[Finding]:
    e = numbers.environment
    if not e:
        return
    on_device = e.get("device") not in (None, "cpu")
    found = sorted({name for name in map(_node, numbers.operations) if name in NONDETERMINISTIC})
    if on_device and found and not e.get("deterministic"):
        yield Finding(
            "determinism",
            Severity.WARNING,
            "operations whose kernels on this device add in no fixed order",
            ", ".join(found),
            numbers.step,
            before=True,
            advice="torch.use_deterministic_algorithms(True), or other operations",
        )
    if on_device and e.get("cudnn_benchmark"):
        yield Finding(
            "determinism",
            Severity.WARNING,
            "cuDNN chooses its kernels by timing them, which may fall out differently in the next process",
            "torch.backends.cudnn.benchmark",
            0,
            advice="torch.backends.cudnn.benchmark = False",
        )
    if e.get("tf32"):
        yield Finding(
            "determinism",
            Severity.NOTE,
            "TF32 is on: matrix products keep 10 bits of a float32's 23; exact on one kind of GPU, and other on another",
            "torch.backends.cuda.matmul.allow_tf32",
            0,
        )
    if not e.get("hash_seed"):
        yield Finding(
            "determinism",
            Severity.NOTE,
            "PYTHONHASHSEED is not fixed: what depends on the order of a set of strings differs from process to process",
            advice="start with PYTHONHASHSEED=0",
        )


def _node(name: str) -> str:
    """``ScatterAddBackward0``: ``ScatterAdd``."""
    return name.split("Backward")[0]


def _on(value: Any) -> str:
    return "on" if value else "off"
