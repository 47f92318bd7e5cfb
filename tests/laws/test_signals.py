"""SIGINT and SIGTERM: finish the step, save, leave; and what was left can be gone on with exactly."""

import os
import signal

import pytest
import torch
from law_trainings import STATE, assert_same, plain, until

import onthefly
from onthefly.store import queries

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
OUTCOMES = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
EACH = pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)


def check_it_left_well(trainings, training, number, step, **kind):
    """It ended with the right code at the right step, and goes on from there to the same end."""
    assert training.end(CODES[number]) is None
    with trainings.opened() as store:
        (session,) = queries.sessions(store)
        assert (session.status, session.outcome) == ("ended", OUTCOMES[number])
        assert queries.run(store, "baseline").status == "unfinished"
        newest = queries.newest_checkpoint(store, "baseline")
        assert newest.step == step
    resumed = trainings.resume(training, group=False, context="fork")
    end = resumed.end()
    expected = plain(**{name: value for name, value in kind.items() if name not in ("group", "context")})
    assert len(end["losses"]) == len(expected["losses"]) - step
    assert_same(end, expected, *STATE)
    assert resumed.client.events(kinds=["inexact"]) == []


@EACH
@pytest.mark.parametrize("loop", ["epochs", "steps"])
def test_the_step_is_finished_and_saved(trainings, number, loop):
    training = trainings.start(stops=(7,), loop=loop)
    training.at(7).signal(number)
    training.go()
    check_it_left_well(trainings, training, number, 7, loop=loop)


@EACH
def test_before_the_first_step_there_is_nothing_to_finish(trainings, number):
    training = trainings.start(stops=(0,))
    training.at(0).signal(number)
    training.go()
    check_it_left_well(trainings, training, number, 0)


@EACH
def test_a_paused_session_leaves_too(trainings, number):
    training = trainings.start(stops=(7,))
    paused = training.at(7).deliver("pause", save=False)
    training.go().done(paused)
    training.signal(number)
    check_it_left_well(trainings, training, number, 7)


@EACH
def test_pending_gradients_are_used_first(trainings, number):
    training = trainings.start(stops=(6,), accumulate=4)
    training.at(6).signal(number)
    training.go()
    check_it_left_well(trainings, training, number, 8, accumulate=4)


@EACH
@pytest.mark.parametrize("kind", [{}, {"persistent": True, "val_workers": False}], ids=["new workers", "persistent"])
def test_with_forked_workers_the_whole_group_gets_it(trainings, number, kind):
    kind = {"workers": 2, "augmented": False, "group": True, **kind}
    training = trainings.start(stops=(7,), **kind)
    training.at(7).signal(number)
    training.go()
    check_it_left_well(trainings, training, number, 7, **kind)
    until(lambda: not group_lives(training.pid), "the end of its workers")


@EACH
def test_spawned_workers_get_it_too(trainings, number):
    """While they are being started: they need seconds until they run anything of ours."""
    kind = {"workers": 1, "augmented": False, "group": True, "context": "spawn", "val_workers": False, "epochs": 1}
    training = trainings.start(stops=(0,), command_line=True, **kind)
    training.at(0).go()
    until(lambda: any("spawn_main" in command_line(pid) for pid in training.children()), "a worker")
    training.signal(number)
    check_it_left_well(trainings, training, number, 1, **kind)
    until(lambda: not group_lives(training.pid), "the end of its workers")


def command_line(pid):
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read()
    except OSError:  # it is gone
        return ""


def group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_second_sigint_leaves_at_once(trainings):
    training = trainings.start(stops=(7,), command_line=True)
    training.at(7).signal(signal.SIGINT)
    until(lambda: "Ctrl-C again leaves at once" in training.said, "the answer to the first")
    training.signal(signal.SIGINT)
    assert training.end(-signal.SIGINT) is None  # what a shell calls 130
    with trainings.opened() as store:
        (session,) = queries.sessions(store)
        assert (session.status, session.outcome) == ("ended", "failed")
        assert queries.run(store, "baseline").status == "unfinished"
    resumed = trainings.resume(training)
    assert_same(resumed.end(), plain(), *STATE)
    assert resumed.client.events(kinds=["inexact"]) == []


def attached(folder, **config):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return onthefly.attach(model, optimizer, config=onthefly.SessionConfig(store=folder, **config))


@EACH
def test_handlers_are_put_back_at_close(tmp_path, number):
    def mine(number, frame):
        raise AssertionError("nobody sent it")

    before = signal.signal(number, mine)
    try:
        with attached(tmp_path):
            assert signal.getsignal(number) is not mine
        assert signal.getsignal(number) is mine
        with attached(tmp_path) as session:
            for _ in session.steps(2):
                pass
            assert signal.getsignal(number) is mine  # after the loop there is no step to finish
        with attached(tmp_path, handle_signals=False):
            assert signal.getsignal(number) is mine
    finally:
        signal.signal(number, before)


@EACH
def test_a_handler_that_was_installed_later_stays(tmp_path, number):
    def mine(number, frame):
        raise AssertionError("nobody sent it")

    before = signal.getsignal(number)
    try:
        with attached(tmp_path):
            signal.signal(number, mine)
        assert signal.getsignal(number) is mine
    finally:
        signal.signal(number, before)
