"""docs/format.md is enough to read a checkpoint with: its reader, which knows nothing of us, and every fact that it states."""

import ast
import json
import math
import random
import re
import struct
import sys
import types
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors import safe_open
from torch import nn

import onthefly
from onthefly.checkpoints import header, save_checkpoint
from onthefly.checkpoints.format import open_checkpoint
from onthefly.checkpoints.sidecar import path_of
from onthefly.state import tree
from onthefly.state.train_state import TrainState
from onthefly.state.tree import flatten, unflatten

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
(SOURCE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
ROWS = re.findall(r"^\| `(\{.*?\})` \|[^|]*\| `(.*)` \|$", PAGE, re.MULTILINE)
"""The table of tags: JSON, and the value in Python."""


@pytest.fixture(scope="module")
def stranger():
    module = types.ModuleType("stranger")
    exec(compile(SOURCE, "docs/format.md", "exec"), vars(module))
    return module


class Net(nn.Module):
    """Mixed dtypes, tied weights, one that is not contiguous, and a buffer that no state_dict has."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.out = nn.Linear(4, 5, bias=False)
        self.out.weight = self.embed.weight
        self.small = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.turned = nn.Parameter(torch.randn(3, 4).t())
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("scale", torch.tensor([0.1, -2.5], dtype=torch.float64))
        self.register_buffer("cache", torch.arange(3), persistent=False)

    def forward(self, numbers):
        hidden = self.norm(self.embed(numbers)) + self.small(self.embed(numbers).bfloat16()).float()
        return self.out(hidden).sum() + (hidden @ self.turned).square().mean()


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """(path, live objects, all tensors in them as they were saved) of a training of a few steps."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randint(5, (6,))).backward()
        optimizer.step()
        scheduler.step()
    live = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "order": random.Random(4),
        "step": 3,
        "loss": 0.25,
    }
    path = tmp_path_factory.mktemp("training") / "baseline-step00000003.safetensors"
    save_checkpoint(path, live)
    return path, live, flatten(TrainState.of(live).capture())[1]  # the random state will be another soon


# -- the reader ------------------------------------------------------------------------------------------------


def test_the_reader_is_short_and_needs_no_more_than_the_standard_library_and_blake3():
    assert len(SOURCE.splitlines()) <= 60
    imported = {
        n.names[0].name if isinstance(n, ast.Import) else n.module
        for n in ast.walk(ast.parse(SOURCE))
        if isinstance(n, ast.Import | ast.ImportFrom)
    }
    assert imported <= {*sys.stdlib_module_names, "blake3"}


def test_a_stranger_reads_what_the_live_objects_hold(stranger, training):
    path, _, tensors = training
    state, found = stranger.read(path)
    assert found.keys() == tensors.keys()
    for name, (dtype, shape, numbers) in found.items():
        tensor = tensors[name]
        assert (dtype, shape) == (CODES[tensor.dtype], list(tensor.shape)), name
        assert numbers == tensor.flatten().tolist(), name
        assert {type(number) for number in numbers} <= {type(tensor.flatten()[0].item())}
    assert {dtype for dtype, _, _ in found.values()} == {"F64", "I64", "F32", "BF16", "U8", "BOOL"}
    assert state["counters"] == {"step": 3, "epoch": 0} | {"loss": 0.25} or state["counters"] == {
        "step": 3,
        "loss": 0.25,
    }


CODES = {torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip


def test_a_stranger_finds_each_weight_by_its_own_name(stranger, training):
    path, live, _ = training
    state, found = stranger.read(path)
    weights = live["model"].state_dict()
    assert list(state["model"]) == list(weights)
    for name, tag in state["model"].items():
        _, shape, numbers = found[tag["$tensor"]]
        assert shape == ([math.prod(tag["shape"])] if "stride" in tag else list(weights[name].shape))
        stored = torch.tensor(numbers, dtype=weights[name].dtype).view(shape)
        if "stride" in tag:
            stored = stored.as_strided(tag["shape"], tag["stride"])
        assert torch.equal(stored, weights[name]), name
    assert "stride" in state["model"]["turned"]
    assert state["model"]["out.weight"] == state["model"]["embed.weight"] == {"$tensor": "model/embed.weight"}
    assert state["buffers"]["model"] == {"cache": {"$tensor": "buffers/model/cache"}}
    moments = dict(state["optimizer"]["state"]["$dict"])
    for number, parameter in enumerate(live["optimizer"].param_groups[0]["params"]):
        _, _, numbers = found[moments[number]["exp_avg"]["$tensor"]]
        assert sorted(numbers) == sorted(live["optimizer"].state[parameter]["exp_avg"].flatten().tolist())


@pytest.mark.parametrize("place", [3, 40, 120, 8000, -1])
def test_a_stranger_refuses_a_file_that_was_altered(stranger, training, tmp_path, place):
    data = bytearray(training[0].read_bytes())
    data[place] ^= 1
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ValueError, match=r"."):
        stranger.read(tmp_path / "a")


