"""How values look in a terminal: pure functions from values to text.

Colours are ANSI codes that `click.echo` takes away when the output is not a terminal. Tables are laid out here: loading
rich would take a fifth of the time that `onthefly status` has.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import click

_BLOCKS = " ▁▂▃▄▅▆▇█"
_GAP = "  "


@dataclasses.dataclass(frozen=True)
class Column:
    title: str
    align: Literal["left", "right"] = "left"


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns under their titles. A column without a single entry is left out."""
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    widths = {i: max(len(plain(row[i])) for row in (*rows, [c.title for c in columns])) for i in kept}

    def line(cells: Sequence[str]) -> str:
        return _GAP.join(_aligned(cells[i], widths[i], columns[i].align) for i in kept).rstrip()

    head = line([column.title for column in columns])
    return "\n".join([dim(head), *(line(row) for row in rows)])


def plain(text: str) -> str:
    """The text without colours."""
    return click.unstyle(text)


def dim(text: str) -> str:
    return click.style(text, dim=True)


def bold(text: str) -> str:
    return click.style(text, bold=True)


def status(word: str) -> str:
    """A status in its colour."""
    colours = {"running": "green", "paused": "yellow", "killed": "red", "failed": "red", "unfinished": "yellow"}
    return click.style(word, fg=colours.get(word))


def ago(then: float | None, now: float) -> str:
    """``3 s ago``. Empty for None."""
    if then is None:
        return ""
    return "now" if now - then < 1 else f"{span(now - then)} ago"


def span(seconds: float) -> str:
    """A duration in one or two units: ``0.4 s``, ``12 s``, ``3 min``, ``2 h 5 min``, ``4 d``."""
    if seconds < 10:
        return f"{max(seconds, 0):.1f}".removesuffix(".0") + " s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min"
    hours, rest = divmod(seconds, 3600)
    if hours < 48:
        return f"{hours:.0f} h" + (f" {rest // 60:.0f} min" if rest >= 60 and hours < 10 else "")
    return f"{hours // 24:.0f} d"


def size(count: int | None) -> str:
    """Bytes: ``1.2 MB``. Empty for None."""
    if count is None:
        return ""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def number(value: float) -> str:
    """A measured number in four digits: ``0.4213``, ``1.2e-05``."""
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    return f"{value:.4g}"


def value(item: Any) -> str:
    """Any value of an event or a result, short."""
    if isinstance(item, float):
        return number(item)
    if isinstance(item, str):
        return item
    return json.dumps(jsonable(item), ensure_ascii=False)


def pairs(values: Mapping[str, Any]) -> str:
    """``lr 0.001  loss 0.42``."""
    return _GAP.join(f"{name} {value(item)}" for name, item in values.items())


def clock(time: float, now: float) -> str:
    """The local time of day, with the date when it is not today's."""
    then, today = datetime.fromtimestamp(time), datetime.fromtimestamp(now)
    return then.strftime("%H:%M:%S" if then.date() == today.date() else "%Y-%m-%d %H:%M:%S")


def document(item: Any) -> str:
    """One JSON document: rows by the names of their fields, paths as text, NaN and infinities as text, too."""
    return json.dumps(jsonable(item), indent=2, ensure_ascii=False, allow_nan=False)


def jsonable(item: Any) -> Any:
    """The value in JSON's types. JSON has no NaN: it becomes ``"NaN"``, which Python's and JavaScript's number read."""
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return {field.name: jsonable(getattr(item, field.name)) for field in dataclasses.fields(item)}
    if isinstance(item, Mapping):
        return {str(key): jsonable(entry) for key, entry in item.items()}
    if isinstance(item, list | tuple):
        return [jsonable(entry) for entry in item]
    if isinstance(item, Path):
        return str(item)
    if isinstance(item, float) and not math.isfinite(item):
        return "NaN" if math.isnan(item) else "Infinity" if item > 0 else "-Infinity"
    return item


def chart(columns: Sequence[float], height: int) -> list[str]:
    """Numbers as `height` lines of block characters, highest first. One that is not finite is an ``x``."""
    finite = [value for value in columns if math.isfinite(value)]
    if not finite:
        return ["x" * len(columns)] if columns else []
    low, high = min(finite), max(finite)
    steps = height * 8
    # Level 1 at least, so that the lowest point is seen, too.
    levels = [
        None if not math.isfinite(value) else 1 + round((value - low) / ((high - low) or 1.0) * (steps - 1))
        for value in columns
    ]
    return ["".join(_cell(level, row) for level in levels) for row in reversed(range(height))]


def means(values: Sequence[float], width: int) -> list[float]:
    """The values, or, when there are more than `width`, the means of so many equal parts; NaN where one is not finite."""
    count = len(values)
    if count <= width:
        return [float(value) for value in values]
    edges = [i * count // width for i in range(width + 1)]
    parts = [values[begin:end] for begin, end in itertools.pairwise(edges)]
    return [math.fsum(part) / len(part) if _finite(part) else math.nan for part in parts]


def _cell(level: int | None, row: int) -> str:
    if level is None:
        return "x" if row == 0 else " "
    return _BLOCKS[min(max(level - row * 8, 0), 8)]


def _finite(values: Sequence[float]) -> bool:
    return all(math.isfinite(value) for value in values)


def _aligned(text: str, width: int, align: str) -> str:
    padding = " " * (width - len(plain(text)))
    return padding + text if align == "right" else text + padding
