"""A loader put back at any batch gives the batches, and leaves the random state, of one that never stopped."""

import itertools
import json
import os
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
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from onthefly.errors import InvalidCommandError, StateMismatchError, UnsupportedLoaderError
from onthefly.state import rng
from onthefly.state.loader import END, ExactLoader
from onthefly.state.tree import flatten, unflatten

SIZE, BATCH, EPOCHS = 23, 4, 3


class Augmented(Dataset):
    """Draws from all three process-wide generators for every sample."""

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        if isinstance(index, list):  # a loader that does not batch may have a sampler that does
            return torch.stack([self[i] for i in index])
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


class Pairs:
    """A batch sampler of a user's own, which can be made for a subset."""

    def __init__(self, size, source):
        self.size, self.random, self.epoch = size, source, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for _ in range(self.size // 2):
            yield [self.random.randrange(self.size), self.epoch % self.size]

    def __len__(self):
        return self.size // 2

    def subset(self, indices):
        return type(self)(len(indices), self.random)


class EndlessPairs(Pairs):
    """One that does not know how many it gives: they are drawn as they are needed."""

    __len__ = None


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
    "batches as samples": lambda d: {"sampler": BatchSampler(RandomSampler(d), BATCH, False), "batch_size": None},
    "own": lambda d: {"batch_sampler": Pairs(len(d), random.Random(3))},
    "as it goes": lambda d: {"batch_sampler": EndlessPairs(len(d), random.Random(3))},
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
            check_indices(exact, batch)
            seen.append((batch.tolist(), torch.rand(2).tolist(), random.random()))  # dropout draws, too
        exact.end_epoch()
    exact.close()
    return seen, None


def check_indices(exact, batch):
    """The loader names the samples of the batch that it gave. Each has its index in front."""
    if exact.samples is None:
        assert exact.indices is None
        return
    assert exact.indices.dtype == np.int64
    assert exact.indices.tolist() == np.floor(batch.numpy().reshape(-1, batch.shape[-1])[:, 0]).tolist()


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


# -- bound to a subset -----------------------------------------------------------------------------------------

SUBSET, OTHER = [20, 3, 7, 8, 15, 11, 1, 9, 10, 6, 18], [14, 5, 19, 2, 8, 0, 16, 12, 22, 7]
BINDINGS = [((0, 2), SUBSET), ((1, 1), OTHER), ((2, 0), None)]  # at (epoch, batch)
BINDABLE = [kind for kind in KINDS if kind not in ("eager batch sampler", "lazy")]
PERMUTING = ["sequential", "generator", "batch sampler", "unbatched", "distributed", "collate", "batches as samples"]


def cells(kinds, often):
    """Every kind of loader with every kind of workers. To start workers takes long: few of these cells are always checked."""
    rare = pytest.mark.long
    return [
        pytest.param(kind, workers, persistent, marks=rare if workers and kind not in often else ())
        for kind in kinds
        for workers, persistent in ((0, False), (2, False), (2, True))
    ]


def journey(exact, bindings, epochs=EPOCHS):
    """What a training loop sees from here on, and every state that a checkpoint could hold, each with what is still to come."""
    seen, moments, bindings = [], [], list(bindings)

    def look():
        state = stored({"loader": exact.state_dict(), "rng": rng.capture()})
        moments.append((len(seen), list(bindings), (exact.epoch, exact.batch, exact.under_way), state))

    while exact.epoch < epochs:
        if not exact.under_way:
            exact.set_epoch(exact.epoch)
        while True:
            look()
            if bindings and (exact.epoch, exact.batch) == bindings[0][0]:
                exact.rebind(bindings.pop(0)[1])
                look()
            if (batch := exact.next()) is END:
                break
            check_indices(exact, batch)
            seen.append((batch.tolist(), torch.rand(2).tolist(), random.random()))
        exact.end_epoch()
    exact.close()
    generators = stored(exact.state_dict()["generators"])
    seen.append((torch.rand(2).tolist(), random.random(), np.random.rand(), repr(generators)))
    return seen, moments


def assert_bound_exactly(fresh, choose=lambda moments: moments):
    whole, moments = journey(ExactLoader(fresh()), BINDINGS)
    assert not moments[-1][1], "it was never bound to some of them"
    for number, bindings, place, state in choose(moments):
        torch.manual_seed(99), random.seed(99), np.random.seed(99)
        resumed = ExactLoader(fresh())
        resumed.load_state_dict(state["loader"])
        rng.restore(state["rng"])
        assert (resumed.epoch, resumed.batch, resumed.under_way) == place
        assert journey(resumed, bindings)[0] == whole[number:], f"put back at {place}, after {number} batches"


def hand_made(kind, workers, persistent):
    """The loader that somebody writes who wants to train on these samples alone."""
    seeded(None)
    dataset = Subset(Augmented(), SUBSET)
    options = KINDS[kind](dataset)
    if kind == "weighted":
        options["sampler"] = WeightedRandomSampler(options["sampler"].weights[SUBSET], 30)
    if kind == "subset":
        options["sampler"] = SubsetRandomSampler([SUBSET.index(i) for i in range(5, 20) if i in SUBSET], generator())
    return DataLoader(dataset, num_workers=workers, persistent_workers=persistent, **options)


@pytest.mark.parametrize(("kind", "workers", "persistent"), cells(BINDABLE, ("shuffle", "weighted", "own")))
def test_bound_to_a_subset_it_gives_what_a_loader_over_that_subset_gives(kind, workers, persistent):
    exact = ExactLoader(make(kind, workers, persistent), exact_augmentation=False)
    exact.rebind(SUBSET)
    *mine, _ = journey(exact, [], 2)[0]
    loader = hand_made(kind, workers, persistent)
    plain = []
    for epoch in range(2):
        for sampler in (loader.sampler, loader.batch_sampler):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        for batch in loader:
            plain.append((batch.tolist(), torch.rand(2).tolist(), random.random()))
    assert mine == plain
    assert exact.active == len(SUBSET)
    assert exact.batches == (None if kind == "as it goes" else len(loader))


@pytest.mark.parametrize(("kind", "workers", "persistent"), cells(BINDABLE, ("generator", "as it goes")))
def test_bound_to_other_samples_any_batch_can_be_gone_back_to(kind, workers, persistent):
    def few(moments):
        first, second, _ = (i for i, (one, next) in enumerate(itertools.pairwise(moments)) if one[1] != next[1])
        # On the eve of it, right after it, in the middle of the pass and at its end.
        return [moments[i] for i in (first, first + 1, (first + second) // 2, second + 1)]

    def many(moments):
        return moments[:: 1 if len(moments) < 40 else 5]

    assert_bound_exactly(lambda: make(kind, workers, persistent), few if workers else many)


@pytest.mark.parametrize("kind", BINDABLE)
def test_back_on_all_samples_it_is_as_if_it_had_never_been_bound(kind):
    never = journey(ExactLoader(make(kind)), [])[0]
    exact = ExactLoader(make(kind))
    exact.rebind(SUBSET)
    exact.rebind(None)
    assert (exact.subset, exact.active) == (None, SIZE)
    assert journey(exact, [])[0] == never


@pytest.mark.parametrize(("kind", "workers", "persistent"), cells(PERMUTING, ("generator",)))
def test_each_pass_gives_every_sample_that_it_is_bound_to_once(kind, workers, persistent):
    exact = ExactLoader(make(kind, workers, persistent))
    for active in (None, SUBSET, OTHER, None):
        exact.rebind(active)
        given = []
        for _ in range(exact.batches):
            exact.next()
            given += exact.indices.tolist()
        assert exact.next() is END
        everything = sorted(active or range(SIZE))
        if kind == "distributed":  # one of two ranks, in the order of an epoch's seed
            assert len(set(given)) == len(given) == (len(everything) + 1) // 2
            assert set(given) < set(everything)
        else:
            assert sorted(given) == everything
    exact.close()


def test_in_the_middle_of_an_epoch_a_fresh_pass_begins_with_the_random_state_of_now():
    exact = ExactLoader(make("generator"))
    exact.next(), exact.next()
    exact.rebind(SUBSET)
    assert (exact.epoch, exact.batch, exact.under_way, exact.exhausted) == (0, 0, True, False)
    assert exact.subset.dtype == torch.int64
    assert exact.subset.tolist() == SUBSET
    state, drawn = rng.capture(), exact.state_dict()["generators"]
    mine = [batch.tolist() for batch in exact]
    assert (exact.epoch, exact.batch, exact.under_way) == (1, 0, False)
    loader = hand_made("generator", 0, False)
    rng.restore(state)
    loader.generator.set_state(drawn["generator"])
    assert mine == [batch.tolist() for batch in loader]


def test_between_epochs_no_epoch_is_under_way():
    exact = ExactLoader(make("shuffle"))
    assert not exact.under_way
    exact.rebind(SUBSET)
    assert not exact.under_way
    exact.begin()
    assert not exact.under_way
    exact.next()
    assert exact.under_way
    exact.end_epoch()
    assert not exact.under_way
    exact.rebind(None)
    assert (exact.epoch, exact.under_way) == (1, False)


def test_the_last_batch_of_an_epoch_may_be_followed_by_a_pass_over_a_subset():
    exact = ExactLoader(make("sequential"))
    while exact.next() is not END:
        pass
    assert exact.exhausted
    exact.rebind(SUBSET)
    assert not exact.exhausted
    assert len(list(exact)) == 3
    assert exact.epoch == 1


@pytest.mark.parametrize("persistent", [False, True])
def test_augmentation_is_seeded_by_the_place_in_the_pass_not_by_the_worker(persistent):
    runs = [journey(ExactLoader(make("generator", n, persistent)), BINDINGS)[0] for n in (1, 2)]
    assert runs[0] == runs[1]
    noise = [tuple(sample[1:]) for batch, *_ in runs[0][:-1] for sample in batch]
    assert len(set(noise)) == len(noise)


def test_a_pass_that_begins_with_the_random_state_of_another_has_other_augmentation():
    exact = ExactLoader(make("generator", 1, True))  # the process-wide state does not move: the loader has its own
    noise = []
    exact.rebind(SUBSET)
    for active in (SUBSET, SUBSET, OTHER):
        noise += exact.next()[:, 1:].tolist()
        exact.rebind(active)
    exact.close()
    assert len(set(map(tuple, noise))) == len(noise) == 3 * BATCH


class Located(Augmented):
    def __getitem__(self, index):
        return torch.tensor([index, os.getpid()], dtype=torch.float64)


def test_persistent_workers_live_on():
    exact = ExactLoader(make("shuffle", 1, True, dataset=Located()))
    pids = {exact.next()[0, 1].item()}
    for active in (SUBSET, None):
        exact.rebind(active)
        pids.add(exact.next()[0, 1].item())
    exact.close()
    assert len(pids) == 1


def test_a_user_who_sets_the_epoch_of_their_own_sampler_is_heard():
    loader = make("distributed")
    exact = ExactLoader(loader)
    exact.rebind(SUBSET)
    orders = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        orders.append([batch[:, 0].tolist() for batch in exact])
    assert orders[0] == orders[2] != orders[1]


def test_weights_that_are_changed_between_epochs_hold_for_the_subset_too():
    loader = make("weighted")
    exact = ExactLoader(loader)
    exact.rebind(SUBSET)
    list(exact)
    loader.sampler.weights[:] = 0
    loader.sampler.weights[11] = 1
    assert {i for batch in exact for i in batch[:, 0].tolist()} == {11}


# -- what is refused, and changes nothing ----------------------------------------------------------------------


def assert_unmoved(exact, refused, error, match):
    before = stored(exact.state_dict())
    subset = None if exact.subset is None else exact.subset.tolist()
    with pytest.raises(error, match=match):
        refused()
    assert repr(stored(exact.state_dict())) == repr(before)
    assert (None if exact.subset is None else exact.subset.tolist()) == subset


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, SIZE], "the data set has 23 samples"),
        ([-1, 0, 1, 2], "none at -1"),
        ([1, 2, 3, 3], "only once"),
        ([], "at least one sample"),
        ([0.0, 1.0, 2.0, 3.0], "integers"),
        ([4, 5, 6], "3 samples give no whole batch"),  # it drops the last batch if that is short
    ],
)
def test_wrong_indices_are_refused(indices, message, bound):
    def batches(ask):
        exact = ExactLoader(make("shuffle"))
        if bound:
            exact.rebind(SUBSET)
        found = [exact.next().tolist()]
        if ask:
            for refused in (exact.rebind, exact.check_subset):
                assert_unmoved(exact, lambda refused=refused: refused(indices), InvalidCommandError, message)
        return [*found, *(batch.tolist() for batch in exact)]

    assert batches(ask=True) == batches(ask=False)


