"""Retention is a pure function: the newest, the best, and what is needed stay."""

import dataclasses
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onthefly.checkpoints.retention import ORIGIN, Candidate, evict

unhurried = settings(deadline=None)  # the machine may be busy
metrics = st.none() | st.floats() | st.sampled_from([0.0, 0.5, 1.0])


@st.composite
def several(draw):
    orders = draw(st.lists(st.integers(-50, 50), unique=True, max_size=20))
    return [
        Candidate(
            id=number,
            step=draw(st.integers(0, 9)),
            order=order,
            reason=draw(st.sampled_from([ORIGIN, "cadence", "pause", "epoch"])),
            metric=draw(metrics),
            pinned=draw(st.booleans()),
            needed=draw(st.booleans()),
        )
        for number, order in enumerate(orders)
    ]


keeps = st.integers(0, 25)


def plain(order, **more):
    return Candidate(id=f"c{order}", step=order * 10, order=order, reason="cadence", **more)


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


def test_a_negative_number_to_keep_is_refused():
    with pytest.raises(ValueError, match="-1"):
        evict([], keep=-1)


@unhurried
@given(several(), keeps)
def test_the_protected_never_go(candidates, keep):
    for gone in evict(candidates, keep):
        assert not gone.pinned
        assert not gone.needed
        assert gone.reason != ORIGIN


@unhurried
@given(several(), keeps)
def test_the_newest_never_go_and_everything_that_stays_has_a_reason(candidates, keep):
    gone = ids(evict(candidates, keep))
    newest = sorted(candidates, key=lambda c: -c.order)[:keep]
    assert not {c.id for c in newest} & set(gone)
    lowest = min((c.metric for c in candidates if c.metric is not None and math.isfinite(c.metric)), default=None)
    unexplained = [
        c for c in candidates
        if c.id not in gone and c not in newest and not (c.pinned or c.needed or c.reason == ORIGIN)
    ]  # fmt: skip
    assert [c.metric for c in unexplained] in ([], [lowest])


@unhurried
@given(several(), keeps)
def test_the_best_never_goes(candidates, keep):
    finite = [c.metric for c in candidates if c.metric is not None and math.isfinite(c.metric)]
    kept = [c for c in candidates if c not in evict(candidates, keep)]
    assert not finite or min(finite) in [c.metric for c in kept]


@unhurried
@given(several(), keeps, st.randoms())
def test_the_order_of_the_list_does_not_matter_and_the_oldest_go_first(candidates, keep, shuffler: random.Random):
    shuffled = list(candidates)
    shuffler.shuffle(shuffled)
    gone = evict(candidates, keep)
    assert ids(evict(shuffled, keep)) == ids(gone)
    assert [c.order for c in gone] == sorted(c.order for c in gone)


@unhurried
@given(several(), keeps)
def test_a_second_time_nothing_more_goes(candidates, keep):
    gone = ids(evict(candidates, keep))
    assert evict([c for c in candidates if c.id not in gone], keep) == []


@unhurried
@given(several(), keeps)
def test_keeping_more_never_evicts_more(candidates, keep):
    assert set(ids(evict(candidates, keep + 1))) <= set(ids(evict(candidates, keep)))
