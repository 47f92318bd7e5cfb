"""The drawing of runs says what the runs say: its lines are traced, character by character."""

import random
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from onthefly.errors import StoreError
from onthefly.runs.graph import GraphLine, draw

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy


@dataclass(frozen=True)
class Run:
    name: str
    parents: tuple[tuple[str, str], ...] = ()
    created: float = 0.0
    kind: str = "fork"
    base: None = None


def runs(*lines):
    """``runs("b < a", "c < a b")``: each comes after those before it."""
    found = []
    for number, line in enumerate(lines):
        name, _, parents = line.partition(" < ")
        found.append(Run(name, tuple((parent, "hash") for parent in parents.split()), float(number)))
    return found


def text(rows, **how):
    return "\n".join(f"{line.graph} {line.run}" if line.run else line.graph for line in draw(rows, **how))


def edges(rows):
    names = {row.name for row in rows}
    return {(row.name, parent) for row in rows for parent, _ in row.parents if parent in names}


@st.composite
def graphs(draw, most=14):
    """Rows of a random graph, in any order. Clocks may have been wrong, and a parent may be gone."""
    rows = []
    for number in range(draw(st.integers(0, most))):
        sources = st.lists(st.sampled_from([*(row.name for row in rows), "gone"]), max_size=4)
        created = draw(st.sampled_from([float(number), float(draw(st.integers(0, 5)))]))
        rows.append(Run(f"r{number}", tuple((parent, "hash") for parent in draw(sources)), created))
    return draw(st.permutations(rows))


class Tracer:
    """Reads a drawing as an eye does. It knows what a character looks like, and nothing of how it came there."""

    RUNS = "●○"

    def __init__(self, lines):
        self.names = [line.run for line in lines]
        self.rows = [line.graph for line in lines]
        self.seen = set()

    def edges(self):
        found = []
        for row, name in enumerate(self.names):
            if name is not None:
                [(column, mark)] = [(c, char) for c, char in enumerate(self.rows[row]) if char in self.RUNS]
                self.seen.add((row, column))
                found += [(name, self.names[at]) for at in self.leave(row, column, mark)]
        return found

    def at(self, row, column):
        inside = 0 <= row < len(self.rows) and 0 <= column < len(self.rows[row])
        return self.rows[row][column] if inside else " "

    def leave(self, row, column, mark):
        """The rows of the runs that the lines from this run arrive at."""
        yield from self.down(row, column) if mark == self.RUNS[0] else ()
        for way in (-1, 1):
            if self.at(row, column + way) == "─":
                yield from self.sideways(row, column, way)

    def down(self, row, column):
        while True:
            row += 1
            char = self.at(row, column)
            self.seen.add((row, column))
            if char in self.RUNS:
                yield row
                return
            if char == "╯":
                yield from self.sideways(row, column, -1)
                return
            assert char in "│├", f"a line breaks off at {row}, {column}"

    def sideways(self, row, column, way):
        while True:
            column += way
            char = self.at(row, column)
            self.seen.add((row, column))
            if char in ("╭├" if way < 0 else "╮"):
                yield from self.down(row, column)
                return
            if char == "┬":
                yield from self.down(row, column)
            else:
                assert char in "─│", f"a line breaks off at {row}, {column}"


class AsciiTracer(Tracer):
    RUNS = "*o"

    def leave(self, row, column, mark):
        yield from self.down(row, column) if mark == "*" else ()
        for way in (-1, 1):
            if self.at(row, column + way) == "-":
                yield from self.sideways(row, column, way)

    def down(self, row, column):
        while True:
            row += 1
            char = self.at(row, column)
            if char == " " and self.at(row, column - 1) == "/":
                column = self.slide(row, column - 1)
                continue
            self.seen.add((row, column))
            if char in self.RUNS:
                yield row
                return
            assert char == "|", f"a line breaks off at {row}, {column}"

    def slide(self, row, column):
        """Along ``|_|/`` to the line that it joins: the first to its left that it does not pass behind."""
        self.seen.add((row, column))
        while True:
            column -= 1
            char = self.at(row, column)
            self.seen.add((row, column))
            if char == "|" and self.at(row, column - 1) != "_":
                return column
            assert char in "_|", f"a line breaks off at {row}, {column}"

    def sideways(self, row, column, way):
        while True:
            column += way
            char = self.at(row, column)
            self.seen.add((row, column))
            goes_on = self.at(row, column + way) == "-"
            if char == ".":
                yield from self.down(row, column)
                if not goes_on:
                    return
            else:
                assert char == "-" or (char == "|" and goes_on), f"a line breaks off at {row}, {column}"


TRACERS = [(False, Tracer), (True, AsciiTracer)]

CROSSED = runs("a", "b < a", "c < a", "d < a", "m < b c d", "x < b", "y < c", "z < d")
STARS = runs("a", "b", "c", "d", "m < a b c d", "n < d c b a", "o < n a", "p < m b n")


def test_the_drawing():
    rows = runs("baseline", "fork1 < baseline", "fork2 < baseline", "merge1 < fork1 fork2", "fork3 < baseline")
    assert (
        text(rows)
        == """
● fork3
│ ●─╮ merge1
│ │ ● fork2
├─│─╯
│ ● fork1
├─╯
○ baseline"""[1:]
    )
    assert (
        text(rows, ascii=True)
        == """
* fork3
| *-. merge1
| | * fork2
|_|/
| * fork1
|/
o baseline"""[1:]
    )


