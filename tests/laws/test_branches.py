"""Going from run to run: whatever the way, the steps are those that the state and the samples lead to."""

import subprocess
import sys

import pytest
from law_programs import PER_EPOCH, SAMPLES
from law_trainings import STATE, assert_same, until

from onthefly import client as door
from onthefly.errors import CommandError, InvalidCommandError, UnknownReferenceError
from onthefly.runs import manifest

LAST = 3 * PER_EPOCH
CHOSEN = {"select": "indices", "indices": [1, 2, 3, 5, 8, 13, 21, 34, 35, 36, 37, 38]}
FORK = {"recipe": CHOSEN, "values": {"lr": "*0.5"}}
KINDS = {
    "here": {},
    "workers": {"workers": 2},
    "persistent workers": {"workers": 2, "persistent": True},
    "accumulation": {"accumulate": 2, "schedule": True},
}


# -- fork ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("step", [5, 7], ids=["between epochs", "mid-epoch"])
def test_a_fork_is_exact_though_its_process_is_killed(trainings, kind, step):
    whole = trainings.start(store="whole", stops=(step,), **kind)
    assert whole.go_on(step, "forkRun", **FORK)["run"] == "fork1"
    training = trainings.start(stops=(step, step + 2), **kind)
    forked = training.go_on(step, "forkRun", **FORK)
    assert (forked["run"], forked["parent"], forked["samples"], forked["of"]) == ("fork1", "baseline", 12, SAMPLES)
    training.at(step + 2).kill()
    resumed = trainings.resume(training, run="fork1")
    assert_same(resumed.end(), whole.end(), *STATE)
    last = [client.checkpoints("fork1")[-1].hash for client in (resumed.client, whole.client)]
    assert last[0] == last[1]
    assert resumed.client.events(kinds=["inexact"]) == []


def test_a_fork_trains_on_the_chosen_samples_and_its_parent_stays_where_it_was(trainings):
    training = trainings.start(stops=(7,))
    forked = training.go_on(7, "forkRun", name="hard", **FORK)
    training.end()
    client = training.client
    assert client.selection("hard").indices.tolist() == CHOSEN["indices"]
    run = client.run("hard")
    assert (run.kind, run.status, run.parents) == ("fork", "finished", (("baseline", forked["hash"]),))
    assert client.run("baseline").status == "left"
    parent = next(c for c in client.checkpoints("baseline") if c.hash == forked["hash"])
    assert (parent.step, parent.reason, parent.path.exists()) == (7, "fork", True)
    assert "needed" in client.kept_because()[parent.id]
    # 40 samples are 5 batches; of 12 there are 2: 1 whole epoch of them is left, and the one that was under way.
    assert client.series("hard", "loss").steps.tolist() == list(range(8, 8 + 2 + 2))
    found = manifest.read(client.store.manifests_dir / f"{run.manifest[:16]}.json")
    assert found.digest == run.manifest
    assert [(p.run, p.step, p.hash) for p in found.parents] == [("baseline", 7, forked["hash"])]
    assert found.selection["count"] == 12
    assert found.changes == {"lr": "*0.5"}


def test_a_fork_without_samples_or_values_is_a_branch_of_the_same_training(trainings):
    alone = trainings.start(store="alone")
    training = trainings.start(stops=(7,))
    training.go_on(7, "forkRun")
    assert_same(training.end(), alone.end(), *STATE)


def test_a_fresh_fork_begins_where_its_run_began(trainings):
    alone = trainings.start(store="alone")
    training = trainings.start(stops=(7,))
    training.go_on(7, "forkRun", fresh=True)
    training.at(7).go()
    assert_same(training.end(), alone.end(), *STATE)
    assert training.client.trajectory("fork1", "loss").steps.tolist() == list(range(1, LAST + 1))


