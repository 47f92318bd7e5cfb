"""The command line, against real processes that play sessions."""

import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from onthefly import cli

COMMAND = [sys.executable, "-c", "import sys; from onthefly.cli import main; sys.exit(main())"]


@pytest.fixture
def run(capsys):
    """Runs a command line in this process; gives exit code, stdout and stderr."""

    def run(*words):
        code = cli.main(list(words))
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


def in_process(*words, **options):
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, **options)


# -- looking ---------------------------------------------------------------------------------------------------


def test_status_shows_live_sessions(play, ok, own_store):
    player = play()
    output = ok("status")
    head, row = output.splitlines()
    assert head.split()[:5] == ["SESSION", "RUN", "STATUS", "STEP", "EPOCH"]
    assert row.split()[:3] == [str(player.session), "baseline", "running"]
    assert "\x1b" not in output
    document = json.loads(ok("status", "--json"))
    assert document["store"] == str(own_store)
    assert document["live"][0]["run"] == "baseline"
    assert (document["last"], document["unfinished"]) == (None, [])


def test_status_without_a_session_says_how_to_go_on(play, ok):
    player = play()
    player.kill()
    player.wait()
    output = ok("status")
    assert "no live session" in output
    assert "killed" in output
    assert "unfinished: baseline  (go on with `onthefly resume`)" in output


def test_listings_are_tables_and_json_documents(play, ok, wait_until):
    play()
    wait_until(lambda: "100" in ok("status"))
    ok("save", "--pin")
    table = ok("checkpoints")
    assert table.splitlines()[1].startswith("baseline@100")
    assert "pinned" in table
    (row,) = json.loads(ok("checkpoints", "baseline", "--json"))
    assert (row["step"], row["size"], row["evicted"], row["metrics"]) == (100, 3, None, {"val_loss": 50.0})
    assert row["path"].endswith(".safetensors")
    (run,) = json.loads(ok("runs", "--json"))
    assert (run["name"], run["status"], run["step"], run["checkpoints"]) == ("baseline", "running", 100, 1)
    assert ok("runs").splitlines()[1].split()[:3] == ["baseline", "running", "100"]


def test_log_tells_the_history(play, ok):
    play()
    ok("pause")
    ok("set", "lr=1e-4")
    ok("save")
    lines = ok("log").splitlines()
    assert lines[0].split() == ["TIME", "RUN", "STEP", "EPOCH", "WHAT"]
    assert "session 1 started" in lines[1]
    assert "paused" in lines[2]
    assert "set lr 1 -> 0.0001" in lines[3]
    assert "saved" in lines[4]
    kinds = [event["kind"] for event in json.loads(ok("log", "baseline", "--json"))]
    assert kinds == ["sessionStarted", "paused", "command", "checkpointSaved"]
    assert len(ok("log", "-n", "2").splitlines()) == 3


def test_watch_prints_a_frame(play, ok, wait_until):
    play()
    wait_until(lambda: "100" in ok("status"))
    frame = ok("watch", "--once")
    assert "baseline  running  step 100  epoch 0" in frame
    assert "loss 0.01" in frame
    assert "█" in frame
    assert "session 1 started" in frame
    ok("stop")
    assert "stopped" in ok("watch")


