"""The graph of runs: where each comes from, and what may not go."""

import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onthefly.errors import StoreError, UnknownReferenceError
from onthefly.runs.lineage import START, Lineage, Segment

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy


@dataclass(frozen=True)
class Run:
    name: str
    parents: tuple[tuple[str, str], ...] = ()
    base: dict | None = None
    created: float = 0.0
    kind: str = "fork"


@dataclass(frozen=True)
class Row:
    hash: str
    path: Path = Path("/store/elsewhere.safetensors")


def root(name, created=0.0, base=None):
    return Run(name, base=base, created=created, kind="root")


def child(name, *parents, step=0, created=0.0, hash=None, path=None):
    base = {"path": path or f"/store/{name}-origin", "hash": hash or f"origin of {name}", "step": step, "epoch": 0}
    return Run(name, tuple((parent, f"{parent} for {name}") for parent in parents), base, created)


@st.composite
def graphs(draw):
    """Rows of a random graph, in any order, made by clocks that were wrong. The n-th comes from earlier ones only."""
    rows = []
    for number in range(draw(st.integers(1, 12))):
        sources = st.lists(st.sampled_from(rows), max_size=3) if rows else st.just([])
        parents = [row.name for row in draw(sources)]
        created = float(draw(st.integers(0, 5)))
        rows.append(
            child(f"r{number}", *parents, step=draw(st.integers(0, 9)), created=created)
            if parents
            else root(f"r{number}", created)
        )
    return draw(st.permutations(rows))


def reachable(rows, name):
    """Ancestors, found the slow way."""
    direct = {parent for row in rows if row.name == name for parent, _ in row.parents}
    return direct.union(*(reachable(rows, parent) for parent in direct))


DIAMOND = [
    root("baseline", 1),
    child("fork1", "baseline", step=100, created=2),
    child("fork2", "baseline", step=150, created=3),
    child("merge1", "fork1", "fork2", step=200, created=4),
    child("fork3", "merge1", step=260, created=5),
]


def test_relatives():
    lineage = Lineage.of(DIAMOND)
    assert lineage.parents("merge1") == ("fork1", "fork2")
    assert lineage.parents("baseline") == ()
    assert lineage.children("baseline") == ("fork1", "fork2")
    assert lineage.ancestors("fork3") == ("merge1", "fork1", "fork2", "baseline")
    assert lineage.descendants("baseline") == ("fork1", "fork2", "merge1", "fork3")
    assert lineage.descendants("fork3") == ()


def test_common_ancestors():
    lineage = Lineage.of([*DIAMOND, root("baseline2")])
    assert lineage.common_ancestor("fork1", "fork2") == "baseline"
    assert lineage.common_ancestor("fork1", "fork3") == "fork1"
    assert lineage.common_ancestor("fork3", "fork3") == "fork3"
    assert lineage.common_ancestor("fork3", "baseline2") is None


def test_a_short_way_to_an_old_run_does_not_hide_a_nearer_one():
    rows = [root("old"), child("near", "old"), child("a", "old", "near"), child("b", "old", "near")]
    assert Lineage.of(rows).common_ancestor("a", "b") == "near"


def test_departures_are_where_lines_left_an_ancestor():
    rows = [
        root("baseline"),
        child("fork1", "baseline", step=10),
        child("fork2", "baseline", step=20),
        child("fork3", "fork1", step=15),
        child("merge1", "fork2", "fork1", step=30),
        root("other"),
    ]
    lineage = Lineage.of(rows)
    assert lineage.nearest_common(["fork3", "fork2", "fork1"]) == "baseline"
    assert lineage.nearest_common(["fork3", "fork1"]) == "fork1"
    assert lineage.nearest_common(["fork1", "other"]) is None
    assert lineage.departures("fork3", "baseline") == ("baseline for fork1",)
    assert lineage.departures("fork3", "fork1") == ("fork1 for fork3",)
    assert set(lineage.departures("merge1", "baseline")) == {"baseline for fork1", "baseline for fork2"}
    assert lineage.departures("merge1", "fork1") == ("fork1 for merge1",)
    assert lineage.departures("baseline", "baseline") == ()


def test_of_several_nearest_common_ancestors_the_one_least_far_and_then_the_newest_is_taken():
    rows = [root("p", created=1), root("q", created=2), child("a", "p", "q"), child("b", "q", "p")]
    assert Lineage.of(rows).common_ancestor("a", "b") == "q"
    rows = [*rows, child("q1", "q"), child("c", "p", "q1")]
    assert Lineage.of(rows).common_ancestor("a", "c") == "p"


def test_all_of_one_distance_come_before_any_that_is_further_away():
    rows = [root("p2"), child("p1", "p2"), root("q3"), child("q2", "q3"), child("q1", "q2"), child("m", "p1", "q1")]
    assert Lineage.of(rows).ancestors("m") == ("p1", "q1", "p2", "q2", "q3")
    assert Lineage.of([*rows, child("n", "q1", "p1")]).ancestors("n") == ("q1", "p1", "q2", "p2", "q3")


