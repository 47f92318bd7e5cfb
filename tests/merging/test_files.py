"""Merges of files: what comes out, and that nothing is left of what goes wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from onthefly.checkpoints import save_checkpoint
from onthefly.errors import (
    CheckpointNotFoundError,
    CheckpointWriteError,
    CorruptCheckpointError,
    InvalidCommandError,
    OnTheFlyError,
    StateMismatchError,
    UnsupportedValueError,
)
from onthefly.merging import merge_files, merge_state_dicts
from onthefly.merging.parents import open_parent


def state(seed, **other):
    draw = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(40, 30, generator=draw),
        "bias": torch.randn(40, generator=draw).bfloat16(),
        "half": torch.randn(9, generator=draw).half(),
        "scale": torch.randn((), generator=draw),
        "none": torch.empty(0, 3),
        "count": torch.tensor(seed),
        "mask": torch.tensor([True, False, seed == 0]),
        **other,
    }


@pytest.fixture
def files(tmp_path):
    """Writes state dicts into files; gives their paths."""

    def files(*states):
        paths = [tmp_path / f"{number}.safetensors" for number in range(len(states))]
        for path, one in zip(paths, states, strict=True):
            save_file(one, path)
        return paths

    return files


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "merged.safetensors"


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


# -- what comes out --------------------------------------------------------------------------------------------


def test_a_stock_reader_finds_what_a_merge_in_memory_gives(files, out):
    states = [state(0), state(1), state(2)]
    told = []
    found = merge_files(files(*states), "weighted", weights=[1, 2, 3], out=out, on_progress=lambda *at: told.append(at))
    merged = load_file(out)
    assert_equal(merged, merge_state_dicts(states, "weighted", weights=[1, 2, 3]))
    assert int(merged["count"]) == 0
    assert merged["mask"].tolist() == [True, False, True]
    assert (found.path, found.size, found.tensors) == (out, out.stat().st_size, 7)
    assert set(found.kept) == {"count", "mask"}
    assert told[-1][0] == told[-1][1]
    assert told == sorted(told)


def test_the_bytes_are_the_same_every_time_in_any_slices(files, out):
    import blake3

    paths = files(state(0), state(1), state(2))
    one = merge_files(paths[:2], "ties", base=paths[2], out=out)
    first = out.read_bytes()
    assert one.hash == blake3.blake3(first).hexdigest()
    assert merge_files(paths[:2], "ties", base=paths[2], out=out, force=True, slice_size=13) == one
    assert out.read_bytes() == first


def test_statistics_and_what_they_do_not_cover(files, out, tmp_path):
    parents = files(state(0), state(1))
    fishers = [tmp_path / "f0.safetensors", tmp_path / "f1.safetensors"]
    for seed, path in enumerate(fishers):
        save_file({"weight": state(seed + 5)["weight"].square()}, path)
    found = merge_files(parents, "fisher", out=out, statistics=fishers)
    assert set(found.averaged) == {"bias", "half", "scale", "none"}
    wanted = merge_state_dicts([state(0), state(1)], "fisher", statistics=[load_file(path) for path in fishers])
    assert_equal(load_file(out), wanted)


def test_a_lora_of_another_rank_has_other_shapes(files, out):
    def adapter(seed):
        draw = torch.Generator().manual_seed(seed)
        return {"x.lora_A": torch.randn(2, 8, generator=draw), "x.lora_B": torch.randn(6, 2, generator=draw)}

    merge_files(files(adapter(0), adapter(1)), "lora", {"rank": 4}, out=out)
    found, one, other = load_file(out), adapter(0), adapter(1)
    wanted = (one["x.lora_B"] @ one["x.lora_A"] + other["x.lora_B"] @ other["x.lora_A"]) / 2
    torch.testing.assert_close(found["x.lora_B"] @ found["x.lora_A"], wanted, rtol=1e-4, atol=1e-4)


class Tied(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(11, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 11)
        self.head.weight = self.embedding.weight


def saved(folder, kind, seed):
    model = Tied(seed)
    path = folder / f"{kind}{seed}.{'pt' if kind == 'pickled' else 'safetensors'}"
    if kind == "checkpoint":
        save_checkpoint(path, {"model": model, "optimizer": torch.optim.Adam(model.parameters()), "step": 3})
    elif kind == "pickled":
        torch.save(model.state_dict(), path)
    elif kind == "old":
        path = path.with_suffix(".bin")
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    else:
        save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("kinds", ["checkpoint pickled", "pickled plain", "plain old", "checkpoint checkpoint"])
def test_files_of_every_kind_merge_and_tied_tensors_stay_equal(tmp_path, out, kinds):
    paths = [saved(tmp_path, kind, seed) for seed, kind in enumerate(kinds.split())]
    base = saved(tmp_path, "pickled", 7)
    merge_files(paths, "dare", base=base, out=out)
    found = load_file(out)
    assert torch.equal(found["embedding.weight"], found["head.weight"])
    wanted = merge_state_dicts([Tied(0), Tied(1)], "dare", base=Tied(7))
    assert wanted["embedding.weight"].data_ptr() == wanted["head.weight"].data_ptr()
    assert_equal({name: found[name] for name in wanted}, wanted)
    Tied(2).load_state_dict(found)


def test_a_tie_that_another_parent_contradicts_is_refused(tmp_path, out):
    model = Tied(0)
    model.head.weight = nn.Parameter(torch.zeros(11, 4))
    path = tmp_path / "untied.safetensors"
    save_file(model.state_dict(), path)
    with pytest.raises(StateMismatchError, match=r"head\.weight and embedding\.weight are tied.*untied"):
        merge_files([saved(tmp_path, "pickled", 1), path], "swa", out=out)


def test_the_hash_of_a_checkpoint_is_verified_and_known(tmp_path, out):
    path = saved(tmp_path, "checkpoint", 0)
    assert len(open_parent(path).hash) == 64
    with pytest.raises(InvalidCommandError, match="optimiser"):
        open_parent(path, only="optimiser")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpointError):
        merge_files([path, saved(tmp_path, "plain", 1)], "swa", out=out)


# -- what goes wrong -------------------------------------------------------------------------------------------


def poisoned(name, value):
    one = state(1)
    one[name] = one[name].clone()
    one[name].view(-1)[-1] = value
    return one


WRONG = {
    "one parent": (lambda f: f(state(0)), {}, InvalidCommandError, "two parents or more, not 1"),
    "the same twice": (lambda f: [f(state(0))[0]] * 2, {}, InvalidCommandError, "same content"),
    "equal ones": (lambda f: f(state(0), state(1), state(0)), {}, InvalidCommandError, r"0\.safe.*2\.safe.*same content"),
    "no such file": (lambda f: [*f(state(0)), Path("no.safetensors")], {}, CheckpointNotFoundError, "no such"),
    "another kind": (lambda f: [*f(state(0)), Path(__file__)], {}, InvalidCommandError, "no checkpoint"),
    "other names": (lambda f: f(state(0), {**state(1), "more": torch.ones(1)}), {}, StateMismatchError, "1.*has more besides"),
    "fewer names": (lambda f: f(state(0), {"weight": state(1)["weight"]}), {}, StateMismatchError, "lacks .* and 3 more"),
    "other shape": (lambda f: f(state(0), state(1, scale=torch.ones(2))), {}, StateMismatchError, r"float32\[2\], not float32\[\]"),
    "other dtype": (lambda f: f(state(0), state(1, half=torch.ones(9))), {}, StateMismatchError, "half is float32"),
    "NaN": (lambda f: f(state(0), poisoned("weight", float("nan"))), {}, InvalidCommandError, r"1\.safetensors: weight .*NaN"),
    "inf": (lambda f: f(state(0), poisoned("half", float("inf"))), {}, InvalidCommandError, r"1\.safetensors: half .*infinite"),
    "few weights": (lambda f: f(state(0), state(1)), {"strategy": "weighted", "weights": [1]}, InvalidCommandError, "1 weights for 2"),
    "no weights": (lambda f: f(state(0), state(1)), {"strategy": "weighted"}, InvalidCommandError, "needs weights"),
    "zero weights": (lambda f: f(state(0), state(1)), {"strategy": "weighted", "weights": [0, 0]}, InvalidCommandError, "not all zero"),
    "a weight below zero": (lambda f: f(state(0), state(1)), {"strategy": "weighted", "weights": [2, -1]}, InvalidCommandError, "zero or more"),
    "needless weights": (lambda f: f(state(0), state(1)), {"weights": [1, 1]}, InvalidCommandError, "takes no weights"),
    "no base": (lambda f: f(state(0), state(1)), {"strategy": "ties"}, InvalidCommandError, "needs a base"),
    "no Fisher": (lambda f: f(state(0), state(1)), {"strategy": "fisher"}, InvalidCommandError, "needs fishers"),
    "three for slerp": (lambda f: f(state(0), state(1), state(2)), {"strategy": "slerp"}, InvalidCommandError, "2 parents, not 3"),
    "unknown": (lambda f: f(state(0), state(1)), {"strategy": "slrp"}, InvalidCommandError, "slerp"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_and_leaves_no_file(files, out, case):
    paths, given, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        merge_files(paths(files), **{"strategy": "swa", "out": out, **given})
    assert os.listdir(out.parent) == []


def test_statistics_that_do_not_fit(files, out, tmp_path):
    parents = files(state(0), state(1))

    def refused(error, words, one, other=None):
        paths = [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
        for path, found in zip(paths, (one, one if other is None else other), strict=True):
            save_file({name: tensor.clone() for name, tensor in found.items()}, path)
        with pytest.raises(error, match=words):
            merge_files(parents, "fisher", out=out, statistics=paths)
        assert os.listdir(out.parent) == []

    good = {"weight": torch.ones(40, 30)}
    refused(StateMismatchError, "one for each number", {"weight": torch.ones(40)})
    refused(StateMismatchError, r"other\.safetensors lacks weight", good, {"bias": torch.ones(40)})
    refused(InvalidCommandError, r"other\.safetensors: weight is below zero", good, {"weight": -good["weight"]})
    refused(InvalidCommandError, r"other\.safetensors: weight .*NaN", good, {"weight": good["weight"] / 0 * 0})
    refused(UnsupportedValueError, "real numbers", good, {"weight": torch.ones(40, 30, dtype=torch.int64)})


def test_a_result_that_the_dtype_cannot_hold_is_refused(files, out):
    paths = files(state(0, half=torch.full((9,), 6e4).half()), state(1), state(2))
    with pytest.raises(InvalidCommandError, match="half: what task_arithmetic makes of it is too large"):
        merge_files(paths[:2], "task_arithmetic", {"scale": 9}, base=paths[2], out=out)
    assert os.listdir(out.parent) == []


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "code"])
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_a_damaged_parent_is_refused_and_not_executed(files, out, tmp_path, damage, ending):
    good, *_ = files(state(0))
    bad, witness = tmp_path / f"bad.{ending}", tmp_path / "witness"

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(witness),)

    if ending == "pt" or damage == "code":
        torch.save({"weight": Malicious()} if damage == "code" else state(1), bad)
    else:
        save_file(state(1), bad)
    data = bad.read_bytes()
    bad.write_bytes({"cut": data[: len(data) // 2], "noise": os.urandom(400), "empty": b"", "code": data}[damage])
    with pytest.raises(CorruptCheckpointError, match="bad"):
        merge_files([good, bad], "swa", out=out)
    assert not witness.exists()
    assert os.listdir(out.parent) == []


def test_a_file_that_is_there_stays_unless_forced(files, out):
    paths = files(state(0), state(1))
    out.write_text("mine")
    with pytest.raises(CheckpointWriteError, match="there is such a file already"):
        merge_files(paths, "swa", out=out)
    with pytest.raises(InvalidCommandError, match="NaN"):
        merge_files([paths[0], *files(poisoned("weight", float("nan")), state(3))[:1]], "swa", out=out, force=True)
    assert out.read_text() == "mine"
    merge_files(files(state(0), state(1)), "swa", out=out, force=True)
    assert os.listdir(out.parent) == [out.name]


def test_a_place_that_cannot_be_written(files, tmp_path):
    paths = files(state(0), state(1))
    with pytest.raises(CheckpointWriteError):
        merge_files(paths, "swa", out=tmp_path / "no" / "out.safetensors")
    with pytest.raises(InvalidCommandError, match="ends in"):
        merge_files(paths, "swa", out=tmp_path / "out.pt")


def test_what_progress_raises_ends_the_merge_and_leaves_nothing(files, out):
    def stop(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_files(files(state(0), state(1)), "swa", out=out, on_progress=stop)
    assert os.listdir(out.parent) == []


def test_a_disk_without_room_is_a_typed_error(files, out):
    paths = files(state(0), state(1))
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
    code = f"{limit}from onthefly.merging import merge_files\nmerge_files(sys.argv[1:3], 'swa', out=sys.argv[3])"
    done = subprocess.run([sys.executable, "-c", code, *paths, out], capture_output=True, text=True)
    assert "CheckpointWriteError" in done.stderr
    assert os.listdir(out.parent) == []


# -- in memory -------------------------------------------------------------------------------------------------


def test_models_are_merged_by_their_own_names_and_stay_as_they_are():
    models = [Tied(0), nn.DataParallel(Tied(1))]
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    found = merge_state_dicts(models, "swa")
    assert list(found) == list(models[0].state_dict())
    assert not any(tensor.requires_grad for tensor in found.values())
    for model, kept in zip(models, before, strict=True):
        assert_equal(model.state_dict(), kept)
    found["norm.weight"].zero_()
    assert_equal(models[0].state_dict(), before[0])


def test_an_entry_that_is_no_tensor_is_named():
    with pytest.raises(UnsupportedValueError, match="model 1: extra"):
        merge_state_dicts([state(0), {"extra": 3}], "swa")
    with pytest.raises(OnTheFlyError):
        merge_state_dicts([], "swa")
    with pytest.raises(InvalidCommandError, match="no tensors"):
        merge_state_dicts([{}, {}], "swa")
