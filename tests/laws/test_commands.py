"""Every command, end to end: a real process, the store, an answer, and what became of the training."""

import math
import shutil
import time
from pathlib import Path

import pytest
import torch
from law_programs import PER_EPOCH
from law_trainings import STATE, Values, assert_same, changes_of, plain, until

from onthefly.checkpoints import save_checkpoint
from onthefly.control.commands import COMMANDS
from onthefly.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    InvalidCommandError,
    MissingPartError,
    NoLiveSessionError,
    StateMismatchError,
)

LAST = 3 * PER_EPOCH


def test_each_command_is_tested_here():
    """A new one fails this until it is given a test below."""
    assert {command.kind for command in COMMANDS} == {
        "pause",
        "resume",
        "stop",
        "saveCheckpoint",
        "pinCheckpoint",
        "removeCheckpoint",
        "loadCheckpoint",
        "resetSession",
        "testRun",
        "set",
        # in test_branches.py and test_sampling.py
        "forkRun",
        "switchRun",
        "subset",
        "undo",
        "scanSamples",
        "showSamples",
        "cancelScan",
        "exportSubset",
        # in test_beside.py
        "adoptScan",
        # in tests/health
        "report",
        "cancelReport",
        # in test_merging.py
        "mergeRuns",
    }


def checkpoints(training, run="baseline"):
    return training.client.checkpoints(run)


# -- pause, resume ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["epochs", "batches", "steps"])
@pytest.mark.parametrize("step", [0, 7, LAST], ids=["before the first step", "in the middle", "in the last step"])
def test_a_pause_holds_at_the_next_boundary_until_it_is_resumed(trainings, loop, step):
    training = trainings.start(loop=loop, stops=(step, -1))
    paused = training.at(step).deliver("pause")
    training.go()
    assert training.done(paused) == {"paused": True}
    row = training.answer(paused)
    ended = 0 if loop == "steps" else step // PER_EPOCH
    assert (row.step, row.epoch) == (step, ended)
    saved = until(lambda: [c for c in checkpoints(training) if c.step == step], "the pause's checkpoint")
    assert [c.reason for c in saved] == [
        "origin" if step == 0 else "pause" if step % PER_EPOCH or loop == "steps" else "epoch"
    ]
    until(lambda: training.session.status == "paused", "a heartbeat that says so")
    assert len(training.taken()) == step

    assert training.client.resume() == {"step": step, "epoch": ended, "paused": False}
    training.at(-1).go()
    result = training.end()
    assert result["step"] == LAST
    if loop != "batches":
        assert_same(result, plain(loop=loop))
    assert [event.step for event in training.client.events(kinds=["paused", "resumed"])] == [step, step]


def test_a_pause_without_a_checkpoint_saves_none(trainings):
    training = trainings.start(stops=(7,))
    paused = training.at(7).deliver("pause", save=False)
    training.go().done(paused)
    training.client.resume()
    training.end()
    assert 7 not in [c.step for c in training.client.checkpoints("baseline", evicted=True)]


def test_pausing_twice_is_one_pause(trainings):
    training = trainings.start(stops=(7,))
    training.at(7).deliver("pause")
    training.go()
    training.client.pause()
    training.client.resume()
    assert_same(training.end(), plain())


def test_resuming_what_is_not_paused_changes_nothing(trainings):
    training = trainings.start(stops=(7,))
    resumed = training.at(7).deliver("resume")
    assert training.go().done(resumed) == {"paused": False}
    assert_same(training.end(), plain())


# -- saveCheckpoint --------------------------------------------------------------------------------------------


def test_save_pin_and_save_to_a_path(trainings, tmp_path):
    training = trainings.start(stops=(7, 8, 9))
    outside = tmp_path / "elsewhere" / "mine.safetensors"
    outside.parent.mkdir()
    saved = training.at(7).deliver("saveCheckpoint")
    training.go().at(8)
    pinned = training.deliver("saveCheckpoint", pin=True)
    training.go().at(9)
    to_a_path = training.deliver("saveCheckpoint", path=str(outside))
    training.go().end()
    rows = {row.hash: row for row in training.client.checkpoints("baseline", evicted=True)}
    for id, step, is_pinned in [(saved, 7, False), (pinned, 8, True), (to_a_path, 9, True)]:
        result = training.done(id)
        row = rows[result["hash"]]
        assert (row.step, row.pinned, row.reason, str(row.path)) == (step, is_pinned, "manual", result["path"])
        assert row.size == result["size"]
    assert outside.stat().st_size == training.done(to_a_path)["size"]
    assert {c.step for c in checkpoints(training)} >= {0, 8, 9, LAST}


