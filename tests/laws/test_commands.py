"""Every command, end to end: a real process, the store, an answer, and what became of the training."""

import math
import shutil
import time

import pytest
import torch
from law_programs import PER_EPOCH
from law_trainings import STATE, assert_same, changes_of, plain, until

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
        "loadCheckpoint",
        "resetSession",
        "testRun",
        "set",
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
    assert [c.reason for c in saved] == ["origin" if step == 0 else "pause" if step % PER_EPOCH or loop == "steps" else "epoch"]
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
    assert [c.step for c in checkpoints(training)] == [0, 8, 9, 5, 10, 15] or {
        c.step for c in checkpoints(training)
    } >= {0, 8, 9, 15}


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


# -- loadCheckpoint --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["running", "paused"])
@pytest.mark.parametrize(
    ("saved_in", "loaded_in"),
    [(3, 4), (2, 14), (7, 13), (10, 12), (0, 7), (12, 15)],
    ids=["same epoch", "first epoch from the last", "mid-epoch", "an epoch's end", "the origin", "last step of all"],
)
@pytest.mark.parametrize("kind", [{}, {"workers": 2, "persistent": True, "schedule": True}], ids=["here", "workers"])
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
    series = training.client.series("baseline", "loss")
    assert series.steps.tolist() == list(range(1, LAST + 1))
    assert series.values.tolist() == whole["losses"]
    assert training.client.run("baseline").generation == 1
    (generation,) = training.client.events(kinds=["generation"])
    assert (generation.step, generation.data["reason"]) == (saved_in, "load")
    # Equal state is equal bytes: the two runs' last checkpoints are one.
    assert checkpoints(training)[-1].hash == alone.client.checkpoints("baseline")[-1].hash


def test_a_newer_checkpoint_can_be_loaded_after_an_older_one(trainings):
    training = trainings.start(stops=(4, 9))
    older = training.go_on(4, "saveCheckpoint", pin=True)
    training.at(9)
    newer = training.deliver("saveCheckpoint", pin=True)
    back = training.deliver("loadCheckpoint", path=older["path"])
    forth = training.deliver("loadCheckpoint", path=training.pending_path(9))
    training.go()
    assert training.done(back)["step"] == 4
    assert training.done(forth)["step"] == 9
    assert training.done(newer)["step"] == 9
    assert_same(training.end(), plain())
    assert training.client.run("baseline").generation == 2


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
    """A loaded file may be gone by then: the generation that begins with it has a beginning of its own."""
    other = trainings.start(seed=5, stops=(8,))
    theirs = other.go_on(8, "saveCheckpoint", pin=True)
    whole = other.end()
    training = trainings.start(store="second", stops=(11,))
    training.at(11)
    id = training.deliver("loadCheckpoint", path=theirs["path"])
    training.go().done(id)
    training.at(11).kill()
    shutil.rmtree(trainings.store)
    resumed = trainings.resume(training)
    assert_same(resumed.end(), whole, *STATE)


def test_a_file_that_does_not_fit_is_refused_and_training_goes_on(trainings, tmp_path):
    wide = trainings.start(store="wide", width=9, stops=(7,))
    mismatching = wide.go_on(7, "saveCheckpoint", pin=True)["path"]
    other = trainings.start(store="sgd", optimizer="sgd", stops=(7,))
    other_optimizer = other.go_on(7, "saveCheckpoint", pin=True)["path"]
    training = trainings.start(stops=(6, 7), workers=2, persistent=True)
    good = training.go_on(6, "saveCheckpoint", pin=True)
    data = bytearray(open(good["path"], "rb").read())
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
    }
    training.at(7)
    ids = {path: training.deliver("loadCheckpoint", path=path) for path in expected}
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