def test_too_few_samples_for_every_rank_are_refused():
    sampler = DistributedSampler(Augmented(), num_replicas=4, rank=0, drop_last=True)
    exact = ExactLoader(DataLoader(Augmented(), BATCH, sampler=sampler))
    with pytest.raises(InvalidCommandError, match="no whole batch"):
        exact.rebind([1, 2, 3])


class Endless(Augmented):
    __len__ = None


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(Count(), batch_size=BATCH), "Count, is an IterableDataset.*filter the samples there"),
        (Counter(), "Counter keeps its position itself; use a torch.utils.data.DataLoader"),
        ([1, 2, 3], "list has no data set to choose from"),
        (DataLoader(Augmented(), sampler=LazySampler()), r"LazySampler.*subset\(indices\)"),
        (DataLoader(Augmented(), batch_sampler=EagerBatchSampler()), r"EagerBatchSampler.*subset\(indices\)"),
        (DataLoader(Endless(), sampler=LazySampler()), "Endless has no length.*__len__"),
    ],
)
def test_a_loader_that_cannot_be_bound_says_what_to_do(loader, message):
    exact = ExactLoader(loader)
    for refused in (exact.rebind, exact.check_subset):
        assert_unmoved(exact, lambda refused=refused: refused([0, 1]), UnsupportedLoaderError, message)
    exact.next()