def test_a_reset_fork_is_again_what_it_was_born_as(trainings):
    whole = trainings.start(store="whole", stops=(7,))
    whole.go_on(7, "forkRun", **FORK)
    training = trainings.start(stops=(7, 9))
    training.go_on(7, "forkRun", **FORK)
    reset = training.go_on(9, "resetSession")
    assert (reset["step"], reset["generation"]) == (7, 1)
    training.at(9).kill()
    resumed = trainings.resume(training, run="fork1")
    assert_same(resumed.end(), whole.end(), *STATE)


BAD = {
    "out of range": ({"recipe": {"select": "indices", "indices": [1, SAMPLES]}}, InvalidCommandError),
    "negative": ({"recipe": {"select": "indices", "indices": [-1]}}, InvalidCommandError),
    "duplicate": ({"recipe": {"select": "indices", "indices": [1, 1]}}, InvalidCommandError),
    "empty": ({"recipe": {"select": "indices", "indices": []}}, InvalidCommandError),
    "float": ({"recipe": {"select": "indices", "indices": [1.5]}}, InvalidCommandError),
    "quantile": ({"recipe": {"select": "quantile", "field": "loss", "low": 0.5, "high": 1.5}}, InvalidCommandError),
    "name with a slash": ({"name": "a/b"}, InvalidCommandError),
    "name with a control character": ({"name": "a\x07b"}, InvalidCommandError),
    "nothing to set": ({"values": {"no such value": 1}}, InvalidCommandError),
    "no such selection": ({"selection": "abcdef12"}, UnknownReferenceError),
    "beside, without a command line": ({"beside": True}, CommandError),
}


def test_a_fork_that_cannot_be_is_refused_and_training_goes_on_untouched(trainings):
    alone = trainings.start(store="alone")
    training = trainings.start(stops=(7,))
    training.at(7)
    ids = {name: training.deliver("forkRun", **arguments) for name, (arguments, _) in BAD.items()}
    training.go()
    for name, id in ids.items():
        assert training.failed(id)["type"] == BAD[name][1].__name__, name
    assert_same(training.end(), alone.end())
    assert [run.name for run in training.client.runs()] == ["baseline"]


def test_a_fork_is_proved_by_a_replay(trainings):
    training = trainings.start(stops=(7, 8, 9), command_line=True)
    training.go_on(7, "forkRun", **FORK)
    training.go_on(8, "saveCheckpoint", pin=True)
    training.at(9).go()
    training.end()
    found = training.client.verify("fork1@8")
    assert found.equal, found.differences
    assert found.run == "fork1"


def test_a_rewind_to_a_file_of_nobody_s_is_sound(trainings):
    other = trainings.start(seed=5, stops=(8,), store="other")
    theirs = other.go_on(8, "saveCheckpoint", pin=True)
    training = trainings.start(stops=(7,))
    loaded = training.go_on(7, "loadCheckpoint", path=theirs["path"], name="theirs")
    assert loaded["run"] == "theirs"
    training.end()
    assert training.client.run("theirs").parents == ()
    assert training.client.fsck().errors == ()


# -- switch, subset, undo --------------------------------------------------------------------------------------


def test_back_on_its_parent_training_goes_on_as_if_there_had_been_no_fork(trainings):
    alone = trainings.start(store="alone")
    training = trainings.start(stops=(7, 9))
    training.go_on(7, "forkRun", **FORK)
    switched = training.go_on(9, "switchRun", run="baseline")
    assert (switched["run"], switched["from"], switched["step"]) == ("baseline", "fork1", 7)
    training.at(9).go()
    assert_same(training.end(), alone.end(), *STATE)
    assert training.client.series("baseline", "loss").steps.tolist() == list(range(1, LAST + 1))
    assert {run.name: run.status for run in training.client.runs()} == {"baseline": "finished", "fork1": "left"}
    # And the fork is still there to be gone on with.
    resumed = trainings.resume(training, run="fork1")
    resumed.end()
    assert resumed.client.run("fork1").status == "finished"


def test_a_switch_to_nowhere_is_refused(trainings):
    training = trainings.start(stops=(7,))
    training.at(7)
    here, nowhere = training.deliver("switchRun", run="baseline"), training.deliver("switchRun", run="no")
    training.go()
    assert training.failed(here)["type"] == "InvalidCommandError"
    assert training.failed(nowhere)["type"] == "UnknownReferenceError"
    training.end()


