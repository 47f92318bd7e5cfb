"""Scans and exports of a live training: right, tied to a state, and without a trace."""

import csv
import time
from pathlib import Path

import law_programs
import numpy as np
import pytest
import torch
from law_programs import SAMPLES
from law_trainings import STATE, assert_same

from onthefly.samples.table import SampleTable

FOREIGN = {"run": "baseline", "generation": 0, "step": 7, "epoch": 1, "checkpoint": "c" * 64, "data": "train"} | {
    "columns": ["loss"],
    "length": SAMPLES,
    "hash": "d" * 64,
    "seconds": 1.0,
}


@pytest.mark.parametrize("kind", [{}, {"workers": 2}], ids=["here", "workers"])
def test_a_scan_leaves_no_trace_and_is_not_made_twice_of_one_state(trainings, kind):
    alone = trainings.start(store="alone", **kind)
    training = trainings.start(stops=(7,), **kind)
    training.at(7)
    first, second = training.deliver("scanSamples"), training.deliver("scanSamples")
    training.go()
    found, again = training.done(first), training.done(second)
    assert (found["samples"], found["step"], found["again"]) == (SAMPLES, 7, False)
    assert again["again"] is True
    assert again["path"] == found["path"]
    assert_same(training.end(), alone.end(), *STATE)
    (row,) = training.client.scans("baseline")
    assert row.checkpoint == found["checkpoint"]
    assert row.checkpoint in {c.hash for c in training.client.checkpoints("baseline", evicted=True)}
    table = SampleTable.read(row.path, content=row.hash)
    assert np.isclose(table.columns["loss"].mean(), found["loss"])


@pytest.mark.parametrize("kind", [{}, {"workers": 2, "persistent": True}], ids=["here", "workers"])
def test_samples_are_shown_as_a_scan_sees_them_without_a_trace(trainings, kind):
    """Also while training stands. The augmentation draws from all generators."""
    alone = trainings.start(store="alone", **kind)
    training = trainings.start(stops=(3, 7, 9), **kind)
    first = training.at(3).deliver("showSamples", indices=[5, 0])
    training.go()
    ids = [
        training.at(7).deliver("showSamples", indices=[5, 0]),
        training.deliver("showSamples", indices=[0, 9, 5]),
        training.deliver("showSamples", indices=[SAMPLES]),
        training.deliver("showSamples", indices=[1], data="val"),
        training.deliver("pause", save=False),
    ]
    training.go()
    found, again, more, _, _ = (training.done(id) for id in (first, *ids[:2], *ids[3:]))
    assert training.failed(ids[2])["type"] == "InvalidCommandError"
    paused = training.client.show_samples([9, 5])
    training.client.resume()
    training.at(9).go()
    assert_same(training.end(), alone.end(), *STATE)
    assert (found["again"], again["again"], again["shown"] == found["shown"]) == (False, True, True)
    tables = [training.client.shown_samples(answer["shown"]).columns for answer in (found, more, paused)]
    assert [table["index"].tolist() for table in tables] == [[5, 0], [0, 9, 5], [9, 5]]
    texts = [dict(zip(table["index"].tolist(), table["text"], strict=True)) for table in tables]
    assert texts[0] == {index: texts[1][index] for index in (5, 0)}
    assert texts[2] == {index: texts[1][index] for index in (9, 5)}
    assert (tables[0]["kind"][0], tables[0]["shape"][0], tables[0]["label"].tolist()) == ("array", "6", ["2", "0"])
    held = law_programs.Samples(1).inputs
    shown = np.array([float(number) for number in texts[0][5].split(",")])
    assert 0 < np.abs(shown - held[5].numpy()).max() < 0.6  # augmented


def test_a_fork_by_quantile_is_on_the_samples_with_the_largest_losses(trainings):
    training = trainings.start(stops=(7,), augmented=False)
    training.at(7)
    scanned = training.deliver("scanSamples")
    recipe = {"select": "quantile", "field": "loss", "low": 0.75, "high": 1.0}
    forked = training.deliver("forkRun", recipe=recipe)
    training.go()
    path, result = training.done(scanned)["path"], training.done(forked)
    training.end()
    losses = SampleTable.read(path).columns["loss"]
    chosen = training.client.selection("fork1").indices
    assert result["samples"] == len(chosen) == SAMPLES // 4
    assert set(chosen) == set(np.argsort(losses)[-len(chosen) :])