def test_watch_follows_a_session_in_a_terminal(play):
    player = play()
    ours, theirs = pty.openpty()
    watching = subprocess.Popen([*COMMAND, "watch", "--every", "0.05"], stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while b"baseline" not in shown:
        shown += os.read(ours, 4096)
    player.kill()
    player.wait()
    while chunk := _read(ours):  # until it ends by itself
        shown += chunk
    os.close(ours)
    assert watching.wait() == 0
    assert "killed" in shown.decode()


def _read(terminal):
    try:
        return os.read(terminal, 4096)
    except OSError:  # a terminal that nobody holds any more
        return b""


# -- steering --------------------------------------------------------------------------------------------------


def test_a_session_is_steered(play, ok):
    play()
    assert ok("pause").startswith("paused  step ")
    assert "paused" in ok("status")
    assert ok("save").startswith("saved  step ")
    assert ok("load", "baseline").startswith("loaded  step 1  ")
    assert ok("set", "lr=1e-4", "mode=fast").splitlines()[1:] == ["  lr  1 -> 0.0001", "  mode  1 -> fast"]
    assert ok("test", "--data", "val").endswith("loss 0.25  samples 10  in 0.5 s\n")
    assert ok("reset").startswith("reset  step ")
    assert ok("resume").startswith("resumed baseline  step ")
    assert ok("stop").startswith("stopped  step ")


def test_answers_are_json_documents(play, ok):
    play()
    assert json.loads(ok("pause", "--json"))["paused"] is True
    assert json.loads(ok("set", "lr*=0.1", "--json"))["changed"] == [{"name": "lr", "before": 1.0, "after": "*0.1"}]
    assert json.loads(ok("save", "--json", "--no-wait"))["status"] == "queued"


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("lr=1e-4", 1e-4),
        ("lr=.5", 0.5),
        ("lr=-1", -1),
        ("lr*=0.1", "*0.1"),
        ("lr=true", True),
        ("lr=null", None),
        ("lr=[0.9, 0.99]", [0.9, 0.99]),
        ('lr="0.1"', "0.1"),
        ("lr=a=b", "a=b"),
    ],
)
def test_values_are_json_or_text(word, value):
    from onthefly.cli.steer import assignments

    found = assignments([word])["lr"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("words", [["lr"], ["=1"], ["lr*=x"], ["lr=1", "lr=2"], ["lr=1", "--release"]])
def test_what_is_no_assignment_is_refused(words, run, play):
    play()
    code, output, error = run("set", *words)
    assert (code, output) == (2, "")
    assert error.startswith("error: set: ")


def test_names_alone_are_released(play, ok):
    play()
    assert "lr" in ok("set", "lr", "--release")


# -- errors ----------------------------------------------------------------------------------------------------


def test_errors_are_one_line_and_an_exit_code(play, run, own_store, tmp_path):
    assert run("status") == (5, "", f"error: there is no store in {own_store}. A training that attaches makes one; if it is "
                             "elsewhere, go to its folder or set ONTHEFLY_STORE to it\n")  # fmt: skip
    player = play()
    assert run("test") == (6, "", "error: no such part: test\n")
    assert run("load", "basline") == (2, "", "error: there is no run 'basline'; there are: baseline\n")
    assert run("checkpoints", "fork1")[0] == 2
    assert run("frob")[::2] == (2, "error: No such command 'frob'; see `onthefly --help`\n")
    code, _, error = run("pause", "--frob")
    assert code == 2
    assert error.endswith("see `onthefly pause --help`\n")
    assert run("pause", "--session", "1", "--run", "baseline")[0] == 2
    assert run("pause", "--session", "99")[0] == 6
    player.kill()
    player.wait()
    code, _, error = run("pause")
    assert code == 6
    assert error.endswith("; `onthefly resume` goes on with baseline\n")
    assert run("status", "--store", str(tmp_path / "other"))[0] == 5


def test_several_sessions_are_listed_and_one_is_chosen(play, run, ok):
    play()
    play("run=other")
    code, _, error = run("pause")
    assert code == 2
    assert "1 (baseline, pid" in error
    assert "2 (other, pid" in error
    ok("pause", "--run", "other")
    assert ok("resume").startswith("resumed other")  # the one that is paused is meant
    ok("pause", "--session", "1")
    assert run("resume", "other", "--run", "baseline")[0] == 2
    assert ok("resume", "baseline").startswith("resumed baseline")


def test_no_answer_in_time_is_an_error(play, run):
    play("deaf")
    code, _, error = run("pause", "--timeout", "0.1")
    assert code == 6
    assert "it stays queued" in error


# -- resume ----------------------------------------------------------------------------------------------------


def test_resume_becomes_the_training_process(play, ok, wait_until):
    player = play()
    os.kill(player.pid, signal.SIGKILL)
    player.wait()
    resumed = subprocess.Popen([*COMMAND, "resume"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert resumed.stdout.readline() == "ready 2\n"
    (session,) = json.loads(ok("status", "--json"))["live"]
    assert (session["pid"], session["run"]) == (resumed.pid, "baseline")  # replaced, not started beside
    ok("stop")
    assert resumed.wait() == 0
    assert resumed.stderr.read().startswith("resuming baseline")
    resumed.stdout.close()
    resumed.stderr.close()


def test_resume_without_anything_to_resume_is_an_error(play, run):
    play("steps=2").wait()
    assert run("resume")[::2][0] == 7
    code, _, error = run("resume", "baseline")
    assert (code, error) == (7, "error: 'baseline' is finished; there is nothing left to train\n")
    assert run("resume", "--session", "1")[0] == 2


# -- real command lines ----------------------------------------------------------------------------------------


def test_it_is_installed(play):
    play()
    script = os.path.join(os.path.dirname(sys.executable), "onthefly")
    done = subprocess.run([script, "status"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "baseline" in done.stdout
    done = in_process("test")
    assert (done.returncode, done.stdout, done.stderr) == (6, "", "error: no such part: test\n")


def test_status_loads_nothing_heavy(play):
    play()
    code = (
        "import sys\nfrom onthefly.cli import main\nmain(['status'])\n"
        "print([name for name in ('torch', 'pydantic', 'rich') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "[]\n"


def test_a_reader_that_has_had_enough_is_no_error(play):
    play()
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*COMMAND, "log"], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_while_waiting_ends_only_the_waiting(play, ok, wait_until):
    play("deaf")
    waiting = subprocess.Popen([*COMMAND, "pause"], stderr=subprocess.PIPE, text=True)
    from onthefly.store.store import Store

    store = Store.open()
    wait_until(lambda: store.queued_commands(1))
    with waiting.stderr:
        while waiting.poll() is None:  # Python loses one that comes while it runs a finalizer
            waiting.send_signal(signal.SIGINT)
            time.sleep(0.5)
        assert waiting.returncode == cli.INTERRUPTED
        assert waiting.stderr.read().startswith("pause stays asked of session 1 (baseline)")
    assert len(store.queued_commands(1)) == 1
    store.close()


@pytest.mark.parametrize("words", [["--help"], ["set", "--help"], ["--version"]])
def test_help_and_version_need_no_store(words, ok):
    assert ok(*words)
