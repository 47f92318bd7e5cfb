"""How merges are judged: pure values."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onthefly.errors import InvalidCommandError
from onthefly.merging.preview import Preview, Score, class_rows, score

numbers = st.floats(allow_nan=True, allow_infinity=True)
scores = st.builds(Score, numbers, st.floats(0, 1), st.just(10))


def preview(parents, candidates, metric="loss"):
    columns = {f"p{i}": {"val": s} for i, s in enumerate(parents)} | {
        f"c{i}": {"val": s} for i, s in enumerate(candidates)
    }
    names = tuple(columns)
    return Preview(names[: len(parents)], names[len(parents) :], columns, "val", metric)


@given(st.lists(scores, min_size=2, max_size=4), st.lists(scores, min_size=1, max_size=4))
def test_by_loss_what_does_not_fall_short_is_at_least_as_good_as_every_parent(parents, candidates):
    shown = preview(parents, candidates)
    for name, candidate in zip(shown.candidates, candidates, strict=True):
        good = candidate.loss < math.inf and all(
            math.isnan(parent.loss) or candidate.loss <= parent.loss for parent in parents
        )
        assert shown.falls_short(name) == (not good)


@given(st.lists(scores, min_size=2, max_size=4), st.lists(scores, min_size=1, max_size=4))
def test_the_best_by_accuracy_has_no_better_beside_it(parents, candidates):
    shown = preview(parents, candidates, "accuracy")
    best = shown.scores[shown.best(shown.candidates)]["val"]
    assert best.accuracy == max(candidate.accuracy for candidate in candidates)
    told = shown.told()
    assert told["best"]["val"] in told["columns"]


def test_columns_have_different_names():
    score = Score(1.0, 0.5, 4)
    with pytest.raises(InvalidCommandError, match="different names"):
        Preview(("swa", "b"), ("swa",), {"swa": {"val": score}, "b": {"val": score}}, "val", "loss")


def test_nothing_is_worse_than_nan():
    shown = preview([Score(1.0, 0.5, 4), Score(2.0, 0.5, 4)], [Score(math.nan, 0.9, 4)])
    assert shown.falls_short("c0")
    assert shown.told()["scores"]["c0"]["val"]["loss"] is None


def test_scores_leave_out_what_is_ignored_and_nothing_else():
    columns = {
        "loss": np.array([1.0, 3.0, np.nan], np.float32),
        "correct": np.array([True, False, False]),
        "label": np.array([0, 1, -1]),
    }
    assert score(columns) == Score(2.0, 0.5, 2)
    assert score(columns, np.array([1])) == Score(3.0, 0.0, 1)
    with pytest.raises(InvalidCommandError):
        score(columns, np.array([2]))
    columns["label"][2] = 1
    assert math.isnan(score(columns).loss)
    assert {name: rows.tolist() for name, rows in class_rows(columns).items()} == {"class 0": [0], "class 1": [1, 2]}
