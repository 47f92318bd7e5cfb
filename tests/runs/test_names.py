"""Names of runs are unique, and fit into the names of files."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onthefly.runs.names import free_name, next_name

KINDS = ("root", "fork", "merge")
taken_names = st.sets(
    st.from_regex(r"(baseline|fork|merge|Fork)(-?[0-9]{0,3})", fullmatch=True) | st.text(max_size=6), max_size=20
)
some_names = st.from_regex(r"[a-z0-9][A-Za-z0-9_.+-]{0,8}", fullmatch=True)


def several(kind, count, environment):
    taken = []
    for _ in range(count):
        taken.append(next_name(kind, taken, environment))
    return taken


def test_default_names():
    assert several("root", 3, {}) == ["baseline", "baseline2", "baseline3"]
    assert several("fork", 3, {}) == ["fork1", "fork2", "fork3"]
    assert several("merge", 2, {}) == ["merge1", "merge2"]


def test_a_counter_goes_on_behind_the_highest():
    assert next_name("fork", ["baseline", "fork7", "fork2", "merge9"], {}) == "fork8"
    assert next_name("fork", ["fork", "forks3", "fork03", "fork-5"], {}) == "fork1"


def test_counters_can_be_seeded():
    environment = {"ONTHEFLY_FORK_COUNTER_INIT": "4", "ONTHEFLY_MERGE_COUNTER_INIT": "0"}
    assert several("fork", 2, environment) == ["fork5", "fork6"]
    assert several("merge", 1, environment) == ["merge1"]
    assert several("root", 1, environment) == ["baseline"]
    assert next_name("fork", ["fork9"], environment) == "fork10"


@pytest.mark.parametrize("seed", ["", "x", "-1", "1.5", "²"])
def test_a_wrong_seed_is_refused(seed):
    with pytest.raises(ValueError, match="ONTHEFLY_FORK_COUNTER_INIT"):
        next_name("fork", [], {"ONTHEFLY_FORK_COUNTER_INIT": seed})


def test_a_taken_name_gets_a_number():
    assert free_name("mine", ["yours"]) == "mine"
    assert free_name("mine", ["mine", "mine-3"]) == "mine-2"
    assert free_name("Mine", ["mine", "mine-2"]) == "Mine-3"


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../up", "-x", "a b", "a\n", "n\0", "x" * 101])
def test_a_name_that_no_file_could_carry_is_refused(name):
    with pytest.raises(ValueError, match="cannot name a run"):
        free_name(name, [])


@given(st.sampled_from(KINDS), taken_names, st.integers(0, 50))
def test_a_default_name_is_free(kind, taken, seed):
    environment = {"ONTHEFLY_FORK_COUNTER_INIT": str(seed), "ONTHEFLY_MERGE_COUNTER_INIT": str(seed)}
    name = next_name(kind, taken, environment)
    assert name not in taken
    assert free_name(name, taken) == name


@given(some_names, st.lists(some_names, max_size=20))
def test_names_given_one_after_the_other_never_collide(name, others):
    taken = []
    for wish in [name, *others, name]:
        taken.append(free_name(wish, taken))
    assert len({given_name.casefold() for given_name in taken}) == len(taken)
