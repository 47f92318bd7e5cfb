"""How values look."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onthefly.cli import render
from onthefly.cli.render import Column


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.4 s"), (3, "3 s"), (42.4, "42 s"), (120, "2 min"), (3600, "1 h"), (7500, "2 h 5 min"), (200_000, "2 d")],
)
def test_spans(seconds, text):
    assert render.span(seconds) == text


def test_ago():
    assert render.ago(97, 100) == "3 s ago"
    assert render.ago(100.5, 100) == "now"
    assert render.ago(None, 100) == ""


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1234, "1.2 kB"), (1_234_567, "1.2 MB"), (456e9, "456 GB"), (3e12, "3.0 TB")],
)
def test_sizes(count, text):
    assert render.size(int(count)) == text


def test_tables_are_aligned_whatever_the_colours():
    columns = (Column("NAME"), Column("EMPTY"), Column("N", "right"))
    text = render.table(columns, [[render.bold("a"), "", "1"], ["longer", "", "1000"]])
    assert render.plain(text).splitlines() == ["NAME       N", "a          1", "longer  1000"]


def test_a_chart_has_its_extremes_at_the_edges():
    lines = render.chart([0.0, 1.0, 2.0, math.nan], 2)
    assert lines == [" ▁█ ", "▁██x"]


def test_flat_and_empty_and_hopeless_charts():
    assert render.chart([], 3) == []
    assert render.chart([1.0, 1.0], 1) == ["▁▁"]
    assert render.chart([math.inf, math.nan], 3) == ["xx"]


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1), st.integers(1, 50))
def test_means_have_at_most_the_width_and_stay_in_range(values, width):
    found = render.means(values, width)
    assert len(found) == min(len(values), width)
    slack = 1e-6 * max(map(abs, values))
    assert all(min(values) - slack <= mean <= max(values) + slack for mean in found)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_any_value_becomes_one_json_document(value):
    def refuse(constant):
        raise AssertionError(constant)

    json.loads(render.document(value), parse_constant=refuse)


def test_not_a_number_is_a_text_that_float_reads():
    read = json.loads(render.document([math.nan, math.inf, -math.inf]))
    assert [float(text) for text in read][1:] == [math.inf, -math.inf]
    assert math.isnan(float(read[0]))
