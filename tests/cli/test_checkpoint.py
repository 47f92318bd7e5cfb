"""Checkpoints at the command line: real files of a real training, in a store of the test's own."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from onthefly import cli

TRAINING = """
import sys
import torch
from torch import nn
import onthefly

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)
        self.tied = nn.Linear(3, 4)
        self.tied.weight = self.first.weight
        self.image = nn.Conv2d(2, 3, 2)
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.last(self.first(x).tanh() + self.tied(x))

if __name__ == "__main__":
    torch.manual_seed(0)
    data = [(torch.randn(8, 3), torch.randn(8, 3)) for _ in range(10)]
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    config = onthefly.SessionConfig(ckpt_keep=2, ckpt_every_minutes=None)
    session = onthefly.attach(model, optimizer, train_loader=data, config=config)
    for epoch in session.epochs(int(sys.argv[1])):
        for x, y in session:
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.log(loss=loss)
            if session.step == 1:
                print("going", flush=True)
        session.log(val_loss=1.0 if epoch != 1 else 0.5)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a training of five epochs of ten steps; the second one was the best."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "training.py").write_text(TRAINING)
    environment = {**os.environ, "ONTHEFLY_STORE": str(folder / "store")}
    subprocess.run([sys.executable, "training.py", "5"], cwd=folder, env=environment, check=True, capture_output=True)
    return folder


@pytest.fixture
def own(trained, own_store):
    """A copy of that store, for this test alone."""
    shutil.copytree(trained / "store", own_store)
    return own_store


@pytest.fixture
def run(capsys):
    """Runs a command line in this process; gives exit code, stdout and stderr."""

    def run(*words):
        code = cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def ok(run):
    """Runs a command line that must succeed; gives what it printed."""

    def ok(*words):
        code, output, error = run(*words)
        assert (code, error) == (0, "")
        return output

    return ok


@pytest.fixture
def answer(ok):
    """Runs a command line with --json; gives the document."""
    return lambda *words: json.loads(ok(*words, "--json"))


# -- why it is there -------------------------------------------------------------------------------------------


def test_a_listing_says_why_each_one_is_kept(own, ok, answer):
    rows = {row["step"]: row["kept_because"] for row in answer("checkpoints", "--why")}
    assert rows == {0: ["origin"], 20: ["best"], 40: ["newest"], 50: ["newest"]}
    gone = [row for row in answer("checkpoints", "--why", "--all") if row["evicted"] is not None]
    assert {row["step"]: row["kept_because"] for row in gone} == {10: None, 30: None}
    head, *lines = ok("checkpoints", "--why").splitlines()
    assert "KEPT" in head
    assert "PINNED" not in head
    assert [line.split()[-3] for line in lines[1:]] == ["best", "newest", "newest"]
    assert "kept_because" not in answer("checkpoints")[0]