def test_a_save_to_a_path_overwrites_nothing(trainings, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    training = trainings.start(stops=(7,))
    id = training.at(7).deliver("saveCheckpoint", path=str(mine))
    assert training.go().failed(id)["type"] == "InvalidCommandError"
    assert mine.read_text() == "mine"
    assert_same(training.end(), plain())


def test_saving_one_state_twice_gives_the_same_file(trainings):
    training = trainings.start(stops=(7,))
    first = training.at(7).deliver("saveCheckpoint")
    second = training.deliver("saveCheckpoint", pin=True)
    training.go().end()
    assert training.done(first) == training.done(second)
    assert [(c.step, c.pinned) for c in checkpoints(training) if c.step == 7] == [(7, True)]


def test_a_save_into_a_folder_that_is_not_there_fails_and_training_goes_on(trainings, tmp_path):
    training = trainings.start(stops=(7,))
    id = training.at(7).deliver("saveCheckpoint", path=str(tmp_path / "nowhere" / "mine.safetensors"))
    assert training.go().failed(id)["type"] == "CheckpointWriteError"
    assert_same(training.end(), plain())


# -- pinCheckpoint, removeCheckpoint ---------------------------------------------------------------------------


def test_a_checkpoint_is_pinned_unpinned_and_removed_while_training_goes_on(trainings):
    training = trainings.start(stops=(6, 7, 8, 9))
    saved = training.go_on(6, "saveCheckpoint")
    pinned = training.at(7).deliver("pinCheckpoint", path=saved["path"])
    training.go()
    assert training.done(pinned)["pinned"] is True
    assert [c.pinned for c in checkpoints(training) if c.hash == saved["hash"]] == [True]
    unpinned = training.at(8).deliver("pinCheckpoint", path=saved["path"], pinned=False)
    foreign = training.deliver("pinCheckpoint", path=saved["path"] + "x")
    training.go()
    assert training.done(unpinned)["pinned"] is False
    assert training.failed(foreign)["type"] == "InvalidCommandError"
    origin = next(c for c in checkpoints(training) if c.reason == "origin")
    removed = training.at(9).deliver("removeCheckpoint", path=saved["path"])
    needed = training.deliver("removeCheckpoint", path=str(origin.path))
    assert training.go().done(removed)["hash"] == saved["hash"]
    assert training.failed(needed)["type"] == "InvalidCommandError"
    assert_same(training.end(), plain())
    rows = {c.hash: c for c in training.client.checkpoints("baseline", evicted=True)}
    assert rows[saved["hash"]].evicted_reason == "removed"
    assert not rows[saved["hash"]].path.exists()
    assert origin.path.exists()
    kinds = [e.kind for e in training.client.events(kinds=["checkpointPinned", "checkpointUnpinned"])]
    assert kinds == ["checkpointPinned", "checkpointUnpinned"]


# -- loadCheckpoint --------------------------------------------------------------------------------------------


WORKERS = {"workers": 2, "persistent": True, "schedule": True}


@pytest.mark.parametrize(
    ("how", "kind"),
    [("running", {}), ("paused", {}), ("running", WORKERS)],
    ids=["running", "paused", "with workers"],
)
@pytest.mark.parametrize(
    ("saved_in", "loaded_in"),
    [(3, 4), (2, 14), (7, 13), (10, 12), (0, 7), (12, 15)],
    ids=["same epoch", "first epoch from the last", "mid-epoch", "an epoch's end", "the origin", "last step of all"],
)
def test_after_a_load_the_steps_are_those_that_followed_the_checkpoint(trainings, how, saved_in, loaded_in, kind):
    alone = trainings.start(store="alone", **kind)
    training = trainings.start(stops=(saved_in, loaded_in), **kind)
    saved = training.at(saved_in).deliver("saveCheckpoint", pin=True)
    checkpoint = training.go().done(saved)
    training.at(loaded_in)
    if how == "paused":
        paused = training.deliver("pause")
        training.go().done(paused)
        loaded = training.client.load(checkpoint["hash"])
        assert len(training.taken()) == loaded_in
        training.client.resume()
    else:
        id = training.deliver("loadCheckpoint", path=checkpoint["path"], hash=checkpoint["hash"])
        loaded = training.go().done(id)
    assert (loaded["loaded"], loaded["hash"]) == (checkpoint["path"], checkpoint["hash"])
    if saved_in < loaded_in:  # its stops come again
        for step in (s for s in (saved_in, loaded_in) if s > checkpoint["step"]):
            training.at(step).go()
    end, whole = training.end(), alone.end()
    assert_same(end, whole, *STATE)
    assert end["losses"] == whole["losses"][:loaded_in] + whole["losses"][saved_in:]
    assert end["seen"] == whole["seen"][:loaded_in] + whole["seen"][saved_in:]
    # It is another run from there: what the first one was trained to stays what it was.
    assert loaded["run"] == "rewind1"
    assert training.client.run("rewind1").parents == (("baseline", checkpoint["hash"]),)
    series = training.client.trajectory("rewind1", "loss")
    assert series.steps.tolist() == list(range(1, LAST + 1))
    assert series.values.tolist() == whole["losses"]
    assert training.client.series("baseline", "loss").steps.tolist() == list(range(1, loaded_in + 1))
    (transition,) = training.client.events(kinds=["runTransition"])
    assert (transition.step, transition.data["reason"]) == (saved_in, "load")
    # Equal state is equal bytes: the two runs' last checkpoints are one.
    assert checkpoints(training, "rewind1")[-1].hash == alone.client.checkpoints("baseline")[-1].hash


def test_what_is_set_after_a_load_holds(trainings):
    """Though the load leaves an epoch, whose body ends before the loaded one begins."""
    training = trainings.start(stops=(5, 13))
    saved = training.go_on(5, "saveCheckpoint", pin=True)
    paused = training.at(13).deliver("pause")
    training.go().done(paused)
    training.client.load(saved["hash"])
    training.client.set(lr=0.2, noise=0.5)
    training.client.resume()
    training.at(13).go()
    given = ((5, 1, Values(lr=0.2, noise=0.5)),)
    assert_same(training.end(), plain(given=given), *STATE)
    assert training.client.trajectory("rewind1", "val_loss").steps.tolist() == [5, 10, 15]
    assert training.client.events(kinds=["inexact"]) == []


def test_a_newer_checkpoint_can_be_loaded_after_an_older_one(trainings):
    training = trainings.start(stops=(4, 9))
    older = training.go_on(4, "saveCheckpoint", pin=True)
    training.at(9)
    training.deliver("pause")
    training.go()
    newer = training.client.save(pin=True)
    assert training.client.load(older["hash"])["step"] == 4
    assert training.client.load(newer["hash"])["step"] == 9
    training.client.resume()
    assert_same(training.end(), plain())
    runs = {run.name: (run.parents[0][0] if run.parents else None, run.status) for run in training.client.runs()}
    assert runs == {"baseline": (None, "left"), "rewind1": ("baseline", "left"), "rewind2": ("baseline", "finished")}


def test_a_checkpoint_of_another_run_can_be_loaded(trainings):
    other = trainings.start(seed=5, stops=(8,))
    theirs = other.go_on(8, "saveCheckpoint", pin=True)
    whole = other.end()
    training = trainings.start(seed=0, stops=(11,), store="second")
    training.at(11)
    id = training.deliver("loadCheckpoint", path=theirs["path"])
    training.go().done(id)
    training.at(11).go()
    assert_same(training.end(), whole, *STATE)


def test_a_load_survives_death(trainings):
    """A loaded file may be gone by then: the run that begins with it has a beginning of its own."""
    other = trainings.start(seed=5, stops=(8,))
    theirs = other.go_on(8, "saveCheckpoint", pin=True)
    whole = other.end()
    training = trainings.start(store="second", stops=(11,))
    training.at(11)
    id = training.deliver("loadCheckpoint", path=theirs["path"])
    training.go().done(id)
    training.at(11).kill()
    shutil.rmtree(trainings.store)
    resumed = trainings.resume(training, run="rewind1")
    assert_same(resumed.end(), whole, *STATE)


def test_a_file_that_does_not_fit_is_refused_and_training_goes_on(trainings, tmp_path):
    wide = trainings.start(store="wide", width=9, stops=(7,))
    mismatching = wide.go_on(7, "saveCheckpoint", pin=True)["path"]
    other = trainings.start(store="sgd", optimizer="sgd", stops=(7,))
    other_optimizer = other.go_on(7, "saveCheckpoint", pin=True)["path"]
    knobs = trainings.start(store="knobs", knobs=("noise", "loudness"), stops=(7,))
    unknown_knob = knobs.go_on(7, "saveCheckpoint", pin=True)["path"]
    alone = tmp_path / "alone.safetensors"
    model = torch.nn.Linear(2, 2)
    save_checkpoint(alone, {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)})
    training = trainings.start(stops=(6, 7), workers=2, persistent=True)
    good = training.go_on(6, "saveCheckpoint", pin=True)
    data = bytearray(Path(good["path"]).read_bytes())
    data[-100] ^= 1
    flipped, cut, foreign = (tmp_path / name for name in ("flipped", "cut", "foreign"))
    flipped.write_bytes(data)
    cut.write_bytes(data[:-1000])
    torch.save({"model": 1}, foreign)
    expected = {
        str(flipped): CorruptCheckpointError,
        str(cut): CorruptCheckpointError,
        str(foreign): CorruptCheckpointError,
        str(tmp_path): CorruptCheckpointError,
        str(tmp_path / "nothing"): CheckpointNotFoundError,
        mismatching: StateMismatchError,
        other_optimizer: StateMismatchError,
        unknown_knob: StateMismatchError,
        str(alone): StateMismatchError,
    }
    training.at(7)
    ids = {path: training.send("loadCheckpoint", path=path) for path in expected}
    wrong_hash = training.deliver("loadCheckpoint", path=good["path"], hash="0" * 64)
    training.go()
    for path, id in ids.items():
        error = training.failed(id)
        assert error["type"] == expected[path].__name__, path
        assert path.rsplit("/", 1)[-1] in error["message"] or error["type"] == "StateMismatchError"
    assert training.failed(wrong_hash)["type"] == "CorruptCheckpointError"
    alone = trainings.start(store="alone", workers=2, persistent=True)
    assert_same(training.end(), alone.end())
    assert training.client.run("baseline").generation == 0


