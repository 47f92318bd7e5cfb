"""Recalibrated batch norms are those of `update_bn`, and nothing else of the model has changed."""

import copy

import pytest
import torch
from merging_models import assert_same, cnn, data_for, in_batches, in_the_middle_of_training, mlp, trace_of
from torch import nn
from torch.optim.swa_utils import update_bn

from onthefly.errors import MissingPartError
from onthefly.merging.recalibrate import recalibrate

BUFFERS = [f"{layer}.{name}" for layer in (1, 4) for name in ("running_mean", "running_var", "num_batches_tracked")]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_it_is_what_update_bn_gives(momentum):
    model = cnn()
    model[1].momentum = momentum
    pairs = in_batches(*data_for(model), 7)
    expected = copy.deepcopy(model)
    update_bn(pairs, expected)
    assert recalibrate(model, pairs) == BUFFERS
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_nothing_else_is_changed():
    model = in_the_middle_of_training(cnn())
    model[1].eval()
    model.register_buffer("runs", torch.zeros(()))
    model.register_forward_pre_hook(lambda module, args: module.runs.add_(1) and None)
    before = trace_of(model)
    assert recalibrate(model, in_batches(*data_for(model))) == BUFFERS
    after = trace_of(model)
    for name in BUFFERS:
        assert not torch.equal(after["tensors"].pop(name), before["tensors"].pop(name)) or "tracked" in name
    assert_same(before, after)


def test_dropout_stays_off_so_that_the_result_is_the_same_each_time():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.9), nn.BatchNorm1d(5)).train()
    inputs, targets = data_for(mlp())
    recalibrate(model, [(inputs, targets)])
    torch.testing.assert_close(model[2].running_mean, model[0](inputs).mean(0).detach())
    assert model[1].training


def test_a_failure_leaves_everything_as_it_was():
    model = in_the_middle_of_training(cnn())
    before = trace_of(model)
    inputs, targets = data_for(model)
    with pytest.raises(RuntimeError):
        recalibrate(model, [(inputs, targets), (inputs[:, :, :2], targets)])
    assert_same(before, trace_of(model))
    with pytest.raises(MissingPartError, match="no batch"):
        recalibrate(model, [])
    assert_same(before, trace_of(model))


def test_a_number_of_batches_is_not_exceeded():
    model, other = cnn(), cnn()
    pairs = in_batches(*data_for(model))
    recalibrate(model, pairs, limit=2)
    recalibrate(other, pairs[:2])
    assert int(model[1].num_batches_tracked) == 2
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_without_statistics_nothing_is_loaded():
    def never():
        raise AssertionError("loaded")
        yield

    assert recalibrate(mlp(), never()) == []
    assert recalibrate(nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), nn.LayerNorm(6)), never()) == []


def test_a_batch_norm_that_does_not_run_keeps_its_statistics():
    model = nn.Sequential(nn.BatchNorm1d(6))
    model[0].idle = nn.BatchNorm1d(3)
    model[0].idle.running_mean.fill_(5)
    found = recalibrate(model, [data_for(mlp())])
    assert found == ["0.running_mean", "0.running_var", "0.num_batches_tracked"]
    assert torch.equal(model[0].idle.running_mean, torch.full((3,), 5.0))


def test_a_last_batch_of_one_sample_is_left_out():
    model = nn.Sequential(nn.BatchNorm1d(6))
    inputs, targets = data_for(mlp())
    recalibrate(model, in_batches(inputs, targets, 20))  # 20 and 1
    torch.testing.assert_close(model[0].running_mean, inputs[:20].mean(0))


def test_a_batch_norm_across_processes_waits_for_nobody(monkeypatch):
    def wait(module, inputs):
        raise AssertionError("waits for the other processes")

    monkeypatch.setattr(nn.SyncBatchNorm, "forward", wait)
    plain, model = cnn(), nn.SyncBatchNorm.convert_sync_batchnorm(cnn())
    pairs = in_batches(*data_for(plain))
    before = trace_of(model)["own"]
    assert recalibrate(model, pairs) == recalibrate(plain, pairs)
    assert trace_of(model)["own"] == before
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