def test_a_subset_holds_until_all_are_asked_for(trainings):
    training = trainings.start(stops=(5, 7))
    (changed,) = training.go_on(5, "subset", recipe=CHOSEN)["changed"]
    assert (changed["before"], changed["after"]) == (SAMPLES, 12)
    (changed,) = training.go_on(7, "subset")["changed"]
    assert (changed["before"], changed["after"]) == (12, SAMPLES)
    training.end()
    assert [run.name for run in training.client.runs()] == ["baseline"]
    with pytest.raises(UnknownReferenceError, match="all samples"):
        training.client.selection("baseline")


def test_a_run_is_on_the_samples_that_it_branched_with_whatever_its_parent_was_told_since(trainings):
    training = trainings.start(stops=(4, 7))
    saved = training.go_on(4, "saveCheckpoint", pin=True)
    training.at(7)
    ids = [training.deliver("subset", recipe=CHOSEN), training.deliver("pause")]
    training.go()
    for id in ids:
        training.done(id)
    client = training.client
    assert len(client.selection("baseline").indices) == 12
    undone = client.undo()
    with pytest.raises(UnknownReferenceError, match="all samples"):
        client.selection(undone["run"])
    assert client.load(saved["hash"])["run"] == "rewind2"
    with pytest.raises(UnknownReferenceError, match="all samples"):
        client.selection("rewind2")
    client.subset(CHOSEN)
    assert client.fork()["run"] == "fork1"
    assert len(client.selection("fork1").indices) == 12
    client.stop()
    training.end()


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [("forkRun", FORK), ("set", {"values": {"lr": 0.5}}), ("subset", {"recipe": CHOSEN}), ("resetSession", {})],
    ids=["fork", "set", "subset", "reset"],
)
def test_what_is_undone_has_not_been(trainings, kind, arguments):
    alone = trainings.start(store="alone")
    training = trainings.start(stops=(7, 8, 9))
    training.go_on(7, kind, **arguments)
    if kind == "resetSession":
        training.at(7).go()
    undone = training.go_on(8, "undo")
    assert undone["step"] == 7
    for step in (8, 9):
        training.at(step).go()
    assert_same(training.end(), alone.end(), *STATE)


def test_undo_goes_back_further_each_time_and_says_when_there_is_nothing(trainings):
    alone = trainings.start(store="alone")
    training = trainings.start(stops=(4, 7, 8))
    training.go_on(4, "set", values={"lr": 0.5})
    training.go_on(7, "forkRun", **FORK)
    training.at(8)
    ids = [training.deliver("pause"), *(training.deliver("undo") for _ in range(3)), training.deliver("resume")]
    training.go()
    training.done(ids[0])
    assert training.done(ids[1])["run"] == "baseline"
    assert training.done(ids[2])["step"] == 4
    error = training.failed(ids[3])
    assert error["type"] == "CommandError"
    assert "nothing to undo" in error["message"]
    training.done(ids[4])
    for step in (7, 8):
        training.at(step).go()
    assert_same(training.end(), alone.end(), *STATE)


# -- beside ----------------------------------------------------------------------------------------------------


def test_a_fork_beside_comes_out_as_one_in_place_and_leaves_its_parent_alone(trainings):
    alone = trainings.start(store="alone", command_line=True)
    inside = trainings.start(store="inside", stops=(7,), command_line=True)
    inside.go_on(7, "forkRun", **FORK)
    inside.end()
    training = trainings.start(stops=(7, 8), command_line=True)
    forked = training.go_on(7, "forkRun", beside=True, **FORK)
    training.at(8)
    started = training.event("childStarted").data
    assert started["child"] == forked["run"] == "fork1"
    # The child is the same command line: it stops in the step that it is told to stop in, too; its input is at an end.
    until(lambda: training.client.run("fork1").status != "planned", "a child that has begun")
    training.go()
    for one in (training, alone):
        one.end()
    until(lambda: training.client.run("fork1").status == "finished", "the child's end")
    last = {
        name: one.client.checkpoints(run)[-1].hash
        for name, one, run in (
            ("parent", training, "baseline"),
            ("alone", alone, "baseline"),
            ("beside", training, "fork1"),
            ("in place", inside, "fork1"),
        )
    }
    assert last["parent"] == last["alone"]
    assert last["beside"] == last["in place"]
    assert training.client.run("baseline").status == "finished"


