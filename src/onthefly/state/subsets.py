"""Subsets: which samples of a data set are active, and a loader's sampler rebuilt for only these.

PyTorch's samplers know a data set by its length, or by one weight or index for each sample. So a sampler for a subset is
the same kind of sampler for a data set of that length: it gives positions in the subset, from 0, and whoever iterates
it looks up which sample each of them is. The data set itself stays as it is, and so do workers that hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from onthefly.errors import InvalidCommandError, UnsupportedLoaderError
from onthefly.state import rng

Indices = Sequence[int] | np.ndarray[Any, Any] | torch.Tensor


def checked(indices: Indices, length: int) -> torch.Tensor:
    """Indices of samples of a data set with so many, in the order given, as an int64 tensor that shares no memory.

    Raises `InvalidCommandError` unless they are integers in one dimension, each from 0 to length - 1, none twice, and
    at least one.
    """
    array = _as_array(indices)
    if array.ndim != 1:
        raise InvalidCommandError(f"the indices of a subset are one flat list, not {_dimensions(array)}")
    if not array.size:
        raise InvalidCommandError("the subset is empty: give the index of at least one sample, or None for all samples")
    if array.dtype.kind == "b":
        raise InvalidCommandError("the subset is a mask of booleans: give indices, such as numpy.flatnonzero(mask)")
    if array.dtype.kind not in "iu":
        raise InvalidCommandError(
            f"the indices of a subset are integers of 64 bits, not {_kind_of(array)}: convert them first"
        )
    wrong = array[(array < 0) | (array >= length)]
    if wrong.size:
        raise InvalidCommandError(
            f"the data set has {length} samples, from 0 to {length - 1}: there is none at {_some(wrong)}"
        )
    values, counts = np.unique(array, return_counts=True)
    if values.size < array.size:
        raise InvalidCommandError(
            f"a sample can be in a subset only once; more than once given: {_some(values[counts > 1])}"
        )
    return torch.from_numpy(array.astype(np.int64))  # astype copies


def sampler_for(sampler: Any, subset: torch.Tensor) -> Any:
    """The same kind of sampler or batch sampler, for a data set of only the samples at these indices.

    It shares the generator of the one it is made from, and is in the same epoch. PyTorch's own are known by their exact
    type. Any other must have a method ``subset(indices)``: given the indices as a list of ints, it returns the same kind
    for a data set that has only these samples, in this order (so that what it gives is from 0 to len(indices) - 1), with
    the same generators.

    Raises `UnsupportedLoaderError` for one that has not, and `InvalidCommandError` when it could give no sample.
    """
    rebuild: Callable[[Any, torch.Tensor], Any] = _REBUILDERS.get(type(sampler), _by_its_own_method)
    rebuilt = rebuild(sampler, subset)
    epoch = getattr(sampler, "epoch", None)
    if hasattr(rebuilt, "set_epoch") and isinstance(epoch, int):
        rebuilt.set_epoch(epoch)
    return rebuilt


def _sequential(sampler: SequentialSampler, subset: torch.Tensor) -> SequentialSampler:
    _check_known(sampler, subset, len(sampler.data_source))
    return SequentialSampler(range(len(subset)))


def _random(sampler: RandomSampler, subset: torch.Tensor) -> RandomSampler:
    _check_known(sampler, subset, len(sampler.data_source))
    number = sampler._num_samples  # None: as many as there are
    return RandomSampler(range(len(subset)), sampler.replacement, number, generator=sampler.generator)


def _weighted(sampler: WeightedRandomSampler, subset: torch.Tensor) -> WeightedRandomSampler:
    known = len(sampler.weights)
    _check_known(sampler, subset, known)
    weights = sampler.weights[subset]
    if not weights.sum() > 0:
        raise InvalidCommandError(
            "the loader draws by weight, and the weights of all these samples are 0: choose others"
        )
    number = len(subset) if sampler.num_samples == known else sampler.num_samples
    if not sampler.replacement:
        number = min(number, len(subset))
    return WeightedRandomSampler(weights, number, sampler.replacement, generator=sampler.generator)  # type: ignore[arg-type]


def _subset_random(sampler: SubsetRandomSampler, subset: torch.Tensor) -> SubsetRandomSampler:
    given = _as_array(sampler.indices)
    if given.dtype.kind not in "iu":
        raise UnsupportedLoaderError("the loader's SubsetRandomSampler holds other things than integers")
    ranked, places = torch.sort(subset)
    indices = torch.from_numpy(given.astype(np.int64))
    found = torch.searchsorted(ranked, indices).clamp_(max=len(subset) - 1)
    own = places[found[ranked[found] == indices]].tolist()
    if not own:
        raise InvalidCommandError(
            "the loader's SubsetRandomSampler holds none of these samples: choose among its indices"
        )
    return SubsetRandomSampler(own, generator=sampler.generator)


def _distributed(sampler: DistributedSampler[Any], subset: torch.Tensor) -> DistributedSampler[Any]:
    _check_known(sampler, subset, len(sampler.dataset))  # type: ignore[arg-type]
    return DistributedSampler(
        range(len(subset)),  # type: ignore[arg-type]
        num_replicas=sampler.num_replicas,
        rank=sampler.rank,
        shuffle=sampler.shuffle,
        seed=sampler.seed,
        drop_last=sampler.drop_last,
    )


def _batches(sampler: BatchSampler, subset: torch.Tensor) -> BatchSampler:
    return BatchSampler(sampler_for(sampler.sampler, subset), sampler.batch_size, sampler.drop_last)


_REBUILDERS: Mapping[type, Callable[[Any, torch.Tensor], Any]] = {
    SequentialSampler: _sequential,
    RandomSampler: _random,
    WeightedRandomSampler: _weighted,
    SubsetRandomSampler: _subset_random,
    DistributedSampler: _distributed,
    BatchSampler: _batches,
}


def _by_its_own_method(sampler: Any, subset: torch.Tensor) -> Iterable[Any]:
    name = type(sampler).__name__
    method = getattr(sampler, "subset", None)
    if not callable(method):
        raise UnsupportedLoaderError(
            f"{name} is not a sampler of PyTorch's own, so it cannot be made anew for a subset: give it a method "
            "subset(indices) that returns the same kind of sampler for a data set of only these samples"
        )
    rebuilt: Any = method(subset.tolist())
    if not hasattr(rebuilt, "__iter__"):
        raise UnsupportedLoaderError(f"{name}.subset gave a {type(rebuilt).__name__}, which cannot be iterated")
    # Only the generators that were found in the loader are part of its state.
    known = {id(generator) for generator in rng.find_generators({"": sampler}).values()}
    for path, generator in rng.find_generators({name: rebuilt}).items():
        if id(generator) not in known:
            raise UnsupportedLoaderError(
                f"{name}.subset made a new random generator, at {path}, which no checkpoint would hold: "
                f"hand on the one that the {name} has"
            )
    return rebuilt  # type: ignore[no-any-return]


def _check_known(sampler: Any, subset: torch.Tensor, known: int) -> None:
    if (last := int(subset.max())) >= known:
        raise InvalidCommandError(
            f"the loader's {type(sampler).__name__} is made for {known} samples: it never gives the one at {last}"
        )


def _as_array(indices: Any) -> np.ndarray[Any, Any]:
    if isinstance(indices, torch.Tensor):
        if indices.dtype.is_floating_point or indices.dtype.is_complex:
            raise InvalidCommandError(f"the indices of a subset are integers, not {indices.dtype}: convert them first")
        return indices.detach().cpu().numpy()
    try:
        return np.asarray(indices)
    except ValueError as e:  # a ragged list
        raise InvalidCommandError(f"the indices of a subset are one flat list of integers: {e}") from e


def _dimensions(array: np.ndarray[Any, Any]) -> str:
    return f"{array.ndim} dimensions" if array.ndim else f"one {type(array.item()).__name__}"


def _kind_of(array: np.ndarray[Any, Any]) -> str:
    return type(array[0]).__name__ if array.dtype.kind == "O" else str(array.dtype)


def _some(indices: np.ndarray[Any, Any]) -> str:
    shown = ", ".join(map(str, indices[:3].tolist()))
    return f"{shown} and {indices.size - 3} more" if indices.size > 3 else shown