def test_samples_are_exported_with_their_values(trainings, tmp_path):
    training = trainings.start(stops=(7,))
    training.at(7)
    recipe = {"select": "indices", "indices": [3, 5, 8]}
    ids = [
        training.deliver("exportSubset", recipe=recipe, path=str(tmp_path / "three.csv")),
        training.deliver("exportSubset", recipe=recipe, path=str(tmp_path / "three.csv")),
        training.deliver("exportSubset", path=str(tmp_path / "all.txt")),
    ]
    training.go()
    assert training.done(ids[0])["rows"] == 3
    assert "already" in training.failed(ids[1])["message"]
    assert training.failed(ids[2])["type"] == "InvalidCommandError"
    training.end()
    with open(tmp_path / "three.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == [3, 5, 8]
    assert all(np.isfinite(float(row["loss"])) for row in rows)


def test_what_cannot_be_scanned_is_said(trainings, tmp_path):
    training = trainings.start(stops=(7,), test_loss=None)
    training.at(7)
    ids = [
        training.deliver("scanSamples"),
        training.deliver("scanSamples", data="test"),
        training.deliver("cancelScan"),
        training.deliver("forkRun", recipe={"select": "forgotten", "times": 1}),
        training.deliver("adoptScan", **FOREIGN, path=str(tmp_path / "of nobody's.arrow")),
    ]
    training.go()
    kinds = [training.failed(id)["type"] for id in ids]
    assert kinds == [*["MissingPartError"] * 2, "InvalidCommandError", "MissingPartError", "InvalidCommandError"]
    training.end()
    assert training.client.scans() == []


def test_what_a_loop_logs_of_its_samples_is_part_of_the_state(tmp_path, monkeypatch):
    import onthefly
    from onthefly import client as door

    monkeypatch.setenv("ONTHEFLY_STORE", str(tmp_path / "store"))
    inputs, targets = torch.randn(24, 3), torch.arange(24) % 2
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=8, shuffle=True)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorded = {}
    with onthefly.attach(
        model, optimizer, train_loader=loader, config=onthefly.SessionConfig(handle_signals=False)
    ) as session:
        for _ in session.epochs(3):
            for x, y in session:
                losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
                assert torch.equal(x, inputs[session.indices])
                session.log_samples(losses)
                for index, loss in zip(session.indices.tolist(), losses.tolist(), strict=True):
                    recorded.setdefault(index, []).append(loss)
                losses.mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    with door.connect() as client:
        table = client.samples(dynamics=True)
    assert table.columns["seen"].tolist() == [3] * 24
    means = [np.mean(recorded[index]) for index in range(24)]
    np.testing.assert_allclose(table.columns["mean_loss"], means, rtol=1e-5)


def test_a_scan_can_be_cancelled_and_training_goes_on_untouched(trainings):
    alone = trainings.start(store="alone")
    training = trainings.start(stops=(7,))
    training.at(7)
    scanned, cancelled = training.deliver("scanSamples"), training.deliver("cancelScan")
    tested = training.deliver("testRun", data="val", save=False)
    training.go()
    error = training.failed(scanned)
    assert (error["type"], "cancelled" in error["message"]) == ("CommandError", True)
    assert training.done(cancelled) == {"cancelled": True}
    training.done(tested)  # what came behind it is done
    assert_same(training.end(), alone.end(), *STATE)
    assert training.client.scans() == []


def test_a_scan_that_was_altered_on_the_disk_is_named_and_made_anew(trainings):
    """By the process that made it, and by another: a resumed one stands at the very state."""
    training = trainings.start(stops=(7, 8))
    found = training.go_on(7, "scanSamples")
    training.at(8).kill()
    whole = Path(found["path"]).read_bytes()
    Path(found["path"]).write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    client = training.client
    client.store.recover(time.time())
    assert "scan" in {finding.kind for finding in client.fsck().errors}
    assert "scan" not in {finding.kind for finding in client.fsck(full=False).errors}  # it is there
    resumed = trainings.resume(training, stops=(0, 8)).at(0)
    assert resumed.client.checkpoints("baseline")[-1].hash == found["checkpoint"]
    id = resumed.deliver("scanSamples")
    assert resumed.go().done(id)["again"] is False
    resumed.at(8).go()
    resumed.end()
    assert Path(found["path"]).read_bytes() == whole
    assert client.fsck().errors == ()
