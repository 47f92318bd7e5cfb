"""Indices are checked before anything is bound to them, and a sampler for a subset is the same kind of sampler."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from onthefly.errors import InvalidCommandError, UnsupportedLoaderError
from onthefly.state.subsets import checked, sampler_for

SIZE = 30
unhurried = settings(deadline=None)  # the machine may be busy
subsets = st.lists(st.integers(0, SIZE - 1), unique=True, min_size=1)
SUBSET = torch.tensor([20, 3, 7, 8, 15])


# -- indices ---------------------------------------------------------------------------------------------------


@unhurried
@given(subsets)
def test_indices_of_any_form_are_kept_in_their_order(indices):
    forms = [indices, tuple(indices), np.array(indices), np.array(indices, np.uint8), torch.tensor(indices)]
    forms += [
        torch.tensor(indices, dtype=torch.int16),
        [np.int64(i) for i in indices],
        [torch.tensor(i) for i in indices],
    ]
    for form in forms:
        found = checked(form, SIZE)
        assert found.dtype == torch.int64
        assert found.tolist() == indices
    assert checked(range(5, 9), SIZE).tolist() == [5, 6, 7, 8]


def test_the_callers_indices_may_change_afterwards():
    for mine in (np.array([1, 2]), torch.tensor([1, 2])):
        found = checked(mine, SIZE)
        mine[0] = 9
        assert found.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "at least one sample"),
        (np.array([], np.int64), "at least one sample"),
        ([0, SIZE], "from 0 to 29: there is none at 30"),
        ([-1], "there is none at -1"),
        (list(range(40, 50)), "none at 40, 41, 42 and 7 more"),
        ([10**30], "integers of 64 bits, not int"),
        (np.array([2**63], np.uint64), "none at 9223372036854775808"),
        ([4, 5, 4, 6, 6], "only once; more than once given: 4, 6"),
        ([1.0, 2.0], "integers of 64 bits, not float64"),
        ([1, float("nan")], "not float64"),
        (torch.tensor([1.0], dtype=torch.bfloat16), "not torch.bfloat16"),
        (torch.tensor([1 + 0j]), "not torch.complex64"),
        ([True, False], "flatnonzero"),
        (torch.ones(SIZE, dtype=torch.bool), "flatnonzero"),
        (["1"], "not <U1"),
        ([None], "not NoneType"),
        ([[1, 2], [3, 4]], "one flat list, not 2 dimensions"),
        ([[1], [2, 3]], "one flat list"),
        (3, "one flat list, not one int"),
        ({1, 2}, "one flat list, not one set"),
        ("12", "one flat list, not one str"),
    ],
)
def test_indices_that_cannot_be_are_refused(indices, message):
    with pytest.raises(InvalidCommandError, match=message):
        checked(indices, SIZE)


@unhurried
@given(st.lists(st.integers(-2, SIZE + 2), max_size=8))
def test_indices_are_accepted_only_if_they_are_of_different_samples(indices):
    sound = bool(indices) and len(set(indices)) == len(indices) and all(0 <= i < SIZE for i in indices)
    try:
        assert checked(indices, SIZE).tolist() == indices
    except InvalidCommandError:
        assert not sound
    else:
        assert sound


# -- samplers --------------------------------------------------------------------------------------------------


def generator():
    return torch.Generator().manual_seed(5)


WEIGHTS = torch.linspace(0.1, 3.0, SIZE, dtype=torch.float64)
PERMUTING = {
    "sequential": lambda n: SequentialSampler(range(n)),
    "random": lambda n: RandomSampler(range(n), generator=generator()),
    "weighted": lambda n: WeightedRandomSampler(WEIGHTS[:n], n, replacement=False, generator=generator()),
    "subset": lambda n: SubsetRandomSampler(range(n), generator()),
}


@unhurried
@given(st.sampled_from(sorted(PERMUTING)), subsets)
def test_without_replacement_each_place_of_the_subset_is_given_once(kind, indices):
    rebuilt = sampler_for(PERMUTING[kind](SIZE), torch.tensor(indices))
    assert type(rebuilt) is type(PERMUTING[kind](SIZE))
    given_out = list(rebuilt)
    assert sorted(given_out) == list(range(len(indices)))
    assert len(rebuilt) == len(indices)


@unhurried
@given(subsets, st.integers(1, 7), st.booleans())
def test_batches_keep_their_size_and_what_is_dropped(indices, size, drop_last):
    rebuilt = sampler_for(BatchSampler(PERMUTING["random"](SIZE), size, drop_last), torch.tensor(indices))
    expected = BatchSampler(PERMUTING["random"](len(indices)), size, drop_last)
    assert list(rebuilt) == list(expected)


@unhurried
@given(subsets, st.integers(1, 4), st.booleans(), st.booleans(), st.integers(0, 5), st.data())
def test_a_distributed_sampler_keeps_its_rank_seed_and_epoch(indices, replicas, shuffle, drop_last, epoch, data):
    rank = data.draw(st.integers(0, replicas - 1))
    options = {"num_replicas": replicas, "rank": rank, "shuffle": shuffle, "seed": 11, "drop_last": drop_last}
    source = DistributedSampler(range(SIZE), **options)
    source.set_epoch(epoch)
    expected = DistributedSampler(indices, **options)
    expected.set_epoch(epoch)
    assert list(sampler_for(source, torch.tensor(indices))) == list(expected)


def test_the_generator_is_the_same_object():
    source = generator()
    samplers = [
        RandomSampler(range(SIZE), generator=source),
        RandomSampler(range(SIZE), replacement=True, num_samples=3, generator=source),
        WeightedRandomSampler(WEIGHTS, SIZE, generator=source),
        SubsetRandomSampler(range(SIZE), source),
    ]
    for sampler in samplers:
        assert sampler_for(sampler, SUBSET).generator is source
        assert sampler_for(BatchSampler(sampler, 2, False), SUBSET).sampler.generator is source


def test_how_many_are_drawn_follows_the_length_unless_it_was_given():
    assert len(sampler_for(RandomSampler(range(SIZE)), SUBSET)) == 5
    assert len(sampler_for(RandomSampler(range(SIZE), replacement=True), SUBSET)) == 5
    assert len(sampler_for(RandomSampler(range(SIZE), replacement=True, num_samples=50), SUBSET)) == 50
    assert len(sampler_for(RandomSampler(range(SIZE), num_samples=12), SUBSET)) == 12
    assert len(sampler_for(WeightedRandomSampler(WEIGHTS, SIZE), SUBSET)) == 5
    assert len(sampler_for(WeightedRandomSampler(WEIGHTS, 50), SUBSET)) == 50
    assert len(sampler_for(WeightedRandomSampler(WEIGHTS, 12, replacement=False), SUBSET)) == 5
    assert len(sampler_for(WeightedRandomSampler(WEIGHTS, 2, replacement=False), SUBSET)) == 2


def test_weights_are_those_of_the_samples():
    rebuilt = sampler_for(WeightedRandomSampler(WEIGHTS, SIZE), SUBSET)
    assert rebuilt.weights.tolist() == WEIGHTS[SUBSET].tolist()
    weights = [0.0] * SIZE
    weights[15] = 2.0
    assert set(sampler_for(WeightedRandomSampler(weights, SIZE), SUBSET)) == {4}
    with pytest.raises(InvalidCommandError, match="weights of all these samples are 0"):
        sampler_for(WeightedRandomSampler(weights, SIZE), SUBSET[:4])


def test_a_subset_random_sampler_keeps_to_its_own_indices():
    for own in ([7, 1, 20, 7], torch.tensor([7, 1, 20, 7]), np.array([7, 1, 20, 7])):
        assert sampler_for(SubsetRandomSampler(own), SUBSET).indices == [2, 0, 2]
    with pytest.raises(InvalidCommandError, match="holds none of these"):
        sampler_for(SubsetRandomSampler([1, 2]), SUBSET)


def test_a_sample_that_the_sampler_was_not_made_for_is_refused():
    few = range(10)
    for sampler in (
        SequentialSampler(few),
        RandomSampler(few),
        WeightedRandomSampler(WEIGHTS[:10], 10),
        DistributedSampler(few, num_replicas=1, rank=0),
        BatchSampler(SequentialSampler(few), 2, False),
    ):
        with pytest.raises(InvalidCommandError, match="made for 10 samples: it never gives the one at 20"):
            sampler_for(sampler, SUBSET)
        sampler_for(sampler, SUBSET[1:4])


# -- samplers of a user's own ----------------------------------------------------------------------------------


class Half(RandomSampler):
    """A sampler that PyTorch does not have."""

    def __iter__(self):
        return iter(list(super().__iter__())[: len(self)])

    def __len__(self):
        return max(1, len(self.data_source) // 2)


class Own:
    """One that can be made for a subset."""

    def __init__(self, size, source):
        self.size, self.source, self.epoch = size, source, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter([self.source.randrange(self.size), self.epoch])

    def subset(self, indices):
        assert indices == SUBSET.tolist()
        assert all(type(i) is int for i in indices)
        return Own(len(indices), self.source)


class Renewing(Own):
    def subset(self, indices):
        return Renewing(len(indices), random.Random(7))


class Forgetful(Own):
    def subset(self, indices):
        return None


class Occupied(Own):
    subset = (1, 2)  # means something else there


def test_a_subclass_of_a_known_sampler_is_not_taken_for_it():
    for sampler in (Half(range(SIZE)), BatchSampler(Half(range(SIZE)), 2, False)):
        with pytest.raises(UnsupportedLoaderError, match=r"Half .*give it a method subset\(indices\)"):
            sampler_for(sampler, SUBSET)


def test_a_sampler_that_knows_how_is_asked():
    own = Own(SIZE, random.Random(3))
    own.set_epoch(4)
    rebuilt = sampler_for(own, SUBSET)
    assert type(rebuilt) is Own
    assert (rebuilt.size, rebuilt.epoch) == (5, 4)
    assert rebuilt.source is own.source
    assert sampler_for(BatchSampler(own, 2, False), SUBSET).sampler.size == 5


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Renewing, "Renewing.subset made a new random generator, at Renewing.source"),
        (Forgetful, "Forgetful.subset gave a NoneType"),
        (Occupied, "Occupied is not a sampler of PyTorch's own"),
    ],
)
def test_a_sampler_that_does_not_keep_the_contract_is_refused(kind, message):
    with pytest.raises(UnsupportedLoaderError, match=message):
        sampler_for(kind(SIZE, random.Random(3)), SUBSET)
