"""Loading samples by their index, as batches: what every pass over a data set works on.

What is drawn while a sample is loaded depends on its index alone: not on the number of loader workers, not on the samples
beside it, and not on what the training drew before. (A private generator that a data set holds is out of reach, as it is
in training. A data set that loads several at once, by ``__getitems__``, draws for all of them from the index of the first.)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from onthefly.errors import InvalidCommandError, MissingPartError, UnsupportedLoaderError
from onthefly.state.loader import _arguments, _seed_everything, _signals_blocked
from onthefly.state.subsets import Indices, checked

SEED = 0x5CA9
"""What every pass seeds with."""

_BATCH = 256  # where the loader does not say


def batches(loader: Any, indices: Indices | None = None) -> Generator[Any, None, None]:
    """Every sample of a loader's data set once, or those at some indices in their order, as batches.

    Of the loader, the data set, the workers, the collate function and the batch size are used, never the sampler. It moves
    the process-wide random state. Its workers end with it: close it when not all of it is taken. Raises `UnsupportedLoaderError` for a loader whose samples have no index, and
    `InvalidCommandError` for indices that are not of its data set, or given twice.
    """
    source = Source.of(loader, indices)
    return (batch for _, batch in each_batch(loader, source))


def pairs(batches: Iterable[Any], samples: int, device: torch.device) -> Iterator[tuple[int, Any, Any]]:
    """The first so many samples of some batches, on a device: (samples in it, inputs, targets) for each batch.

    Raises `MissingPartError` for batches that are not pairs, and for no batch at all.
    """
    if samples < 1:
        raise InvalidCommandError(f"samples must be 1 or more, not {samples}")
    left = samples
    for batch in batches:
        inputs, targets = moved(pair(batch), device)
        count = samples_in(targets)
        if count > left:
            inputs, targets, count = narrow(inputs, 0, left), narrow(targets, 0, left), left
        if count:
            yield count, inputs, targets
        left -= count
        if not left:
            return
    if left == samples:
        raise MissingPartError("there was no batch, so there is nothing to compute from")


def samples_in(value: Any) -> int:
    """Samples in a batch: the length of the first tensor in it."""
    if isinstance(value, torch.Tensor):
        return len(value) if value.dim() else 1
    items = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(items, list | tuple) and items and isinstance(items[0], torch.Tensor | Mapping | list | tuple):
        return samples_in(items[0])
    return len(items) if hasattr(items, "__len__") else 1


def narrow(value: Any, start: int, stop: int) -> Any:
    """Some samples of a batch of tensors, and lists, tuples and dicts of them. Raises `InvalidCommandError` for others."""
    if isinstance(value, torch.Tensor) and value.dim():
        return value[start:stop]
    if isinstance(value, dict):
        return {key: narrow(item, start, stop) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(narrow(item, start, stop) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(narrow(item, start, stop) for item in value)
    raise InvalidCommandError(
        f"a batch holds a {type(value).__name__}, which cannot be told apart into samples: use batches of tensors, or of "
        "lists, tuples and dicts of them, whose first dimension is the samples"
    )


def device_of(model: nn.Module) -> torch.device:
    """Where a model's inputs go: the device of its first parameter."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@dataclass(frozen=True)
class Source:
    """What a pass takes of a loader to make batches of its own."""

    dataset: Any
    indices: torch.Tensor | None  # of the samples, in order; None for all
    length: int  # samples
    size: int  # of a batch
    collate: Callable[[Any], Any]
    bulk: bool  # the data set takes a list of indices

    @classmethod
    def of(cls, loader: Any, indices: Indices | None = None) -> Source:
        instead = "pass a torch.utils.data.DataLoader over a data set with __getitem__ and __len__"
        if not isinstance(loader, DataLoader):
            raise UnsupportedLoaderError(
                f"a scan needs samples with an index, and a {type(loader).__name__} tells none: {instead}"
            )
        dataset: Any = loader.dataset
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise UnsupportedLoaderError(
                f"a scan needs samples with an index, and those of a {type(dataset).__name__} have none: {instead}"
            )
        if len(dataset) == 0:
            raise MissingPartError("the data set is empty, so there is nothing to scan")
        chosen = None if indices is None else checked(indices, len(dataset))
        length = len(dataset) if chosen is None else len(chosen)
        sampler = loader.batch_sampler
        if sampler is not None:
            size = loader.batch_size or (sampler.batch_size if type(sampler) is BatchSampler else _BATCH)
            return cls(dataset, chosen, length, size, loader.collate_fn, bulk=False)
        if isinstance(loader.sampler, BatchSampler):
            return cls(dataset, chosen, length, loader.sampler.batch_size, loader.collate_fn, bulk=True)
        raise UnsupportedLoaderError(
            "a scan needs batches, and this loader hands out samples one by one (batch_size=None): give it a batch_size"
        )