# -- resetSession ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{}, {"workers": 2, "schedule": True}], ids=["here", "workers"])
@pytest.mark.parametrize("step", [3, 12, LAST])
def test_after_a_reset_the_run_is_the_one_that_it_was(trainings, kind, step):
    alone = trainings.start(store="alone", **kind)
    whole = alone.end()
    training = trainings.start(stops=(2, step), **kind)
    changed = training.at(2).deliver("set", values={"lr": 0.5, "noise": 0.3, "grad_clip": 0.1})
    training.go().done(changed)
    before = training.at(step).deliver("saveCheckpoint")
    pinned = training.deliver("saveCheckpoint", pin=True, path=str(training.folder / "pinned.safetensors"))
    reset = training.deliver("resetSession")
    result = training.go().done(reset)
    assert result["step"] == 0
    assert result["generation"] == 1
    assert result["hash"] == alone.client.checkpoints("baseline")[0].hash
    training.at(2)
    # The run's checkpoints are gone but for its origin, what was pinned, and the state before: that can be gone back to.
    left = checkpoints(training)
    saved = training.done(before)
    kept = [training.client.checkpoints("baseline", evicted=True)[0].path, saved["path"], training.done(pinned)["path"]]
    assert sorted(map(str, kept)) == sorted(str(c.path) for c in left)
    assert (0, "origin") in [(c.step, c.reason) for c in left if not c.pinned]
    assert [(c.step, c.reason) for c in left if c.pinned] == [(saved["step"], "manual")]
    assert all(c.path.exists() for c in left)
    gone = [c for c in training.client.checkpoints("baseline", evicted=True) if c.evicted]
    assert {c.evicted_reason for c in gone} <= {"reset", "replaced"}
    training.go().at(step).go()
    end = training.end()
    assert_same(end, whole, *STATE)
    assert end["losses"][step:] == whole["losses"]
    assert checkpoints(training)[-1].hash == alone.client.checkpoints("baseline")[-1].hash
    assert training.client.series("baseline", "loss").values.tolist() == whole["losses"]
    assert training.client.series("baseline", "val_loss").values.tolist() == (
        alone.client.series("baseline", "val_loss").values.tolist()
    )


