"""The graph of runs, drawn in text as ``git log --graph`` draws commits. Values in, values out.

    ●─╮ merge1
    │ ● fork2
    ● │ fork1
    ├─╯
    ○ baseline

Read from the top, the newest run, to the bottom. A line leads from a run down to a parent. What leaves a run sideways is
a further parent of it; where two lines join (``├─╯``) they lead to the same one; where one passes behind another
(``─│─``) they do not touch. A run without a parent is hollow: what stands below it has nothing to do with it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from onthefly.runs.lineage import Lineage, RunLike

_RUN, _ROOT = "●", "○"
_ASCII = str.maketrans("●○│├╭╮┬─", "*o||...-")


@dataclass(frozen=True, slots=True)
class GraphLine:
    """A line of the drawing. `run` is the run that stands in it, or None when it only connects."""

    graph: str
    run: str | None = None


def draw(runs: Iterable[RunLike], *, ascii: bool = False) -> list[GraphLine]:
    """The lines of the drawing, the newest run first, each run before its parents.

    A parent that is not among the runs is not drawn. With `ascii`, only characters of ASCII are used:
    ``*``, ``o`` for a run without a parent, ``|``, ``/``, ``_``, ``-`` and ``.``. Raises `StoreError` as `Lineage.of`.
    """
    rows = list(runs)
    lineage = Lineage.of(rows)
    columns: list[str | None] = []  # the run that the line in each leads down to; None where there is no line
    lines = []
    for name in _newest_first(rows, lineage):
        parents = lineage.parents(name)
        at = _column_of(name, parents, columns)
        known = [parent for parent in parents if parent in columns]
        following = sorted(parents, key=known.__contains__)  # its own column leads on to one that has none yet
        others = following[1:]
        opened = [_open(columns, at, other) for other in others]
        lines.append(GraphLine(_run_line(columns, at, opened, _RUN if parents else _ROOT, ascii), name))
        columns[at] = following[0] if following else None
        for joins in _apart([_both(columns, parent) for parent in known]):
            lines.append(GraphLine(_joining_line(columns, joins, ascii)))
            for _, right in joins:
                columns[right] = None
    return lines


def _newest_first(rows: Sequence[RunLike], lineage: Lineage) -> Iterator[str]:
    """The names in the order of the drawing: of those whose children have all been, the newest comes next."""
    age = {run.name: (-run.created, run.name) for run in rows}
    left = {name: len(lineage.children(name)) for name in age}
    ready = [age[name] for name, count in left.items() if not count]
    heapq.heapify(ready)
    while ready:
        _, name = heapq.heappop(ready)
        yield name
        for parent in lineage.parents(name):
            left[parent] -= 1
            if not left[parent]:
                heapq.heappush(ready, age[parent])


def _column_of(name: str, parents: Sequence[str], columns: list[str | None]) -> int:
    """Where a run stands: below the line that leads to it, or, if none does, near a parent's line."""
    if name in columns:
        return columns.index(name)
    near = next((columns.index(parent) for parent in parents if parent in columns), 0)
    return _open(columns, near, name)


def _open(columns: list[str | None], near: int, leads_to: str) -> int:
    """Begin a line in the nearest free column, on the right only if there is none: a narrow drawing is read at a glance."""
    free = [column for column, taken in enumerate(columns) if taken is None]
    if not free:
        columns.append(leads_to)
        return len(columns) - 1
    column = min(free, key=lambda column: (abs(column - near), -column))
    columns[column] = leads_to
    return column


def _both(columns: Sequence[str | None], parent: str) -> tuple[int, int]:
    """The two columns that lead to a parent; lines join as soon as they can, so there are never more."""
    left = columns.index(parent)
    return left, columns.index(parent, left + 1)


def _apart(joins: Iterable[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Joins by the line that they are drawn in: those in one do not touch each other."""
    lines: list[list[tuple[int, int]]] = []
    for left, right in sorted(joins):
        line = next((line for line in lines if line[-1][1] < left), None)
        if line is None:
            lines.append([(left, right)])
        else:
            line.append((left, right))
    return lines


def _run_line(columns: Sequence[str | None], at: int, opened: Sequence[int], mark: str, ascii: bool) -> str:
    cells = _cells([taken if column not in opened else None for column, taken in enumerate(columns)])
    left, right = min(at, *opened, at), max(at, *opened, at)
    _stroke(cells, left, right)
    for column in opened:
        cells[2 * column] = "╭" if column == left else "╮" if column == right else "┬"
    cells[2 * at] = mark
    text = "".join(cells).rstrip()
    return text.translate(_ASCII) if ascii else text


def _joining_line(columns: Sequence[str | None], joins: Iterable[tuple[int, int]], ascii: bool) -> str:
    cells = _cells(columns)
    for left, right in joins:
        _stroke(cells, left, right)
        cells[2 * left], cells[2 * right] = "├", "╯"
    text = "".join(cells)
    if ascii:
        text = text.replace("─╯", "/ ").replace("─", "_").translate(_ASCII)
    return text.rstrip()


def _cells(columns: Sequence[str | None]) -> list[str]:
    """The characters of a line: those of the columns, each followed by a gap."""
    return [cell for taken in columns for cell in (" " if taken is None else "│", " ")]


def _stroke(cells: list[str], left: int, right: int) -> None:
    """A horizontal line between two columns, behind what stands there."""
    for place in range(2 * left, 2 * right):
        if cells[place] == " ":
            cells[place] = "─"
