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


# -- looking into one ------------------------------------------------------------------------------------------


def test_show_lists_tensors_by_part_and_plain_values(own, ok, answer):
    found = answer("checkpoint", "show", "baseline")
    assert found["counters"] == {"step": 50, "epoch": 5, "val_loss": 1.0, "val_loss_step": 50}
    assert (found["verified"], found["recorded"]["step"], found["recorded"]["hash"]) == (False, 50, found["hash"])
    parts = {part["name"]: part for part in found["parts"]}
    model = {tensor["path"]: tensor for tensor in parts["model"]["tensors"]}
    assert model["first.weight"] == {
        "path": "first.weight", "dtype": "float32", "shape": [4, 3], "size": 48, "tied_to": None
    }  # fmt: skip
    assert (model["tied.weight"]["tied_to"], model["tied.weight"]["size"]) == ("model/first.weight", 0)
    assert model["image.weight"]["shape"] == [3, 2, 2, 2]
    assert parts["optimizer"]["values"]["param_groups/0/lr"] == 0.01
    assert {"path": "torch", "dtype": "uint8"}.items() <= parts["rng"]["tensors"][-1].items()
    text = ok("checkpoint", "show", "baseline")
    assert "counters  step 50  epoch 5  val_loss 1  val_loss_step 50" in text
    assert "lr 0.01" in text
    assert "not checked: --verify" in text


def test_show_sums_up_what_is_long(own, ok, tmp_path):
    import torch

    from onthefly.checkpoints import save_checkpoint

    model = torch.nn.Sequential(*(torch.nn.Linear(2, 3) if n % 2 == 0 else torch.nn.Linear(3, 2) for n in range(20)))
    save_checkpoint(tmp_path / "deep.safetensors", {"model": model, "nan": float("nan")})
    text = ok("checkpoint", "show", tmp_path / "deep.safetensors")
    assert len(text.splitlines()) < 20
    assert next(line.split() for line in text.splitlines() if "*.weight" in line) == [
        "*.weight", "20", "x", "float32", "various", "120", "480", "B"
    ]  # fmt: skip
    assert "counters  nan nan" in text
    assert "19.weight" in ok("checkpoint", "show", tmp_path / "deep.safetensors", "--all")


def test_show_loads_no_torch(own):
    code = (
        "import sys\nfrom onthefly.cli import main\nmain(['checkpoint', 'show', 'baseline', '--verify'])\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "False\n"
    assert "every byte matches it" in done.stdout


def test_show_says_when_bytes_do_not_match(own, run, answer):
    path = answer("checkpoint", "show", "baseline")["path"]
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert run("checkpoint", "show", "baseline")[0] == 0
    code, output, error = run("checkpoint", "show", "baseline", "--verify")
    assert (code, output) == (4, "")
    assert "its bytes do not match its hash" in error
    other = answer("checkpoint", "show", "baseline@0")["path"]
    shutil.copyfile(other, path)
    code, _, error = run("checkpoint", "show", "baseline")
    assert code == 4
    assert "was recorded" in error


# -- comparing -------------------------------------------------------------------------------------------------


def test_diff_of_equal_ones_is_short(own, ok, answer):
    assert ok("checkpoint", "diff", "baseline", "baseline@50").splitlines()[-1] == "equal, bit for bit"
    found = answer("checkpoint", "diff", "baseline", "baseline@50")
    assert (found["equal"], found["values"], found["changes"], found["rest"]) == (True, [], [], [])


def test_diff_says_how_far_every_layer_has_moved(own, ok, answer):
    import torch
    from safetensors.torch import load_file

    found = answer("checkpoint", "diff", "baseline@40", "baseline")
    a, b = load_file(found["a"]), load_file(found["b"])
    moved = {change["path"]: change["relative"] for change in found["changes"]}
    for name in ("model/first.weight", "model/last.bias"):
        wanted = torch.linalg.norm(b[name].double() - a[name].double()) / torch.linalg.norm(a[name].double())
        assert moved[name] == pytest.approx(float(wanted))
    assert list(moved.values()) == sorted(moved.values(), reverse=True)
    assert moved["model/tied.weight"] == moved["model/first.weight"]
    assert moved["model/image.weight"] == 0  # it never got a gradient
    values = {one["path"]: one["values"] for one in found["values"]}
    assert values["counters/step"] == [40, 50]
    assert any(one["path"] == "optimizer/state/0/exp_avg" for one in found["rest"])
    assert not any(one["path"].startswith("model/") for one in found["rest"])
    text = ok("checkpoint", "diff", "baseline@40", "baseline", "-n", "1")
    assert "2 tensors of the model are equal" in text
    assert len(text.splitlines()) < 20


def test_diff_names_what_only_one_has(own, ok, answer):
    rest = {one["path"]: one["text"] for one in answer("checkpoint", "diff", "baseline@0", "baseline")["rest"]}
    assert rest["optimizer/state/0"] == "in B, not in A"
    assert "in B, not in A" in ok("checkpoint", "diff", "baseline@0", "baseline")
