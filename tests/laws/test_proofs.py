"""A run that began from another's checkpoint is proved from there, with what it was born with."""

import json
import shutil
import sqlite3

from law_trainings import until

from onthefly import client as door

CHOSEN = {"select": "indices", "indices": [1, 2, 3, 5, 8, 13, 21, 34, 35, 36, 37, 38]}
FORK = {"recipe": CHOSEN, "values": {"lr": "*0.5"}}


def test_a_fork_that_was_reset_is_proved_from_its_parent_and_one_that_was_told_otherwise_is_found(trainings):
    training = trainings.start(stops=(7, 9), command_line=True)
    training.go_on(7, "forkRun", **FORK)
    reset = training.go_on(9, "resetSession")
    assert (reset["step"], reset["generation"]) == (7, 1)
    saved = training.go_on(9, "saveCheckpoint", pin=True)
    training.end()
    client = training.client
    plan = client.plan("fork1@9")
    assert (plan.start.run, plan.start.step, plan.end.hash) == ("baseline", 7, saved["hash"])
    assert [command["kind"] for command in plan.commands] == ["subset", "set"]
    assert client.plan("baseline@7", "fork1@9") == plan
    assert client.plan("fork1@9", "fork1").start.hash == saved["hash"]
    found = client.verify("fork1@9")
    assert found.equal, found.differences
    assert (found.run, found.generation, found.start.run, found.commands) == ("fork1", 1, "baseline", 2)

    altered = trainings.folder / "altered"
    shutil.copytree(trainings.store, altered)
    with sqlite3.connect(altered / "onthefly.db") as database:
        before, after = json.dumps({"lr": "*0.5"}), json.dumps({"lr": "*0.4"})
        changed = database.execute(
            "update event set data = replace(data, ?, ?) where kind = 'command' and run = 'fork1'", (before, after)
        )
        assert changed.rowcount == 4
    database.close()
    with door.connect(altered) as other:
        found = other.verify("fork1@9")
    assert not found.equal
    assert any(line.startswith("model/") for line in found.differences)


def test_so_is_a_fork_beside_and_what_follows_a_reset_begins_where_its_run_began(trainings):
    training = trainings.start(stops=(7, 8), command_line=True)
    forked = training.go_on(7, "forkRun", beside=True, **FORK)
    reset = training.go_on(8, "resetSession")
    assert (reset["step"], reset["generation"]) == (0, 1)
    training.go_on(7, "set", values={"lr": "*0.9"})
    training.go_on(8, "saveCheckpoint", pin=True)
    training.end()
    client = training.client
    until(lambda: client.run("fork1").status == "finished", "the end of the fork")
    first = min(client.checkpoints("fork1"), key=lambda row: (row.step, row.epoch))
    plan = client.plan(first.hash)
    assert (plan.start.hash, plan.end.hash) == (forked["hash"], first.hash)
    assert len(plan.commands) == 2
    beside = client.verify(first.hash)
    assert beside.equal, beside.differences
    first = min((row for row in client.checkpoints("baseline") if row.generation == 1), key=lambda row: row.step)
    plan = client.plan(first.hash)
    assert (plan.end.generation, plan.start.step, plan.start.generation, plan.start.hash) == (1, 0, 0, reset["hash"])
