"""Merges in a live training: judged without a trace, committed whole or not at all, and gone on with exactly."""

import shutil

import numpy as np
import pytest
import torch
from law_trainings import STATE, assert_same

from onthefly.checkpoints.format import open_checkpoint
from onthefly.errors import CorruptCheckpointError
from onthefly.runs import manifest
from onthefly.state.tree import unflatten

SAMPLES = {"select": "indices", "indices": [1, 2, 3, 5, 8, 13, 21, 34, 35, 36, 37, 38]}
OTHERS = {"select": "indices", "indices": [0, 4, 6, 7, 9, 10, 11, 12, 14, 15, 16, 17]}


def branched(trainings, **program):
    """A training that stands in step 9 of fork2; and its parents. fork1 left baseline in step 3, fork2 in step 5."""
    training = trainings.start(stops=(3, 5, 7, 9), epochs=4, **program)
    training.go_on(3, "forkRun", recipe=SAMPLES)
    training.go_on(5, "switchRun", run="baseline")
    training.go_on(5, "forkRun", recipe=OTHERS)
    training.at(7).go().at(9)
    rows = training.client.checkpoints()
    parents = {
        run: {"path": str(row.path), "hash": row.hash}
        for run in ("baseline", "fork1")
        for row in rows
        if row.run == run
    }
    return training, [parents["baseline"], parents["fork1"], {}]


def value_of(row):
    file = open_checkpoint(row.path)
    return unflatten(file.tree, file.tensors)


def test_a_preview_is_a_table_and_leaves_no_trace(trainings):
    alone, _ = branched(trainings, store="alone")
    alone.go()
    training, parents = branched(trainings)
    preview = training.deliver("mergeRuns", parents=parents, base=parents[0], strategies=["all"])
    training.go()
    table = training.done(preview)
    assert table["parents"] == ["baseline", "fork1", "fork2"]
    assert {"swa", "fisher", "regmean", "ties", "task_arithmetic", "greedy"} <= set(table["candidates"])
    assert "weighted" in table["skipped"]
    assert table["slices"][:4] == ["val", "class 0", "class 1", "class 2"]
    assert {"fork1's samples", "fork2's samples"} <= set(table["slices"])
    for scores in table["scores"].values():
        assert scores["val"]["samples"] == 40
        assert 0 <= scores["val"]["accuracy"] <= 1
        assert np.isclose(
            scores["val"]["accuracy"],
            sum(scores[f"class {c}"]["accuracy"] * scores[f"class {c}"]["samples"] for c in range(3)) / 40,
        )
    assert "val" not in table["worse"]["greedy"]
    pair = table["explained"]["pairs"][0]
    assert (pair["first"], pair["second"]) == ("baseline", "fork1")
    assert len(table["explained"]["paths"][0]["losses"]) == 5
    assert table["committed"] is None
    assert_same(training.end(), alone.end(), *STATE)
    assert [path.name for path in training.client.store.checkpoints_dir.iterdir() if ".merge" in path.name] == []


def test_what_was_measured_of_a_parent_is_not_measured_again(trainings):
    training, parents = branched(trainings)
    told = {"parents": parents, "strategies": ["fisher"], "floor": False}
    ids = [training.deliver("mergeRuns", **told), training.deliver("mergeRuns", **told, commit="fisher")]
    training.go()
    first, again = (training.done(id) for id in ids)
    assert first["scores"] == again["scores"]
    training.end()
    client = training.client
    files = sorted(client.store.statistics_dir.iterdir())
    assert len(files) == 3
    assert client.verify_merge("merge1").equal
    assert not client.fsck().errors
    data = bytearray(files[0].read_bytes())
    data[-1] ^= 1
    files[0].write_bytes(data)
    assert [finding.kind for finding in client.fsck().errors] == ["statistics"]
    with pytest.raises(CorruptCheckpointError):
        client.verify_merge("merge1")


@pytest.mark.parametrize("kind", [{}, {"workers": 2}], ids=["here", "workers"])
def test_a_committed_merge_is_gone_on_with_exactly_though_its_process_is_killed(trainings, kind):
    told = {"strategies": ["fisher", "swa"], "commit": "swa", "floor": False, "warmup": 2}
    whole, parents = branched(trainings, store="whole", **kind)
    merge = whole.deliver("mergeRuns", parents=parents, **told)
    result = whole.go().done(merge)
    assert (result["committed"], result["run"], result["from"]) == ("swa", "merge1", "fork2")
    end = whole.end()
    other, parents = branched(trainings, store="other", **kind)
    merge = other.deliver("mergeRuns", parents=parents, **told)
    assert other.go().done(merge)["hash"] == result["hash"]
    other.kill()
    assert_same(trainings.resume(other, run="merge1").end(), end, *STATE)

    client = whole.client
    run = client.run("merge1")
    assert (run.kind, run.status, client.run("fork2").status) == ("merge", "finished", "left")
    assert [parent for parent, _ in run.parents] == ["baseline", "fork1", "fork2"]
    origin = client.checkpoints("merge1")[0]
    assert (origin.hash, origin.reason, origin.step) == (result["hash"], "origin", 9)
    # The forks were on some samples; a merge is on all.
    assert value_of(origin)["loader"]["subset"] is not None
    assert value_of(client.checkpoints("merge1")[-1])["loader"]["subset"] is None
    rows = {row.hash: row for row in client.checkpoints()}
    models = [value_of(rows[content])["model"] for _, content in run.parents]
    merged = value_of(origin)["model"]
    for name in ("0.weight", "4.bias"):
        mean = sum(model[name].double() for model in models) / 3
        torch.testing.assert_close(merged[name], mean.float(), rtol=0, atol=0)
    assert not torch.equal(merged["1.running_mean"], models[0]["1.running_mean"])
    found = manifest.read(client.store.manifests_dir / f"{run.manifest[:16]}.json")
    assert found.merge["recalibrated"]["buffers"] == ["1.num_batches_tracked", "1.running_mean", "1.running_var"]
    assert found.merge["strategy"] == "swa"
    assert found.merge["preview"]["scores"].keys() >= {"baseline", "fork1", "fork2", "swa"}
    assert not client.fsck().errors

    proof = client.verify_merge("merge1")
    assert (proof.equal, proof.tensors, proof.recalibrated) == (True, 6, tuple(found.merge["recalibrated"]["buffers"]))
    assert proof.parents == ("baseline@5", "fork1@5", "fork2@9")


