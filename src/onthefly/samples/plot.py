"""Plots of per-sample values: a histogram, and the data map, each as text for a terminal or as a picture.

Text needs no library, and fits whatever terminal there is; pictures are matplotlib's. The colours are those of Okabe and Ito, which
people who see fewer colours can tell apart.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onthefly.errors import InvalidCommandError, MissingPartError, StoreError, said

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DRAWN = 25_000
"""The most points that a data map draws: more only take time."""

_SHARES = (0.5, 0.9, 0.99)
_SMALLEST = (44, 14)  # columns and rows; in less there is no room for the words
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_SHADES = "·░▒▓█"
_BLUE, _ORANGE, _RED, _GREY = "#0072B2", "#E69F00", "#D55E00", "#555555"
_CODES = {_BLUE: "38;5;32", _ORANGE: "38;5;214", _RED: "38;5;202", _GREY: "2", "bold": "1"}
_EASY, _AMBIGUOUS, _HARD = "easy to learn", "ambiguous", "hard to learn"


@dataclass(frozen=True, eq=False)  # arrays have no == of their own that says yes or no
class Histogram:
    """How many samples have which value: `counts` int64 [bins] between `edges` float64 [bins + 1].

    `marks` are the quantiles (share, value). `notes` say what is not drawn. `log`: the tail would vanish on a linear scale.
    """

    title: str
    axis: str
    counts: np.ndarray
    edges: np.ndarray
    marks: tuple[tuple[float, float], ...]
    notes: tuple[str, ...]
    log: bool


@dataclass(frozen=True, eq=False)
class DataMap:
    """Where samples lie by the variability (x) and the mean (y) of their confidence or loss, float64 [N].

    `known` is bool [N], or None where it is not known. `upside_down`: y falls, so that what is easy is at the top.
    """

    title: str
    axes: tuple[str, str]
    x: np.ndarray
    y: np.ndarray
    known: np.ndarray | None
    limits: tuple[tuple[float, float], tuple[float, float]]
    notes: tuple[str, ...]
    upside_down: bool


Plot = Histogram | DataMap


def histogram(values: np.ndarray, *, bins: int = 40, title: str = "", axis: str = "loss (nats)") -> Histogram:
    """The histogram of one column, with marks at its quantiles of 50, 90 and 99 %.

    Values that are not finite are left out, and so are outliers so far off that all the others would be one bar: the notes
    tell how many. `axis` names the values and their unit. Raises `InvalidCommandError` when there is no value at all.
    """
    if bins < 1:
        raise InvalidCommandError(f"a histogram has 1 bin or more, not {bins}")
    array = np.asarray(values, np.float64)
    finite = array[np.isfinite(array)]
    _need(finite.size, axis)
    low, high = _range(finite)
    counts, edges = np.histogram(finite, bins, (low, high))
    notes = _left_out(array.size - finite.size, int((finite < low).sum() + (finite > high).sum()), (low, high))
    marks = tuple(zip(_SHARES, np.quantile(finite, _SHARES).tolist(), strict=True))
    log = bool(counts.max() > 50 * counts[counts > 0].min())
    return Histogram(
        title or f"{axis.partition(' (')[0]} of {finite.size:,} samples", axis, counts, edges, marks, notes, log
    )


def data_map(
    variability: np.ndarray,
    mean: np.ndarray,
    known: np.ndarray | None = None,
    *,
    of: str = "confidence",
    title: str = "",
) -> DataMap:
    """The data map of Swayamdipta et al. 2020, "Dataset Cartography": which samples are easy, ambiguous, hard to learn.

    With `of="confidence"` the columns are `confidence_variability` and `mean_confidence`, with `of="loss"` they are `variability` and
    `mean_loss`; then y falls. `known` tells which samples were right at their last recording. Of more than 25,000 samples
    so many are drawn, always the same. Raises `InvalidCommandError` when no sample has both values.
    """
    if of not in ("confidence", "loss"):
        raise InvalidCommandError(f'a data map is of "confidence" or "loss", not {of!r}')
    x, y = np.asarray(variability, np.float64), np.asarray(mean, np.float64)
    finite = np.isfinite(x) & np.isfinite(y)
    total = int(finite.sum())
    _need(total, f"mean and variability of the {of}")
    if of == "confidence":
        limits = ((0.0, max(0.5, float(x[finite].max()))), (0.0, 1.0))
        axes = ("standard deviation of the confidence", "mean confidence (probability of the true class)")
    else:
        limits = (_range(x[finite]), _range(y[finite]))
        axes = ("standard deviation of the loss (nats)", "mean loss (nats), falling")
    (left, right), (low, high) = limits
    inside = np.flatnonzero(finite & (x >= left) & (x <= right) & (y >= low) & (y <= high))
    notes = _left_out(x.size - total, total - inside.size, None)
    if inside.size > DRAWN:
        notes = (*notes, f"{DRAWN:,} of them drawn")
        inside = np.sort(np.random.default_rng(0).choice(inside, DRAWN, replace=False))
    seen = None if known is None else np.asarray(known, bool)[inside]
    return DataMap(
        title or f"data map of {total:,} samples", axes, x[inside], y[inside], seen, limits, notes, of == "loss"
    )


# -- in a terminal ---------------------------------------------------------------------------------------------


def terminal(plot: Plot, width: int | None = None, height: int | None = None, *, colour: bool | None = None) -> str:
    """The plot as lines of text, `height` of them, none longer than `width`; at least 44 columns and 14 rows are used.

    By default they fit the terminal, with its last row left for the prompt, and are coloured if standard output is one and
    ``NO_COLOR`` is not set.
    """
    size = shutil.get_terminal_size()
    columns = max(size.columns if width is None else width, _SMALLEST[0])
    rows = max(size.lines - 1 if height is None else height, _SMALLEST[1])
    if colour is None:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    if isinstance(plot, Histogram):
        return _text_histogram(plot, columns, rows).text(colour)
    canvas = _text_map(plot, columns, rows)
    if colour and plot.known is not None:
        words = [(" █ right at the last recording", _BLUE), (" █ wrong", _RED)]
        place = columns - sum(len(word) for word, _ in words)
        for word, paint in words:
            canvas.put(rows - 1, place, word, paint)
            place += len(word)
    return canvas.text(colour)


class _Canvas:
    """Rows of coloured characters."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self._cells = [[(" ", "")] * columns for _ in range(rows)]

    def put(self, row: int, column: int, text: str, colour: str = "") -> None:
        """Write from a place on; what does not fit is cut off."""
        for offset, character in enumerate(text):
            if 0 <= row < self.rows and 0 <= column + offset < self.columns:
                self._cells[row][column + offset] = (character, colour)

    def put_around(self, row: int, centre: int, text: str, colour: str = "") -> None:
        """Write around a column, as far as the edges let."""
        self.put(row, max(0, min(centre - len(text) // 2, self.columns - len(text))), text, colour)

    def free(self, row: int, column: int) -> bool:
        return self._cells[row][column][0] == " "

    def text(self, coloured: bool) -> str:
        return "\n".join(_line(row, coloured) for row in self._cells)


def _line(cells: Sequence[tuple[str, str]], coloured: bool) -> str:
    plain = "".join(character for character, _ in cells).rstrip()
    if not coloured:
        return plain
    out, current = [], ""
    for character, colour in cells[: len(plain)]:
        if colour != current:
            out += ["\x1b[0m"] * bool(current) + [f"\x1b[{_CODES.get(colour)}m"] * bool(colour)
            current = colour
        out.append(character)
    return "".join(out) + "\x1b[0m" * bool(current)


class _Frame:
    """A canvas with a title and axes, and the area between them."""

    def __init__(
        self,
        plot: Plot,
        columns: int,
        rows: int,
        x: tuple[float, float],
        x_label: str,
        y_ticks: Iterable[tuple[float, str]],
        y_label: str,
    ) -> None:
        """`y_ticks` are (height from 0 to 1, word)."""
        self.canvas = _Canvas(columns, rows)
        ticks = list(y_ticks)
        self.left = max(len(word) for _, word in ticks) + 2
        self.top, self.width, self.height = 2, columns - self.left - 1, rows - 5
        bottom = self.top + self.height
        heading = "; ".join([plot.title, *plot.notes])
        self.canvas.put(0, 0, heading[: columns - 1] + "…" * (len(heading) >= columns), "bold")
        self.canvas.put(1, 0, y_label, _GREY)
        for row in range(self.top, bottom):
            self.canvas.put(row, self.left - 1, "│", _GREY)
        self.canvas.put(bottom, self.left - 1, "└" + "─" * self.width, _GREY)
        for share, word in ticks:
            row = self.row(share)
            self.canvas.put(row, self.left - 2 - len(word), word, _GREY)
            self.canvas.put(row, self.left - 1, "┤", _GREY)
        low, high = x
        positions = _ticks(low, high, max(2, self.width // 12))
        for value, word in zip(positions, _words(positions), strict=True):
            column = self.left + self.column((value - low) / (high - low))
            self.canvas.put(bottom, column, "┬", _GREY)
            self.canvas.put_around(bottom + 1, column, word, _GREY)
        self.canvas.put(rows - 1, self.left, x_label, _GREY)

    def column(self, share: float) -> int:
        return min(self.width - 1, int(share * self.width))

    def row(self, share: float) -> int:
        return self.top + self.height - 1 - min(self.height - 1, int(share * self.height))


def _text_histogram(plot: Histogram, columns: int, rows: int) -> _Canvas:
    low, high = float(plot.edges[0]), float(plot.edges[-1])
    scale = _Scale(int(plot.counts.max()), plot.log)
    y_ticks = [(scale.height(value), f"{value:,.0f}") for value in scale.ticks((rows - 5) // 3)]
    y_label = "samples, log scale" if plot.log else "samples"
    frame = _Frame(plot, columns, rows, (low, high), plot.axis, y_ticks, y_label)
    bins = np.minimum((np.arange(frame.width) + 0.5) / frame.width * plot.counts.size, plot.counts.size - 1).astype(int)
    for column, bin_ in enumerate(bins.tolist()):
        eighths = round(scale.height(int(plot.counts[bin_])) * frame.height * 8)
        eighths = max(eighths, 1) if plot.counts[bin_] else 0
        for row in range(math.ceil(eighths / 8)):
            block = _EIGHTHS[min(8, eighths - 8 * row)]
            colour = _part((plot.edges[bin_] + plot.edges[bin_ + 1]) / 2, plot.marks)
            frame.canvas.put(frame.top + frame.height - 1 - row, frame.left + column, block, colour)
    for number, (share, value) in enumerate(plot.marks):
        if not low <= value <= high:
            continue
        column = frame.left + frame.column((value - low) / (high - low))
        word = f"{share:.0%} below {value:.3g}"
        for row in range(frame.top + number, frame.top + frame.height):
            if frame.canvas.free(row, column):
                frame.canvas.put(row, column, "┊", _GREY)
        right = column + 2
        place = right if right + len(word) < columns else column - 1 - len(word)
        frame.canvas.put(frame.top + number, place, word, "bold")
    return frame.canvas


def _text_map(plot: DataMap, columns: int, rows: int) -> _Canvas:
    x, (low, high) = plot.limits
    values = _ticks(low, high, 5)
    shares = [(value - low) / (high - low) for value in values]
    y_ticks = [
        (1 - share if plot.upside_down else share, word) for share, word in zip(shares, _words(values), strict=True)
    ]
    frame = _Frame(plot, columns, rows, x, plot.axes[0], y_ticks, plot.axes[1])
    across = np.minimum((plot.x - x[0]) / (x[1] - x[0]) * frame.width, frame.width - 1).astype(int)
    up = (plot.y - low) / (high - low)
    down = np.minimum((up if plot.upside_down else 1 - up) * frame.height, frame.height - 1).astype(int)
    cells = down * frame.width + across
    counts = np.bincount(cells, minlength=frame.width * frame.height)
    known = None if plot.known is None else np.bincount(cells, plot.known, minlength=counts.size) * 2 >= counts
    steps = math.log(max(int(counts.max(initial=1)), 2)) / (len(_SHADES) - 1)
    for cell in np.flatnonzero(counts).tolist():
        shade = _SHADES[math.ceil(math.log(counts[cell]) / steps - 1e-9)]
        colour = _BLUE if known is None or known[cell] else _RED
        frame.canvas.put(frame.top + cell // frame.width, frame.left + cell % frame.width, shade, colour)
    # A sample whose value never moves is at an end of the scale: between them there is room on the left.
    inwards = max(1, frame.height // 6)
    frame.canvas.put(frame.top + inwards, frame.left + 1, _EASY, "bold")
    frame.canvas.put(frame.top + frame.height - 1 - inwards, frame.left + 1, _HARD, "bold")
    frame.canvas.put(frame.top + frame.height // 2, columns - 2 - len(_AMBIGUOUS), _AMBIGUOUS, "bold")
    return frame.canvas


# -- as a picture ----------------------------------------------------------------------------------------------


def picture(plot: Plot, path: str | os.PathLike[str]) -> Path:
    """Draw the plot to a ``.png``, ``.svg`` or ``.pdf`` file. A file that is there already is replaced by the whole new one.

    Raises `MissingPartError` without matplotlib, `InvalidCommandError` for another suffix, and `StoreError` when the disk does
    not take it.
    """
    target = Path(path)
    kind = target.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg", "pdf"):
        raise InvalidCommandError(f"{target}: a plot is written to a .png, .svg or .pdf file")
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise MissingPartError("pictures need matplotlib: pip install 'onthefly[plot]'") from e
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(plot.title, loc="left", fontweight="bold")
    if plot.notes:
        axes.set_title("; ".join(plot.notes), loc="right", fontsize="small", color=_GREY)
    if isinstance(plot, Histogram):
        _draw_histogram(plot, axes)
    else:
        _draw_map(plot, axes)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        figure.savefig(temporary, format=kind)
        os.replace(temporary, target)
    except OSError as e:
        raise StoreError(f"{target}: cannot write the plot: {said(e)}") from e
    finally:
        with suppress(OSError):
            temporary.unlink()
    return target


def _draw_histogram(plot: Histogram, axes: Axes) -> None:
    middles = (plot.edges[:-1] + plot.edges[1:]) / 2
    colours = [_part(middle, plot.marks) for middle in middles.tolist()]
    axes.bar(plot.edges[:-1], plot.counts, np.diff(plot.edges), align="edge", color=colours, edgecolor="white", lw=0.5)
    axes.set_xlim(plot.edges[0], plot.edges[-1])
    axes.set_xlabel(plot.axis)
    axes.set_ylabel("samples, log scale" if plot.log else "samples")
    top = float(plot.counts.max())
    if plot.log:
        axes.set_yscale("log")
        axes.set_ylim(0.5, top * 8)
    else:
        axes.set_ylim(0, top * 1.35)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for number, (share, value) in enumerate(plot.marks):
        if plot.edges[0] <= value <= plot.edges[-1]:
            axes.axvline(value, color=_GREY, lw=1, ls=(0, (4, 3)))
            late = (value - plot.edges[0]) / (plot.edges[-1] - plot.edges[0]) > 0.8
            axes.annotate(
                f"{share:.0%} below {value:.3g}",
                (value, 0.96 - 0.06 * number),
                (-5 if late else 5, 0),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="right" if late else "left",
                va="center",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )


def _draw_map(plot: DataMap, axes: Axes) -> None:
    size, alpha = (14, 0.55) if plot.x.size <= 5_000 else (7, 0.35)
    groups: list[tuple[Any, str, str, str | None]] = [(slice(None), _BLUE, "o", None)]
    if plot.known is not None:
        groups = [
            (plot.known, _BLUE, "o", "right at the last recording"),
            (~plot.known, _RED, "^", "wrong at the last recording"),
        ]
    for chosen, colour, marker, label in groups:
        axes.scatter(
            plot.x[chosen],
            plot.y[chosen],
            s=size,
            c=colour,
            marker=marker,
            alpha=alpha,
            lw=0,
            label=label,
            rasterized=True,
        )
    (left, right), (low, high) = plot.limits
    margin = (right - left) * 0.02, (high - low) * 0.02
    axes.set_xlim(left - margin[0], right + margin[0])
    axes.set_ylim(*sorted((low - margin[1], high + margin[1]), reverse=plot.upside_down))
    axes.set_xlabel(plot.axes[0])
    axes.set_ylabel(plot.axes[1])
    for x, y, word, ha, va in (
        (0.02, 0.84, _EASY, "left", "center"),
        (0.98, 0.5, _AMBIGUOUS, "right", "center"),
        (0.02, 0.16, _HARD, "left", "center"),
    ):
        box = {"facecolor": "white", "edgecolor": _GREY, "boxstyle": "round,pad=0.3", "lw": 0.5, "alpha": 0.85}
        axes.text(x, y, word, transform=axes.transAxes, ha=ha, va=va, fontweight="bold", bbox=box)
    if plot.known is not None:
        legend = axes.legend(loc="upper right", frameon=False, markerscale=1.6)
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set_alpha(1)


# -- parts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scale:
    """The heights of bars, from 0 to 1. On the logarithmic one a single sample still is to be seen."""

    most: int
    log: bool

    def height(self, count: float) -> float:
        if count <= 0:
            return 0.0
        headroom = 0.8  # for the words of the marks
        return headroom * (math.log(count / 0.5) / math.log(self.most / 0.5) if self.log else count / self.most)

    def ticks(self, number: int) -> list[float]:
        if self.log:
            decades = math.floor(math.log10(self.most)) + 1
            return [float(10**power) for power in range(0, decades, math.ceil(decades / max(number, 1)))]
        return [value for value in _ticks(0, self.most, number) if value == int(value)]


def _need(number: int, what: str) -> None:
    if not number:
        raise InvalidCommandError(
            f"no sample has a value to draw ({what}); `onthefly scan` or some training gives them"
        )


def _range(values: np.ndarray) -> tuple[float, float]:
    """From the smallest to the largest, but for outliers further off than three times the breadth of the middle 98 %."""
    low, first, last, high = np.quantile(values, [0, 0.01, 0.99, 1]).tolist()
    reach = 3 * (last - first)
    if reach > 0:
        near = values[(values >= first - reach) & (values <= last + reach)]
        low, high = float(near.min()), float(near.max())
    if 0 < low < (high - low) / 20:
        low = 0.0
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # they are as good as the same
        low, high = low - max(abs(low), 1) / 2, high + max(abs(high), 1) / 2
    return low, high


def _left_out(missing: int, outside: int, limits: tuple[float, float] | None) -> tuple[str, ...]:
    drawn = "what is drawn" if limits is None else f"{limits[0]:.3g} to {limits[1]:.3g}"
    notes = [f"{missing:,} without a value"] * bool(missing)
    return (*notes, *[f"{outside:,} outside {drawn}"] * bool(outside))


def _part(value: float, marks: Sequence[tuple[float, float]]) -> str:
    """The colour of a bar: of the bulk, of the last tenth, of the last hundredth."""
    return _RED if value > marks[2][1] else _ORANGE if value > marks[1][1] else _BLUE


def _ticks(low: float, high: float, most: int) -> list[float]:
    """At most so many round numbers in a range, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    for factor in (1, 2, 5, 10, 20):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [number * step for number in range(first, last + 1)]


def _words(ticks: Sequence[float]) -> list[str]:
    """Ticks with as many decimals as tell them apart."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) if ticks else 1
    largest = max((abs(tick) for tick in ticks), default=0)
    if largest >= 1e6 or 0 < step < 1e-4:
        return [f"{tick:.3g}" for tick in ticks]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
    return [f"{tick + 0.0:,.{decimals}f}" for tick in ticks]
