"""Scans of checkpoints by processes of their own: what a live session's scan gives, and nothing of the training is touched."""

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


@pytest.mark.parametrize("kind", [{}, {"workers": 2}], ids=["here", "workers"])
def test_beside_a_live_training_it_is_what_that_would_have_found_and_leaves_no_trace(trainings, kind):
    other = trainings.start(store="other", stops=(7,), **kind)
    theirs = other.go_on(7, "scanSamples", embeddings=True)
    training = trainings.start(stops=(7,), command_line=True, **kind)
    training.go_on(7, "pause")
    client = training.client
    until(lambda: any(row.step == 7 for row in client.checkpoints()), "its checkpoint")
    told = []
    found = client.scan_checkpoint("baseline@7", embeddings=True, tell=told.append)
    assert (found["checkpoint"], found["step"], found["again"]) == (theirs["checkpoint"], 7, False)
    assert told
    assert client.scan_checkpoint(theirs["checkpoint"][:12])["again"] is True
    assert client.scan()["path"] == found["path"]  # the live session stands at that very state
    client.resume()
    assert_same(training.end(), other.end(), *STATE)
    table = SampleTable.read(theirs["path"])
    assert_same_values(table.columns, client.samples("baseline@7").columns)
    assert client.samples("baseline@7").about == table.about
    (row,) = client.scans()
    assert (row.checkpoint, row.path.name) == (found["checkpoint"], found["path"].rpartition("/")[2])
    assert [event.data["checkpoint"] for event in client.events(kinds=["scanned"])] == [row.checkpoint]
    assert client.fsck().errors == ()
    with pytest.raises(UnknownReferenceError, match="no scan"):
        client.samples("baseline@7", data="val")


def test_of_a_fork_on_chosen_samples_and_of_what_a_session_has_left(trainings):
    training = trainings.start(stops=(7, 8), command_line=True)
    training.go_on(7, "forkRun", recipe=CHOSEN, values={"lr": "*0.5"})
    training.go_on(8, "pause")
    client = training.client
    assert client.scan_checkpoint("baseline@7")["samples"] == 40  # of the run that the session has left
    client.resume()
    training.end()
    found = client.scan_checkpoint("fork1", "val")
    assert (found["again"], found["data"]) == (False, "val")
    assert [(row.run, row.step, row.data) for row in client.scans()] == [
        ("baseline", 7, "train"),
        ("fork1", found["step"], "val"),
    ]
    assert client.fsck().errors == ()
    events = client.events()
    assert len({(event.session, event.seq) for event in events}) == len(events)


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


def test_under_the_autocast_of_training_at_the_end_of_a_loop_in_mid_epoch(script, capsys):
    """Of a loop of one's own, which is never run, and of the Trainer's: it knows by itself."""
    with door.connect(script("live")) as client:
        live = client.samples("baseline")
    with door.connect(script("ended")) as client:
        found = client.scan_checkpoint("baseline")
        assert found["step"] == 8
        assert_same_values(live.columns, client.samples().columns)
    store = script("trainer")
    assert main(["scan", "baseline@8", "--store", str(store)]) == 0
    assert "48 samples" in capsys.readouterr().out
    assert main(["samples", "baseline@8", "--store", str(store)]) == 0
    assert "baseline@8" in capsys.readouterr().out
    with door.connect(store) as client:
        # The same data, weights and steps.
        assert_same_values(live.columns, client.samples("baseline@8").columns)


def test_a_script_that_cannot_do_it_is_quoted_and_nothing_is_recorded(script, monkeypatch):
    store = script("ended")
    with door.connect(store) as client:
        with pytest.raises(ResumeError, match=r"(?s)MissingPartError.*no val_loader"):
            client.scan_checkpoint("baseline", "val")
        monkeypatch.setenv("DIES", "1")
        with pytest.raises(
            ResumeError, match=r"(?s)exit code 3 before it had scanned baseline@8.*the data set has moved"
        ):
            client.scan_checkpoint("baseline")
        assert client.scans() == []
        assert [path for path in client.store.checkpoints_dir.iterdir() if path.name.startswith(".scan")] == []


def test_a_run_without_a_command_line_cannot_be_started_again(trainings):
    training = trainings.start()
    training.end()
    with pytest.raises(ResumeError, match=r"(?s)not started by a command line.*scan it"):
        training.client.scan_checkpoint("baseline")
