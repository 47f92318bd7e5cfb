"""Law 2: looking never changes the run."""

import random

import pytest
from law_programs import PER_EPOCH, SAMPLES
from law_trainings import assert_same, plain

from onthefly.health.findings import KINDS as REPORTS

KINDS = [
    {"workers": 0},
    {"workers": 0, "schedule": True, "accumulate": 3},
    {"workers": 2},
    {"workers": 2, "persistent": True},
]


def name(kind):
    return "-".join(f"{key}={value}" for key, value in kind.items())


@pytest.mark.parametrize("kind", KINDS[:2], ids=name)
def test_an_attached_run_is_the_plain_loop(trainings, kind):
    assert_same(trainings.start(**kind).end(), plain(**kind))


@pytest.mark.parametrize("loop", ["batches", "steps"])
def test_other_attached_loops_are_the_plain_loop(trainings, loop):
    if loop == "steps":
        assert_same(trainings.start(loop=loop).end(), plain(loop=loop))
    else:  # a plain loop over one epoch of a loader
        assert_same(trainings.start(loop=loop, epochs=1).end(), plain(loop=loop, epochs=1))


def test_with_workers_and_without_exact_augmentation_an_attached_run_is_the_plain_loop(trainings):
    kind = {"workers": 2, "persistent": True}
    assert_same(trainings.start(**kind, config={"exact_augmentation": False}).end(), plain(**kind))


@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_twenty_looks_leave_no_trace(trainings, kind):
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    epochs = 6
    steps = range(1, epochs * PER_EPOCH + 1)
    stops = tuple(sorted(rng.sample(steps, 20)))
    left_alone = trainings.start(epochs=epochs, store="alone", **kind)
    looked_at = trainings.start(epochs=epochs, stops=stops, **kind)
    for step in stops:
        look(looked_at.at(step), rng)
    assert_same(looked_at.end(), left_alone.end())
    kinds = {event.kind for event in looked_at.client.events()}
    assert not kinds & {"inexact", "command", "generation", "checkpointFailed"}


def look(training, rng):
    """Do one of the things that must not matter to a training that stands in a step, and let it on."""
    what = rng.choice(["pause", "save", "test", "val", "status", "lr", "nothing", "pin", "report", "show"])
    if what == "status":
        assert [row.pid for row in training.client.status().live] == [training.pid]
        training.client.latest("baseline")
        training.go()
        return
    commands = {
        "pause": ("pause", {"save": rng.random() < 0.5}),
        "save": ("saveCheckpoint", {}),
        "pin": ("saveCheckpoint", {"pin": True}),
        "test": ("testRun", {"save": rng.random() < 0.5}),
        "val": ("testRun", {"data": "val", "save": False}),
        "report": ("report", {"report": rng.choice(REPORTS), "steps": 2}),
        "show": ("showSamples", {"indices": rng.sample(range(SAMPLES), 3)}),
        "lr": ("set", {"values": {"lr": _lr(training)}}),
        "nothing": ("set", {"values": {"noise": 0.01, "weight_decay": "*1"}}),
    }
    kind, arguments = commands[what]
    id = training.deliver(kind, **arguments)
    training.go()
    if what == "pause":
        training.done(id)
        if rng.random() < 0.5:
            training.client.test("val")
        training.client.resume()


def _lr(training):
    return "*1.0" if training.program.schedule else 0.01