def test_two_checkpoints_of_one_run_are_one_parent_and_both_stay():
    merge = Run("merge1", (("baseline", "aa"), ("baseline", "bb")), kind="merge")
    lineage = Lineage.of([root("baseline"), merge])
    assert lineage.parents("merge1") == ("baseline",)
    assert lineage.children("baseline") == ("merge1",)
    assert lineage.needed() == {"aa": "merge1", "bb": "merge1"}


def test_the_path_goes_from_the_root_to_the_head():
    lineage = Lineage.of(DIAMOND)
    assert lineage.path("baseline") == (Segment("baseline", START, None),)
    assert lineage.path("fork2") == (Segment("baseline", START, 150), Segment("fork2", 150, None))
    assert lineage.path("fork3") == (
        Segment("baseline", START, 100),
        Segment("fork1", 100, 200),
        Segment("merge1", 200, 260),
        Segment("fork3", 260, None),
    )


def test_a_run_that_goes_on_further_ahead_than_a_child_left_it_leaves_no_step_twice():
    moved = child("fork1", "baseline", step=300)
    rows = [root("baseline"), moved, child("fork2", "fork1", step=200)]
    assert Lineage.of(rows).path("fork2") == (
        Segment("baseline", START, 200),
        Segment("fork1", 200, 200),
        Segment("fork2", 200, None),
    )


def test_a_root_that_was_reset_begins_the_path_all_the_same():
    reset = root("baseline", base={"path": "/store/o", "hash": "oo", "step": 40, "epoch": 0})
    assert Lineage.of([reset]).path("baseline") == (Segment("baseline", START, None),)


def test_a_run_whose_checkpoint_is_on_its_way_stands_on_nothing_yet_and_begins_its_path():
    starting = Run("fork1", (("baseline", ""),))
    lineage = Lineage.of([root("baseline"), starting])
    assert lineage.needed() == {}
    assert not lineage.needs(Row(""))
    assert not lineage.needs_content("")
    assert lineage.path("fork1") == (Segment("fork1", START, None),)
    assert lineage.ancestors("fork1") == ("baseline",)
    assert lineage.check() == []


def test_what_a_run_stands_on_is_known_by_hash_and_by_path():
    fork = child("fork1", "baseline", hash="bb", path=Path("/store/f.safetensors"))
    lineage = Lineage.of([root("baseline"), fork])
    assert lineage.needed() == {"baseline for fork1": "fork1", "bb": "fork1"}
    assert lineage.stands_on("bb", "/other") == "fork1"
    assert lineage.stands_on("zz", Path("/store/f.safetensors")) == "fork1"
    assert lineage.stands_on("zz", "/other") is None
    assert lineage.run_on(Row("baseline for fork1")) == "fork1"
    assert lineage.needs(Row("zz", Path("/store/f.safetensors")))
    assert not lineage.needs(Row("zz"))
    assert lineage.needs_content("bb")
    assert not lineage.needs_content("zz")


def test_what_is_needed_cannot_be_changed():
    with pytest.raises(TypeError):
        Lineage.of(DIAMOND).needed()["x"] = "y"


def test_a_name_that_is_no_run_is_refused_with_those_that_are():
    lineage = Lineage.of(DIAMOND)
    for ask in (lineage.parents, lineage.children, lineage.ancestors, lineage.descendants, lineage.path):
        with pytest.raises(UnknownReferenceError, match=r"'nobody'.*fork1"):
            ask("nobody")
    with pytest.raises(UnknownReferenceError):
        lineage.common_ancestor("fork1", "nobody")
    with pytest.raises(UnknownReferenceError, match="none yet"):
        Lineage.of([]).path("nobody")


def test_circles_are_refused_and_listed_and_the_rest_can_still_be_asked():
    rows = [root("baseline"), child("a", "c", created=1), child("b", "a"), child("c", "b"), child("self", "self")]
    with pytest.raises(StoreError, match=r"a from c from b from a|c from b from a from c|b from a from c from b"):
        Lineage.of(rows)
    lineage = Lineage(rows)
    assert sorted(problem.split(": ")[0] for _, problem in lineage.check()) == ["it comes from itself"] * 2
    assert lineage.needs_content("c for a")
    assert set(lineage.ancestors("a")) == {"b", "c"}
    with pytest.raises(StoreError, match="comes from itself"):
        lineage.path("a")


def test_every_fault_is_listed():
    rows = [
        root("baseline"),
        root("baseline"),
        child("fork1", "gone", "baseline", "lost"),
        Run("merge1", kind="merge"),
    ]
    assert Lineage(rows).check() == [
        ("fork1", "its parent 'gone' is not there"),
        ("fork1", "its parent 'lost' is not there"),
        ("merge1", "it is a merge, and nothing tells from which run"),
        ("baseline", "there are 2 runs of this name"),
    ]
    with pytest.raises(StoreError, match="2 runs"):
        Lineage.of(rows)


