"""Recipes: two forms of the same thing, and typed errors for all else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onthefly.errors import InvalidCommandError, MissingPartError
from onthefly.samples import recipes

fields = st.sampled_from(recipes.SCAN_FIELDS + recipes.DYNAMICS_FIELDS)
counts = st.integers(1, 10**9)
shares = st.floats(0, 1, exclude_min=True)
seeds = st.integers(0, 2**32 - 1)
reals = st.floats(allow_nan=False, allow_infinity=False)


def leaf(select, **arguments):
    return st.fixed_dictionaries({"select": st.just(select), **arguments})


def ordered(select, values):
    pairs = st.lists(values, min_size=2, max_size=2, unique=True).map(sorted)
    return st.builds(lambda f, p: {"select": select, "field": f, "low": p[0], "high": p[1]}, fields, pairs)


leaves = st.one_of(
    leaf("all"),
    leaf("suspects"),
    leaf("indices", indices=st.lists(st.integers(0, 10**12), min_size=1, max_size=5, unique=True)),
    ordered("quantile", st.floats(0, 1)),
    ordered("range", reals),
    leaf("range", field=fields, low=reals),
    leaf("range", field=fields, high=reals),
    leaf("top", field=fields, k=counts),
    leaf("class_top", field=fields, k=counts),
    leaf("cluster", k=st.just(9), which=st.lists(st.integers(0, 8), min_size=1, unique=True), seed=seeds),
    leaf("random", k=counts, seed=seeds),
    leaf("forgotten", times=counts),
    *(leaf(name, fraction=shares) for name in ["hard", "ambiguous", "el2n", "margin", "noise_aware"]),
)
every = st.recursive(
    leaves,
    lambda part: st.builds(lambda k, a, b: {k: [a, b]}, st.sampled_from(["and", "or", "minus"]), part, part),
    max_leaves=8,
)


@settings(deadline=None)
@given(every)
def test_the_notation_of_a_recipe_is_read_back_equal(recipe):
    sound = recipes.check(recipe)
    assert recipes.parse(recipes.describe(sound)) == sound == recipes.check(sound)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "loss",
        "-all()",
        "all() + all()",
        "worst(3)",
        "__import__('os')",
        "top(loss)",
        "top(loss, 0)",
        "top(loss, 1, 2)",
        "top(loss, 1.5)",
        "top(loss, True)",
        "top(hidden, 3)",
        "top(loss, k=3, j=2)",
        "top(loss, 3, k=3)",
        "top(loss, (3).real)",
        "quantile(loss, 0.5, 1.5)",
        "quantile(loss, 0.5, 0.5)",
        "range(loss)",
        "range(loss, 1e999)",
        "indices()",
        "indices(1, 1)",
        "indices(-1)",
        "indices(0.5)",
        "indices(9223372036854775808)",
        f"top(loss, 0x{'f' * 5000})",
        "cluster(3, 3)",
        "hard(0)",
        " - ".join(["all()"] * 40),
        "(" * 5000 + "all()" + ")" * 5000,
        " - ".join(["all()"] * 50_000),
    ],
)
def test_what_is_no_recipe_is_refused(text):
    with pytest.raises(InvalidCommandError):
        recipes.parse(text)


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        [],
        {},
        {"select": "no"},
        {"and": [{"select": "all"}]},
        {"select": []},
        {"select": "top", "field": [], "k": 1},
        {"select": "top", "field": "loss", "k": 10**5000},
        {"select": "hard", "fraction": 10**5000},
        {"select": "indices", "indices": [True, 2]},
        {"select": "indices", "indices": np.array([1.0])},
        {"select": "indices", "indices": np.array([[1]])},
        {"select": "all", "and": []},
    ],
)
def test_wrong_json_is_refused(wrong):
    with pytest.raises(InvalidCommandError):
        recipes.check(wrong)


def test_needs_tell_a_scan_from_dynamics():
    found = recipes.needs(recipes.parse("top(loss, 3) & cluster(4, 1) - suspects()"))
    assert (found.scan, found.embedding, found.dynamics, found.either) == (True, True, False, True)
    assert found.columns == {"loss", "embedding"}
    assert recipes.needs(recipes.parse("hard(0.1)")).dynamics


def test_what_cannot_be_chosen_says_why():
    columns = {"loss": np.array([1.0, 2.0, np.nan])}
    for text, word in [("indices(3)", "3 samples"), ("range(loss, 9)", "widen")]:
        with pytest.raises(InvalidCommandError, match=word):
            recipes.choose(recipes.parse(text), columns, 3)
    with pytest.raises(InvalidCommandError, match="scan it again"):
        recipes.choose(recipes.parse("top(loss, 1)"), columns, 4)
    for text, word in [("el2n(1)", "classifier"), ("hard(1)", "log_samples"), ("cluster(1, 0)", "embed=")]:
        with pytest.raises(MissingPartError, match=word):
            recipes.choose(recipes.parse(text), columns, 3)


def test_a_sample_never_seen_is_never_chosen_by_its_dynamics():
    columns = {"seen": np.array([0, 2, 1]), "forgotten": np.array([0, 0, 1])}
    assert recipes.choose(recipes.parse("range(forgotten, high=0)"), columns, 3).tolist() == [1]


def test_a_selection_rich_in_label_errors_is_told_from_the_rest():
    n, wrong = 200, np.arange(10)
    label = np.arange(n) % 2
    confidence, prediction = np.full(n, 0.9), label.copy()
    confidence[wrong], prediction[wrong] = 0.01, 1 - label[wrong]
    margin = np.log(confidence / (1 - confidence))
    columns = {"confidence": confidence, "margin": margin, "prediction": prediction, "label": label}
    rich = recipes.likely_label_errors(columns, np.arange(20))
    assert (rich.chosen, rich.size, rich.base, rich.rich) == (10, 20, 0.05, True)
    assert not recipes.likely_label_errors(columns, np.arange(n)).rich
    assert recipes.likely_label_errors({"loss": margin}, np.arange(n)) is None


def test_a_selection_of_nearly_nothing_but_label_errors_is_rich_however_many_there_are():
    assert recipes.LabelDoubt(chosen=90, size=100, base=0.4).rich
    assert not recipes.LabelDoubt(chosen=60, size=100, base=0.4).rich
    assert not recipes.LabelDoubt(chosen=4, size=4, base=0.01).rich
    assert not recipes.LabelDoubt(chosen=9, size=100, base=0.01).rich
    assert not recipes.LabelDoubt(chosen=100, size=100, base=1.0).rich