def test_several_parents():
    rows = runs("a", "b", "c < a", "d", "m < c b d", "n < d m c")
    assert (
        text(rows)
        == """
●─┬─╮ n
│ ●─│─┬─╮ m
├─│─│─│─╯
│ │ ├─╯
○ │ │ d
  │ ● c
  ○ │ b
    ○ a"""[1:]
    )
    assert (
        text(rows, ascii=True)
        == """
*-.-. n
| *-|-.-. m
|_|_|_|/
| | |/
o | | d
  | * c
  o | b
    o a"""[1:]
    )


def test_a_line_on_the_left_that_is_free_again_is_taken_by_a_merge():
    rows = runs("a", "b < a", "m < b a", "y", "f < m", "z < y")
    assert (
        text(rows)
        == """
● z
│ ● f
○ │ y
╭─● m
│ ● b
├─╯
○ a"""[1:]
    )
    assert text(rows, ascii=True).splitlines()[3] == ".-* m"


def test_many_forks_of_one_run_take_two_columns():
    rows = runs("baseline", *(f"fork{n} < baseline" for n in range(1, 200)))
    lines = draw(rows)
    assert max(len(line.graph) for line in lines) == 3
    assert len(lines) == 200 + 198


def test_runs_that_have_nothing_to_do_with_each_other_take_one_column_and_are_hollow():
    rows = runs("baseline", "baseline2", "fork1 < baseline2", "baseline3")
    assert text(rows) == "○ baseline3\n● fork1\n○ baseline2\n○ baseline"


def test_a_column_that_is_free_again_is_used_again():
    rows = runs("a", "b < a", "p", "q < p", "c < b")
    assert text(rows) == "● c\n│ ● q\n│ ○ p\n● b\n○ a"


def test_a_run_stands_in_the_free_column_next_to_its_parents_line():
    rows = runs("a", "b", "c", "x < c", "p", "q", "c1 < c", "b1 < b", "q1 < q", "p1 < p", "a1 < a")
    assert (
        text(rows)
        == """
● a1
│ ● p1
│ │ ● q1
│ │ │ ● b1
│ │ │ │ ● c1
│ │ ○ │ │ q
│ ○   │ │ p
│   ● │ │ x
│   ├─│─╯
│   ○ │ c
│     ○ b
○ a"""[1:]
    )


def test_a_parent_that_is_not_there_is_not_drawn():
    assert draw([Run("fork1", (("gone", "hash"),))]) == [GraphLine("○", "fork1")]
    assert draw([]) == []


def test_a_parent_of_two_checkpoints_is_drawn_once():
    assert text(runs("a", "m < a a")) == "● m\n○ a"


def test_a_circle_is_refused():
    with pytest.raises(StoreError, match="comes from itself"):
        draw([Run("a", (("b", "hash"),)), Run("b", (("a", "hash"),))])


@pytest.mark.parametrize(("ascii", "tracer"), TRACERS)
@unhurried
@given(graphs())
@example(CROSSED)
@example(STARS)
def test_every_edge_is_one_line_and_no_other_line_is_there(ascii, tracer, rows):
    lines = draw(rows, ascii=ascii)
    tracing = tracer(lines)
    found = tracing.edges()
    assert sorted(found) == sorted(edges(rows))
    ink = {(row, column) for row, line in enumerate(lines) for column, char in enumerate(line.graph) if char != " "}
    assert ink == tracing.seen, "a character is of no line"


@pytest.mark.parametrize(("ascii", "characters"), [(False, " ●○│─├╯╮╭┬"), (True, " *o|/_-.")])
@given(graphs())
@unhurried
def test_only_its_characters_are_used_and_no_line_ends_in_spaces_or_is_empty(ascii, characters, rows):
    for line in draw(rows, ascii=ascii):
        assert set(line.graph) <= set(characters)
        assert line.graph
        assert line.graph == line.graph.rstrip()


@unhurried
@given(graphs())
def test_every_run_comes_once_before_its_parents_and_the_newest_of_those_that_may_come_next(rows):
    order = [line.run for line in draw(rows) if line.run is not None]
    assert sorted(order) == sorted(row.name for row in rows)
    assert all(order.index(one) < order.index(parent) for one, parent in edges(rows))
    created = {row.name: row.created for row in rows}
    for place, name in enumerate(order):
        rest = set(order[place:])
        free = rest - {parent for one, parent in edges(rows) if one in rest}
        assert created[name] == max(created[other] for other in free)


@unhurried
@given(graphs())
def test_it_is_compact(rows):
    lines = draw(rows)
    drawn = edges(rows)
    # Lines that lead to the same run have to meet, in a line of their own at most.
    assert len(lines) - len(rows) <= len(drawn) - len({parent for _, parent in drawn})
    # As many columns as lines have to lie side by side somewhere, and none more.
    awaited, most = set(), 0
    for name in (line.run for line in lines if line.run is not None):
        parents = [parent for one, parent in drawn if one == name]
        awaited.discard(name)
        most = max(most, len(awaited) + max(1, len(parents)))
        awaited.update(parents)
    assert max((len(line.graph) for line in lines), default=0) <= max(2 * most - 1, 0)


@unhurried
@given(graphs(), st.randoms())
def test_the_order_of_rows_does_not_matter(rows, shuffler: random.Random):
    shuffled = list(rows)
    shuffler.shuffle(shuffled)
    assert draw(shuffled) == draw(rows)


@unhurried
@given(graphs())
def test_the_two_forms_have_the_same_lines(rows):
    plain = draw(rows, ascii=True)
    assert [line.run for line in plain] == [line.run for line in draw(rows)]


def test_ten_thousand_runs_in_a_row():
    lines = draw(runs("r0", *(f"r{n} < r{n - 1}" for n in range(1, 10_000))))
    assert {line.graph for line in lines[:-1]} == {"●"}
    assert [line.run for line in lines] == [f"r{n}" for n in reversed(range(10_000))]