def bound_state():
    exact = ExactLoader(make("sequential"))
    exact.rebind(SUBSET)
    exact.next()
    return stored(exact.state_dict())


class Short(Augmented):
    def __len__(self):
        return 15


@pytest.mark.parametrize(
    ("loader", "changed", "message"),
    [
        (lambda: make("sequential", dataset=Short()), {}, "has 15 samples.*none at 20, 15, 18"),
        (lambda: DataLoader(Count(), batch_size=BATCH), {}, "IterableDataset"),
        (lambda: DataLoader(Augmented(), sampler=LazySampler()), {}, "LazySampler"),
        (lambda: make("sequential"), {"subset": torch.tensor([1.0])}, "integers"),
        (lambda: make("sequential"), {"subset": "all"}, "one flat list"),
    ],
)
def test_a_stored_subset_that_does_not_fit_is_refused_before_anything_changes(loader, changed, message):
    exact = ExactLoader(loader())
    state = {**bound_state(), **changed}
    assert_unmoved(exact, lambda: exact.load_state_dict(state), StateMismatchError, f"stored subset: .*{message}")


def test_a_load_goes_to_the_subset_that_was_stored_whatever_it_is_bound_to():
    live = ExactLoader(make("sequential"))
    live.rebind(OTHER)
    live.load_state_dict(bound_state())
    assert live.subset.tolist() == SUBSET
    assert (live.active, live.batches) == (len(SUBSET), 3)
    assert [batch[:, 0].tolist() for batch in live] == [SUBSET[4:8], SUBSET[8:]]
    live.load_state_dict(stored(ExactLoader(make("sequential")).state_dict()))
    assert live.subset is None
    assert len(list(live)) == 6