class _Batches:
    """Stands where the data set stood: its items are batches, collated, in the order of the indices.

    Seeding costs more than many a sample. So a batch is first loaded without; if that drew any random number, it is
    loaded once more with every sample seeded by its index, and so are all that follow. Either way each sample is what
    it is when seeded.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._draws: _Draws | None = None  # in the process that loads
        self._seeded = False

    def __len__(self) -> int:
        return -(-self._source.length // self._source.size)

    def __getitem__(self, number: int) -> Any:
        source = self._source
        places = range(number * source.size, min(source.length, (number + 1) * source.size))
        chosen = source.indices
        indices = list(places) if chosen is None else chosen[places.start : places.stop].tolist()
        if not self._seeded:
            if self._draws is None:
                self._draws = _Draws()
            self._draws.begin()
            batch = source.collate(self._load(indices))
            if not self._draws.any():
                return batch
            self._seeded = True
        return source.collate(self._load(indices, seeded=True))

    def _load(self, indices: list[int], *, seeded: bool = False) -> Any:
        dataset = self._source.dataset
        several = dataset.__getitem__ if self._source.bulk else getattr(dataset, "__getitems__", None)
        if several is not None:
            if seeded:
                _seed_everything(SEED, indices[0])
            return several(indices)
        if not seeded:
            return [dataset[index] for index in indices]  # a third faster than `map` for a __getitem__ in Python
        samples = []
        for index in indices:
            _seed_everything(SEED, index)
            samples.append(dataset[index])
        return samples

    # A user's worker_init_fn looks at its data set, and opens files there.

    def __getattr__(self, name: str) -> Any:
        if name in _OWN or name.startswith("__"):  # not set yet, while being unpickled
            raise AttributeError(name)
        return getattr(self._source.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self._source.dataset, name, value)


_OWN = ("_source", "_draws", "_seeded")


class _Draws:
    """Tells whether anybody draws from the process-wide generators, for a few microseconds.

    To compare their whole states would take ten times as long. So each draws a number, which tells where it is: those of
    Python and NumPy in step with twins that nobody else has, as seeding them takes as long again.
    """

    def __init__(self) -> None:
        self._python = random.Random(SEED)
        self._numpy = np.random.RandomState(SEED)
        self._number = torch.empty((), dtype=torch.int64)
        self._torch = self._number.random_(generator=torch.Generator().manual_seed(SEED)).item()

    def begin(self) -> None:
        torch.default_generator.manual_seed(SEED)
        if not self._in_step():
            random.seed(SEED)
            np.random.seed(SEED)
            self._python.seed(SEED)
            self._numpy.seed(SEED)

    def any(self) -> bool:
        return not self._in_step() or self._number.random_().item() != self._torch

    def _in_step(self) -> bool:
        python, numpy = random.getrandbits(64), np.random.random_sample()
        return python == self._python.getrandbits(64) and numpy == self._numpy.random_sample()


def each_batch(loader: DataLoader[Any], source: Source) -> Generator[tuple[int, Any], None, None]:
    """Every batch, with how many samples are done with it. Its workers end with it."""
    batches = _Batches(source)
    if loader.num_workers or loader.pin_memory:
        iterator = iterate(loader, batches)
    else:  # a DataLoader would only add its own time, a twentieth of a small model's
        iterator = (batches[number] for number in range(len(batches)))
    try:
        for number, batch in enumerate(iterator, 1):
            yield min(number * source.size, source.length), batch
    finally:
        if loader.num_workers:  # an exception that somebody keeps would keep them alive, too
            iterator._shutdown_workers()


def iterate(loader: DataLoader[Any], items: Any, **instead: Any) -> Any:
    """The iterator of a loader like the user's, but for what is given `instead`, over items that are handed out as they are."""
    arguments = {
        **_arguments(loader),
        "collate_fn": _as_it_is,
        "generator": torch.Generator().manual_seed(SEED),  # the user's stays where it is
        "persistent_workers": False,
        "in_order": True,
        **instead,
    }
    own: DataLoader[Any] = DataLoader(items, batch_size=None, **arguments)
    with _signals_blocked(own):
        return iter(own)


def _as_it_is(batch: Any) -> Any:
    return batch


def pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise MissingPartError(
            f"a scan needs batches that are (inputs, targets) pairs; this loader gives a {type(batch).__name__}"
        )
    return batch[0], batch[1]


def moved(value: Any, device: torch.device) -> Any:
    """Tensors, and lists, tuples and mappings of them, on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if hasattr(value, "to"):  # a batch of a library's own
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(item, device) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(moved(item, device) for item in value)
    return value
