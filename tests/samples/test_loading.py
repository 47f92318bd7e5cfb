"""Batches by index: what every pass over a data set works on."""

import multiprocessing
from collections import namedtuple
from contextlib import closing

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from onthefly.errors import InvalidCommandError, MissingPartError
from onthefly.samples.loading import batches, narrow, pairs

CPU = torch.device("cpu")


def loader(**arguments):
    return DataLoader(TensorDataset(torch.arange(11), torch.arange(11) * 2), batch_size=4, **arguments)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_the_samples_in_the_order_of_their_indices(workers):
    whole = [inputs.tolist() for inputs, _ in batches(loader(shuffle=True, num_workers=workers))]
    assert whole == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    some = [inputs.tolist() for inputs, _ in batches(loader(drop_last=True, num_workers=workers), [9, 1, 5, 0, 2])]
    assert some == [[9, 1, 5, 0], [2]]


def test_workers_end_when_it_is_closed():
    with closing(batches(loader(num_workers=2))) as given:
        next(given)
        assert multiprocessing.active_children()
    assert not multiprocessing.active_children()


def test_pairs_are_the_first_samples():
    found = list(pairs(batches(loader()), 6, CPU))
    assert [(count, inputs.tolist(), targets.tolist()) for count, inputs, targets in found] == [
        (4, [0, 1, 2, 3], [0, 2, 4, 6]),
        (2, [4, 5], [8, 10]),
    ]
    assert sum(count for count, _, _ in pairs(batches(loader()), 100, CPU)) == 11


def test_what_is_no_pairs_is_refused():
    with pytest.raises(MissingPartError, match="pairs"):
        list(pairs([torch.zeros(3)], 2, CPU))
    with pytest.raises(MissingPartError, match="no batch"):
        list(pairs([], 2, CPU))
    with pytest.raises(InvalidCommandError, match="1 or more"):
        list(pairs([], 0, CPU))


def test_nested_batches_are_narrowed_inside():
    Point = namedtuple("Point", "x y")
    batch = {"a": torch.arange(5), "b": [torch.arange(10).view(5, 2)], "c": Point(torch.arange(5), torch.ones(5))}
    found = narrow(batch, 1, 3)
    assert found["a"].tolist() == [1, 2]
    assert found["b"][0].shape == (2, 2)
    assert isinstance(found["c"], Point)
    for other in ("text", torch.tensor(1), 3, [None]):
        with pytest.raises(InvalidCommandError, match="told apart"):
            narrow(other, 0, 1)
