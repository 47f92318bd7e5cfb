"""A loader put back at any batch gives the batches, and leaves the random state, of one that never stopped."""

import json
import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from onthefly.errors import StateMismatchError, UnsupportedLoaderError
from onthefly.state import rng
from onthefly.state.loader import END, ExactLoader
from onthefly.state.tree import flatten, unflatten

SIZE, BATCH, EPOCHS = 23, 4, 3


class Augmented(Dataset):
    """Draws from all three process-wide generators for every sample."""

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64)


class Batched(Augmented):
    def __getitems__(self, indices):
        return [self[i] for i in indices]


class OwnGenerator(Augmented):
    def __init__(self):
        self.rng = np.random.default_rng(5)

    def __getitem__(self, index):
        return torch.tensor([index, self.rng.random()], dtype=torch.float64)


class LazySampler:
    """Draws each index from Python's global generator only when it is asked for."""

    def __iter__(self):
        for _ in range(SIZE):
            yield random.randrange(SIZE)

    def __len__(self):
        return SIZE


class EagerBatchSampler:
    """Draws its whole order when `iter` is called, not with the first batch."""

    def __iter__(self):
        order = torch.randperm(SIZE).tolist()
        return iter([order[i : i + 3] for i in range(0, SIZE, 3)])

    def __len__(self):
        return (SIZE + 2) // 3


def random_collate(samples):
    return torch.stack(samples) + torch.rand(())


def generator():
    return torch.Generator().manual_seed(7)


KINDS = {
    "sequential": lambda d: {"sampler": SequentialSampler(d), "batch_size": BATCH},
    "shuffle": lambda d: {"shuffle": True, "batch_size": BATCH, "drop_last": True},
    "generator": lambda d: {"shuffle": True, "batch_size": BATCH, "generator": generator()},
    "replacement": lambda d: {"sampler": RandomSampler(d, replacement=True, num_samples=50), "batch_size": BATCH},
    "weighted": lambda d: {"sampler": WeightedRandomSampler(torch.rand(SIZE).tolist(), 30), "batch_size": BATCH},
    "subset": lambda d: {"sampler": SubsetRandomSampler(range(5, 20), generator()), "batch_size": BATCH},
    "batch sampler": lambda d: {"batch_sampler": BatchSampler(RandomSampler(d), BATCH, False)},
    "eager batch sampler": lambda d: {"batch_sampler": EagerBatchSampler()},
    "lazy": lambda d: {"sampler": LazySampler(), "batch_size": BATCH},
    "unbatched": lambda d: {"shuffle": True, "batch_size": None},
    "distributed": lambda d: {"sampler": DistributedSampler(d, num_replicas=2, rank=1), "batch_size": BATCH},
    "collate": lambda d: {"shuffle": True, "batch_size": BATCH, "collate_fn": random_collate},
}


def seeded(loader):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    return loader


def make(kind, workers=0, persistent=False, dataset=None, **options):
    seeded(None)
    dataset = dataset or Augmented()
    if kind == "unbatched":
        options.pop("collate_fn", None)
    return DataLoader(dataset, num_workers=workers, persistent_workers=persistent, **KINDS[kind](dataset), **options)


def train(exact, epochs, stop=None):
    """What a training loop sees from here on. At `stop` (batches from here) it gives the state instead of going on."""
    seen = []
    while exact.epoch < epochs:
        while True:
            if stop is not None and len(seen) == stop:
                return seen, {"loader": exact.state_dict(), "rng": rng.capture()}
            exact.begin()
            if exact.exhausted or (batch := exact.next()) is END:
                break
            seen.append((batch.tolist(), torch.rand(2).tolist(), random.random()))  # dropout draws, too
        exact.end_epoch()
    exact.close()
    return seen, None


def stored(value):
    tree, tensors = flatten(value)
    return unflatten(json.loads(json.dumps(tree)), {name: t.clone() for name, t in tensors.items()})


def assert_exact(fresh, stops, **options):
    whole, _ = train(ExactLoader(fresh(), **options), EPOCHS)
    for stop in stops(len(whole)):
        exact = ExactLoader(fresh(), **options)
        before, state = train(exact, EPOCHS, stop)
        exact.close()
        torch.manual_seed(99), random.seed(99), np.random.seed(99)  # another process begins anyhow
        state = stored(state)
        resumed = ExactLoader(fresh(), **options)
        resumed.load_state_dict(state["loader"])
        rng.restore(state["rng"])
        after, _ = train(resumed, EPOCHS)
        assert before + after == whole, f"stopped after {stop} of {len(whole)} batches"


