"""`onthefly merge`, on files, without a store."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from onthefly import cli
from onthefly.merging import merge_state_dicts


@pytest.fixture
def states(tmp_path, monkeypatch):
    """State dicts, written to a.safetensors, b.safetensors, base.safetensors in the working directory."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found = {name: {"weight": torch.randn(5, 4), "count": torch.tensor(3)} for name in ("a", "b", "base")}
    for name, state in found.items():
        save_file(state, f"{name}.safetensors")
    return found


def run(capsys, *words):
    code = cli.main(["merge", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_files_are_merged(states, capsys, tmp_path):
    words = ["a.safetensors", "b.safetensors", "--strategy", "ties", "--base", "base.safetensors", "--weights", "1,2"]
    code, output, error = run(capsys, *words, "--set", "density=0.5", "--out", "merged.safetensors")
    assert (code, error) == (0, "")
    assert "ties of 2" in output
    assert "density 0.5" in output.replace("=", " ")
    assert "from the first parent: count" in output
    wanted = merge_state_dicts(
        [states["a"], states["b"]], "ties", {"density": 0.5}, base=states["base"], weights=[1, 2]
    )
    assert torch.equal(load_file("merged.safetensors")["weight"], wanted["weight"])
    assert not (tmp_path / ".onthefly").exists()


def test_fisher_files_and_json(states, capsys):
    for name in ("a", "b"):
        save_file({"weight": states[name]["weight"].square()}, f"f{name}.safetensors")
    words = ["a.safetensors", "b.safetensors", "--strategy", "fisher", "--fisher", "fa.safetensors"]
    code, output, _ = run(capsys, *words, "--fisher", "fb.safetensors", "--out", "merged.safetensors", "--json")
    found = json.loads(output)
    assert code == 0
    assert (found["strategy"], found["tensors"], found["kept"], len(found["hash"])) == ("fisher", 2, ["count"], 64)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["a.safetensors"], 2, "two parents or more"),
        (["a.safetensors", "b.safetensors", "--strategy", "tis"], 2, "did you mean ties"),
        (["a.safetensors", "b.safetensors", "--set", "density"], 2, "NAME=VALUE"),
        (["a.safetensors", "b.safetensors", "--weights", "a,b"], 2, "--weights"),
        (["a.safetensors", "b.safetensors", "--fisher", "x", "--gram", "y"], 2, "not both"),
        (["a.safetensors", "none.safetensors"], 4, "no such"),
    ],
)
def test_what_is_wrong_is_one_line(states, capsys, tmp_path, words, code, said):
    found, output, error = run(capsys, *words, "--out", "merged.safetensors")
    assert (found, output) == (code, "")
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "merged.safetensors").exists()


def test_a_warning_is_said_beside_the_result(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        save_file({"x.lora_A": torch.randn(2, 4), "x.lora_B": torch.randn(4, 2)}, f"{name}.safetensors")
    code, _, error = run(capsys, "a.safetensors", "b.safetensors", "--out", "merged.safetensors")
    assert code == 0
    assert "warning:" in error
    assert "average of factors" in error
