"""Plots fit where they are drawn, and say what they show, and what they leave out."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from onthefly.errors import InvalidCommandError, StoreError
from onthefly.samples.plot import DRAWN, data_map, histogram, picture, terminal

unhurried = settings(deadline=None)
lengths = st.integers(1, 40)
values = lengths.flatmap(lambda n: arrays(np.float32, n))
SIGNATURES = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


def losses(number=5000):
    return np.random.default_rng(0).lognormal(-2, 1.5, number)


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def a_map(number=500, **more):
    draw = np.random.default_rng(1)
    mean = draw.random(number)
    return data_map(np.sqrt(mean * (1 - mean)) * draw.random(number), mean, mean > 0.5, **more)


@unhurried
@given(values, st.integers(1, 60))
def test_every_finite_value_is_in_a_bin_or_told_to_be_left_out(column, bins):
    finite = column[np.isfinite(column)]
    if not finite.size:
        with pytest.raises(InvalidCommandError, match="no sample has a value"):
            histogram(column, bins=bins)
        return
    plot = histogram(column, bins=bins)
    assert (len(plot.counts), len(plot.edges)) == (bins, bins + 1)
    left_out = [int(note.split(" ")[0].replace(",", "")) for note in plot.notes]
    assert plot.counts.sum() + sum(left_out) == column.size
    assert plot.counts.sum() > 0
    assert [share for share, _ in plot.marks] == [0.5, 0.9, 0.99]
    assert [mark for _, mark in plot.marks] == np.quantile(finite.astype(float), [0.5, 0.9, 0.99]).tolist()


sizes = st.tuples(st.integers(1, 150), st.integers(1, 50))


@unhurried
@given(values, sizes, st.booleans())
def test_text_has_as_many_lines_as_asked_for_and_none_too_long(column, size, colour):
    width, height = size
    plots = [histogram(column), data_map(column, column[::-1], of="loss")] if np.isfinite(column).all() else [a_map(9)]
    for plot in plots:
        lines = plain(terminal(plot, width, height, colour=colour)).split("\n")
        assert len(lines) == max(height, 14)
        assert max(map(len, lines)) <= max(width, 44)


@unhurried
@given(sizes)
def test_colours_change_no_character_of_a_histogram_and_without_them_there_is_no_code(size):
    plot = histogram(losses())
    coloured, bare = (terminal(plot, *size, colour=colour) for colour in (True, False))
    assert "\x1b[" in coloured
    assert "\x1b" not in bare
    assert plain(coloured) == bare


def test_text_fits_the_terminal_by_default_and_has_no_colours_unless_there_is_one(monkeypatch):
    monkeypatch.setenv("COLUMNS", "61")
    monkeypatch.setenv("LINES", "25")
    text = terminal(a_map())
    assert text == terminal(a_map(), 61, 24, colour=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert terminal(a_map()) == terminal(a_map(), 61, 24, colour=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal(a_map()) == text


def test_a_histogram_says_what_it_is_of_and_where_its_quantiles_are():
    text = terminal(histogram(np.append(losses(), [np.nan, 1e6])), 80, 24, colour=False)
    assert text.startswith("loss of 5,001 samples; 1 without a value; 2 outside 0 to ")
    assert "loss (nats)" in text
    for share, value in zip((50, 90, 99), np.quantile(np.append(losses(), 1e6), [0.5, 0.9, 0.99]), strict=True):
        assert f"{share}% below {value:.3g}" in text


def test_a_long_tail_is_counted_on_a_log_scale_and_an_even_one_is_not():
    tail, even = histogram(losses()), histogram(np.linspace(0, 1, 500))
    assert tail.log
    assert not even.log
    assert "log scale" in terminal(tail, 80, 24)
    assert "log scale" not in terminal(even, 80, 24)


def test_the_bars_of_a_histogram_are_as_high_as_its_counts():
    rows = terminal(histogram(np.repeat([0.0, 1.0, 2.0], [10, 40, 20]), bins=3), 80, 40, colour=False).split("\n")
    heights = [sum(row[column : column + 1] in tuple("▁▂▃▄▅▆▇█") for row in rows) for column in (8, 40, 70)]
    assert heights[1] == pytest.approx(4 * heights[0], abs=2)
    assert heights[2] == pytest.approx(2 * heights[0], abs=2)


def test_a_data_map_names_its_regions_and_its_axes():
    text = terminal(a_map(), 80, 24, colour=True)
    for word in ("easy to learn", "ambiguous", "hard to learn", "mean confidence", "right at the last", "wrong"):
        assert word in plain(text)
    assert plain(text).index("easy") < plain(text).index("ambiguous") < plain(text).index("hard")
    assert "right at" not in terminal(data_map(np.ones(2), np.ones(2)), 80, 24, colour=True)


@pytest.mark.parametrize(("of", "easy"), [("confidence", 1.0), ("loss", 0.0)])
def test_what_is_easy_is_at_the_top_of_a_data_map(of, easy):
    spread = np.array([0.0, 0.3])
    rows = terminal(data_map(spread, np.array([easy, 0.5]), of=of), 80, 24, colour=False).split("\n")
    assert "│·" in rows[2] or "┤·" in rows[2]


def test_of_many_samples_a_data_map_draws_some_and_says_so():
    many = np.random.default_rng(0).random(DRAWN + 5)
    plots = [data_map(many / 2, many, many > 0.5) for _ in range(2)]
    assert len(plots[0].x) == len(plots[0].y) == len(plots[0].known) == DRAWN
    assert np.array_equal(plots[0].x, plots[1].x)
    assert (plots[0].known == (plots[0].y > 0.5)).all()
    assert plots[0].notes == ("25,000 of them drawn",)


def test_samples_without_a_value_are_not_on_a_data_map():
    plot = data_map(np.array([0.1, np.nan, 0.2]), np.array([0.5, 0.5, np.nan]), np.array([True, False, False]))
    assert plot.x.tolist() == [0.1]
    assert plot.known.tolist() == [True]
    assert plot.notes == ("2 without a value",)


@pytest.mark.parametrize("kind", SIGNATURES)
@pytest.mark.parametrize("plot", [histogram(losses()), a_map(), a_map(of="loss")], ids=["histogram", "map", "loss map"])
def test_a_picture_is_a_file_of_its_kind_and_replaces_an_older_one(tmp_path, kind, plot):
    path = tmp_path / f"plot.{kind}"
    path.write_text("older")
    assert picture(plot, str(path)) == path
    assert path.read_bytes().startswith(SIGNATURES[kind])
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("column", [[2.0], [0.0, 0.0], [1e30, -1e30], [1e-30, 2e-30]])
def test_few_or_strange_values_are_drawn_as_well(tmp_path, column):
    picture(histogram(np.array(column)), tmp_path / "h.png")
    picture(data_map(np.array(column), np.array(column), np.ones(len(column), bool), of="loss"), tmp_path / "m.png")


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(InvalidCommandError, match=r"\.png, \.svg or \.pdf"):
        picture(a_map(), tmp_path / "plot.jpg")
    with pytest.raises(InvalidCommandError, match="1 bin or more"):
        histogram(losses(), bins=0)
    with pytest.raises(InvalidCommandError, match="no sample has a value"):
        data_map(np.array([np.nan]), np.array([0.5]))
    with pytest.raises(InvalidCommandError, match="margin"):
        data_map(np.ones(1), np.ones(1), of="margin")
    with pytest.raises(StoreError, match="No such file"):
        picture(a_map(), tmp_path / "none" / "plot.png")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "script",
    [
        "terminal(plot, 80, 24); sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)",
        "picture(plot, sys.argv[1]); sys.exit('matplotlib.pyplot' in sys.modules)",
        """
sys.modules['matplotlib'] = None
try:
    picture(plot, sys.argv[1])
except MissingPartError as e:
    sys.exit("pip install 'onthefly[plot]'" not in str(e))
""",
    ],
    ids=["text needs no library", "no global state of matplotlib", "without matplotlib it is said what to install"],
)
def test_libraries(tmp_path, script):
    before = (
        "import sys\nfrom onthefly.errors import *\nfrom onthefly.samples.plot import *\nplot = histogram([1, 2])\n"
    )
    done = subprocess.run([sys.executable, "-c", before + script, str(tmp_path / "a.png")], check=False)
    assert done.returncode == 0