def test_a_reset_run_resumes_in_its_new_generation(trainings):
    training = trainings.start(stops=(2, 8))
    changed = training.at(2).deliver("set", values={"lr": 0.5})
    training.go().done(changed)
    reset = training.at(8).deliver("resetSession")
    training.go().done(reset)
    training.at(2).go().at(8).kill()
    resumed = trainings.resume(training)
    assert_same(resumed.end(), plain(), *STATE)
    assert resumed.client.run("baseline").generation == 1


# -- set -------------------------------------------------------------------------------------------------------


SETS = {
    "lr": ({}, {"lr": 0.5}),
    "lr under a scheduler": ({"schedule": True}, {"lr": 0.5}),
    "weight decay": ({}, {"weight_decay": 0.3}),
    "betas": ({}, {"betas": [0.5, 0.7]}),
    "one group": ({"optimizer": "sgd"}, {"optimizer.0.momentum": 0.5}),
    "clip": ({}, {"grad_clip": 0.05}),
    "clip and scheduler": ({"schedule": True, "accumulate": 2}, {"grad_clip": 0.05, "lr": 0.3}),
    "knob": ({}, {"noise": 0.5}),
}


@pytest.mark.parametrize(("kind", "values"), SETS.values(), ids=SETS)
def test_a_set_value_is_what_a_user_would_have_changed_by_hand(trainings, kind, values):
    training = trainings.start(stops=(4, 8), **kind)
    id = training.at(4).deliver("set", values=values)
    changed = training.go().done(id)["changed"]
    assert len(changed) == len(values)
    training.at(8).go()
    end = training.end()
    with trainings.opened() as store:
        given = changes_of(store, "baseline")
    # With gradients pending it waits for their step.
    assert [step for step, _, _ in given] == [4]
    assert_same(end, plain(given=given, **kind))
    untouched = plain(**kind)
    assert end["losses"][:4] == untouched["losses"][:4]
    assert end["losses"] != untouched["losses"]


