"""What a header tells of a checkpoint is what is in it."""

import json
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from onthefly.checkpoints.contents import contents, folded
from onthefly.checkpoints.format import write
from onthefly.checkpoints.header import Header, read_header
from onthefly.errors import CorruptCheckpointError
from onthefly.state.tree import flatten


def told(folder, value):
    write(folder / "x.safetensors", *flatten(value))
    found = contents(read_header(folder / "x.safetensors"), verified=False)
    return {part.name: part for part in found.parts}, found


def test_every_kind_of_value_has_its_place(tmp_path):
    shared = torch.zeros(4, 3)
    parts, found = told(
        tmp_path,
        {
            "tensors": {
                "plain": shared,
                "again": shared,
                "turned": torch.ones(2, 3).t(),
                "complex": torch.zeros(5, dtype=torch.complex64),
                "half": torch.zeros(2, dtype=torch.bfloat16),
                "array": np.zeros((2, 3), np.float64),
                "numbers": list(range(100)),
                "tuple": tuple(range(100)),
                "empty": torch.zeros(0, 7),
            },
            "values": {
                "none": None,
                "int": 2**70,
                "nan": float("-inf"),
                "text": "\ud800",
                "bytes": b"abc",
                "dtype": torch.float16,
                "device": torch.device("cpu"),
                "size": torch.Size([1, 2]),
                "scalar": np.float32(0.5),
                "complex": 1j,
                "list": [1, (2, 3), {4}],
                "mixed": [{"lr": 0.1}, {"lr": 0.2}],
                "dict": {1: {"$x": "y"}},
                "ordered": OrderedDict(a=1),
                "default": defaultdict(int, a=2),
                "counter": Counter("aab"),
            },
            "nothing": {},
            "counters": {"step": 3},
        },
    )
    tensors = {tensor.path: tensor for tensor in parts["tensors"].tensors}
    assert {path: (tensor.dtype, tensor.shape, tensor.size) for path, tensor in tensors.items()} == {
        "plain": ("float32", (4, 3), 48),
        "again": ("float32", (4, 3), 0),
        "turned": ("float32", (3, 2), 24),
        "complex": ("complex64", (5,), 40),
        "half": ("bfloat16", (2,), 4),
        "array": ("array <f8", (2, 3), 48),
        "numbers": ("int64", (100,), 800),
        "tuple": ("int64", (100,), 800),
        "empty": ("float32", (0, 7), 0),
    }
    assert tensors["again"].tied_to == "tensors/plain"
    assert parts["tensors"].numbers == 12 + 6 + 5 + 2 + 6 + 200
    assert parts["values"].values == {
        "none": None,
        "int": 2**70,
        "nan": float("-inf"),
        "text": "�" * 3,
        "bytes": "3 bytes",
        "dtype": "float16",
        "device": "cpu",
        "size": [1, 2],
        "scalar": 0.5,
        "complex": "1j",
        "list": [1, [2, 3], [4]],
        "mixed/0/lr": 0.1,
        "mixed/1/lr": 0.2,
        "dict/1/$x": "y",
        "ordered/a": 1,
        "default/a": 2,
        "counter/a": 2,
        "counter/b": 1,
    }
    assert found.counters == {"step": 3}
    assert set(parts) == {"tensors", "values"}


def test_tensors_of_layers_are_folded(tmp_path):
    names = ["emb", *(f"layers.{n}.{kind}" for n in range(12) for kind in ("weight", "bias")), "v2.weight"]
    parts, _ = told(tmp_path, {"model": {name: torch.zeros(len(name), 2) for name in names}})
    folds = folded(parts["model"].tensors)
    assert [(fold.path, len(fold.tensors), fold.shape) for fold in folds] == [
        ("emb", 1, (3, 2)),
        ("layers.*.weight", 12, None),  # "layers.10.weight" is longer
        ("layers.*.bias", 12, None),
        ("v2.weight", 1, (9, 2)),
    ]


DEEP = json.loads("[" * 700 + "]" * 700)


@pytest.mark.parametrize(
    "tree",
    [
        [],
        3,
        {"x": {"$tensor": "gone"}},
        {"x": {"$tensor": []}},
        {"x": {"$what": 1}},
        {"x": {"$int": "zz"}},
        {"x": {"$float": "00"}},
        {"x": {"$npscalar": []}},
        {"x": {"$dict": [1]}},
        {"x": {"$dict": 1}},
        {"x": {"$dict": [[{"a": 1}, 2]]}},
        {"x": DEEP},
    ],
)
def test_a_tree_that_no_checkpoint_has_is_a_typed_error(tree):
    with pytest.raises(CorruptCheckpointError, match="odd"):
        contents(Header(Path("odd"), 1, "0" * 64, tree, ()), verified=False)
