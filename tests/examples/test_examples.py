"""The examples, as a stranger runs them: real command lines, to their end."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import onthefly
from onthefly.verification import differences

EXAMPLES = Path(__file__).parents[2] / "examples"
HASH = re.compile(r"^(?:recorded|replayed)  ([0-9a-f]{64})$", re.MULTILINE)


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Starts an example in a folder of its own; gives its process. What still runs at the end of the test is ended."""
    started = []
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    # For what is resumed, too: other sums come out of another number of threads.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def start(name, *arguments, store=tmp_path / "store", **more):
        env = os.environ | {"ONTHEFLY_STORE": str(store)}
        command = [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments]
        process = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True, **more)
        started.append(process)
        return process

    yield start
    for process in started:
        process.terminate()
        process.wait()
        process.stdout.close()


def resume(*arguments):
    """What `onthefly resume` prints until the training has ended."""
    command = [Path(sys.executable).with_name("onthefly"), "resume", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def read_until(process, text):
    """What the process prints up to a line with that text."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"it ended without saying {text!r}:\n{''.join(lines)}")


def finished(process):
    """What the process printed. It must have ended well."""
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def last_checkpoint(store):
    with onthefly.connect(store) as client:
        return client.checkpoints()[-1].path


@pytest.mark.long
def test_own_loop_ends_with_the_same_state_when_it_was_killed_and_resumed(example, tmp_path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    output = finished(example("own_loop.py", "--epochs", "5", store=alone))

    process = example("own_loop.py", "--epochs", "5", store=killed)
    read_until(process, "epoch   2")
    process.kill()
    process.wait()
    again = resume("--store", str(killed))

    assert again.splitlines()[-1] == output.splitlines()[-1]
    differing = {line.partition(":")[0] for line in differences(last_checkpoint(alone), last_checkpoint(killed))}
    assert differing == {"rng/python", "rng/numpy"}  # which the script neither seeds nor uses
    with onthefly.connect(killed) as client:
        assert [row.status for row in client.runs()] == ["finished"]
        assert not client.events(kinds=["inexact", "lost"])


@pytest.mark.long
def test_digits_trains_without_workers_too(example):
    output = finished(example("digits.py", "--epochs", "1", "--workers", "0"))
    assert re.search(r"^digits: test accuracy \d+\.\d% after 40 steps$", output, re.MULTILINE)


def test_char_lm_writes_at_the_end(example, tmp_path):
    output = finished(example("char_lm.py", "--steps", "5", "--sample", "20"))
    assert re.search(r"^step +0  loss 4\.\d+\ndef .{20}\Z", output.removesuffix("\n"), re.MULTILINE | re.DOTALL)
    with onthefly.connect(tmp_path / "store") as client:
        assert client.checkpoints()[-1].step == 5


def test_the_demo_proves_that_it_comes_back_from_the_middle_of_an_epoch(example, tmp_path):
    output = finished(example("demo.py", "--epochs", "2", "--no-view", "--folder", str(tmp_path / "demo")))
    assert f"cd {shlex.quote(str(tmp_path / 'demo'))}" in output
    assert "digits: 5 steps, from 75 to 80" in output  # an epoch has 40
    recorded, replayed = HASH.findall(output)
    assert recorded == replayed


def test_a_demo_that_is_interrupted_says_how_to_go_on_and_that_works(example, tmp_path):
    arguments = ["--epochs", "1", "--slow", "0.2", "--no-view", "--folder", str(tmp_path / "demo")]
    process = example("demo.py", *arguments)
    read_until(process, "Ctrl-C here")
    process.send_signal(signal.SIGINT)
    output = finished(process)

    program, *how = shlex.split(re.search(r"^  (\S+ resume .*)$", output, re.MULTILINE)[1])
    assert Path(tmp_path, program).name == "onthefly"
    words = [str(tmp_path / word) if word.endswith(".onthefly") else word for word in how[1:]]
    assert "digits: test accuracy" in resume(*words)
