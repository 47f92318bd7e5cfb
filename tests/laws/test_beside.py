"""Scans of checkpoints by processes of their own: what a live session's scan gives, and nothing of the training is touched."""

import json
import os
import subprocess
import sys

import pytest
from law_trainings import STATE, assert_same, until

from onthefly import client as door
from onthefly.cli import main
from onthefly.errors import ResumeError, UnknownReferenceError
from onthefly.samples.table import SampleTable

CHOSEN = {"select": "indices", "indices": [1, 2, 3, 5, 8, 13, 21, 34, 35, 36, 37, 38]}


def assert_same_values(one, other):
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert one[name].tobytes() == other[name].tobytes(), name


def test_it_is_what_the_live_session_would_have_found_and_leaves_no_trace(trainings, capsys):
    fork = {"recipe": CHOSEN, "values": {"lr": "*0.5"}}
    other = trainings.start(store="other", stops=(7,))
    other.at(7)
    ids = [other.deliver("scanSamples", embeddings=True), other.deliver("forkRun", **fork)]
    theirs, _ = other.go().done(ids[0]), other.done(ids[1])
    training = trainings.start(stops=(7,), command_line=True)
    client = training.client
    training.at(7)
    ids = [training.deliver("forkRun", **fork), training.deliver("pause")]
    training.go()
    for id in ids:
        training.done(id)
    told = []
    found = client.scan_checkpoint("baseline@7", embeddings=True, tell=told.append)  # its session has left that run
    assert (found["checkpoint"], found["step"], found["again"]) == (theirs["checkpoint"], 7, False)
    assert told
    assert client.scan_checkpoint(theirs["checkpoint"][:12])["again"] is True
    until(lambda: client.checkpoints("fork1"), "its checkpoint")
    store = ("--store", str(client.store.root))
    assert main(["scan", "--beside", "--data", "val", "--json", *store]) == 0
    of_fork = json.loads(capsys.readouterr().out)
    assert (of_fork["samples"], of_fork["again"]) == (40, False)
    assert client.scan("val")["path"] == of_fork["path"]  # the live session stands at that very state
    client.resume()
    assert_same(training.end(), other.end(), *STATE)

    table = SampleTable.read(theirs["path"])
    assert_same_values(table.columns, client.samples("baseline@7").columns)
    assert client.samples("baseline@7").about == table.about
    with pytest.raises(UnknownReferenceError, match="no scan"):
        client.samples("baseline@7", data="val")
    rows = client.scans()
    assert [(row.run, row.step, row.data) for row in rows] == [("baseline", 7, "train"), ("fork1", 7, "val")]
    events = client.events(kinds=["scanned"])
    assert [(event.run, event.data["checkpoint"]) for event in events] == [(row.run, row.checkpoint) for row in rows]
    assert client.fsck().errors == ()


SCRIPT = """
import os, sys
if "DIES" in os.environ:
    print("the data set has moved")
    sys.exit(3)
import torch, onthefly
from torch.utils.data import DataLoader, TensorDataset
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = DataLoader(TensorDataset(torch.randn(48, 4), torch.arange(48) % 3), batch_size=8, shuffle=True)
loss_fn = torch.nn.functional.cross_entropy
config = onthefly.SessionConfig(max_steps=8)
if sys.argv[1] == "trainer":
    onthefly.Trainer(config, device="cpu", amp="bf16").fit(model, optimizer, loss_fn, loader)
    sys.exit()
with onthefly.attach(model, optimizer, train_loader=loader, loss_fn=loss_fn, config=config) as session:
    for epoch in session.epochs(5):
        for x, y in session:
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    if sys.argv[1] == "live":
        session.sampling.scan("train")
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.delenv("ONTHEFLY_STORE", raising=False)

    def run(mode):
        store = tmp_path / mode
        environment = {**os.environ, "ONTHEFLY_STORE": str(store)}
        subprocess.run(
            [sys.executable, "script.py", mode], cwd=tmp_path, env=environment, check=True, stderr=subprocess.DEVNULL
        )
        return store

    return run


@pytest.mark.long
def test_under_the_autocast_of_training_at_the_end_of_a_loop_in_mid_epoch(script, capsys, monkeypatch):
    """Of a loop of one's own, which is never run, and of the Trainer's: it knows by itself."""
    with door.connect(script("live")) as client:
        live = client.samples("baseline")
        (made,) = client.scans()
        made.path.unlink()
        found = client.scan_checkpoint("baseline")
        assert (found["step"], found["again"]) == (8, False)
        assert found["checkpoint"] == made.checkpoint
        assert_same_values(live.columns, client.samples("baseline").columns)
    store = script("trainer")
    assert main(["scan", "baseline@8", "--store", str(store)]) == 0
    assert "48 samples" in capsys.readouterr().out
    assert main(["samples", "baseline@8", "--store", str(store)]) == 0
    assert "baseline@8" in capsys.readouterr().out
    with door.connect(store) as client:
        # The same data, weights and steps.
        assert_same_values(live.columns, client.samples("baseline@8").columns)
        # What it cannot do is told by its last words, and nothing of it stays.
        monkeypatch.setenv("DIES", "1")
        with pytest.raises(ResumeError, match=r"(?s)exit code 3 before it had scanned baseline@8.*data set has moved"):
            client.scan_checkpoint("baseline", embeddings=True)
        assert len(client.scans()) == 1
        assert list(client.store.checkpoints_dir.glob(".scan*")) == []


@pytest.mark.parametrize("words", ["baseline --run baseline", "baseline --cancel", "--beside --no-wait"])
def test_what_makes_no_sense_is_refused(words, capsys):
    assert main(["scan", *words.split()]) == 2
    assert "error:" in capsys.readouterr().err


def test_a_run_without_a_command_line_cannot_be_started_again(trainings):
    training = trainings.start()
    training.end()
    with pytest.raises(ResumeError, match=r"(?s)not started by a command line.*scan it"):
        training.client.scan_checkpoint("baseline")