def test_the_stock_library_reads_each_tensor_by_name(training):
    path, _, tensors = training
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == tensors.keys()
        for name, tensor in tensors.items():
            stored = file.get_tensor(name)
            assert (stored.dtype, stored.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(stored, tensor), name


# -- the page --------------------------------------------------------------------------------------------------


def test_the_page_names_every_tag_and_no_other():
    in_code = set(re.findall(r'"(\$[a-z]+)"', Path(tree.__file__).read_text()))
    assert {tag for example, _ in ROWS for tag in json.loads(example) if tag.startswith("$")} == in_code
    assert set(re.findall(r'"(\$[a-z]{2,})"', PAGE)) == in_code


@pytest.mark.parametrize(("example", "value"), ROWS)
def test_an_example_of_a_tag_is_what_its_value_becomes_and_comes_back_from(example, value):
    names = {"torch": torch, "np": np, "Counter": Counter, "OrderedDict": OrderedDict, "defaultdict": defaultdict}
    value = eval(value, names)
    flat, tensors = flatten({"w": value})
    assert json.dumps(flat["w"], separators=(",", ":")) == example
    back = unflatten({"w": json.loads(example)}, tensors)["w"]
    assert type(back) is type(value)
    assert repr(back) == repr(value)


def test_the_page_shows_where_the_bytes_are(training):
    raw = training[0].read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length]
    assert raw[8:35] == b'{"__metadata__":{"blake3":"'
    assert raw[99:114] == b'","onthefly":"{'
    assert blake3(raw[:35] + b"0" * 64 + raw[99:]).hexdigest().encode() == raw[35:99]
    assert (8 + length) % 4096 == 0
    assert text.isascii()
    assert text.rstrip(b" ").endswith(b"}}")
    entries = json.loads(text)
    assert json.dumps(entries, separators=(",", ":")).encode() == text.rstrip(b" ")
    assert list(entries.pop("__metadata__")) == ["blake3", "onthefly"]
    assert all(list(info) == ["dtype", "shape", "data_offsets"] for info in entries.values())
    sizes = {code: struct.calcsize(letter) for code, letter in (("F64", "d"), ("I64", "q"), ("F32", "f"), ("BF16", "H"), ("U8", "B"), ("BOOL", "?"))}  # fmt: skip
    assert list(entries) == sorted(entries, key=lambda name: (-sizes[entries[name]["dtype"]], name))


def test_the_page_has_the_limits_and_the_dtypes_that_the_code_has():
    table = PAGE[PAGE.index("| dtype |") : PAGE.index("**The hash**")]
    rows = re.findall(r"^\| ((?:`\w+` ?)+)\| (\d) \|", table, re.MULTILINE)
    assert {code: int(size) for codes, size in rows for code in re.findall(r"\w+", codes)} == header.ITEM_SIZES
    assert f"{header.MAX_HEADER:,}" in PAGE
    assert f"a multiple of {header.ALIGNMENT}" in PAGE
    assert f"nests values {tree.MAX_DEPTH} deep" in PAGE
    assert f"Format {header.FORMAT_VERSION}." in PAGE
    assert f"a list of {tree._LONG_LIST} integers or more" in PAGE
    factories = re.findall(r"`(\w+)`", PAGE[PAGE.index("factory: `none`") :].split("|")[0])
    assert factories == list(tree._DEFAULT_FACTORIES)


def test_the_page_names_what_lies_in_a_train_state_and_in_a_sidecar(training, tmp_path):
    path, live, _ = training
    table = PAGE[PAGE.index("| entry |") : PAGE.index("A session adds")]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    state = open_checkpoint(path).tree
    assert state.keys() - {"order"} == named - {"scaler", "grads"}
    assert state["optimizer"].keys() == {"state", "param_groups", "class", "parameters"}
    assert state["modes"]["model"].keys() == {"frozen", "eval"}
    assert state["owners"]["optimizer"] == [f"model/{name}" for name, _ in live["model"].named_parameters()]
    assert state["rng"].keys() >= {"python", "numpy", "torch"}
    sidecar = PAGE[PAGE.index("`<file>.meta.json`") : PAGE.index("It is a note")]
    assert list(json.loads(path_of(path).read_bytes())) == re.findall(r"`(\w+)`", sidecar)

    model = nn.Linear(2, 2)
    config = onthefly.SessionConfig(store=tmp_path, handle_signals=False)
    loader = [torch.ones(1, 2)]
    with onthefly.attach(model, torch.optim.SGD(model.parameters()), train_loader=loader, config=config) as session:
        for _ in session.epochs(1):
            for batch in session:
                model(batch).sum().backward()
    with onthefly.connect(tmp_path) as client:
        state = open_checkpoint(client.checkpoints()[-1].path).tree
    added = re.findall(r"`(\w+)`", PAGE[PAGE.index("A session adds") :].split(":")[0])
    assert state.keys() == named - {"scheduler", "scaler"} | set(added)
