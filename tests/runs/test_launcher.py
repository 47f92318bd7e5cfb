"""Runs are started beside a process: real children that work, crash, are killed and outlive it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onthefly.errors import InvalidCommandError, ResumeError
from onthefly.runs.launcher import LocalLauncher, Order, tail

WAITS = """
import sys, time
from pathlib import Path
print("begun", flush=True)
while not Path(sys.argv[1]).exists():
    time.sleep(0.01)
print("done", flush=True)
"""

TELLS = """
import json, os, signal, sys
print(json.dumps({
    "arguments": sys.argv[1:],
    "flags": sys.orig_argv[1],
    "cwd": os.getcwd(),
    "environment": {k: os.environ.get(k) for k in ("ONTHEFLY_RESUME", "ONTHEFLY_REPLAY", "OMP_NUM_THREADS")},
    "input": sys.stdin.read(),
    "files": len(os.listdir("/dev/fd")),
    "alone": os.getsid(0) == os.getpgid(0) == os.getpid(),
    "ignored": sorted(n for n in signal.valid_signals() if signal.getsignal(n) == signal.SIG_IGN),
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
}))
"""


class Told:
    """What a launcher has told, in order."""

    def __init__(self):
        self.all = []
        self.callbacks = {f"on_{word}": partial(self._add, word) for word in ("started", "ended", "failed")}

    def _add(self, word, *what):
        self.all.append((word, *what))

    def of(self, word):
        return [what[1:] for what in self.all if what[0] == word]


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def launcher(told):
    """Two at once."""
    launcher = LocalLauncher(2, **told.callbacks)
    yield launcher
    launcher.close()
    for _, pid in told.of("started"):
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


@pytest.fixture
def order(tmp_path):
    """Makes an order for a program given as text."""

    def make(run, program, *arguments, options=("-S",), extra=None, ready=None, environment=None, **launch):
        script = tmp_path / f"{run}.py"
        script.write_text(program)
        recorded = {
            "argv": ["python", *options, script.name, *map(str, arguments)],
            "executable": sys.executable,
            "cwd": str(tmp_path),
            "attach": 1,
            "environment": environment or {},
            **launch,
        }
        return Order(run, recorded, extra or {}, tmp_path / "logs" / f"{run}.txt", ready)

    return make


def test_a_run_is_started_by_its_command_line_and_its_end_is_told(
    launcher, told, order, tmp_path, wait_until, monkeypatch
):
    monkeypatch.setenv("ONTHEFLY_REPLAY", "an order to another")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    launcher.submit(
        order("fork1", TELLS, "--lr", 0.1, extra={"ONTHEFLY_RESUME": "fork1"}, environment={"OMP_NUM_THREADS": "1"})
    )
    ((run, code, words),) = wait_until(lambda: told.of("ended"))
    ((_, pid),) = told.of("started")
    assert [what[0] for what in told.all] == ["started", "ended"]
    assert (run, code) == ("fork1", 0)
    assert words == (tmp_path / "logs" / "fork1.txt").read_text().rstrip()
    child = json.loads(words)
    assert child["arguments"] == ["--lr", "0.1"]
    assert child["flags"] == "-S"
    assert child["cwd"] == os.path.realpath(tmp_path)
    assert child["environment"] == {"ONTHEFLY_RESUME": "fork1", "ONTHEFLY_REPLAY": None, "OMP_NUM_THREADS": "1"}
    assert child["input"] == ""
    assert child["alone"]
    with pytest.raises(ProcessLookupError):  # not even as a zombie
        os.kill(pid, 0)
    assert (launcher.waiting, launcher.running) == ((), ())


def test_a_child_inherits_no_open_file(launcher, told, order, wait_until):
    with socket.create_server(("127.0.0.1", 0)) as server, open(__file__) as file:
        launcher.submit(order("before", TELLS))
        for handle in (server, file):
            os.set_inheritable(handle.fileno(), True)
        launcher.submit(order("after", TELLS))
        wait_until(lambda: len(told.of("ended")) == 2)
    assert {json.loads(words)["files"] for _, _, words in told.of("ended")} == {4}  # the three, and the folder listed


def test_only_so_many_run_at_once_and_the_rest_wait_in_order(launcher, told, order, tmp_path, wait_until):
    names = [f"run{i}" for i in range(5)]
    for name in names:
        launcher.submit(order(name, WAITS, tmp_path / f"end-{name}"))
    wait_until(lambda: len(told.of("started")) == 2)
    assert (launcher.running, launcher.waiting) == (("run0", "run1"), ("run2", "run3", "run4"))
    (tmp_path / "end-run1").touch()
    wait_until(lambda: len(told.of("started")) == 3)
    assert (launcher.running, launcher.waiting) == (("run0", "run2"), ("run3", "run4"))
    os.kill(dict(told.of("started"))["run0"], signal.SIGKILL)  # its place is free as well
    for name in names:
        (tmp_path / f"end-{name}").touch()
    wait_until(lambda: len(told.of("ended")) == 5)
    assert [run for run, _ in told.of("started")] == names
    assert {run: code for run, code, _ in told.of("ended")} == {**dict.fromkeys(names, 0), "run0": -signal.SIGKILL}
    alive = 0
    for word, *_ in told.all:
        alive += {"started": 1, "ended": -1}[word]
        assert 0 <= alive <= 2


def test_a_child_that_dies_at_its_start_is_told_with_its_own_last_words(launcher, told, order, wait_until):
    crash = order("fork1", "import sys\nprint('loading')\nsys.exit('\\x1b[31mno data\\x1b[0m')\n")
    crash.log.parent.mkdir()
    crash.log.write_text("of the process before\n")
    launcher.submit(crash)
    wait_until(lambda: told.of("ended"))
    ((run, code, words),) = told.of("ended")
    assert (run, code) == ("fork1", 1)
    assert sorted(words.splitlines()) == ["loading", "no data"]
    assert crash.log.read_text().startswith("of the process before\n")


def test_a_log_that_is_gone_leaves_no_words(launcher, told, order, wait_until):
    launcher.submit(order("fork1", "import os, sys\nprint('x')\nos.unlink(sys.argv[1])\n", "logs/fork1.txt"))
    wait_until(lambda: told.of("ended"))
    assert told.of("ended") == [("fork1", 0, "")]


def test_an_exit_code_that_somebody_else_took_is_not_called_success(told, order, wait_until):
    def start(run, pid):
        os.waitpid(pid, 0)

    launcher = LocalLauncher(**{**told.callbacks, "on_started": start})
    launcher.submit(order("fork1", "raise SystemExit(3)"))
    wait_until(lambda: told.of("ended"))
    launcher.close()
    assert told.of("ended") == [("fork1", None, "")]


def refuse():
    raise OSError("the database is locked")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"executable": "/nowhere/python"}, "the Python that it was started with is gone: /nowhere/python"),
        ({"cwd": "/nowhere"}, "the folder that it was started in is gone: /nowhere"),
        ({"argv": ["python", "nowhere.py"]}, "the script that it was started from is gone: "),
        ({"executable": "{text}"}, "cannot start .*/text again: Exec format error"),
        ({"extra": {"A": "\0"}}, "ValueError: embedded null byte"),
        ({"extra": {"A": "x" * 2**22}}, "cannot start .* again: Argument list too long"),
        ({"ready": refuse}, "the database is locked"),
        ({"ready": lambda: sys.exit()}, "SystemExit: "),
    ],
)
def test_what_cannot_be_started_is_told_and_the_next_is_started(
    launcher, told, order, tmp_path, wait_until, wrong, reason
):
    (tmp_path / "text").write_text("no program")
    (tmp_path / "text").chmod(0o755)
    if wrong.get("executable") == "{text}":
        wrong = {"executable": str(tmp_path / "text")}
    launcher.submit(order("wrong", "print('never')", **wrong))
    launcher.submit(order("right", "print('here')"))
    wait_until(lambda: told.of("ended"))
    ((run, words),) = told.of("failed")
    assert run == "wrong"
    assert re.match(reason, words)
    assert told.of("ended") == [("right", 0, "here")]


def test_a_log_that_cannot_be_written_is_a_failed_start(launcher, told, order, tmp_path, wait_until):
    (tmp_path / "logs").write_text("a file")
    launcher.submit(order("fork1", "print('never')"))
    wait_until(lambda: told.all)
    assert told.all == [("failed", "fork1", f"File exists: {tmp_path / 'logs'}")]


def test_thousands_of_orders_are_taken_at_once(launcher, told, order, tmp_path, wait_until):
    holds = [order(f"holds{i}", WAITS, tmp_path / "end") for i in range(2)]
    for one in holds:
        launcher.submit(one)
    names = [f"run{i}" for i in range(5000)]
    gone = order("gone", "", executable="/nowhere/python")
    for name in names:
        launcher.submit(replace(gone, run=name))
    assert launcher.waiting[-5000:] == tuple(names)
    assert told.of("failed") == []
    (tmp_path / "end").touch()
    wait_until(lambda: len(told.of("failed")) == 5000)
    assert [run for run, _ in told.of("failed")] == names


def test_a_run_that_waits_or_runs_is_not_started_twice(launcher, told, order, tmp_path, wait_until):
    orders = [order(name, WAITS, tmp_path / "end") for name in ("one", "two", "three")]
    for one in orders:
        launcher.submit(one)
    wait_until(lambda: len(launcher.running) == 2)
    with pytest.raises(InvalidCommandError, match=f"'one' runs already, as process {told.of('started')[0][1]}"):
        launcher.submit(orders[0])
    with pytest.raises(InvalidCommandError, match="'three' waits to be started already"):
        launcher.submit(orders[2])
    (tmp_path / "end").touch()
    wait_until(lambda: len(told.of("ended")) == 3)
    launcher.submit(orders[0])
    wait_until(lambda: len(told.of("ended")) == 4)
    assert [run for run, _ in told.of("started")] == ["one", "two", "three", "one"]
    assert orders[0].log.read_text() == "begun\ndone\n" * 2
    assert told.of("ended")[-1] == ("one", 0, "begun\ndone")


@pytest.mark.parametrize("limit", [0, -1])
def test_a_launcher_of_nothing_is_refused(told, limit):
    with pytest.raises(ValueError, match="at least 1 process at once"):
        LocalLauncher(limit, **told.callbacks)


def test_nobody_waits_for_what_has_to_be_ready_first(launcher, told, order, wait_until):
    asked, go = threading.Event(), threading.Event()

    def ready():
        asked.set()
        go.wait()

    launcher.submit(order("fork1", "print('here')", ready=ready))
    asked.wait()
    assert (launcher.waiting, launcher.running, told.all) == (("fork1",), (), [])
    go.set()
    wait_until(lambda: told.of("ended"))
    assert told.of("ended") == [("fork1", 0, "here")]


def test_a_closed_launcher_leaves_its_children_alone_and_starts_no_more(launcher, told, order, tmp_path, wait_until):
    assert "onthefly-launcher" not in [thread.name for thread in threading.enumerate()]
    orders = [order(name, WAITS, tmp_path / "end") for name in ("one", "two", "three", "four")]
    for one in orders:
        launcher.submit(one)
    wait_until(lambda: len(told.of("started")) == 2)
    launcher.close()
    launcher.close()
    assert "onthefly-launcher" not in [thread.name for thread in threading.enumerate()]
    assert launcher.waiting == ()
    assert [run for run, _ in told.of("failed")] == ["three", "four"]
    assert all(f"start it with `onthefly resume {run}`" in reason for run, reason in told.of("failed"))
    with pytest.raises(ResumeError, match="start it with `onthefly resume three`"):
        launcher.submit(orders[2])
    (tmp_path / "end").touch()
    assert [os.waitpid(pid, 0)[1] for _, pid in told.of("started")] == [0, 0]
    assert [one.log.read_text() for one in orders[:2]] == ["begun\ndone\n"] * 2
    assert not orders[2].log.exists()
    assert told.of("ended") == []


def test_what_is_being_made_ready_at_the_close_is_not_started(launcher, told, order):
    asked = threading.Event()

    def ready():
        asked.set()
        while not closed():
            pass

    def closed():
        try:
            launcher.submit(never)
        except InvalidCommandError:
            return False
        except ResumeError:
            return True

    never = order("fork1", "print('never')", ready=ready)
    launcher.submit(never)
    asked.wait()
    launcher.close()
    assert [(word, run) for word, run, *_ in told.all] == [("failed", "fork1")]


def test_a_launcher_can_be_used_and_closed_by_its_own_callbacks(told, order, wait_until, caplog):
    def end(run, code, words):
        told.callbacks["on_ended"](run, code, words)
        if run == "one":
            launcher.submit(order("two", "print('here')"))
        else:
            launcher.close()

    launcher = LocalLauncher(1, **{**told.callbacks, "on_ended": end})
    launcher.submit(order("one", ""))
    wait_until(lambda: "onthefly-launcher" not in [thread.name for thread in threading.enumerate()])
    assert told.of("ended") == [("one", 0, ""), ("two", 0, "here")]
    assert caplog.records == []


def test_a_callback_that_fails_is_logged_and_the_others_are_told(told, order, wait_until, caplog):
    launcher = LocalLauncher(1, **{**told.callbacks, "on_started": lambda run, pid: 1 / 0})
    launcher.submit(order("one", ""))
    launcher.submit(order("two", ""))
    wait_until(lambda: len(told.of("ended")) == 2)
    launcher.close()
    assert [record.message for record in caplog.records] == [
        "what became of the run 'one' could not be told",
        "what became of the run 'two' could not be told",
    ]
    assert "ZeroDivisionError" in caplog.text


PARENT = """
import json, os, signal, sys, threading
from pathlib import Path
from onthefly.runs.launcher import LocalLauncher, Order
"""

SURVIVES = """
import os, signal, sys, time
from pathlib import Path