def test_a_parent_that_is_not_there_is_in_no_answer():
    lineage = Lineage.of([child("fork1", "gone")])
    assert lineage.parents("fork1") == lineage.ancestors("fork1") == ()
    assert lineage.path("fork1") == (Segment("fork1", START, None),)
    assert lineage.needs_content("gone for fork1")


@unhurried
@given(graphs())
def test_ancestors_and_descendants_are_each_others_inverse(rows):
    lineage = Lineage.of(rows)
    names = [row.name for row in rows]
    for name in names:
        above, below = lineage.ancestors(name), lineage.descendants(name)
        assert set(above) == reachable(rows, name)
        assert len(set(above)) == len(above)
        assert len(set(below)) == len(below)
        assert {other for other in names if name in lineage.ancestors(other)} == set(below)
        assert {other for other in names if name in lineage.parents(other)} == set(lineage.children(name))


@unhurried
@given(graphs())
def test_the_nearest_ancestors_come_first(rows):
    lineage = Lineage.of(rows)

    def away(name, ancestor):
        return (
            0 if name == ancestor else 1 + min(away(p, ancestor) for p in lineage.parents(name) if leads(p, ancestor))
        )

    def leads(name, ancestor):
        return name == ancestor or ancestor in lineage.ancestors(name)

    for row in rows:
        distances = [away(row.name, ancestor) for ancestor in lineage.ancestors(row.name)]
        assert distances == sorted(distances)
        assert distances == [] or distances[0] == 1


@unhurried
@given(graphs(), st.data())
def test_a_common_ancestor_is_one_of_both_and_no_descendant_of_it_is(rows, data):
    lineage = Lineage.of(rows)
    a, b = (data.draw(st.sampled_from([row.name for row in rows])) for _ in "ab")
    common = ({a} | reachable(rows, a)) & ({b} | reachable(rows, b))
    found = lineage.common_ancestor(a, b)
    assert found == lineage.common_ancestor(b, a)
    assert (found is None) == (not common)
    assert found is None or found in common
    assert found is None or not common & set(lineage.descendants(found))


@unhurried
@given(graphs())
def test_segments_meet_and_lead_through_parents(rows):
    lineage = Lineage.of(rows)
    for row in rows:
        path = lineage.path(row.name)
        assert path[0].first_step == START
        assert (path[-1].run, path[-1].last_step) == (row.name, None)
        for one, following in pairwise(path):
            assert one.last_step == following.first_step >= one.first_step
            assert lineage.parents(following.run)[0] == one.run


@unhurried
@given(graphs(), st.randoms())
def test_the_order_of_rows_does_not_matter(rows, shuffler: random.Random):
    shuffled = list(rows)
    shuffler.shuffle(shuffled)
    one, other = Lineage.of(rows), Lineage.of(shuffled)
    assert one.needed() == other.needed()
    for row in rows:
        name = row.name
        assert one.children(name) == other.children(name)
        assert one.ancestors(name) == other.ancestors(name)
        assert one.descendants(name) == other.descendants(name)
        assert one.path(name) == other.path(name)
        for second in rows:
            assert one.common_ancestor(name, second.name) == other.common_ancestor(name, second.name)


@unhurried
@given(graphs(), st.data())
def test_an_edge_back_is_found_wherever_it_is(rows, data):
    lineage = Lineage.of(rows)
    assert not any("itself" in problem for _, problem in lineage.check())
    bent = data.draw(st.sampled_from(rows))
    back = data.draw(st.sampled_from([bent.name, *lineage.descendants(bent.name)]))
    damaged = [row if row is not bent else Run(bent.name, (*bent.parents, (back, "x")), bent.base) for row in rows]
    with pytest.raises(StoreError, match=bent.name):
        Lineage.of(damaged)
    assert any(bent.name in f"{name}: {problem}" for name, problem in Lineage(damaged).check())


@unhurried
@given(graphs())
def test_everything_that_a_row_names_is_needed(rows):
    lineage = Lineage.of(rows)
    for row in rows:
        contents = [content for _, content in row.parents] + ([row.base["hash"]] if row.base else [])
        assert all(lineage.needs_content(content) and lineage.stands_on(content, "/other") for content in contents)
        assert row.base is None or lineage.stands_on("zz", row.base["path"]) == row.name


def test_ten_thousand_runs_in_a_row():
    rows = [root("r0")] + [child(f"r{n}", f"r{n - 1}", step=n, created=n) for n in range(1, 10_000)]
    lineage = Lineage.of(rows)
    assert lineage.ancestors("r9999") == tuple(f"r{n}" for n in reversed(range(9_999)))
    assert len(lineage.descendants("r0")) == 9_999
    assert lineage.common_ancestor("r9999", "r5000") == "r5000"
    assert len(lineage.path("r9999")) == 10_000
    closed = [child("r0", "r9999"), *rows[1:]]
    with pytest.raises(StoreError, match="comes from itself"):
        Lineage.of(closed)
