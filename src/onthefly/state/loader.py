"""The loader's position: iterating a user's loader so that any batch of any epoch can be gone back to.

An epoch is replayed, not stored: the random state at its start is kept, and a resume sets that state, builds the
iterator with the first *n* batches skipped before any sample of them is loaded, then sets the random state of the
saved moment. That holds for every sampler, with a generator of its own or not.

With loader workers, PyTorch's augmentation depends on which worker drew what before. Here indices carry
their position in the epoch, and a worker seeds Python, NumPy and torch from (epoch seed, position) before each
sample and again before collating, so that a sample's augmentation depends on nothing else.

A loader that is bound to a subset keeps its data set and its workers. Its sampler is made anew for so many samples, at the
start of every pass from the user's own, and `_Order` looks up which sample of the data set each of its positions is.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import operator
import os
import random
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, IterableDataset

from onthefly.errors import InvalidCommandError, StateMismatchError, UnsupportedLoaderError
from onthefly.state import rng, subsets
from onthefly.state.subsets import Indices

_HUGE_EPOCH = 20_000_000  # samples; beyond it the epoch's order is drawn as it is needed, to save memory


class ExactLoader:
    """Iterates a loader, epoch by epoch, with a position that can be saved and put back.

    A `DataLoader` is rebuilt from every argument that it was made with, and the rebuilt one is iterated. A loader
    with its own ``state_dict`` and ``load_state_dict`` is asked for its position instead. Any other iterable is
    put back by drawing and dropping the batches that were handed out before.

    Iterating it gives the rest of the current epoch. `epoch` and `batch` (batches handed out in this epoch, since it
    was last bound to other samples) are its position, with `under_way`: whether the epoch has given a batch already.
    `inexact` lists what keeps this loader from being put back exactly, in words for its user.

    Raises `UnsupportedLoaderError` for a `DataLoader` subclass with an ``__iter__`` of its own and no state.
    """

    def __init__(self, loader: Iterable[Any], *, exact_augmentation: bool = True) -> None:
        self.epoch = 0
        self.batch = 0
        self.under_way = False
        self._source = loader
        self._exact_augmentation = exact_augmentation
        self._has_state = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        self._workers: int = getattr(loader, "num_workers", 0)
        self._built: DataLoader[Any] | None = None
        self._order: _Order | None = None
        self._iterator: Iterator[Any] | None = None
        self._subset: torch.Tensor | None = None
        self._passes = 0  # how often an epoch that had begun got a new pass, over other samples
        self._drawn: deque[Any] | None = None  # the indices of batches that workers are ahead with, if they can be told
        self._handed: Any = None  # those of the last batch
        self._ended = False
        self._started = False  # whether any epoch of this trajectory has begun
        self._start: dict[str, Any] | None = None  # random states at the start of the epoch under way
        self._resume: dict[str, Any] | None = None  # a loaded position that no iterator was built for yet
        self._generators = rng.find_generators(_places_of_generators(loader))
        if isinstance(loader, DataLoader) and not self._has_state:
            _refuse_custom_iteration(loader)
        self._obstacle = _obstacle_to_subsets(loader)
        # What the next pass draws from: indices, or places in the subset.
        self._sampler = self._whole()
        self.inexact: list[str] = list(self._reasons())

    # -- iteration ---------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        while (batch := self.next()) is not _END:
            yield batch
        self.end_epoch()

    def next(self) -> Any:
        """The next batch of this epoch, or `END` when there is none left."""
        if self._iterator is None and not self._ended:
            self.begin()
        if self._ended:
            return _END
        assert self._iterator is not None
        try:
            batch = next(self._iterator)
        except StopIteration:
            self._ended = True
            return _END
        except BaseException:
            # Whether that batch is lost or comes later, only PyTorch knows: from here on the indices would be guessed.
            self._drawn = self._handed = None
            raise
        if self._drawn is not None:
            self._handed = self._drawn.popleft()
        self.batch += 1
        self.under_way = True
        return batch

    @property
    def exhausted(self) -> bool:
        """Whether it is certain that this epoch has no batch left. Asking loads nothing."""
        if self._ended:
            return True
        if self._order is not None and self._order.length is not None:
            return self.batch >= self._order.length
        return (
            self._order is None
            and self._iterator is not None
            and self.batch >= (_length(self._source) or self.batch + 1)
        )

    def begin(self) -> None:
        """Build the iterator of the current epoch, at the current position. Idempotent.

        The process-wide random state is left as a plain loop's ``iter(loader)`` leaves it at the start of an epoch,
        and untouched when a loaded position is gone back to.
        """
        if self._iterator is not None or self._ended:
            return
        if self._resume is not None:
            resume, self._resume = self._resume, None
            self._replay(resume)
        else:
            self._begin_epoch()

    def end_epoch(self) -> None:
        """Leave this epoch, complete or not, for the start of the next."""
        self._iterator = None
        self._resume = None
        self._start = None
        self._ended = False
        self.epoch += 1
        self.batch = 0
        self.under_way = False

    def set_epoch(self, epoch: int) -> None:
        """Tell a sampler that wants to know (such as `DistributedSampler`) which epoch comes."""
        for sampler in _samplers(self._source):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)

    def close(self) -> None:
        """Let go of the iterator and its worker processes."""
        self._iterator = None
        self._order = None
        if self._built is not None:
            self._built._iterator = None
            self._built = None

    # -- which samples -----------------------------------------------------------------------------------------

    @property
    def subset(self) -> torch.Tensor | None:
        """The samples that this is bound to, as int64 indices into the data set in the order given; None for all."""
        return self._subset

    @property
    def active(self) -> int | None:
        """The number of samples that this is bound to; None if the data set does not know its length."""
        return len(self._subset) if self._subset is not None else _length(getattr(self._source, "dataset", None))

    @property
    def batches(self) -> int | None:
        """The number of batches in a whole epoch over the active samples, if that is known without drawing any."""
        return _length(self._sampler if self._sampler is not None else self._source)

    @property
    def indices(self) -> npt.NDArray[np.int64] | None:
        """Which samples of the data set the last batch was made of: int64, one for each; None before any batch.

        None, too, where that cannot be known: for loaders without a sampler or with a state of their own, for workers that hand
        batches out of order, where a sampler gives something other than integers, and, to the end of the pass, once
        a batch could not be loaded.
        """
        return _positions(self._handed)

    @property
    def samples(self) -> int | None:
        """The length of the whole data set, where each sample of it has an index."""
        return _length(self._source.dataset) if self._obstacle is None else None  # type: ignore[attr-defined]

    def check_subset(self, indices: Indices | None) -> None:
        """Raise what `rebind` would raise; change nothing."""
        self._bound_to(indices)

    def rebind(self, indices: Indices | None) -> None:
        """Take batches from only these samples of the data set from now on, or from all of them again (None).

        In the middle of an epoch, what remains of it is a whole pass over these samples: `batch` is 0 again, the order is
        drawn from the random state of now, as at the start of an epoch, and `epoch` and `under_way` stay. Everything else
        about the loader stays as well: the data set, the kind of sampler, its generator, the workers.

        Raises, with everything as it was, `InvalidCommandError` for indices that are not integers of the data set, for one
        given twice, for none, and for too few to make a batch; and `UnsupportedLoaderError` for a loader that
        cannot be rebound: see `subsets.sampler_for`.
        """
        subset, sampler = self._bound_to(indices)
        if self._resume is not None:  # as if it had been gone back to
            resume, self._resume = self._resume, None
            self._set_generator_states(resume["generators"])
            self._set_sampler_epoch(resume["start"]["sampler_epoch"])
        if self._start is not None:
            self._passes += 1
        self._subset, self._sampler = subset, sampler
        self._iterator = None
        self._start = None
        self._ended = False
        self.batch = 0

    # -- position ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The position, and what is needed to go back to it."""
        if self._resume is not None:
            return self._resume
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "started": self._started,
            "num_workers": self._workers,
            "exact_augmentation": self._exact_augmentation,
            "start": self._start,
            "generators": self._generator_states(),
            "own": self._source.state_dict() if self._has_state else None,  # type: ignore[attr-defined]
            "subset": self._subset,
            "under_way": self.under_way,
            "passes": self._passes,
            "sampler_epoch": _sampler_epoch(self._source),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a stored position; its iterator is built when it is first needed.

        Raises `StateMismatchError`, before anything changes, for a loader with other generators, one whose order
        is drawn as it goes with another number of workers, or one that cannot be bound to the stored subset.
        """
        missing = set(state["generators"]) ^ set(self._generators)
        if missing:
            raise StateMismatchError(
                f"loader: these random generators are not on both sides: {', '.join(sorted(missing))}"
            )
        if (state["own"] is not None) != self._has_state:
            raise StateMismatchError("loader: one of the two loaders has a state_dict of its own, the other has not")
        subset, sampler = None, self._whole()
        if (stored := state.get("subset")) is not None:  # states of before there were subsets have none
            try:
                subset, sampler = self._bound_to(stored)
            except (InvalidCommandError, UnsupportedLoaderError) as e:
                raise StateMismatchError(f"loader: it does not fit the stored subset: {e}") from e
        if self._draws_as_it_goes(sampler) and state["num_workers"] != self._workers:
            raise StateMismatchError(
                f"loader: its order is drawn as it goes, so num_workers must stay {state['num_workers']}, not {self._workers}"
            )
        self.close()
        self.epoch, self.batch = state["epoch"], state["batch"]
        self._started = state["started"]
        self._exact_augmentation = state["exact_augmentation"]  # a trajectory keeps the mode it began with
        self._start = state["start"]
        self._ended = False
        self._subset, self._sampler = subset, sampler
        self._handed = None
        self.under_way = state.get("under_way", self.batch > 0)
        self._passes = state.get("passes", 0)
        if self._has_state:
            self._source.load_state_dict(state["own"])  # type: ignore[attr-defined]
        self._resume = dict(state) if state["start"] is not None else None
        if self._resume is None:
            self._set_generator_states(state["generators"])
            self._set_sampler_epoch(state.get("sampler_epoch"))

    # -- inside ------------------------------------------------------------------------------------------------

    def _begin_epoch(self) -> None:
        if self._started:
            self._warm_up()
        self._start = {
            "rng": rng.capture(),
            "generators": self._generator_states(),
            "sampler_epoch": _sampler_epoch(self._source),
            "first": not self._started,
        }
        self._iterator = self._make_iterator(skip=0)
        self._started = True

    def _replay(self, resume: dict[str, Any]) -> None:
        now = rng.capture()
        start = resume["start"]
        if not start["first"]:
            self._warm_up()
        rng.restore(start["rng"])
        self._set_generator_states(start["generators"])
        self._set_sampler_epoch(start["sampler_epoch"])
        self._iterator = self._make_iterator(skip=self.batch)
        if self._order is not None:
            self._order.prime()
        elif not self._has_state:
            for _ in range(self.batch):
                if next(self._iterator, _END) is _END:
                    raise StateMismatchError(
                        f"loader: it ended before batch {self.batch}, which was handed out when this was saved"
                    )
        self._set_generator_states(resume["generators"])
        rng.restore(now)

    def _warm_up(self) -> None:
        """Start persistent workers that had started by now in the trajectory.

        They draw their seed at their very first epoch only, so a later epoch that is entered by a new process must not
        find them unborn: the draw would shift every random number after it.
        """
        if not getattr(self._source, "persistent_workers", False) or self._has_state:
            return
        loader = self._loader()
        if loader._iterator is not None:
            return
        with rng.preserved():
            states = self._generator_states()
            if self._order is not None:
                self._order.plan(())
                with _signals_blocked(loader):
                    iterator = iter(loader)
                for _ in iterator:
                    raise AssertionError("an empty epoch gave a batch")
            else:
                with _signals_blocked(loader):
                    iter(loader)
            self._set_generator_states(states)

    def _make_iterator(self, skip: int) -> Iterator[Any]:
        if not isinstance(self._source, DataLoader) or self._has_state:
            return iter(self._source)
        loader = self._loader()
        if self._order is None:
            with _signals_blocked(loader):
                return iter(loader)
        if self._subset is not None:  # anew, since a user may change the sampler of their own between epochs
            self._sampler = subsets.sampler_for(self._whole(), self._subset)
        self._order.plan(
            self._sampler,
            self._subset,
            as_it_goes=self._draws_as_it_goes(self._sampler),
            skip=skip,
            seed=self._epoch_seed() if self._seeds_samples() else None,
        )
        with _signals_blocked(loader):
            iterator = iter(loader)
        # Workers that hand batches out of order do not say which they hand out.
        self._drawn = self._order.drawn if self._workers == 0 or self._source.in_order else None
        return iterator

    def _seeds_samples(self) -> bool:
        return self._exact_augmentation and self._workers > 0 and not _is_iterable_style(self._source)

    def _epoch_seed(self) -> int:
        """A seed for this epoch's samples, from the random state at its start; nothing is drawn for it."""
        assert self._start is not None
        state = hashlib.blake2b(self._start["rng"]["torch"].numpy().tobytes(), digest_size=8)
        state.update(self.epoch.to_bytes(8, "little"))
        if self._passes:  # a rebinding may find the random state that the epoch began with
            state.update(self._passes.to_bytes(8, "little"))
        return int.from_bytes(state.digest(), "little")

    def _loader(self) -> DataLoader[Any]:
        if self._built is None:
            assert isinstance(self._source, DataLoader)
            self._built, self._order = _rebuild(self._source, seeded=self._seeds_samples())
        return self._built

    def _whole(self) -> Any:
        """The user's own sampler or batch sampler, where there can be a subset of what it gives."""
        return _index_source(self._source) if self._obstacle is None else None

    def _bound_to(self, indices: Indices | None) -> tuple[torch.Tensor | None, Any]:
        """A subset of these samples, and a sampler of places in it; or for all samples None, and the user's own."""
        if self._obstacle is not None:
            raise UnsupportedLoaderError(f"this train loader cannot be bound to a subset: {self._obstacle}")
        if indices is None:
            return None, self._whole()
        assert isinstance(self._source, DataLoader)
        length = _length(self._source.dataset)
        if length is None:
            name = type(self._source.dataset).__name__
            raise UnsupportedLoaderError(f"{name} has no length, so indices cannot be checked: give it a __len__")
        subset = subsets.checked(indices, length)
        sampler = subsets.sampler_for(self._whole(), subset)
        if _length(sampler) == 0:
            raise InvalidCommandError(
                f"{len(subset)} samples give no whole batch, and the loader drops what is less: choose more samples"
            )
        return subset, sampler

    def _draws_as_it_goes(self, sampler: Any) -> bool:
        """Whether the order over this sampler is drawn as it is needed, not whole at the start."""
        if sampler is None:
            return False
        length = _length(sampler)
        return length is None or length * (getattr(self._source, "batch_size", None) or 1) > _HUGE_EPOCH

    def _set_sampler_epoch(self, epoch: int | None) -> None:
        if epoch is not None:
            self.set_epoch(epoch)

    def _generator_states(self) -> dict[str, Any]:
        return {path: rng.generator_state(generator) for path, generator in self._generators.items()}

    def _set_generator_states(self, states: Mapping[str, Any]) -> None:
        for path, state in states.items():
            rng.set_generator_state(self._generators[path], state)

    def _reasons(self) -> Iterator[str]:
        loader = self._source
        if self._has_state:
            return
        if not isinstance(loader, DataLoader):
            if not isinstance(loader, list | tuple):
                yield f"the train loader is a {type(loader).__name__} without state_dict: a resume draws and drops its first batches"
            return
        if _is_iterable_style(loader):
            yield "the data set is an IterableDataset without state_dict: a resume draws and drops its first batches"
        if self._workers == 0:
            return
        if not getattr(loader, "in_order", True):
            yield "the loader hands batches out of order (in_order=False): their order cannot be repeated"
        if not self._exact_augmentation:
            yield "exact_augmentation is off: random augmentation in loader workers is not repeated by a resume"
        for path in self._generators:
            if path.startswith(("dataset", "collate_fn")):
                yield f"{path} is a random generator of its own, copied into each worker: its numbers cannot be repeated"