def test_a_state_from_before_there_were_subsets_is_one_of_all_samples():
    exact = ExactLoader(make("shuffle"))
    exact.next()
    state = stored({"loader": exact.state_dict(), "rng": rng.capture()})
    for name in ("subset", "under_way", "passes", "sampler_epoch"):
        del state["loader"][name]
    resumed = ExactLoader(make("shuffle"))
    resumed.rebind(SUBSET)
    resumed.load_state_dict(state["loader"])
    assert (resumed.subset, resumed.batch, resumed.under_way) == (None, 1, True)
    rng.restore(state["rng"])
    rest = [batch.tolist() for batch in exact]
    rng.restore(state["rng"])
    assert [batch.tolist() for batch in resumed] == rest


# -- which samples a batch was made of -------------------------------------------------------------------------


def test_before_any_batch_there_are_no_indices():
    exact = ExactLoader(make("sequential"))
    assert exact.indices is None
    exact.next()
    state = stored(exact.state_dict())
    exact.next()
    assert exact.indices.tolist() == [4, 5, 6, 7]
    exact.end_epoch()
    assert exact.indices.tolist() == [4, 5, 6, 7]
    exact.load_state_dict(state)
    assert exact.indices is None
    exact.next()
    assert exact.indices.tolist() == [4, 5, 6, 7]


def test_workers_that_hand_batches_out_of_order_do_not_say_which():
    exact = ExactLoader(make("sequential", 1, in_order=False))
    exact.next()
    assert exact.indices is None
    exact.close()
    exact = ExactLoader(make("sequential", in_order=False))
    exact.next()
    assert exact.indices.tolist() == [0, 1, 2, 3]


class Named(Augmented):
    """A data set that takes other things than integers."""

    def __getitem__(self, name):
        return float(name[-1])


def test_a_sampler_of_other_things_than_integers_gives_no_indices():
    exact = ExactLoader(DataLoader(Named(), sampler=["a1", "b2"]))
    assert exact.next().tolist() == [1.0]
    assert exact.indices is None


class Broken(Augmented):
    def __getitem__(self, index):
        if index == 9:
            raise OSError("no such picture")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_after_a_batch_that_could_not_be_loaded_nothing_is_guessed(workers):
    exact = ExactLoader(make("sequential", workers, dataset=Broken()))
    exact.next(), exact.next()
    with pytest.raises(OSError, match="no such picture"):
        exact.next()
    assert exact.indices is None
    exact.next()
    assert exact.indices is None
    exact.rebind(SUBSET[:4])
    exact.next()
    assert exact.indices.tolist() == SUBSET[:4]
    exact.close()


class OutOfPlace(Pairs):
    def __iter__(self):
        yield [0, self.size]


def test_a_sampler_that_gives_what_is_not_in_the_subset_is_told():
    exact = ExactLoader(DataLoader(Augmented(), batch_sampler=OutOfPlace(SIZE - 1, random.Random(0))))
    exact.rebind(SUBSET)
    with pytest.raises(UnsupportedLoaderError, match="it must give integers from 0 to 10"):
        exact.next()
