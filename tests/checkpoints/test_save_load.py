"""The front door: live objects to a file and back, without a session."""

import copy
import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

from onthefly import checkpoints
from onthefly.checkpoints import load_checkpoint, save_checkpoint
from onthefly.checkpoints.format import digest, open_checkpoint, write
from onthefly.checkpoints.sidecar import path_of, read_sidecar
from onthefly.errors import (
    CheckpointNotFoundError,
    CheckpointWriteError,
    CorruptCheckpointError,
    OnTheFlyError,
    StateMismatchError,
    UnsupportedValueError,
)
from onthefly.state.loader import ExactLoader
from onthefly.state.train_state import TrainState
from onthefly.state.tree import flatten


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are so small that threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(seed=0, width=8, optimizer=torch.optim.AdamW, **more):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.Linear(width, 2))
    made = optimizer(model.parameters(), lr=0.05)
    return {
        "model": model,
        "optimizer": made,
        "scheduler": torch.optim.lr_scheduler.StepLR(made, 2),
        "scaler": torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2),
        **more,
    }


def train(objects, steps=1):
    for _ in range(steps):
        x = torch.randn(5, 4) + random.random() + np.random.random()
        objects["optimizer"].zero_grad()
        objects["scaler"].scale(objects["model"](x).square().sum()).backward()
        objects["scaler"].step(objects["optimizer"])
        objects["scaler"].update()
        objects["scheduler"].step()


def fingerprint(objects):
    """The hash of all that is in there, random generators included."""
    return digest(*flatten(TrainState.of(objects).capture(gradients=True)))


@pytest.fixture
def saved(tmp_path):
    objects = build()
    train(objects, 3)
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, {**objects, "step": 3, "epoch": 1, "val_loss": 0.25})
    return path, objects


def test_the_rooms_public_names():
    assert checkpoints.__all__ == ["load_checkpoint", "save_checkpoint"]


# -- saving and loading ----------------------------------------------------------------------------------------


def test_new_objects_go_on_as_if_never_stopped(saved):
    path, objects = saved
    train(objects, 3)
    expected = fingerprint(objects)
    fresh = build(1)
    random.seed(1)
    np.random.seed(1)
    assert load_checkpoint(path, fresh) == {"step": 3, "epoch": 1, "val_loss": 0.25}
    train(fresh, 3)
    assert fingerprint(fresh) == expected


