"""Points of a series of numbers as packed arrays, and what is left of them at a lower resolution."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

POINT = np.dtype([("step", "<i8"), ("value", "<f8"), ("time", "<f8")])
Points = npt.NDArray[np.void]
RESOLUTIONS = (16, 256, 4096)


def join(parts: list[Points]) -> Points:
    return np.concatenate(parts) if parts else np.empty(0, POINT)


def packed(points: Points) -> dict[str, Any]:
    """The columns of a chunk that hold these points; there is at least one."""
    return {
        "first_step": int(points["step"].min()),
        "last_step": int(points["step"].max()),
        "count": len(points),
        "steps": points["step"].tobytes(),
        "values": points["value"].tobytes(),
        "times": points["time"].tobytes(),
    }


def unpacked(steps: bytes, values: bytes, times: bytes) -> Points:
    """The points of a chunk, from its columns."""
    points = np.empty(len(steps) // 8, POINT)
    points["step"] = np.frombuffer(steps, "<i8")
    points["value"] = np.frombuffer(values, "<f8")
    points["time"] = np.frombuffer(times, "<f8")
    return points


def extremes(points: Points, size: int) -> Points:
    """The lowest and the highest of each `size` consecutive points, in their order. NaN only where there is nothing else."""
    return points[extreme_places(points["value"], size)]


def extreme_places(values: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.int64]:
    """Where the lowest and the highest of each `size` consecutive values are."""
    missing = np.isnan(values)
    low, high = (np.where(missing, edge, values) for edge in (np.inf, -np.inf)) if missing.any() else (values, values)
    whole = len(values) // size * size
    starts = np.arange(0, whole, size)
    lowest = starts + low[:whole].reshape(-1, size).argmin(axis=1)
    highest = starts + high[:whole].reshape(-1, size).argmax(axis=1)
    if whole < len(values):
        lowest = np.append(lowest, whole + low[whole:].argmin())
        highest = np.append(highest, whole + high[whole:].argmax())
    both = np.stack((np.minimum(lowest, highest), np.maximum(lowest, highest)), axis=1).ravel()
    places: npt.NDArray[np.int64] = both[np.append(True, both[1:] != both[:-1])] if len(both) else both
    return places
