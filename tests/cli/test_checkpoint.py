"""Checkpoints at the command line: real files of a real training, in a store of the test's own."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest

from onthefly import cli

TRAINING = """
import sys
import time
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
            if len(sys.argv) > 2:
                time.sleep(0.02)
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
def live(trained, own, answer, wait_until):
    """Starts a training in that store that goes on until the test ends; gives its process when it can be commanded."""
    started = []

    def start():
        command = [sys.executable, "training.py", "100000", "slowly"]
        process = subprocess.Popen(command, cwd=trained, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started.append(process)
        wait_until(lambda: process.poll() is not None or any(live["step"] for live in answer("status")["live"]))
        assert process.poll() is None
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


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


# -- taking out ------------------------------------------------------------------------------------------------


def weights_of(path):
    """The stored tensors of a checkpoint's model, by their names in it."""
    from onthefly.checkpoints.weights import value_of

    return value_of(path)["model"]


def network(folder):
    """The trained class, made anew, as another tool would."""
    space = {"__name__": "training"}
    exec((folder / "training.py").read_text(), space)
    return space["Net"]()


def test_an_exported_pt_is_a_plain_state_dict(trained, own, ok, answer, tmp_path):
    import torch

    out = tmp_path / "model.pt"
    assert ok("checkpoint", "export", "baseline", out).startswith("exported model  8 tensors  ")
    state = torch.load(out, weights_only=True)
    model = network(trained)
    model.load_state_dict(state)
    stored = weights_of(answer("checkpoint", "show", "baseline")["path"])
    assert list(state) == list(model.state_dict()) == list(stored)
    assert all(torch.equal(state[name], stored[name]) and state[name].is_contiguous() for name in state)
    assert not stored["image.weight"].is_contiguous()


def test_an_exported_safetensors_has_every_name(trained, own, answer, tmp_path):
    import torch
    from safetensors.torch import load_file

    found = answer("checkpoint", "export", "baseline", tmp_path / "model.safetensors")
    assert (found["part"], found["tensors"]) == ("model", 8)
    assert found["size"] == (tmp_path / "model.safetensors").stat().st_size
    state = load_file(tmp_path / "model.safetensors")
    model = network(trained)
    model.load_state_dict(state)
    stored = weights_of(answer("checkpoint", "show", "baseline")["path"])
    assert {name: t.tolist() for name, t in state.items()} == {name: t.tolist() for name, t in stored.items()}
    assert torch.equal(state["tied.weight"], state["first.weight"])


def test_any_part_can_be_exported(own, ok, run, tmp_path):
    import torch

    ok("checkpoint", "export", "baseline", tmp_path / "o.pt", "--only", "optimizer")
    state = torch.load(tmp_path / "o.pt", weights_only=True)
    assert (state["param_groups"][0]["lr"], state["state"][0]["exp_avg"].shape) == (0.01, (4, 3))
    code, _, error = run("checkpoint", "export", "baseline", tmp_path / "o.safetensors", "--only", "optimizer")
    assert (code, "optimizer/class: a str has no place" in error) == (3, True)
    code, _, error = run("checkpoint", "export", "baseline", tmp_path / "x.pt", "--only", "ema")
    assert (code, "has no 'ema'; it has: model, optimizer" in error) == (2, True)
    assert run("checkpoint", "export", "baseline", tmp_path / "model.onnx")[0] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.pt", "store"]


def test_of_several_models_one_is_chosen(own, ok, run, tmp_path):
    import torch

    from onthefly.checkpoints import save_checkpoint

    nets = {"gen": torch.nn.Linear(1, 2), "disc": torch.nn.Linear(2, 1)}
    save_checkpoint(tmp_path / "gan.safetensors", {"nets": nets})
    code, _, error = run("checkpoint", "export", tmp_path / "gan.safetensors", tmp_path / "g.pt")
    assert (code, "several models: nets/gen, nets/disc; choose one with --only NAME" in error) == (2, True)
    ok("checkpoint", "export", tmp_path / "gan.safetensors", tmp_path / "g.pt", "--only", "nets/gen")
    nets["gen"].load_state_dict(torch.load(tmp_path / "g.pt", weights_only=True))


def test_an_export_never_replaces_a_file_unasked(own, ok, run, tmp_path):
    out = tmp_path / "model.pt"
    out.write_text("precious")
    code, _, error = run("checkpoint", "export", "baseline", out)
    assert (code, error) == (4, f"error: there is such a file already; --force replaces it: {out}\n")
    assert out.read_text() == "precious"
    ok("checkpoint", "export", "baseline", out, "--force")
    assert out.read_bytes()[:2] == b"PK"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "store"]


