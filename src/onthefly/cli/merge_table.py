"""How a previewed merge looks in a terminal: a pure function from the answer to text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from onthefly.cli import render
from onthefly.cli.render import Column


def preview(answer: Mapping[str, Any]) -> str:
    """Rows are slices, columns the parents, the present model and every strategy. The best of a row is marked, and what is
    worse than the best parent is red."""
    metric, columns = answer["metric"], answer["columns"]
    rows = []
    for name in answer["slices"]:
        scores = {column: answer["scores"][column][name] for column in columns}
        samples = next(iter(scores.values()))["samples"]
        label = f"{name} *" if name == answer["judge"] else name
        cells = [_cell(column, name, scores[column], answer) for column in columns]
        rows.append([render.bold(label) if name == answer["judge"] else label, f"{samples:,}", *cells])
    titles = [Column(metric), Column("samples", "right"), *(Column(column, "right") for column in columns)]
    lines = [render.table(titles, rows)]
    lines += [render.dim(line) for line in _notes(answer)]
    lines += [f"{click.style('warning:', fg='yellow', bold=True)} {name}: {text}" for name, text in _warnings(answer)]
    return "\n".join(lines)


def _cell(column: str, name: str, score: Mapping[str, Any], answer: Mapping[str, Any]) -> str:
    value = score.get(answer["metric"])
    text = f"{value:.1%}" if answer["metric"] == "accuracy" and value is not None else _number(value)
    if answer["best"][name] == column:
        return click.style(f"{text} ◂", fg="green", bold=True)
    return click.style(f"{text}  ", fg="red") if name in answer["worse"].get(column, ()) else f"{text}  "


def _number(value: float | None) -> str:
    """None stands for what is no finite number."""
    return "nan" if value is None else render.number(value)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _notes(answer: Mapping[str, Any]) -> list[str]:
    lines = [f"* decides, by {answer['metric']}; ◂ is the best of its row; red is worse than the best parent"]
    for pair in answer.get("explained", {}).get("pairs", ()):
        overall = pair["overall"]
        words = [f"distance {_number(overall['distance'])}"]
        if overall.get("cosine") is not None:
            words.append(f"cosine {render.number(overall['cosine'])}")
        if overall.get("agreement") is not None:
            words.append(f"{overall['agreement']:.0%} of signs agree")
        lines.append(f"{pair['first']} and {pair['second']}: {', '.join(words)}")
    for path in answer.get("explained", {}).get("paths", ()):
        losses = " ".join(map(_number, path["losses"]))
        lines.append(f"loss from {path['first']} to {path['second']}: {losses} (barrier {_number(path['barrier'])})")
    for name, tensors in answer.get("averaged", {}).items():
        if tensors:
            lines.append(f"{name} averaged what it does not cover: {_few(tensors)}")
    if answer.get("unmerged"):
        lines.append(f"{', '.join(answer['unmerged'])}: tracked, not merged, and as it was")
    lines += [f"{name} was left out: {reason}" for name, reason in answer.get("skipped", {}).items()]
    return lines


def _warnings(answer: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, text) for name, texts in answer.get("warnings", {}).items() for text in texts]