def test_a_held_value_stays_whatever_the_scheduler_says_until_it_is_released(trainings):
    training = trainings.start(schedule=True, epochs=4, stops=(4, 12))
    held = training.at(4).deliver("set", values={"lr": 0.03}, hold=True)
    (change,) = training.go().done(held)["changed"]
    assert (change["before"], change["after"]) == (0.01, 0.03)
    released = training.at(12).deliver("set", values={"lr": None}, release=True)
    (change,) = training.go().done(released)["changed"]
    assert (change["before"], change["after"]) == (0.03, 0.01 * 0.9 * 0.9)
    end = training.end()
    given = ((4, 0, Values(lr=0.03)), (12, 2, Values(lr=None)))
    assert_same(end, plain(schedule=True, epochs=4, given=given, hold=True))


@pytest.mark.parametrize("kind", [{}, {"schedule": True}], ids=["plain", "scheduler"])
def test_a_refused_value_leaves_everything_as_it_was(trainings, kind):
    training = trainings.start(stops=(4,), **kind)
    training.at(4)
    refused = [
        {"lr": -1.0},
        {"lr": "fast"},
        {"lr": True},
        {"lr": None},
        {"lr": math.inf},
        {"lr": math.nan},
        {"lr": "*x"},
        {"lr": [0.1]},
        {"weight_decay": -0.1},
        {"betas": 0.9},
        {"betas": [0.9]},
        {"betas": [0.9, 1.5]},
        {"betas": [-0.1, 0.9]},
        {"grad_clip": -1},
        {"grad_clip": "much"},
        {"params": 3},
        {"nothing": 1},
        {"optimizer.7.lr": 1.0},
        {"noise": "loud"},
        {"noise": 0.5, "lr": -1.0},  # all or nothing
        {"amsgrad": True},  # it needs a state that this optimizer has not kept
        {"capturable": True},
        {"differentiable": True},
    ]
    ids = [training.send("set", values=values) for values in refused]
    training.deliver("resume")
    training.go()
    for id, values in zip(ids, refused, strict=True):
        assert training.failed(id)["type"] == "InvalidCommandError", values
    assert_same(training.end(), plain(**kind))
    assert training.client.events(kinds=["command"]) == []


