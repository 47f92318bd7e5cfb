"""Merges into a file without a name."""

import os
import subprocess
import sys

import pytest
import torch

from onthefly.errors import InvalidCommandError
from onthefly.merging.in_memory import merge_state_dicts
from onthefly.merging.parents import held_parent
from onthefly.merging.streaming import merge_mapped


def models(count, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        weight = torch.randn(70, 50, generator=draw).to(dtype)
        found.append({"a": weight, "tied": weight, "b": torch.randn(3, generator=draw), "n": torch.tensor(3)})
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_it_gives_the_bits_of_a_merge_in_memory_and_leaves_no_file(tmp_path, dtype):
    parents = models(3, dtype)
    told = merge_mapped([held_parent(p, str(i)) for i, p in enumerate(parents)], "swa", folder=tmp_path)
    expected = merge_state_dicts(parents, "swa")
    assert list(told.tensors) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(told.tensors[name], tensor), name
    assert told.tensors["a"].data_ptr() == told.tensors["tied"].data_ptr()
    assert os.listdir(tmp_path) == []


def test_what_is_wrong_leaves_no_file(tmp_path):
    parents = models(2)
    parents[1]["b"][0] = torch.nan
    with pytest.raises(InvalidCommandError, match="b has numbers"):
        merge_mapped([held_parent(p, str(i)) for i, p in enumerate(parents)], "swa", folder=tmp_path)
    assert os.listdir(tmp_path) == []


def test_it_needs_no_safetensors_library(tmp_path):
    program = (
        "import sys; sys.modules['safetensors'] = None\n"
        "import torch\n"
        "from pathlib import Path\n"
        "from onthefly.merging.parents import held_parent\n"
        "from onthefly.merging.streaming import merge_mapped\n"
        "parents = [held_parent({'a': torch.full((2,), float(i))}, str(i)) for i in range(2)]\n"
        f"print(merge_mapped(parents, 'swa', folder=Path({str(tmp_path)!r})).tensors['a'].tolist())\n"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[0.5, 0.5]"
