"""A process is recorded and started again: real command lines."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from onthefly.errors import ResumeError
from onthefly.runs import launch

TELL = "import json, sys; from onthefly.runs import launch; print(json.dumps(launch.record()))"


@pytest.fixture
def script(tmp_path):
    """A script that prints its arguments, what it was told by the environment, and its record."""
    path = tmp_path / "train.py"
    path.write_text(
        "import json, os, sys\n"
        "from onthefly.runs import launch\n"
        "told = {name: os.environ.get(name) for name in ('TOLD', 'PYTHONHASHSEED', 'ONTHEFLY_RESUME')}\n"
        "if 'leave' in sys.argv: os.chdir('/')\n"
        "record = launch.record(2)\n"
        "print(json.dumps([sys.argv[1:], os.getcwd(), told, record]), flush=True)\n"
        "if 'again' in sys.argv and told['TOLD'] is None: launch.relaunch(record, {'TOLD': 'now'})\n"
    )
    return path


def run(*arguments, cwd, **env):
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**{k: v for k, v in os.environ.items() if k != "PYTHONHASHSEED"}, **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_script_becomes_the_process_that_it_was(script):
    first, second = run("-u", "-W", "error", "train.py", "again", "--lr", "1e-3", cwd=script.parent)
    assert second[0] == first[0] == ["again", "--lr", "1e-3"]
    assert second[1] == first[1] == os.path.realpath(script.parent)
    assert second[2]["TOLD"] == "now"
    assert second[3] == first[3]
    assert first[3]["executable"] == sys.executable
    assert first[3]["attach"] == 2


@pytest.mark.parametrize("name", ["PYTHONHASHSEED", "OMP_NUM_THREADS"])
def test_a_variable_that_changes_what_is_computed_is_as_it_was(script, monkeypatch, name):
    monkeypatch.delenv(name, raising=False)
    ((_, _, _, free),) = run("train.py", cwd=script.parent)
    ((_, _, _, fixed),) = run("train.py", cwd=script.parent, **{name: "1"})
    assert (free["environment"].get(name), fixed["environment"][name]) == (None, "1")
    monkeypatch.setenv(name, "2")
    assert name not in launch.environment(free, {})
    assert launch.environment(fixed, {})[name] == "1"


def test_orders_to_one_process_are_not_passed_on(script, monkeypatch):
    monkeypatch.setenv("ONTHEFLY_RESUME", "baseline")
    ((_, _, _, record),) = run("train.py", cwd=script.parent)
    process = launch.spawn(record, {"TOLD": "this"}, stdout=subprocess.PIPE)
    output, _ = process.communicate()
    assert json.loads(output)[2] == {"TOLD": "this", "PYTHONHASHSEED": None, "ONTHEFLY_RESUME": None}


def test_the_environment_can_be_read_while_another_thread_changes_it():
    there = {"cwd": "/", "environment": {}}
    ended = threading.Event()

    def change():
        while not ended.is_set():
            os.environ["ANOTHER"] = "thread"
            del os.environ["ANOTHER"]

    thread = threading.Thread(target=change)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        for _ in range(500):
            assert launch.environment(there, {"TOLD": "this"})["TOLD"] == "this"
    finally:
        ended.set()
        thread.join()
        sys.setswitchinterval(before)


def test_a_child_begins_with_its_signals_as_they_are_by_default(tmp_path):
    """Whatever its parent ignores or blocks, and whatever modules lie beside its script."""
    (tmp_path / "signal.py").write_text("raise SystemExit('not this one')")
    (tmp_path / "os.py").write_text("raise SystemExit('not this one')")
    code = (
        "import _signal as signal\n"
        "ignored = [n for n in signal.valid_signals() if signal.getsignal(n) == signal.SIG_IGN]\n"
        "print([sorted(ignored), sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))])\n"
    )
    record = {"argv": ["python", "-SPc", code], "executable": sys.executable, "cwd": str(tmp_path), "environment": {}}
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        output, _ = launch.spawn(record, {}, stdout=subprocess.PIPE).communicate()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGHUP, handler)
    assert json.loads(output) == [[signal.SIGPIPE, signal.SIGXFSZ], []]  # ignored by Python itself


def test_a_script_that_left_its_folder_is_found_again(script):
    ((_, cwd, _, record),) = run("train.py", "leave", cwd=script.parent, PWD=str(script.parent))
    assert cwd == "/"
    assert Path(record["cwd"]) == script.parent
    ((_, _, _, record),) = run("train.py", "leave", cwd=script.parent, PWD="/")
    assert record["argv"][1] == str(script)


@pytest.mark.parametrize(
    "arguments",
    [["-c", TELL], ["-Ic", TELL], ["-W", "error", "-Xutf8", "-c", TELL], ["-X", "utf8", "-Wi", "-c" + TELL]],
)
def test_code_on_the_command_line_can_be_started_again(arguments, tmp_path):
    (record,) = run(*arguments, cwd=tmp_path)
    assert launch.command_line(record) == [sys.executable, *arguments]


def test_a_module_can_be_started_again(tmp_path):
    (tmp_path / "module.py").write_text(TELL)
    (record,) = run("-m", "module", "x", cwd=tmp_path)
    output, _ = launch.spawn(record, {}, stdout=subprocess.PIPE).communicate()
    assert json.loads(output) == record


@pytest.mark.parametrize("arguments", [[], ["-"], ["-u"], ["-i", "-c", TELL]])
def test_a_piped_or_interactive_session_has_no_command_line(arguments, tmp_path):
    done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, input=TELL, capture_output=True, text=True)
    assert done.stdout.startswith("null")


def test_a_child_of_multiprocessing_has_no_command_line(tmp_path):
    code = (
        "import multiprocessing, sys\nfrom onthefly.runs import launch\n"
        "def tell(): print('null' if launch.record() is None else 'a record', flush=True)\n"
        "if __name__ == '__main__':\n"
        "    for method in ('fork', 'spawn'):\n"
        "        child = multiprocessing.get_context(method).Process(target=tell)\n"
        "        child.start(); child.join()\n"
    )
    (tmp_path / "parent.py").write_text(code)
    assert run("parent.py", cwd=tmp_path) == [None, None]


@pytest.mark.parametrize("gone", ["script", "folder", "python"])
def test_what_is_gone_is_named(script, gone):
    ((_, _, _, record),) = run("train.py", cwd=script.parent)
    if gone == "script":
        script.unlink()
    elif gone == "folder":
        record["cwd"] = str(script.parent / "nowhere")
    else:
        record["executable"] = "/nowhere/python"
    before = os.getcwd()
    for start in (launch.relaunch, launch.spawn):
        with pytest.raises(ResumeError, match="is gone"):
            start(record, {})
    assert os.getcwd() == before