def test_a_knob_and_a_clip_come_back_with_the_checkpoint(trainings):
    training = trainings.start(stops=(4, 6, 9))
    training.go_on(4, "set", values={"noise": 0.4, "grad_clip": 0.1})
    saved = training.go_on(6, "saveCheckpoint", pin=True)
    training.at(9)
    training.deliver("set", values={"noise": 0.9, "grad_clip": None})
    id = training.deliver("loadCheckpoint", path=saved["path"])
    training.go().done(id)
    training.at(9).go()
    given = ((4, 0, Values(noise=0.4, grad_clip=0.1)),)
    assert_same(training.end(), plain(given=given), *STATE)


# -- testRun ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["test", "val"])
@pytest.mark.parametrize("kind", [{}, {"workers": 2, "persistent": True}], ids=["here", "workers"])
def test_a_test_evaluates_the_model_and_leaves_training_alone(trainings, data, kind):
    training = trainings.start(stops=(3,), **kind)  # the training has not yet used its validation's loader itself
    result = training.go_on(3, "testRun", data=data)
    assert (result["data"], result["samples"], result["step"]) == (data, 40, 3)
    assert 0 < result["loss"] < 10
    assert_same(training.end(), plain(**kind) if not kind else trainings.start(store="alone", **kind).end())
    (event,) = training.client.events(kinds=["tested"])
    assert event.data["loss"] == result["loss"]
    assert [c.reason for c in training.client.checkpoints("baseline", evicted=True) if c.step == 3] == ["test"]


def test_a_failing_loss_is_a_failed_command_and_training_goes_on(trainings):
    training = trainings.start(stops=(7, 8), test_loss="fails")
    failed = training.at(7).deliver("testRun", save=False)
    error = training.go().failed(failed)
    assert (error["type"], error["exit_code"]) == ("ZeroDivisionError", 6)
    assert "the user's loss divides by zero" in error["message"]
    training.at(8).go()
    assert_same(training.end(), plain())


def test_a_test_without_a_loss_says_what_is_missing(trainings):
    training = trainings.start(stops=(7,), test_loss=None)
    failed = training.at(7).deliver("testRun")
    error = training.go().failed(failed)
    assert error["type"] == MissingPartError.__name__
    assert "loss_fn" in error["message"]
    assert_same(training.end(), plain())


# -- stop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 7, LAST])
def test_a_stopped_run_is_resumed_where_it_was_left(trainings, step):
    training = trainings.start(stops=(step,))
    result = training.go_on(step, "stop")
    assert result["stopped"]
    assert result["step"] == step
    assert training.end() is None  # code after the loop does not run
    with trainings.opened() as store:
        from onthefly.store import queries

        assert queries.run(store, "baseline").status == "unfinished"
        assert queries.sessions(store)[0].outcome == "stopped"
    resumed = trainings.resume(training)
    assert_same(resumed.end(), plain(), *STATE)
    assert resumed.client.events(kinds=["inexact"]) == []
    assert resumed.client.run("baseline").status == "finished"


def test_a_paused_run_can_be_stopped(trainings):
    training = trainings.start(stops=(7,))
    paused = training.at(7).deliver("pause")
    training.go().done(paused)
    assert training.client.stop()["step"] == 7
    assert training.end() is None


def test_a_stop_without_a_checkpoint_loses_only_time(trainings):
    training = trainings.start(stops=(7,))
    training.go_on(7, "stop", save=False)
    assert training.end() is None
    resumed = trainings.resume(training)
    assert_same(resumed.end(), plain(), *STATE)