DYING = """
import os, sys, torch, onthefly
from torch.utils.data import DataLoader, TensorDataset
if "ONTHEFLY_RESUME" in os.environ:
    print("there is no room for a second one")
    sys.exit(3)
model = torch.nn.Linear(2, 2)
loader = DataLoader(TensorDataset(torch.randn(64, 2), torch.zeros(64, dtype=torch.int64)), batch_size=4)
session = onthefly.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), train_loader=loader)
import time
for epoch in session.epochs(10**6):
    for batch in session:
        time.sleep(0.01)
"""


def test_a_child_that_dies_at_its_start_is_told_of_with_its_last_words(tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    process = subprocess.Popen([sys.executable, "dying.py"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        store = tmp_path / ".onthefly"
        until(lambda: (store / "onthefly.db").exists() and _live(store), "a session")
        with door.connect(store) as client:
            assert client.fork(beside=True)["run"] == "fork1"
            event = until(lambda: client.events(kinds=["childEnded"]), "its end")[0]
            assert (event.data["child"], event.data["code"]) == ("fork1", 3)
            assert "no room for a second one" in event.data["tail"]
            until(lambda: client.run("fork1").status == "failed", "its status")
            assert client.session().status == "running"
            client.stop()
        process.wait(60)
    finally:
        process.kill()
        process.wait()


def _live(store):
    with door.connect(store) as client:
        return client.sessions(alive=True)


@pytest.mark.parametrize(
    "fault", ["none", "manifest gone", "manifest altered", "selection altered", "scan gone", "edge"]
)
def test_a_planted_fault_in_what_a_fork_stands_on_is_named(trainings, fault):
    training = trainings.start(stops=(7,))
    recipe = {"select": "quantile", "field": "loss", "low": 0.5, "high": 1.0}
    training.go_on(7, "forkRun", recipe=recipe)
    training.end()
    store = training.client.store
    path = store.manifests_dir / f"{training.client.run('fork1').manifest[:16]}.json"
    if fault == "manifest gone":
        path.unlink()
    elif fault == "manifest altered":
        path.write_bytes(path.read_bytes().replace(b"fork1", b"fork2"))
    elif fault == "selection altered":
        (selection,) = store.scans_dir.glob("selection-*")
        data = bytearray(selection.read_bytes())
        data[len(data) // 2] ^= 1
        selection.write_bytes(data)
    elif fault == "scan gone":
        training.client.scans()[0].path.unlink()
    elif fault == "edge":
        with store.begin() as connection:
            connection.exec_driver_sql("UPDATE run_parent SET hash = ? WHERE run = 'fork1'", ("f" * 64,))
    kinds = {finding.kind for finding in training.client.fsck().errors}
    expected = {"none": set(), "edge": {"edge", "broken link"}}.get(fault, {fault.split()[0]})
    assert kinds == expected or (fault == "edge" and "edge" in kinds)


def test_a_removed_run_leaves_what_others_stand_on_and_then_nothing(trainings):
    training = trainings.start(stops=(7,))
    forked = training.go_on(7, "forkRun", **FORK)
    training.end()
    client = training.client
    assert client.remove_run("baseline")["kept"] == 1
    assert [row.hash for row in client.checkpoints("baseline")] == [forked["hash"]]
    assert not client.fsck().errors
    assert client.remove_run("fork1")["kept"] == 0
    assert client.remove_run("baseline")["kept"] == 0
    assert client.checkpoints() == []
    assert not client.fsck().errors