ANOTHER_PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
from test_save_load import *
torch.set_num_threads(1)
objects = build(9)
load_checkpoint(sys.argv[2], objects)
train(objects, 3)
print(fingerprint(objects), "sqlalchemy" in sys.modules, "onthefly.store" in sys.modules)
"""


def test_another_process_goes_on_as_if_never_stopped_and_needs_no_database(saved):
    path, objects = saved
    train(objects, 3)
    command = [sys.executable, "-c", ANOTHER_PROCESS, os.path.dirname(__file__), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [fingerprint(objects), "False", "False"]


def test_saving_changes_nothing_and_equal_state_gives_an_equal_hash(saved, tmp_path):
    _, objects = saved
    before = fingerprint(objects)
    first = save_checkpoint(tmp_path / "a", objects)
    time.sleep(0.01)
    second = save_checkpoint(str(tmp_path / "b"), objects)
    assert first == second
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert first.size == (tmp_path / "a").stat().st_size
    assert fingerprint(objects) == before


def test_a_train_state_is_as_good_as_a_mapping(saved, tmp_path):
    path, objects = saved
    state = TrainState.of({**objects, "step": 0})
    assert load_checkpoint(path, state) == {"step": 3, "epoch": 1, "val_loss": 0.25}
    assert state.counters == {"step": 3, "epoch": 1, "val_loss": 0.25}
    state.counters["step"] = 4
    save_checkpoint(tmp_path / "b.safetensors", state)
    assert load_checkpoint(tmp_path / "b.safetensors", {})["step"] == 4


def test_counters_that_were_not_passed_come_back_too(saved):
    assert load_checkpoint(saved[0], {"step": 0}) == {"step": 3, "epoch": 1, "val_loss": 0.25}
    assert load_checkpoint(saved[0], {"other": 1}) == {"step": 3, "epoch": 1, "val_loss": 0.25}


def test_random_generators_are_always_put_back(saved):
    path, _ = saved
    drawn = random.random(), np.random.random(), torch.rand(())
    random.random(), np.random.random(), torch.rand(())
    load_checkpoint(path, {})
    assert drawn == (random.random(), np.random.random(), torch.rand(()))


def test_a_loader_goes_on_with_its_next_batch(tmp_path):
    def loader():
        return ExactLoader(torch.utils.data.DataLoader(list(range(20)), batch_size=3, shuffle=True))

    first = loader()
    for _ in range(2):
        first.next()
    save_checkpoint(tmp_path / "a", {"loader": first})
    rest = [batch.tolist() for batch in first]
    second = loader()
    load_checkpoint(tmp_path / "a", {"loader": second})
    assert [batch.tolist() for batch in second] == rest


# -- what may be missing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scaler", "scheduler"])
@pytest.mark.parametrize("none", [True, False], ids=["None", "left out"])
def test_a_missing_scaler_or_scheduler_is_tolerated_on_either_side(tmp_path, saved, name, none):
    path, objects = saved

    def without(mapping):
        return {**mapping, name: None} if none else {k: v for k, v in mapping.items() if k != name}

    fresh = build(1)
    part = copy.deepcopy(fresh[name].state_dict())
    load_checkpoint(path, without(fresh))
    assert fresh[name].state_dict() == part, "it was not passed"
    assert torch.equal(fresh["model"][0].weight, objects["model"][0].weight)

    bare = tmp_path / "bare"
    save_checkpoint(bare, without(objects))
    fresh = build(1)
    part = copy.deepcopy(fresh[name].state_dict())
    load_checkpoint(bare, fresh)
    assert fresh[name].state_dict() == part, "it was not stored"
    assert torch.equal(fresh["model"][0].weight, objects["model"][0].weight)


def test_only_what_is_passed_is_loaded(saved):
    path, objects = saved
    fresh = build(1)
    load_checkpoint(path, {"model": fresh["model"]})
    assert torch.equal(fresh["model"][0].weight, objects["model"][0].weight)
    for name in ("optimizer", "scheduler", "scaler"):
        assert fresh[name].state_dict() == build(1)[name].state_dict()


# -- what does not fit -----------------------------------------------------------------------------------------


class Refusing:
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        raise RuntimeError("no")


MISFITS = {
    "shapes": lambda: build(width=9),
    "dtypes": lambda: {"model": build()["model"].double()},
    "names": lambda: {"model": nn.ModuleDict({"layer": nn.Linear(4, 8)})},
    "fewer names": lambda: {"model": build()["model"][:2]},
    "groups": lambda: (lambda m: {"optimizer": torch.optim.AdamW([{"params": [p]} for p in m.parameters()])})(
        build()["model"]
    ),
    "another optimizer": lambda: build(optimizer=torch.optim.Adam),
    "an optimizer of other parameters": lambda: {"optimizer": build(width=9)["optimizer"]},
    "an object that is not there": lambda: build(teacher=nn.Linear(1, 1)),
    "an object of another kind": lambda: {"model": build()["optimizer"]},
    "a scheduler that refuses": lambda: {**build(), "scheduler": Refusing()},
}  # fmt: skip


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_match_is_a_typed_error_with_everything_as_it_was(saved, misfit):
    path, _ = saved
    live = MISFITS[misfit]()
    if live.keys() >= build().keys() and misfit != "a scheduler that refuses":
        train(live)
    state = TrainState.of({**live, "step": 1})
    before = fingerprint(live)
    for given in ({**live, "step": 1}, state):
        with pytest.raises(StateMismatchError):
            load_checkpoint(path, given)
        assert fingerprint(live) == before
    assert state.counters == {"step": 1}


def test_a_mismatch_says_which_file_and_what(saved):
    with pytest.raises(
        StateMismatchError, match=r"last\.safetensors.*model/0\.weight.*float32\[8, 4\].*float32\[9, 4\]"
    ):
        load_checkpoint(saved[0], {"model": build(width=9)["model"]})


def test_damage_is_found_before_anything_changes(saved):
    path, _ = saved
    data = path.read_bytes()
    live = build(1)
    before = fingerprint(live)
    for damaged in (data[:-1], data[:-1] + bytes([data[-1] ^ 1]), b"", data[:5000]):
        path.write_bytes(damaged)
        with pytest.raises(CorruptCheckpointError, match=r"last\.safetensors"):
            load_checkpoint(path, live)
        assert fingerprint(live) == before
    path.write_bytes(data)
    load_checkpoint(path, live)
    with pytest.raises(CheckpointNotFoundError):
        load_checkpoint(path.with_name("other"), live)


@pytest.mark.parametrize("key", ["counters", "rng", "modes", "buffers", "owners"])
@pytest.mark.parametrize("damage", ["missing", "list", "tag"])
def test_a_file_whose_hash_is_right_and_whose_tree_is_not_is_corrupt(saved, key, damage):
    path, _ = saved
    file = open_checkpoint(path)
    tree = json.loads(json.dumps(file.tree))
    del tree[key]
    if damage != "missing":
        tree[key] = [1] if damage == "list" else {"$tensor": "there is none"}
    write(path, tree, file.tensors)
    live = build(1)
    before = fingerprint(live)
    with pytest.raises(CorruptCheckpointError, match=r"last\.safetensors"):
        load_checkpoint(path, live)
    assert fingerprint(live) == before


@pytest.mark.parametrize("tree", [None, 3, [], "text", {}, {"model": {"$tensor": 3}}, {"$pickle": "x"}, {"$size": "x"}])
def test_a_tree_of_another_kind_is_corrupt(tmp_path, tree):
    write(tmp_path / "a", tree, {"x": torch.ones(1)})
    with pytest.raises(CorruptCheckpointError):
        load_checkpoint(tmp_path / "a", {"step": 1})


# -- what cannot be saved --------------------------------------------------------------------------------------


class Holding:
    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"inner": [self.value]}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Holding(object()), "thing/inner/0"),
        (Holding(torch.ones(2).to_sparse()), "thing/inner/0"),
        (nn.LazyLinear(3), "thing/weight"),
        (nn.Linear(1, 1).to("meta"), "thing/weight"),
        ("text", "thing"),
        ({"a": [1]}, "thing/a"),
    ],
)
def test_what_cannot_be_saved_is_named_and_nothing_is_written(saved, value, words):
    path, objects = saved
    files = {p: p.read_bytes() for p in path.parent.iterdir()}
    with pytest.raises(UnsupportedValueError, match=words):
        save_checkpoint(path, {**objects, "thing": value})
    assert {p: p.read_bytes() for p in path.parent.iterdir()} == files


def test_an_error_is_one_of_ours_and_one_that_python_knows(tmp_path):
    with pytest.raises(OSError, match="nowhere") as caught:
        save_checkpoint(tmp_path / "nowhere" / "a", {"step": 1})
    assert isinstance(caught.value, CheckpointWriteError)
    assert isinstance(caught.value, OnTheFlyError)


# -- the sidecar -----------------------------------------------------------------------------------------------


def test_a_sidecar_is_written_beside_it(saved):
    path, _ = saved
    assert sorted(p.name for p in path.parent.iterdir()) == ["last.safetensors", "last.safetensors.meta.json"]
    sidecar = read_sidecar(path)
    assert (sidecar.step, sidecar.epoch, sidecar.run, sidecar.reason) == (3, 1, None, "manual")
    assert sidecar.counters == {"step": 3, "epoch": 1, "val_loss": 0.25}
    assert (sidecar.hash, sidecar.size) == (open_checkpoint(path).hash, path.stat().st_size)
    assert abs(sidecar.time - path.stat().st_mtime) < 3600


def test_run_generation_and_step_come_from_a_name_that_has_them(tmp_path):
    path = tmp_path / "fork1-g2-step00000007.safetensors"
    save_checkpoint(path, {})
    sidecar = read_sidecar(path)
    assert (sidecar.run, sidecar.generation, sidecar.step, sidecar.epoch) == ("fork1", 2, 7, None)


def test_counters_of_any_kind_have_a_sidecar(tmp_path):
    counters = {"step": np.int64(5), "epoch": 1.5, "loss": float("nan"), "on": True, "f": np.float32(2), "big": 2**70}
    save_checkpoint(tmp_path / "a", counters)
    sidecar = read_sidecar(tmp_path / "a")
    assert (sidecar.step, sidecar.epoch) == (5, None)
    assert sidecar.counters == {"step": 5, "epoch": 1.5, "loss": None, "on": True, "f": 2.0, "big": 2**70}
    loaded = load_checkpoint(tmp_path / "a", {})
    assert {k: v for k, v in loaded.items() if k != "loss"} == {k: v for k, v in counters.items() if k != "loss"}
    assert type(loaded["step"]) is np.int64


def test_a_checkpoint_without_its_sidecar_is_as_good(saved):
    path, _ = saved
    path_of(path).unlink()
    assert load_checkpoint(path, build(1))["step"] == 3