def test_an_export_without_the_library_says_what_to_install(own, tmp_path):
    code = (
        "import sys\nsys.modules['safetensors'] = None\nfrom onthefly.cli import main\n"
        "sys.exit(main(['checkpoint', 'export', 'baseline', sys.argv[1]]))"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run([*run, str(tmp_path / "m.safetensors")], capture_output=True, text=True)
    assert (done.returncode, done.stderr[:6]) == (6, "error:")
    assert "pip install 'onthefly[export]'" in done.stderr
    assert subprocess.run([*run, str(tmp_path / "m.pt")], capture_output=True).returncode == 0


# -- bringing in -----------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_store_is_copied_and_recorded(own, ok, answer, tmp_path):
    row = answer("checkpoint", "show", "baseline@20")["recorded"]
    for words in ((), ("--run", "baseline")):  # known by its sidecar, and not known
        foreign = tmp_path / f"foreign{len(words)}.safetensors"
        shutil.copyfile(row["path"], foreign)
        if not words:
            shutil.copyfile(row["path"] + ".meta.json", f"{foreign}.meta.json")
        found = answer("checkpoint", "import", foreign, *words)
        assert (found["run"], found["step"], found["epoch"], found["hash"]) == ("baseline", 20, 2, row["hash"])
        assert (found["reason"], found["pinned"], found["metrics"]) == ("import", True, {"val_loss": 0.5})
    names = sorted(path.name for path in (own / "checkpoints").glob("baseline-step00000020*.safetensors"))
    assert names == [f"baseline-step00000020{variant}.safetensors" for variant in ("-v1", "-v2", "")]
    assert answer("checkpoint", "show", "baseline@20", "--verify")["recorded"]["reason"] == "epoch"
    assert "(import) pinned" in ok("log")


def test_a_checkpoint_that_cannot_come_in_leaves_nothing(own, run, answer, tmp_path):
    before = sorted((own / "checkpoints").iterdir())
    foreign = tmp_path / "foreign.safetensors"
    shutil.copyfile(answer("checkpoint", "show", "baseline")["path"], foreign)
    code, _, error = run("checkpoint", "import", foreign)
    assert (code, error) == (2, f"error: {foreign} does not say which run it is of; give --run NAME\n")
    code, _, error = run("checkpoint", "import", foreign, "--run", "other")
    assert (code, error) == (2, "error: there is no run 'other'; there are: baseline\n")
    assert run("checkpoint", "import", foreign, "--run", "baseline", "--into", "baseline")[0] == 2
    with open(foreign, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    code, _, error = run("checkpoint", "import", foreign, "--run", "baseline")
    assert (code, "foreign.safetensors: its bytes do not match its hash" in error) == (4, True)
    assert sorted((own / "checkpoints").iterdir()) == before


def test_what_was_imported_is_no_stretch_to_verify(own, ok, run, tmp_path):
    from onthefly.client import connect

    ok("checkpoint", "export", "baseline@20", tmp_path / "weights.pt")
    imported = json.loads(ok("checkpoint", "import", tmp_path / "weights.pt", "--into", "baseline@50", "--json"))
    with connect() as client:
        plan = client.plan()
    assert (plan.start.step, plan.end.step, plan.end.reason) == (40, 50, "epoch")
    code, _, error = run("verify", "baseline@40", "--to", imported["hash"])
    assert (code, "no steps lead from" in error) == (2, True)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_come_into_a_train_state(own, ok, answer, tmp_path, suffix):
    import torch

    ok("checkpoint", "export", "baseline", tmp_path / f"new{suffix}")
    found = answer("checkpoint", "import", tmp_path / f"new{suffix}", "--into", "baseline@20")
    assert (found["run"], found["step"], found["epoch"]) == ("baseline", 20, 2)
    assert (found["reason"], found["pinned"], found["metrics"]) == ("import", True, {})
    new = answer("checkpoint", "show", found["hash"], "--verify")
    stored, wanted = weights_of(new["path"]), weights_of(answer("checkpoint", "show", "baseline@50")["path"])
    assert all(torch.equal(stored[name], wanted[name]) for name in wanted)
    assert stored["image.weight"].stride() == wanted["image.weight"].stride()
    assert new["counters"] == {"step": 20, "epoch": 2}  # no val_loss: it was that of other weights
    old = answer("checkpoint", "diff", own / "checkpoints" / "baseline-step00000020.safetensors", found["hash"])
    assert {one["path"] for one in old["values"] + old["rest"]} == {"counters/val_loss", "counters/val_loss_step"}


def test_weights_that_do_not_fit_are_refused(own, ok, run, answer, tmp_path):
    import torch

    out, before = tmp_path / "m.pt", sorted((own / "checkpoints").iterdir())
    ok("checkpoint", "export", "baseline", out)
    state = torch.load(out, weights_only=True)

    def refused(changed, code=3):
        torch.save(changed, out)
        found, output, error = run("checkpoint", "import", out)
        assert (found, output) == (code, "")
        assert sorted((own / "checkpoints").iterdir()) == before
        return error

    without = {name: tensor for name, tensor in state.items() if name != "last.bias"}
    assert "it lacks last.bias" in refused(without)
    assert "it has more besides" in refused({**state, "more": torch.zeros(1)})
    assert "last.bias is float32[4], not float32[3]" in refused({**state, "last.bias": torch.zeros(4)})
    assert "last.bias is int64[3]" in refused({**state, "last.bias": torch.zeros(3, dtype=torch.int64)})
    assert "is tied to another" in refused({**state, "tied.weight": torch.zeros(4, 3)})
    assert "names and plain tensors, and these are none: model, step" in refused({"model": state, "step": 3}, 4)
    assert "a list, not a state dict" in refused([1], 4)
    assert run("checkpoint", "import", out, "--run", "baseline")[0] == 2


def test_nothing_of_a_file_is_executed(own, run, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    for name, content in (("evil", pickle.dumps({"w": Evil()})), ("noise", b"\x80\x02garbage"), ("empty", b"")):
        for suffix in (".pt", ".safetensors", ".bin"):
            file = tmp_path / f"{name}{suffix}"
            file.write_bytes(content)
            code, _, error = run("checkpoint", "import", file)
            assert (code, error.count("\n")) == (4, 1), error
            assert "not a state dict of plain tensors" in error
    assert not (tmp_path / "executed").exists()
    assert run("checkpoint", "import", tmp_path)[0] == 4
    assert run("checkpoint", "import", tmp_path / "nothing.pt")[0] == 4
    (tmp_path / "notes.txt").write_text("hello")
    assert run("checkpoint", "import", tmp_path / "notes.txt")[0] == 2


def test_an_imported_checkpoint_can_be_loaded_into_a_live_session(own, live, ok, answer, wait_until, tmp_path):
    ok("checkpoint", "export", "baseline@0", tmp_path / "weights.safetensors")
    imported = answer("checkpoint", "import", tmp_path / "weights.safetensors", "--into", "baseline@20")
    live()
    loaded = answer("load", imported["hash"][:12])
    assert (loaded["hash"], loaded["step"], loaded["epoch"]) == (imported["hash"], 20, 2)
    # Nothing was trained to that state, so the run that goes on from it has no parent; it stands on the file.
    run = wait_until(lambda: [row for row in answer("runs") if row["name"] == loaded["run"] and row["base"]])[0]
    assert (run["kind"], run["parents"], run["base"]["hash"]) == ("rewind", [], imported["hash"])


# -- keeping and removing --------------------------------------------------------------------------------------


def test_checkpoints_of_a_run_at_rest_are_pinned_and_removed(own, ok, run, answer):
    assert ok("checkpoint", "pin", "baseline@40").startswith("pinned  step 40  ")
    assert {row["step"]: row["pinned"] for row in answer("checkpoints")} == {0: False, 20: False, 40: True, 50: False}
    assert answer("checkpoint", "unpin", "baseline@40")["pinned"] is False
    assert not any(row["pinned"] for row in answer("checkpoints"))
    path = answer("checkpoint", "show", "baseline@40")["path"]
    assert ok("checkpoint", "rm", "baseline@40").startswith("removed  step 40  ")
    assert not os.path.exists(path)
    assert not os.path.exists(f"{path}.meta.json")
    (gone,) = [row for row in answer("checkpoints", "--all") if row["step"] == 40]
    assert gone["evicted_reason"] == "removed"
    code, _, error = run("checkpoint", "rm", "baseline@40")
    assert (code, "was removed (removed)" in error) == (2, True)
    assert [line.split()[4] for line in ok("log", "-n", "3").splitlines()[1:]] == ["pinned", "unpinned", "removed"]


def test_what_is_stood_on_is_not_removed(own, ok, run, answer):
    code, _, error = run("checkpoint", "rm", "baseline@0", "--force")
    assert (code, "is the origin of 'baseline'" in error) == (6, True)
    code, _, error = run("checkpoint", "rm", "baseline")
    assert (code, "is the newest of 'baseline'" in error, "--force" in error) == (6, True, True)
    from onthefly.store.store import Store

    store = Store.open()
    parent = answer("checkpoint", "show", "baseline@40")["hash"]
    store.create_run("fork", project="default", kind="fork", parents=[("baseline", parent)])
    store.close()
    assert ["needed"] in [row["kept_because"][1:] for row in answer("checkpoints", "--why")]
    code, _, error = run("checkpoint", "rm", "baseline@40", "--force")
    assert (code, "the run 'fork' goes on from it" in error) == (6, True)
    assert len(answer("checkpoints")) == 4
    ok("checkpoint", "rm", "baseline@50", "--force")
    assert [row["step"] for row in answer("checkpoints")] == [0, 20, 40]


def test_a_live_session_pins_and_removes_its_own(own, live, ok, run, answer, wait_until, tmp_path):
    ok("checkpoint", "export", "baseline", tmp_path / "weights.pt")
    live()
    ok("pause", "--no-save")
    saved = answer("save")
    name = f"baseline2@{saved['step']}"
    pinned = answer("checkpoint", "pin", name)
    assert (pinned["hash"], pinned["pinned"]) == (saved["hash"], True)
    assert answer("checkpoint", "show", name)["recorded"]["pinned"] is True
    assert answer("checkpoint", "unpin", name)["pinned"] is False
    assert run("checkpoint", "rm", name)[0] == 6  # its newest
    assert run("checkpoint", "rm", "baseline2@0", "--force")[0] == 6
    code, _, error = run("checkpoint", "import", tmp_path / "weights.pt", "--into", "baseline2")
    assert (code, "is on 'baseline2' and owns its checkpoints" in error) == (6, True)
    assert answer("checkpoint", "rm", name, "--force")["hash"] == saved["hash"]
    assert not os.path.exists(saved["path"])
    (row,) = [row for row in answer("checkpoints", "baseline2", "--all") if row["hash"] == saved["hash"]][-1:]
    assert row["evicted_reason"] == "removed"
    ok("checkpoint", "pin", "baseline@40")  # of a run that nobody trains
    ok("resume")