def leave(number, frame):
    Path("left").write_text(signal.Signals(number).name)
    sys.exit()

signal.signal(signal.SIGTERM, leave)
Path("pid").write_text(str(os.getpid()))
Path("pid").rename("ready")
while True:
    print("training", flush=True)
    time.sleep(0.01)
"""


def test_a_child_lives_on_when_its_parent_and_its_group_are_killed(order, tmp_path, wait_until):
    child = order("fork1", SURVIVES)
    parent = tmp_path / "parent.py"
    parent.write_text(
        PARENT + "say = lambda *what: None\n"
        f"launch = json.loads({json.dumps(child.launch)!r})\n"
        "LocalLauncher(on_started=say, on_ended=say, on_failed=print).submit(Order('fork1', launch, {}, Path('log')))\n"
        "signal.pause()\n"
    )
    process = subprocess.Popen([sys.executable, parent], cwd=tmp_path, start_new_session=True)
    wait_until((tmp_path / "ready").exists)
    pid = int((tmp_path / "ready").read_text())
    try:
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            os.killpg(process.pid, number)
        process.wait()
        size = (tmp_path / "log").stat().st_size
        wait_until(lambda: (tmp_path / "log").stat().st_size > size)
        assert not (tmp_path / "left").exists()
        os.kill(pid, signal.SIGTERM)
        wait_until((tmp_path / "left").exists)
    finally:
        if not (tmp_path / "left").exists():
            os.kill(pid, signal.SIGKILL)
            process.kill()
            process.wait()


def test_a_child_has_its_own_input_and_the_signals_that_the_parent_ignores_or_blocks(order, tmp_path):
    child = order("fork1", TELLS)
    parent = tmp_path / "parent.py"
    parent.write_text(
        PARENT + "for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\n"
        f"launch, ended = json.loads({json.dumps(child.launch)!r}), threading.Event()\n"
        "say = lambda *what: None\n"
        "end = lambda run, code, words: (print(words), ended.set())\n"
        "launcher = LocalLauncher(on_started=say, on_ended=end, on_failed=print)\n"
        "launcher.submit(Order('fork1', launch, {}, Path('log')))\n"
        "ended.wait()\n"
    )
    done = subprocess.run([sys.executable, parent], cwd=tmp_path, input=b"to it", capture_output=True, check=True)
    found = json.loads(done.stdout)
    assert found["input"] == ""
    assert found["ignored"] == [signal.SIGPIPE, signal.SIGXFSZ]  # by Python itself
    assert found["blocked"] == []


def test_starts_are_not_held_up_by_processes_that_are_forked_meanwhile(order, tmp_path):
    """As the workers of a `DataLoader` are, at every epoch: one that got hold of a start's pipe would keep it open."""
    child = order("fork1", "")
    parent = tmp_path / "parent.py"
    parent.write_text(
        PARENT + f"launch, ended, workers = json.loads({json.dumps(child.launch)!r}), [], []\n"
        "say = lambda *what: None\n"
        "launcher = LocalLauncher(on_started=say, on_ended=lambda run, *_: ended.append(run), on_failed=print)\n"
        "for i in range(20): launcher.submit(Order(f'run{i}', launch, {}, Path('log')))\n"
        "while len(ended) < 20:\n"
        "    if (pid := os.fork()) == 0: signal.pause()\n"
        "    workers.append(pid)\n"
        "    if len(workers) == 50: os.kill(workers[-1], signal.SIGKILL), os.waitpid(workers.pop(), 0)\n"
        "for pid in workers: os.kill(pid, signal.SIGKILL), os.waitpid(pid, 0)\n"
        "print(len(ended))\n"
    )
    process = subprocess.Popen([sys.executable, parent], cwd=tmp_path, stdout=subprocess.PIPE, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert output == b"20\n"


# -- the tail of a log -----------------------------------------------------------------------------------------


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1).filter(str.strip)),
    st.integers(1, 30),
)
def test_the_tail_is_the_last_lines(tmp_path_factory, texts, lines):
    path = tmp_path_factory.mktemp("log") / "log"
    path.write_text("".join(f"{text}.\n" for text in texts), "utf-8")
    assert tail(path, lines) == "\n".join(f"{text}." for text in texts[-lines:])


