"""What the benchmarks share: blocks measured side by side, intervals, and one way to report.

Machines are noisy. So a figure is a ratio of blocks that took turns, or time inside our own calls; and every report
shows the A/A ratio, two identical blocks against each other: what a difference must exceed to mean anything.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios, with a 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def seconds(block: Callable[[], object]) -> float:
    began = time.perf_counter()
    block()
    return time.perf_counter() - began


def ratio(first: Sequence[float], second: Sequence[float]) -> Ratio:
    """first / second, pair by pair."""
    pairs = [a / b for a, b in zip(first, second, strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(pairs, k=len(pairs))) for _ in range(2000))
    return Ratio(statistics.median(pairs), medians[50], medians[1949])


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


class Report:
    """Collects figures, prints them one a line, ends with one line of JSON, and exits with 1 if a target was missed."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._figures: dict[str, Any] = {}
        self._missed: list[str] = []
        print(f"== {name}")

    def note(self, name: str, value: Any, unit: str = "") -> None:
        self._figures[name] = value.__dict__ if isinstance(value, Ratio) else value
        shown = f"{value:.3g}" if isinstance(value, float) else str(value)
        print(f"   {name:<52} {shown} {unit}".rstrip())

    def judge(self, name: str, value: float, limit: float, unit: str = "", *, least: bool = False) -> None:
        """Hold a figure against its target: at most `limit`, or at least."""
        self._figures[name] = value
        met = value >= limit if least else value <= limit
        if not met:
            self._missed.append(name)
        target = f"target: at {'least' if least else 'most'} {limit:g}"
        print(f"   {name:<52} {value:.3g} {unit}  ({target}{'' if met else ', MISSED'})", flush=True)

    def end(self) -> None:
        print(json.dumps({"benchmark": self._name, "figures": self._figures, "missed": self._missed}), flush=True)
        sys.exit(1 if self._missed else 0)
