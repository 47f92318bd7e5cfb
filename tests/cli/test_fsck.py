"""`onthefly fsck`, as a user meets it."""

import json
import os
import pty
import subprocess
import sys

import pytest
from checkpoint_stores import trained

from onthefly import cli
from onthefly.checkpoints import sidecar
from onthefly.store.store import Store


@pytest.fixture
def rows(own_store):
    """Three checkpoints of a run that nobody trains."""
    store = Store.open(own_store, create=True)
    found = trained(store)
    store.close()
    return found


@pytest.fixture
def run(capsys):
    """Runs a command line in this process; gives exit code and what it printed."""

    def run(*words):
        code = cli.main(list(words))
        captured = capsys.readouterr()
        assert captured.err == ""
        return code, captured.out

    return run


def test_a_sound_store_is_one_line(rows, run):
    code, output = run("fsck")
    assert (code, output) == (0, "3 checkpoints, 15.9 kB, every byte checked: all sound\n")
    code, output = run("fsck", "--quick")
    assert (code, output) == (0, "3 checkpoints, 15.9 kB, headers checked: all sound\n")


def test_a_loss_is_an_exit_code_until_it_is_repaired(rows, run):
    rows[1].path.unlink()
    sidecar.path_of(rows[2].path).unlink()
    code, output = run("fsck")
    assert code == 4
    assert output.splitlines() == [
        "lost  baseline@10  checkpoints/baseline-step00000010.safetensors",
        "    its file is gone",
        "    --repair: make its row a tombstone (lost)",
        "    if there is a copy of it, put it back at this path first",
        "sidecar  baseline@20  checkpoints/baseline-step00000020.safetensors",
        "    its sidecar is missing",
        "    --repair: write it from the row",
        "3 checkpoints, 10.6 kB, every byte checked: 1 error, 1 note",
    ]
    code, output = run("fsck", "--repair")
    assert code == 0
    assert output.splitlines()[-3:] == [
        "repaired  lost  checkpoints/baseline-step00000010.safetensors: its row is a tombstone (lost)",
        "repaired  sidecar  checkpoints/baseline-step00000020.safetensors: its sidecar is written",
        "2 checkpoints, 10.6 kB, every byte checked: all sound",
    ]
    assert run("fsck") == (0, "2 checkpoints, 10.6 kB, every byte checked: all sound\n")
    assert "removed" in run("log", "-n", "1")[1]


def test_damage_stays_an_error_until_it_is_given_up(rows, run):
    os.truncate(rows[1].path, 5000)
    assert run("fsck", "--repair")[0] == 4
    assert run("checkpoint", "rm", "baseline@10")[0] == 0
    assert run("fsck") == (0, "2 checkpoints, 10.6 kB, every byte checked: all sound\n")


def test_the_report_as_a_document(rows, run):
    rows[1].path.unlink()
    code, output = run("fsck", "--json")
    report = json.loads(output)
    assert (code, report["errors"], report["notes"], report["sound"], report["repairs"]) == (4, 1, 0, False, None)
    (finding,) = report["findings"]
    assert (finding["kind"], finding["severity"], finding["path"]) == ("lost", "error", str(rows[1].path))
    code, output = run("fsck", "--json", "--repair")
    report = json.loads(output)
    assert (code, report["errors"], report["sound"], report["repairs"][0]["done"]) == (0, 0, True, True)


def test_a_live_run_is_left_alone(play, run, wait_until):
    player = play()
    wait_until(lambda: "100" in run("status")[1])
    run("save", "--pin")
    code, output = run("fsck", "--repair")
    assert (code, "damaged" in output) == (4, True)  # what the player saves is no checkpoint
    (path,) = [row["path"] for row in json.loads(run("checkpoints", "--json")[1])]
    os.unlink(path)
    code, output = run("fsck", "--repair")
    assert (code, f"session {player.session} (pid {player.pid}) trains this run" in output) == (4, True)
    assert len(json.loads(run("checkpoints", "--json")[1])) == 1


def test_progress_is_shown_in_a_terminal(rows):
    ours, theirs = pty.openpty()
    code = "import sys; from onthefly.cli import main; sys.exit(main(['fsck']))"
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code], stdout=subprocess.PIPE, stderr=theirs
    ) as process:
        os.close(theirs)
        output = process.stdout.read()
    assert (process.wait(), output.endswith(b"all sound\n")) == (0, True)
    assert b"checking" in os.read(ours, 100_000)
    os.close(ours)
