"""The functions that the seed of this project named."""

import pytest
import torch
from torch import nn

from onthefly import merging


def models(count=2):
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(count)]


def test_stochastic_weight_averaging_is_the_mean():
    found = merging.stochastic_weight_averaging(models(3))
    wanted = sum(model[0].weight.double() for model in models(3)) / 3
    torch.testing.assert_close(found["0.weight"], wanted.float().detach())
    models()[0].load_state_dict(found)


def test_weighted_average():
    one, other = models()
    found = merging.weighted_average_merge([one, other.state_dict()], [1, 3])
    torch.testing.assert_close(found["0.bias"], (one[0].bias + 3 * other[0].bias).detach() / 4)


def test_a_fisher_soup_without_fishers_is_the_average_and_warns():
    with pytest.warns(UserWarning, match="no Fisher"):
        found = merging.fisher_soup_merge(models())
    wanted = merging.stochastic_weight_averaging(models())
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_fisher_soup():
    fishers = [{"0.weight": torch.full((4, 3), value)} for value in (1.0, 3.0)]
    found = merging.fisher_soup_merge(models(), fishers)
    one, other = models()
    torch.testing.assert_close(found["0.weight"], (one[0].weight + 3 * other[0].weight).detach() / 4)
    torch.testing.assert_close(found["0.bias"], (one[0].bias + other[0].bias).detach() / 2)


def test_adapters_are_fused_and_the_rest_is_the_first():
    states = [{"layer.weight": torch.full((2,), x), "layer.Adapter.down": torch.full((2,), x)} for x in (1.0, 3.0)]
    found = merging.adapter_fuse_merge(states)
    assert found["layer.weight"].tolist() == [1, 1]
    assert found["layer.Adapter.down"].tolist() == [2, 2]