@pytest.mark.parametrize("kind", KINDS)
def test_any_batch_can_be_gone_back_to(kind):
    assert_exact(lambda: make(kind), lambda n: range(0, n, 1 if n < 40 else 7))


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("kind", ["shuffle", "generator", "eager batch sampler", "lazy", "unbatched", "collate"])
def test_any_batch_can_be_gone_back_to_with_workers(kind, persistent):
    epoch = {"unbatched": SIZE, "eager batch sampler": 8}.get(kind, 6)
    assert_exact(lambda: make(kind, 2, persistent), lambda n: (0, 1, n // 3 + 1, 2 * epoch, n - 1))


@pytest.mark.parametrize("kind", KINDS)
def test_without_workers_it_is_the_plain_loop(kind):
    if kind == "lazy":
        pytest.skip("its order is drawn whole, so that it can be resumed")
    loader = make(kind)
    plain = []
    for _ in range(EPOCHS):
        for batch in loader:
            plain.append((batch.tolist(), torch.rand(2).tolist(), random.random()))
    assert train(ExactLoader(make(kind)), EPOCHS)[0] == plain


@pytest.mark.parametrize("persistent", [False, True])
def test_without_exact_augmentation_workers_change_nothing_either(persistent):
    loader = make("shuffle", 2, persistent)
    plain = [(b.tolist(), torch.rand(2).tolist(), random.random()) for _ in range(EPOCHS) for b in loader]
    exact = ExactLoader(make("shuffle", 2, persistent), exact_augmentation=False)
    mine = train(exact, EPOCHS)[0]
    # Python's and torch's numbers in workers follow the loader's seed; NumPy's are copied from the parent.
    assert [m[1:] for m in mine] == [p[1:] for p in plain]
    assert mine == plain


def test_augmentation_depends_neither_on_the_number_of_workers_nor_on_who_batches():
    runs = [train(ExactLoader(make("shuffle", n, dataset=d)), 2)[0] for n, d in ((1, None), (2, None))]
    assert runs[0] == runs[1]
    assert_exact(lambda: make("shuffle", 2, dataset=Batched()), lambda n: (2, n // 2))


def test_the_number_of_workers_may_change_on_resume():
    whole, _ = train(ExactLoader(make("shuffle", 1)), 2)
    exact = ExactLoader(make("shuffle", 1))
    before, state = train(exact, 2, stop=3)
    exact.close()
    resumed = ExactLoader(make("shuffle", 2))
    resumed.load_state_dict(stored(state["loader"]))
    rng.restore(state["rng"])
    assert before + train(resumed, 2)[0] == whole


def test_a_generator_of_the_data_set_is_captured_without_workers_and_announced_with():
    assert_exact(lambda: make("shuffle", dataset=OwnGenerator()), lambda n: (0, 1, 5, 6, 9))
    assert not ExactLoader(make("shuffle", dataset=OwnGenerator())).inexact
    (reason,) = ExactLoader(make("shuffle", 2, dataset=OwnGenerator())).inexact
    assert "dataset.rng" in reason


def test_a_spawned_worker_is_as_exact_as_a_forked_one():
    spawned = train(ExactLoader(make("shuffle", 1, multiprocessing_context="spawn")), 1)[0]
    assert spawned == train(ExactLoader(make("shuffle", 1)), 1)[0]


class Count(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(SIZE))


def test_an_iterable_data_set_goes_on_at_its_place_and_is_announced():
    exact = ExactLoader(DataLoader(Count(), batch_size=BATCH))
    assert "IterableDataset" in exact.inexact[0]
    assert_exact(lambda: seeded(DataLoader(Count(), batch_size=BATCH)), lambda n: (0, 1, 4, 6, 11))


class Counter:
    """A loader with a state of its own."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        while self.at < 5:
            self.at += 1
            yield torch.tensor(self.at)
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def test_a_loader_with_a_state_of_its_own_is_asked_for_it():
    assert_exact(lambda: seeded(Counter()), lambda n: (0, 1, 4, 6, 12))
    assert not ExactLoader(Counter()).inexact


def test_a_list_of_batches_is_a_loader():
    assert_exact(lambda: seeded([torch.tensor(i) for i in range(4)]), lambda n: (0, 1, 5))


def test_iterating_gives_the_rest_of_the_epoch():
    exact = ExactLoader(make("sequential"))
    exact.next()
    assert len(list(exact)) == 5
    assert (exact.epoch, exact.batch) == (1, 0)


def test_a_loader_that_iterates_in_a_way_of_its_own_is_refused():
    class Odd(DataLoader):
        def __iter__(self):
            return iter([1, 2])

    with pytest.raises(UnsupportedLoaderError, match=r"Odd.*state_dict"):
        ExactLoader(Odd(Augmented()))


def test_a_position_in_another_loader_is_refused_before_anything_changes():
    exact = ExactLoader(make("generator"))
    exact.next()
    other = ExactLoader(make("shuffle", dataset=OwnGenerator()))
    with pytest.raises(StateMismatchError, match="generator"):
        other.load_state_dict(exact.state_dict())
    assert (other.epoch, other.batch) == (0, 0)