# -- commands as such ------------------------------------------------------------------------------------------


def test_a_command_is_carried_out_once_by_its_id(trainings):
    training = trainings.start(stops=(4, 8))
    training.at(4).deliver("set", id="once", values={"lr": "*0.5"})
    training.send("set", id="once", values={"lr": "*0.5"})
    training.go()
    first = training.done("once")
    training.at(8).deliver("set", id="once", values={"lr": "*0.5"})
    training.go().end()
    assert training.done("once") == first
    assert len(training.client.events(kinds=["command"])) == 1


def test_commands_are_carried_out_in_their_order(trainings):
    training = trainings.start(stops=(4,))
    training.at(4)
    ids = [training.send("set", values={"noise": value}) for value in (0.1, 0.2, 0.3)]
    training.deliver("resume")
    training.go()
    changes = [training.done(id)["changed"][0] for id in ids]
    assert [(c["before"], c["after"]) for c in changes] == [(0.01, 0.1), (0.1, 0.2), (0.2, 0.3)]


def test_a_command_that_makes_no_sense_is_refused_without_waiting_for_a_step(trainings):
    training = trainings.start(stops=(4,))
    training.at(4)
    for kind, arguments in [("fly", {}), ("pause", {"save": "perhaps"}), ("set", {}), ("set", {"values": {"a": {}}})]:
        assert training.failed(training.send(kind, **arguments))["type"] == InvalidCommandError.__name__
    training.go()
    assert_same(training.end(), plain())


def test_a_command_to_a_dead_session_fails_at_once(trainings):
    training = trainings.start(stops=(4,))
    session = training.at(4).session.id
    training.kill()
    with pytest.raises(NoLiveSessionError):
        training.client.pause()
    with pytest.raises(NoLiveSessionError):
        training.client.pause(session=session)
    training.client.store.recover(time.time())
    with pytest.raises(NoLiveSessionError):
        training.send("pause")


def test_commands_that_came_too_late_fail_when_the_session_ends(trainings):
    training = trainings.start(stops=(-1,))
    late = training.at(-1).deliver("pause")
    training.go().end()
    assert training.failed(late)["type"] == NoLiveSessionError.__name__


# -- pending gradients -----------------------------------------------------------------------------------------


def test_a_command_waits_until_pending_gradients_are_used(trainings):
    training = trainings.start(accumulate=4, stops=(6,))
    saved = training.go_on(6, "saveCheckpoint", pin=True)
    assert saved["step"] == 8
    end = training.end()
    assert_same(end, plain(accumulate=4))
    resumed_from(trainings, training, saved, end)


def test_a_pause_does_not_wait_and_its_checkpoint_holds_the_gradients(trainings):
    training = trainings.start(accumulate=4, stops=(6,))
    paused = training.at(6).deliver("pause")
    training.go().done(paused)
    saved = training.client.save(pin=True)
    assert saved["step"] == 6
    training.client.resume()
    end = training.end()
    assert_same(end, plain(accumulate=4))
    resumed_from(trainings, training, saved, end)


def test_where_gradients_are_always_pending_the_wait_is_bounded(trainings):
    kind = {"accumulate": 90, "epochs": 20}
    training = trainings.start(stops=(3,), **kind)
    saved = training.go_on(3, "saveCheckpoint", pin=True)
    assert 3 < saved["step"] < 80
    end = training.end()
    assert_same(end, plain(**kind))
    resumed_from(trainings, training, saved, end)


def resumed_from(trainings, training, saved, end):
    """A run whose other checkpoints are gone goes on from that one to the same end."""
    for row in checkpoints(training):
        if row.hash != saved["hash"]:
            row.path.unlink()
    with training.client.store.begin() as connection:
        connection.exec_driver_sql("UPDATE run SET status = 'unfinished'")
    resumed = trainings.resume(training, run="baseline")
    result = resumed.end()
    assert len(result["losses"]) == end["step"] - saved["step"]
    assert_same(result, end, *STATE)
    assert resumed.client.events(kinds=["inexact"]) == []
