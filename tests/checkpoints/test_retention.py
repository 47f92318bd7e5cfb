"""Retention is a pure function: the newest, the best, and what is needed stay."""

import dataclasses
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onthefly.checkpoints.retention import ORIGIN, Candidate, evict, reasons

unhurried = settings(deadline=None)  # the machine may be busy
metrics = st.none() | st.floats() | st.sampled_from([0.0, 0.5, 1.0])


@st.composite
def several(draw):
    orders = draw(st.lists(st.integers(-50, 50), unique=True, max_size=20))
    return [
        Candidate(
            id=number,
            step=draw(st.integers(-1, 9)),
            order=order,
            reason=draw(st.sampled_from([ORIGIN, "cadence", "pause", "epoch"])),
            metric=draw(metrics),
            pinned=draw(st.booleans()),
            needed=draw(st.booleans()),
        )
        for number, order in enumerate(orders)
    ]


keeps = st.integers(0, 25)
everies = st.none() | st.integers(1, 5)


def plain(order, **more):
    return Candidate(id=f"c{order}", step=order * 10, order=order, reason="cadence", **more)


def on(every, candidate):
    return every is not None and candidate.step in range(every, 99, every)


def ids(candidates):
    return [c.id for c in candidates]


def test_the_ring():
    ring = [plain(n) for n in (4, 1, 5, 3, 2)]
    assert ids(evict(ring)) == ["c1", "c2"]
    assert ids(evict(ring, keep=1)) == ["c1", "c2", "c3", "c4"]
    assert ids(evict(ring, keep=0)) == ["c1", "c2", "c3", "c4", "c5"]
    assert evict(ring, keep=5) == evict(ring, keep=99) == evict([]) == []


def test_the_best_stays_and_the_newest_of_equals():
    ring = [
        plain(1, metric=0.5),
        plain(2, metric=0.1),
        plain(3, metric=0.1),
        plain(4, metric=math.nan),
        plain(5, metric=-math.inf),
    ]
    assert ids(evict(ring, keep=0)) == ["c1", "c2", "c4", "c5"]


def test_what_is_needed_stays():
    ring = [
        plain(1, pinned=True),
        plain(2, needed=True),
        dataclasses.replace(plain(3), reason=ORIGIN),
        plain(4),
        plain(5),
    ]
    assert ids(evict(ring, keep=1)) == ["c4"]


def test_orders_may_be_tuples():
    ring = [dataclasses.replace(plain(n), order=order) for n, order in enumerate([(2, 1), (1, 9), (2, 0)])]
    assert ids(evict(ring, keep=1)) == ["c1", "c2"]


def test_each_one_whose_step_is_a_multiple_stays():
    ring = [plain(n) for n in range(8)]  # at the steps 0, 10, ..., 70
    assert [c.step for c in ring if c not in evict(ring, keep=1, every=30)] == [30, 60, 70]
    assert [c.step for c in ring if c not in evict(ring, keep=1, every=7)] == [70]
    assert evict(ring, keep=0, every=1) == ring[:1]


def test_every_reason_has_its_word():
    ring = [
        dataclasses.replace(plain(0), reason=ORIGIN),
        plain(1, pinned=True, metric=0.1),
        plain(2, needed=True),
        plain(3),
        plain(4),
    ]
    assert [words for _, words in reasons(reversed(ring), keep=1, every=20)] == [
        ("origin",),
        ("best", "pinned"),
        ("every 20", "needed"),
        (),
        ("newest", "every 20"),
    ]


@pytest.mark.parametrize("numbers", [{"keep": -1}, {"every": 0}, {"every": -1}])
def test_numbers_that_make_no_sense_are_refused(numbers):
    with pytest.raises(ValueError, match=r"-1|0"):
        evict([], **numbers)


@unhurried
@given(several(), keeps, everies)
def test_the_protected_never_go(candidates, keep, every):
    for gone in evict(candidates, keep, every):
        assert not gone.pinned
        assert not gone.needed
        assert gone.reason != ORIGIN


@unhurried
@given(several(), keeps, everies)
def test_the_newest_never_go_and_everything_that_stays_has_a_reason(candidates, keep, every):
    gone = ids(evict(candidates, keep, every))
    newest = sorted(candidates, key=lambda c: -c.order)[:keep]
    assert not {c.id for c in newest} & set(gone)
    lowest = min((c.metric for c in candidates if c.metric is not None and math.isfinite(c.metric)), default=None)
    unexplained = [
        c for c in candidates
        if c.id not in gone and c not in newest and not (c.pinned or c.needed or c.reason == ORIGIN or on(every, c))
    ]  # fmt: skip
    assert [c.metric for c in unexplained] in ([], [lowest])


@unhurried
@given(several(), keeps, everies)
def test_the_best_never_goes(candidates, keep, every):
    finite = [c.metric for c in candidates if c.metric is not None and math.isfinite(c.metric)]
    kept = [c for c in candidates if c not in evict(candidates, keep, every)]
    assert not finite or min(finite) in [c.metric for c in kept]


@unhurried
@given(several(), keeps, everies, st.randoms())
def test_the_order_of_the_list_does_not_matter_and_the_oldest_go_first(
    candidates, keep, every, shuffler: random.Random
):
    shuffled = list(candidates)
    shuffler.shuffle(shuffled)
    gone = evict(candidates, keep, every)
    assert ids(evict(shuffled, keep, every)) == ids(gone)
    assert [c.order for c in gone] == sorted(c.order for c in gone)


@unhurried
@given(several(), keeps, everies)
def test_a_second_time_nothing_more_goes(candidates, keep, every):
    gone = ids(evict(candidates, keep, every))
    assert evict([c for c in candidates if c.id not in gone], keep, every) == []


@unhurried
@given(several(), keeps, everies)
def test_keeping_more_never_evicts_more(candidates, keep, every):
    assert set(ids(evict(candidates, keep + 1, every))) <= set(ids(evict(candidates, keep, every)))


@unhurried
@given(several(), keeps, everies)
def test_every_one_comes_once_oldest_first_and_those_without_a_reason_are_those_that_go(candidates, keep, every):
    told = reasons(candidates, keep, every)
    assert [c for c, _ in told] == sorted(candidates, key=lambda c: c.order)
    assert [c for c, words in told if not words] == evict(candidates, keep, every)
    assert all(("pinned" in words) == c.pinned and ("needed" in words) == c.needed for c, words in told)
    assert all((f"every {every}" in words) == on(every, c) for c, words in told)
    assert sum("newest" in words for _, words in told) == min(keep, len(candidates))
    assert sum("best" in words for _, words in told) <= 1


@unhurried
@given(several(), keeps, st.integers(1, 5), st.integers(1, 3))
def test_a_finer_rhythm_never_evicts_more(candidates, keep, every, factor):
    assert set(ids(evict(candidates, keep, every))) <= set(ids(evict(candidates, keep, every * factor)))
    assert set(ids(evict(candidates, keep, every))) <= set(ids(evict(candidates, keep)))
