"""What is measured of a parent stands in a file, and only a file of the very same thing is taken instead."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from onthefly.merging.bench import Bench
from onthefly.merging.measured import measured
from onthefly.samples.scan import per_sample_loss


def bench_for(loss, autocast=nullcontext):
    draw = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(20, 3, generator=draw), torch.arange(20) % 2)
    return Bench(
        model=nn.Linear(3, 2),
        data=None,
        train=DataLoader(data, 4),
        losses=per_sample_loss(loss),
        autocast=autocast,
        look_up=lambda: None,
        whole="val",
        named={},
        subsets={},
        recalibrate=0,
    )


def statistics(folder, loss, kind="fisher-empirical", samples=8, **more):
    draw = torch.Generator().manual_seed(1)
    tensors = {"weight": torch.randn(2, 3, generator=draw), "bias": torch.randn(2, generator=draw)}
    given = {"of": "ab" * 32, "part": "model", "among": None, "samples": samples, "loss": loss}
    return measured(folder, bench_for(loss, **more), tensors, kind=kind, **given)


def test_the_same_is_measured_once_and_what_is_damaged_again(tmp_path):
    loss = nn.CrossEntropyLoss()
    first = statistics(tmp_path, loss)
    changed = first.path.stat().st_mtime_ns
    assert statistics(tmp_path, nn.CrossEntropyLoss()).hash == first.hash
    assert first.path.stat().st_mtime_ns == changed
    data = bytearray(first.path.read_bytes())
    data[-1] ^= 1
    first.path.write_bytes(data)
    assert statistics(tmp_path, loss).hash == first.hash


@pytest.mark.parametrize(
    "other",
    [
        {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)},
        {"loss": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))},
        {"loss": nn.functional.cross_entropy},
        {"kind": "fisher-true"},
        {"kind": "grams"},
        {"samples": 9},
        {"autocast": lambda: torch.autocast("cpu", torch.bfloat16)},
    ],
    ids=["smoothing", "class weights", "function", "true", "grams", "samples", "precision"],
)
def test_anything_else_is_measured_for_itself(tmp_path, other):
    first = statistics(tmp_path, nn.CrossEntropyLoss())
    second = statistics(tmp_path, **{"loss": nn.CrossEntropyLoss(), **other})
    assert first.path != second.path
    assert len(list(tmp_path.iterdir())) == 2
