"""Law 1 and 3, at their hardest: `kill -9` at any moment, and the run goes on as if nothing had happened."""

import math
import random
import time
from pathlib import Path

import pytest
from law_programs import PER_EPOCH
from law_trainings import STATE, assert_same, changes_of, plain, until

import onthefly
from onthefly.errors import CommandError
from onthefly.store import queries


@pytest.mark.parametrize(
    ("kills", "kind"),
    [
        pytest.param(30, {"epochs": 100, "schedule": True}, marks=pytest.mark.long),
        (3, {"epochs": 20, "workers": 2, "accumulate": 3, "augmented": False}),
        (3, {"epochs": 20, "workers": 2, "persistent": True, "augmented": False}),
        (3, {"epochs": 100, "loop": "steps"}),
    ],
    ids=["thirty times", "workers and accumulation", "persistent workers", "without a loader"],
)
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_never_was(trainings, kills, kind):
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    last = kind["epochs"] * PER_EPOCH
    config = {"ckpt_every_steps": 7}
    training = trainings.start(stops=(last,), config=config, **kind)
    assert training.session  # before there is one, there is nothing to resume
    lives = []
    for _ in range(kills):
        steer(training, rng)
        wait_for_a_random_moment(training, rng)
        training.kill()
        lives.append(training)
        with trainings.opened() as store:
            check_what_is_left(store, lives)
        training = trainings.resume(training, stops=(last,))
    training.at(last).go()
    end = training.end()
    lives.append(training)

    with trainings.opened() as store:
        assert store.recover(time.time()) == []
        given = changes_of(store, "baseline")
        logged = check_what_is_left(store, lives)
        assert sorted(logged) == list(range(1, last + 1))
        assert queries.events(store, kinds=["inexact", "lost", "checkpointFailed"]) == []
        assert queries.run(store, "baseline").status == "finished"
        *killed, ended = queries.sessions(store)  # some died before they had one
        assert {row.status for row in killed} == {"killed"}
        assert ended.status == "ended"
    print(
        len(given),
        "changes at",
        [step for step, _, _ in given],
        "killed in",
        [[s for s, _ in t.taken()][:: len(t.taken()) - 1 or 1][:2] for t in lives],
    )
    assert_same(end, plain(given=given, **kind), *STATE)


def steer(training, rng):
    """Send some changes, now or as soon as there is a session; nobody waits for them."""
    if rng.random() < 0.3:
        return
    for _ in range(rng.choice((1, 1, 2))):
        values = rng.choice(
            [
                {"lr": rng.uniform(0.001, 0.02)},
                {"weight_decay": rng.uniform(0, 0.1)},
                {"grad_clip": rng.uniform(0.5, 2)},
                {"noise": rng.uniform(0, 0.1), "lr": rng.uniform(0.001, 0.02)},
            ]
        )
        training.send("set", values=values)


def wait_for_a_random_moment(training, rng):
    """Somewhere in its life: before it has a session, in its first steps, or after any number of further writes."""
    if rng.random() < 0.15:
        time.sleep(rng.uniform(0, 0.2))
        return
    journal = Path(training.program.store) / "journals" / f"{training.session.id}.journal"
    until(lambda: journal.exists() and journal.stat().st_size, "a journal")
    wanted = journal.stat().st_size + int(math.exp(rng.uniform(math.log(100), math.log(20_000))))
    until(lambda: journal.stat().st_size >= wanted or training.standing, "further writes")
    for _ in range(rng.randrange(5000)):  # a moment that no write marks
        pass


def check_what_is_left(store, lives):
    """After a death: it is known as one, nothing stays queued, and every value that was logged is there, once."""
    store.recover(time.time())
    for row in queries.sessions(store):
        assert row.ended is not None
        assert store.queued_commands(row.id) == []
    logged = {}
    for training in lives:
        for step, loss in training.taken():
            assert logged.setdefault(step, loss) == loss, f"step {step} came out otherwise when it was repeated"
    series = queries.series(store, "baseline", "loss")
    there = dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))
    assert len(there) == len(series.steps), "a step is there twice"
    assert {step: there.get(step) for step in logged} == logged
    # It may have died between writing the last one down and saying so.
    assert len(there) - len(logged) <= len(lives)
    return there