@given(st.binary(max_size=200), st.integers(1, 5))
def test_no_log_drives_a_terminal(tmp_path_factory, raw, lines):
    path = tmp_path_factory.mktemp("log") / "log"
    path.write_bytes(raw)
    text = tail(path, lines)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    assert text.count("\n") < lines


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", ""),
        (b"\n\n", ""),
        (b"one\n\ntwo\n\n", "one\n\ntwo"),
        (b"a\tb", "a\tb"),
        (b"\x1b[1;31mred\x1b[0m \x1b]0;a title\x07text \x1b]8;;http://x\x1b\\link\x1b(B\x1b7\x1b[2J", "red text link"),
        (b"dos\r\nlines\r\n", "dos\nlines"),
        (b"10%|#   |\r50%|##  |\r99%|####|", "99%|####|"),
        (b"10%\r50%\r\nTraceback", "50%\nTraceback"),
        (b"b\x08e\x7fl\x07l\x00", "bell"),
        (b"\xc2\x9b31mred \xff", "red \ufffd"),
        (b"\x1b", ""),
    ],
)
def test_the_tail_is_what_a_terminal_would_show_at_last(tmp_path, raw, text):
    (tmp_path / "log").write_bytes(raw)
    assert tail(tmp_path / "log") == text


def test_a_long_log_is_read_from_its_end_only(tmp_path):
    path = tmp_path / "log"
    path.write_text("é" * 10_000)
    assert tail(path) == "é" * 4096
    path.write_text("é" * 10_000 + "x")
    assert tail(path) == "é" * 4095 + "x"
    path.write_text("one line\n" * 10_000)
    assert tail(path, 3) == "one line\n" * 2 + "one line"
    path.write_text("before\nsince")
    assert tail(path, since=7) == "since"


def test_a_log_that_is_not_there_has_no_tail(tmp_path):
    assert tail(tmp_path / "log") == ""
    with pytest.raises(IsADirectoryError):
        tail(tmp_path)
    with pytest.raises(ValueError, match="at least 1 line, not 0"):
        tail(tmp_path / "log", 0)
