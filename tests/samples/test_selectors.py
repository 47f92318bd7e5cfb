"""Selectors, against plain Python."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onthefly.errors import InvalidCommandError
from onthefly.samples import selectors

unhurried = settings(deadline=None)
rough = st.lists(st.sampled_from([0.0, 1.0, 2.0, -1.0, np.nan, np.inf]), min_size=1, max_size=30)


@unhurried
@given(rough, st.integers(1, 30))
def test_top_takes_the_largest_and_of_equals_the_first(values, k):
    finite = [i for i, value in enumerate(values) if np.isfinite(value)]
    if k > len(finite):
        with pytest.raises(InvalidCommandError):
            selectors.top(np.array(values), k)
    else:
        expected = sorted(sorted(finite, key=lambda i: (-values[i], i))[:k])
        assert selectors.top(np.array(values), k).tolist() == expected


@unhurried
@given(rough, st.integers(1, 5), st.integers(0, 2**32))
def test_class_top_takes_as_many_of_each_class(values, k, seed):
    labels = np.random.default_rng(seed).integers(-1, 3, len(values))
    expected = []
    for label in range(3):
        rows = [i for i, value in enumerate(values) if np.isfinite(value) and labels[i] == label]
        expected += sorted(rows, key=lambda i: (-values[i], i))[:k]
    if expected:
        assert selectors.class_balanced_top(np.array(values), labels, k).tolist() == sorted(expected)
    else:
        with pytest.raises(InvalidCommandError):
            selectors.class_balanced_top(np.array(values), labels, k)


def test_what_is_not_finite_shifts_no_quantile():
    values = np.array([np.nan, 0, 1, 2, 3, 4, np.inf, np.nan])
    assert selectors.quantile(values, 0.75, 1).tolist() == [4, 5]


@unhurried
@given(rough, st.floats(0.01, 1), st.integers(0, 2**32))
def test_noise_aware_takes_as_many_as_hard_of_those_that_are_trusted(values, fraction, seed):
    finite = [i for i, value in enumerate(values) if np.isfinite(value)]
    suspected = np.flatnonzero(np.random.default_rng(seed).random(len(values)) < 0.3)
    if not finite:
        with pytest.raises(InvalidCommandError):
            selectors.noise_aware_hard(np.array(values), fraction, suspected)
        return
    wanted = len(selectors.hard(np.array(values), fraction))
    trusted = sorted((i for i in finite if i not in suspected), key=lambda i: (-values[i], i))
    assert selectors.noise_aware_hard(np.array(values), fraction, suspected).tolist() == sorted(trusted[:wanted])


def test_scan_suspects_are_confidently_something_else():
    confidence = np.array([0.9, 0.8, 0.9, 0.02, 0.45, 0.7, 0.8, np.nan])
    other = np.array([0.1, 0.2, 0.1, 0.97, 0.55, 0.3, 0.2, np.nan])
    label, prediction = np.array([0, 0, 1, 1, 1, 1, 1, -1]), np.array([0, 0, 1, 0, 0, 1, 1, -1])
    margin = np.log(confidence / other)
    # Class 0's threshold is 0.85: sample 3 is above it, sample 4 is not.
    assert selectors.suspects_by_scan(confidence, margin, prediction, label).tolist() == [3]


def by_hand(probabilities, label):
    """Confident learning with whole rows of probabilities, one sample after the other."""
    n, classes = probabilities.shape
    own = probabilities[np.arange(n), label]
    mean = [own[label == c].mean() if (label == c).any() else np.inf for c in range(classes)]
    joint = np.zeros((classes, classes))
    for i in range(n):
        sure = [c for c in range(classes) if probabilities[i, c] >= max(mean[c], 0.5)]
        if sure:
            joint[label[i], max(sure, key=lambda c: probabilities[i, c])] += 1
    found = []
    for its in range(classes):
        for said in set(range(classes)) - {its}:
            lead = probabilities[:, said] - own
            rows = [i for i in range(n) if label[i] == its and probabilities[i].argmax() == said]
            whole = np.rint(joint[its, said] * ((label == its).sum() / max(joint[its].sum(), 1)))
            found += sorted(rows, key=lambda i: (-lead[i], i))[: int(whole)]
    return sorted(found)


@unhurried
@given(st.integers(0, 2**32), st.integers(2, 60), st.integers(2, 4), st.floats(0.5, 8))
def test_scan_suspects_are_those_of_confident_learning_by_hand(seed, n, classes, scale):
    draw = np.random.default_rng(seed)
    label, logits = draw.integers(0, classes, n), draw.normal(size=(n, classes)) * scale
    logits[np.arange(n), label] += scale
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    own = logits[np.arange(n), label]
    others = np.where(np.arange(classes) == label[:, None], -np.inf, logits).max(1)
    confidence = probabilities[np.arange(n), label]
    found = selectors.suspects_by_scan(confidence, own - others, logits.argmax(1), label)
    assert found.tolist() == by_hand(probabilities, label)
    assert found.dtype == np.int64


def test_a_model_that_has_learned_nothing_accuses_nobody():
    draw = np.random.default_rng(0)
    n, classes = 500, 10
    label = draw.integers(0, classes, n)
    logits = draw.normal(size=(n, classes)) * 0.1
    confidence = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[np.arange(n), label]
    others = np.where(np.arange(classes) == label[:, None], -np.inf, logits).max(1)
    margin = logits[np.arange(n), label] - others
    assert not len(selectors.suspects_by_scan(confidence, margin, logits.argmax(1), label))
    seen, still = np.full(n, 5), np.full(n, 0.01)
    assert not len(selectors.suspects_by_dynamics(seen, confidence, still, margin))
    assert not len(selectors.suspects_by_dynamics(seen, confidence, still, np.full(n, np.nan)))


def test_a_confidence_too_small_for_float32_is_a_suspect():
    confidence = np.array([0.9, 0.9, 0.0], np.float32)
    margin = np.array([5, 5, -300], np.float32)
    label, prediction = np.array([0, 1, 0]), np.array([0, 1, 1])
    assert selectors.suspects_by_scan(confidence, margin, prediction, label).tolist() == [2]
    seen, spread = np.full(3, 5), np.zeros(3)
    assert selectors.suspects_by_dynamics(seen, confidence, spread, margin).tolist() == [2]


def test_dynamics_suspects_were_of_another_class_as_surely_as_others_are_of_theirs():
    seen, spread = np.full(5, 5), np.full(5, 0.1)
    mean = np.array([0.9, 0.9, 0.9, 0.1, 0.1])
    other = np.array([0.1, 0.1, 0.1, 0.85, 0.3])  # sample 4 is not understood at all
    assert selectors.suspects_by_dynamics(seen, mean, spread, np.log(mean / other)).tolist() == [3]


def test_dynamics_suspects_stayed_low():
    seen = np.array([5, 5, 5, 5, 5, 5, 2])
    mean = np.array([0.9, 0.95, 0.9, 0.05, 0.24, 0.27, 0.01])
    spread = np.array([0.1, 0.05, 0.1, 0.05, 0.4, 0.1, 0.0])  # sample 4 was learned late, 5 was never quite excluded
    none = np.full(7, np.nan)
    assert selectors.suspects_by_dynamics(seen, mean, spread, none).tolist() == [3]
    assert selectors.suspects_by_dynamics(seen, mean, spread, none + 0).dtype == np.int64
    assert not len(selectors.suspects_by_dynamics(seen, mean, spread, np.ones(7)))


def test_clusters_are_found_and_numbered_by_size():
    points = np.r_[np.zeros((30, 2)), np.full((10, 2), 9.0), np.full((1, 2), np.nan)]
    labels = selectors.cluster_labels(points, 2, seed=0)
    assert labels.tolist() == [0] * 30 + [1] * 10 + [-1]
    assert selectors.clusters(points, 2, which=[1]).tolist() == list(range(30, 40))


some = st.sets(st.integers(0, 40)).map(lambda found: np.array(sorted(found), np.int64))


@unhurried
@given(some, some)
def test_the_algebra_is_that_of_sets(first, second):
    one, other = set(first.tolist()), set(second.tolist())
    assert selectors.union(first, second).tolist() == sorted(one | other)
    assert selectors.intersection(first, second).tolist() == sorted(one & other)
    assert selectors.difference(first, second).tolist() == sorted(one - other)


def test_class_numbers_far_apart_take_no_memory():
    confidence, far = np.array([0.9, 0.01]), 2**40
    margin = np.log(confidence / np.array([0.1, 0.99]))
    label, prediction = np.array([far, 3]), np.array([far, far])
    assert selectors.suspects_by_scan(confidence, margin, prediction, label).tolist() == [1]