class SideLoaders:
    """Loaders that the user iterates: validation and test data.

    Their order and their batches are the user's business. But a persistent worker draws its seed from the process-wide
    generator when the loader is first iterated, and never again: in a new process, or after a step back, the random
    numbers of training would come out of step. So whether each has started is part of the state, as are its generators.
    """

    def __init__(self, loaders: Mapping[str, Any]) -> None:
        self._loaders = {name: loader for name, loader in loaders.items() if loader is not None}
        self._generators = {
            name: rng.find_generators(_places_of_generators(loader)) for name, loader in self._loaders.items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            name: {
                "started": _lives_on(loader) and loader._iterator is not None,
                "generators": {path: rng.generator_state(g) for path, g in self._generators[name].items()},
            }
            for name, loader in self._loaders.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What is stored of a loader that is not here, or of a generator that it does not have, is passed over."""
        for name in state.keys() & self._loaders.keys():
            loader, generators = self._loaders[name], self._generators[name]
            if _lives_on(loader) and state[name]["started"] and loader._iterator is None:
                with rng.preserved():
                    iter(loader)
            elif _lives_on(loader) and not state[name]["started"]:
                loader._iterator = None
            for path in state[name]["generators"].keys() & generators.keys():
                rng.set_generator_state(generators[path], state[name]["generators"][path])


def _lives_on(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and loader.num_workers > 0 and loader.persistent_workers


def one_pass(loader: Iterable[Any]) -> Iterable[Any]:
    """The same batches from a loader of its own: looking at data leaves no trace in the user's persistent workers."""
    if type(loader) is not DataLoader or not loader.persistent_workers:
        return loader
    arguments = {**_arguments(loader), "persistent_workers": False}
    if _is_iterable_style(loader):
        return DataLoader(loader.dataset, batch_size=loader.batch_size, drop_last=loader.drop_last, **arguments)
    if loader.batch_sampler is not None:
        return DataLoader(loader.dataset, batch_sampler=loader.batch_sampler, **arguments)
    return DataLoader(loader.dataset, sampler=loader.sampler, batch_size=None, **arguments)


class _End:
    """The type of `END`."""


_END = END = _End()
"""What `ExactLoader.next` gives when the epoch has no batch left."""


@dataclass(frozen=True, slots=True)
class _SeededBatch:
    """Indices on their way to a worker, with what seeds their augmentation."""

    seed: int
    start: int  # position in the epoch of the first index
    indices: Any  # a list of indices, or one index where the loader does not batch


class _Order:
    """Stands where the sampler stood: hands out the same indices, some skipped, each knowing its position."""

    def __init__(self, *, batched: bool) -> None:
        self.length: int | None = None
        self._batched = batched
        self._source: Iterable[Any] = ()
        self._lookup: memoryview | None = None
        self._as_it_goes = False
        self._skip = 0
        self._seed: int | None = None
        self._latest: _Draws | None = None

    def plan(
        self,
        source: Iterable[Any],
        subset: torch.Tensor | None = None,
        *,
        as_it_goes: bool = False,
        skip: int = 0,
        seed: int | None = None,
    ) -> None:
        """Say what the next iterator does: draw from that, in a subset look up what was drawn, drop so many, seed from that."""
        self._source = source
        self._lookup = None if subset is None else subset.numpy().data  # a list of a million ints takes 40 MB
        self._as_it_goes, self._skip, self._seed = as_it_goes, skip, seed
        self.length = None

    def prime(self) -> None:
        """Draw the order now. Without workers PyTorch would ask for it only with the next batch."""
        assert self._latest is not None
        self._latest.prime()

    @property
    def drawn(self) -> deque[Any]:
        """What the latest iterator handed out, without what was skipped. Whoever uses it takes from the left."""
        assert self._latest is not None
        return self._latest.drawn

    def __iter__(self) -> Iterator[Any]:
        # A sampler whose __iter__ draws at once must be asked as often as PyTorch asks (twice, with
        # workers), one that draws lazily must not be started: so iter() here, next() later.
        self._latest = _Draws(self, iter(self._source), self._lookup, self._skip, self._seed)
        return self._latest

    def __len__(self) -> int:
        return len(self._source)  # type: ignore[arg-type]


class _Draws:
    """One pass's indices."""

    def __init__(
        self, order: _Order, source: Iterator[Any], lookup: memoryview | None, skip: int, seed: int | None
    ) -> None:
        self.drawn: deque[Any] = deque()
        self._order = order
        self._source = source
        self._lookup = lookup
        self._skip = skip
        self._seed = seed
        self._position = 0
        self._primed = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def prime(self) -> None:
        if self._primed:
            return
        self._primed = True
        if not self._order._as_it_goes:
            # Drawn whole: a sampler that draws from a global generator as it goes would otherwise see numbers
            # in between that depend on how far the workers run ahead.
            drawn = list(self._source)
            self._order.length = len(drawn)
            self._source = iter(drawn)
        for _ in range(self._skip):
            item: Any = next(self._source, _END)
            if item is _END:
                raise StateMismatchError(
                    f"loader: it has fewer batches than the {self._skip} handed out when this was saved"
                )
            self._position += len(item) if self._order._batched else 1

    def __next__(self) -> Any:
        self.prime()
        indices = next(self._source)
        if self._order._batched:
            indices = list(indices)
        if self._lookup is not None:
            indices = _looked_up(self._lookup, indices)
        self.drawn.append(indices)
        if self._seed is None:
            return indices
        batch = _SeededBatch(self._seed, self._position, indices)
        self._position += len(indices) if self._order._batched else 1
        return batch


def _looked_up(subset: memoryview, places: Any) -> Any:
    """The samples at these places of a subset: a list of them, or one where the loader does not batch."""
    try:
        if isinstance(places, list):
            return list(map(subset.__getitem__, places))
        return subset[operator.index(places)]
    except (IndexError, TypeError) as e:
        raise UnsupportedLoaderError(
            f"the sampler for the subset gave {places!r}: it must give integers from 0 to {len(subset) - 1}"
        ) from e


def _positions(handed: Any) -> npt.NDArray[np.int64] | None:
    if handed is None:
        return None
    several = isinstance(handed, list) or getattr(handed, "ndim", 0) == 1
    try:
        return np.fromiter(map(operator.index, handed if several else [handed]), np.int64)
    except (TypeError, OverflowError):  # a sampler may give anything that the data set takes
        return None


class _SeededDataset:
    """Stands where the data set stood, in a worker: seeds every generator before each sample."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or name.startswith("__"):  # not set yet, while being unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)  # a user's worker_init_fn may look at its data set

    def __getitem__(self, batch: _SeededBatch) -> Any:
        _seed_everything(batch.seed, batch.start)
        sample = self.dataset[batch.indices]
        _seed_everything(~batch.seed, batch.start)  # for what collates it
        return sample

    def __getitems__(self, batch: _SeededBatch) -> Any:
        if getattr(self.dataset, "__getitems__", None):
            _seed_everything(batch.seed, batch.start)
            samples = self.dataset.__getitems__(batch.indices)
        else:
            samples = []
            for position, index in enumerate(batch.indices, batch.start):
                _seed_everything(batch.seed, position)
                samples.append(self.dataset[index])
        _seed_everything(~batch.seed, batch.start)
        return samples


class _WorkerStart:
    """What a worker runs first. It holds nothing of the session."""

    def __init__(self, users: Callable[[int], None] | None, *, child: bool) -> None:
        self._users = users
        self._trainer = os.getpid()
        self._child = child  # of the trainer itself, not of a forkserver

    def __call__(self, worker: int) -> None:
        if self._child and os.getppid() != self._trainer:
            os._exit(
                0
            )  # the trainer died while this was being started; PyTorch's own watch would take 1 for its parent
        # Both may go to the whole process group; the trainer finishes its step and still needs its workers.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if sys.platform == "linux":
            threading.Thread(target=_obey_trainer, args=(self._trainer, os.getppid()), daemon=True).start()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        else:  # no way to tell who sends a SIGTERM
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _FOR_THE_TRAINER)
        if self._users is not None:
            self._users(worker)


def _worker_start(loader: DataLoader[Any]) -> _WorkerStart:
    return _WorkerStart(loader.worker_init_fn, child=_start_method(loader) != "forkserver")


_FOR_THE_TRAINER = {signal.SIGINT, signal.SIGTERM}


@contextmanager
def _signals_blocked(loader: DataLoader[Any]) -> Iterator[None]:
    """Workers that are started inside begin with these signals blocked: a spawned one takes seconds to get to `_WorkerStart`."""
    if loader.num_workers and _start_method(loader) != "fork":
        resource_tracker.ensure_running()  # or it is started inside, and unblocks them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_TRAINER)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _obey_trainer(trainer: int, parent: int) -> None:
    """End this worker on a SIGTERM, which is blocked in all its threads, from its trainer; leave any other to the trainer."""
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        if sender == trainer or os.getppid() != parent:
            os._exit(0)


def _start_method(loader: DataLoader[Any]) -> str:
    return (loader.multiprocessing_context or multiprocessing).get_start_method() or "fork"


def _seed_everything(seed: int, position: int) -> None:
    mixed = (seed + (position + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF  # splitmix64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    mixed ^= mixed >> 31
    random.seed(mixed)
    np.random.seed(mixed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(mixed)  # torch.manual_seed would visit every accelerator: 100 times slower


def _arguments(loader: DataLoader[Any]) -> dict[str, Any]:
    """What a loader was made with, besides the data and their order."""
    return {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": _worker_start(loader) if loader.num_workers else loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "generator": loader.generator,
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
        "pin_memory_device": loader.pin_memory_device,
        "in_order": loader.in_order,
    }


def _rebuild(loader: DataLoader[Any], *, seeded: bool) -> tuple[DataLoader[Any], _Order | None]:
    arguments = _arguments(loader)
    if _is_iterable_style(loader):
        shape: dict[str, Any] = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
        return DataLoader(loader.dataset, **shape, **arguments), None
    batched = loader.batch_sampler is not None
    order = _Order(batched=batched)
    place: dict[str, Any] = {"batch_sampler": order} if batched else {"sampler": order, "batch_size": None}
    dataset: Any = _SeededDataset(loader.dataset) if seeded else loader.dataset
    return DataLoader(dataset, **place, **arguments), order


def _obstacle_to_subsets(loader: Any) -> str | None:
    """What keeps a loader from being bound to a subset, and what to do about it."""
    name = type(loader).__name__
    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        return (
            f"a {name} keeps its position itself; use a torch.utils.data.DataLoader, or make this one from the subset"
        )
    if not isinstance(loader, DataLoader):
        return f"a {name} has no data set to choose from; use a torch.utils.data.DataLoader"
    if _is_iterable_style(loader):
        return f"its data set, a {type(loader.dataset).__name__}, is an IterableDataset, which has no indices; filter the samples there"
    return None


def _index_source(loader: Any) -> Any:
    return loader.batch_sampler if loader.batch_sampler is not None else loader.sampler


def _length(source: Any) -> int | None:
    try:
        return len(source)
    except TypeError:
        return None


def _is_iterable_style(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset)


def _samplers(loader: Any) -> list[Any]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    candidates = [getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    return list({id(c): c for c in candidates if c is not None}.values())


def _sampler_epoch(loader: Any) -> int | None:
    for sampler in _samplers(loader):
        if hasattr(sampler, "set_epoch") and isinstance(getattr(sampler, "epoch", None), int):
            return int(sampler.epoch)
    return None


def _places_of_generators(loader: Any) -> dict[str, Any]:
    if not isinstance(loader, DataLoader):
        return {"loader": loader}
    names = ("generator", "sampler", "batch_sampler", "dataset", "collate_fn")
    return {name: getattr(loader, name) for name in names}


def _refuse_custom_iteration(loader: DataLoader[Any]) -> None:
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise UnsupportedLoaderError(
            f"{type(loader).__name__} iterates in a way of its own, so its batches cannot be repeated: "
            "give it state_dict and load_state_dict, or pass a plain torch.utils.data.DataLoader"
        )