def test_a_merge_can_be_undone(trainings):
    alone, _ = branched(trainings, store="alone")
    alone.go()
    training, parents = branched(trainings)
    merge = training.deliver("mergeRuns", parents=parents, strategies=["swa"], commit="swa", floor=False)
    back = training.deliver("undo")
    training.go().done(merge)
    assert training.done(back)["run"] == "fork2"
    assert_same(training.end(), alone.end(), *STATE)


def test_nothing_below_the_best_parent_is_committed(trainings):
    training, parents = branched(trainings)
    # A task vector of ten times its length is worse than anything.
    told = {"parents": parents, "base": parents[0], "strategies": ["task_arithmetic"], "options": {"scale": 50.0}}
    refused = training.deliver("mergeRuns", **told, commit="best", metric="loss")
    taken = training.deliver("mergeRuns", **told, commit="best", metric="loss", floor=False)
    training.go()
    result = training.done(refused)
    assert result["committed"] is None
    assert "nothing was committed" in result["refused"]
    assert training.done(taken)["run"] == "merge1"
    training.end()
    assert [run.name for run in training.client.runs()] == ["baseline", "fork1", "fork2", "merge1"]


def test_bad_merges_are_refused_and_leave_everything_as_it_was(trainings):
    alone, _ = branched(trainings, store="alone")
    alone.go()
    training, (baseline, fork1, now) = branched(trainings)
    damaged = training.client.store.checkpoints_dir / "damaged.safetensors"
    data = bytearray(open_checkpoint(fork1["path"]).path.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    cases = [
        ({"parents": [now]}, "InvalidCommandError"),
        ({"parents": [baseline, baseline]}, "InvalidCommandError"),
        ({"parents": [baseline, {"path": str(damaged)}]}, "UnknownReferenceError"),
        ({"parents": [baseline, fork1], "strategies": ["sway"]}, "InvalidCommandError"),
        ({"parents": [baseline, fork1], "strategies": ["ties"]}, "InvalidCommandError"),
        ({"parents": [baseline, fork1], "strategies": ["weighted"], "weights": [1.0]}, "InvalidCommandError"),
        ({"parents": [baseline, fork1], "strategies": ["weighted"], "weights": [0.0, 0.0]}, "InvalidCommandError"),
        ({"parents": [baseline, fork1], "options": {"densitty": 1}}, "InvalidCommandError"),
        ({"parents": [baseline, fork1], "judge": "class 9"}, "InvalidCommandError"),
        ({"parents": [baseline, fork1], "judge": "class 9", "strategies": ["all"]}, "InvalidCommandError"),
        ({"parents": [baseline, fork1], "name": "a/b"}, "InvalidCommandError"),
        (
            {"parents": [baseline, fork1], "slices": {"val": {"select": "top", "field": "loss", "k": 3}}},
            "InvalidCommandError",
        ),
        ({"parents": [baseline, fork1], "commit": "ties"}, "InvalidCommandError"),
        (
            {"parents": [baseline, fork1], "slices": {"none": {"select": "range", "field": "loss", "low": 1e9}}},
            "InvalidCommandError",
        ),
    ]
    ids = [training.deliver("mergeRuns", **arguments) for arguments, _ in cases]
    training.go()
    for id, (arguments, kind) in zip(ids, cases, strict=True):
        assert training.failed(id)["type"] == kind, arguments
    assert_same(training.end(), alone.end(), *STATE)


def test_a_parent_of_another_content_than_was_recorded_is_refused(trainings):
    training, parents = branched(trainings)
    shutil.copyfile(parents[0]["path"], parents[1]["path"])
    merge = training.deliver("mergeRuns", parents=parents, strategies=["swa"], commit="swa", floor=False)
    assert training.go().failed(merge)["type"] == "CorruptCheckpointError"
    training.end()


def test_what_is_merged_stays_though_retention_would_let_it_go(trainings):
    training = trainings.start(stops=(2, 4, 6), epochs=3, config={"ckpt_keep": 2, "ckpt_every_epoch": False})
    rows = [training.go_on(step, "saveCheckpoint") for step in (2, 4)]
    parents = [{"path": row["path"], "hash": row["hash"]} for row in rows]
    training.at(6)
    merge = training.deliver("mergeRuns", parents=[*parents, {}], strategies=["swa"], commit="swa", floor=False)
    training.go().done(merge)
    training.end()
    assert training.client.verify_merge("merge1").equal
    assert not training.client.fsck().errors


@pytest.mark.parametrize(
    ("program", "kind", "words"),
    [
        ({"factory": None}, "MissingPartError", "model_factory"),
        ({"factory": 9}, "StateMismatchError", "model_factory"),
        ({"factory": 0}, "InvalidCommandError", "shares"),
        ({"test_loss": None}, "MissingPartError", "loss"),
    ],
)
def test_what_a_merge_lacks_is_said(trainings, program, kind, words):
    training, parents = branched(trainings, **program)
    id = training.deliver("mergeRuns", parents=parents)
    error = training.go().failed(id)
    assert error["type"] == kind
    assert words in error["message"]
    training.end()