def test_a_command_that_a_killed_session_never_came_to_has_failed(trainings):
    training = trainings.start(stops=(4,))
    id = training.at(4).deliver("saveCheckpoint")
    session = training.session.id
    training.kill()
    with trainings.opened() as store:
        assert store.recover(time.time()) == [session]
        assert queries.session(store, session).status == "killed"
        row = queries.command(store, id)
        assert (row.status, row.error["type"]) == ("failed", "NoLiveSessionError")
        assert queries.run(store, "baseline").status == "unfinished"


def test_killed_before_the_first_checkpoint_it_begins_anew(trainings):
    training = trainings.start(stops=(0,))
    training.at(0).kill()
    resumed = trainings.resume(training)
    assert_same(resumed.end(), plain())


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "empty", "foreign"])
def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before(trainings, damage):
    training = trainings.start(stops=(3, 8), config={"ckpt_every_steps": 2})
    given = training.at(3).deliver("set", values={"lr": 0.02})
    training.go().done(given)
    training.at(8)
    until(lambda: any(row.step == 6 for row in training.client.checkpoints("baseline")), "the checkpoint of step 6")
    training.kill()
    with trainings.opened() as store:
        store.recover(time.time())
        *_, before, newest = queries.checkpoints(store, "baseline")
        changes = changes_of(store, "baseline")
    assert (before.step, newest.step) == (5, 6)
    data = bytearray(newest.path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 4
    elif damage == "cut":
        del data[-5000:]
    elif damage == "empty":
        data.clear()
    elif damage == "foreign":
        data[:] = before.path.read_bytes()  # whole, and not what was recorded
    newest.path.write_bytes(data)
    if damage == "gone":
        newest.path.unlink()
    resumed = trainings.resume(training)
    end = resumed.end()
    assert len(end["losses"]) == 3 * PER_EPOCH - before.step
    assert_same(end, plain(given=changes), *STATE)
    assert resumed.client.events(kinds=["inexact"]) == []
    assert "passing over a checkpoint" in resumed.said or damage == "foreign"


def test_a_run_is_not_resumed_from_a_state_that_was_imported_into_it(trainings, tmp_path):
    training = trainings.start(stops=(4, 8), config={"ckpt_every_epoch": False})
    training.go_on(4, "saveCheckpoint")
    training.at(8).kill()
    with onthefly.connect(trainings.store) as client:
        client.export("baseline@0", tmp_path / "other.pt")
        for _ in range(3):
            assert client.import_file(tmp_path / "other.pt", into="baseline@4").reason == "import"
        assert [client.resolve(ref).reason for ref in ("baseline", "baseline@4")] == ["manual", "manual"]
        client.gc(keep=1)
        with pytest.raises(CommandError, match="what a resume would begin with"):
            client.remove("baseline@4")
    end = trainings.resume(training).end()
    assert len(end["losses"]) == 3 * PER_EPOCH - 4
    assert_same(end, plain(), *STATE)


def test_a_change_made_before_a_repeated_stretch_was_saved_anew_is_not_forgotten(trainings):
    """Killed, resumed, and killed again between a checkpoint of the second life and a change of the first."""
    training = trainings.start(stops=(4, 8, 10), config={"ckpt_every_epoch": False, "undo": False})
    training.go_on(4, "saveCheckpoint")
    changed = training.at(8).deliver("set", values={"lr": 0.05})
    training.go().done(changed)
    training.at(10).kill()
    second = trainings.resume(training, stops=(6, 7))
    second.at(6)
    saved = second.deliver("saveCheckpoint")
    second.go().done(saved)
    second.at(7).kill()
    third = trainings.resume(second)
    end = third.end()
    with trainings.opened() as store:
        given = changes_of(store, "baseline")
    assert [step for step, _, _ in given] == [8]
    assert_same(end, plain(given=given), *STATE)
