"""A checkpoint exists or it does not, whatever instant a process dies at: killed at each system call of a save.

What is found afterwards is the older state or the newer one, whole. What was said to be saved is there.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import crash_programs
import pytest
import syscalls
import torch
from crash_programs import RUN, content, files, live_through, objects

import onthefly
from onthefly import cli
from onthefly.checkpoints import load_checkpoint
from onthefly.checkpoints.durable import remove_stray
from onthefly.checkpoints.format import open_checkpoint
from onthefly.checkpoints.sidecar import newest, path_of, read_sidecar
from onthefly.runs import launch

LIVES = 40
"""How many of a session's stops are met in one run of the tests; its seed says which."""


@pytest.fixture(autouse=True)
def one_thread():
    """As the children have it; other sums come out of another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def traced():
    # A process of its own: whoever traces waits for whatever child there is.
    asked = subprocess.run([sys.executable, syscalls.__file__], check=True, stdout=subprocess.PIPE, text=True)
    if reason := asked.stdout.strip():
        pytest.skip(reason)


def lives(kind, folder, *more):
    """What became of every child: first of one that nobody ended. The folder of each goes when the next is asked for."""
    command = [sys.executable, "-W", "error", crash_programs.__file__, kind, str(folder), *map(str, more)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        for line in parent.stdout:
            life = json.loads(line)
            life["folder"] = Path(life["folder"])
            print(life)
            yield life
            shutil.rmtree(life["folder"])
    assert parent.returncode == 0


@pytest.mark.parametrize("kind", ["over", pytest.param("beside", marks=pytest.mark.long)])
def test_a_save_killed_at_any_of_its_system_calls_leaves_the_older_checkpoint_or_the_newer(tmp_path, kind):
    """The threads of a save take turns differently each time: it is killed all over again until every moment was met."""
    wanted = {
        (False, True, False, False),  # nothing has happened yet
        (False, True, True, False),  # half a file, that nobody takes for one
        (True, False, False, False),  # no sidecar yet, or the older one's
        (True, False, True, False),  # half a sidecar
        (True, True, False, False),
        (True, True, False, True),
    }
    seen = set()
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        seen |= {checked(life, kind) for life in lives(kind, folder)}
        if seen >= wanted:
            return
    raise AssertionError(f"never met: {wanted - seen}")


def checked(life, kind):
    """Holds what one child left against what it may leave. Whether that is newer, has a sidecar, a stray, was reported."""
    older, newer, *saved = life["said"].split()
    older_file, newer_file = files(life["folder"], kind)
    path = newest(life["folder"], RUN)
    file = open_checkpoint(path)
    assert file.hash in (older, newer)
    if saved:
        assert (path, file.hash) == (newer_file, newer)
    if path != older_file:
        assert open_checkpoint(older_file).hash == older
    note = read_sidecar(path)
    assert note is None or note.hash == file.hash
    assert_loads(path, file.hash)
    strays = remove_stray(life["folder"])
    kept = {name for f in (older_file, newer_file) for name in (f.name, path_of(f).name)}
    assert {p.name for p in life["folder"].iterdir()} <= kept
    return file.hash == newer, note is not None, bool(strays), bool(saved)


def test_bytes_are_on_the_disk_before_their_name_is_and_the_name_before_it_is_said(tmp_path):
    """What a machine that loses its power would find; no kill can show it."""
    if not syscalls.WRITES:
        pytest.skip("the numbers of this machine's system calls are not known here")
    found = lives("beside", tmp_path)
    writes = next(found)["writes"]
    found.close()
    names = [name for name, _ in writes]
    for _ in ("the checkpoint", "its sidecar"):
        assert names[0] == "pwrite"
        sync = names.index("fsync")
        assert names[sync : sync + 3] == ["fsync", "rename", "fsync"]
        assert {handle for _, handle in writes[: sync + 1]} == {writes[0][1]}, "written is what is synced"
        names, writes = names[sync + 3 :], writes[sync + 3 :]
    assert names == []


def assert_loads(path, hash):
    live = objects()
    live |= load_checkpoint(path, live)
    assert content(live) == hash


def test_a_session_killed_at_a_system_call_of_a_save_goes_on_from_one_of_two_states_to_the_same_end(
    tmp_path, monkeypatch
):
    seed = os.environ["ONTHEFLY_SEED"]
    print("ONTHEFLY_SEED", seed)
    found = lives("session", tmp_path, LIVES, seed)
    older, newer = (row.hash for row in rows(next(found)["folder"])[-2:])
    seen = set()
    for life in found:
        store = life["folder"]
        strays = list(store.glob("checkpoints/.*.tmp"))
        there = rows(store)
        for row in there:
            assert open_checkpoint(row.path).hash == row.hash
        assert there[-1].hash in ([newer] if life["said"] else [older, newer])
        assert_clean(store)

        monkeypatch.setenv(launch.RESUME, RUN)
        live_through(store, 2)
        assert rows(store)[-1].hash == newer
        assert list(store.glob("checkpoints/.*")) == []
        assert_clean(store)
        seen.add((there[-1].hash == newer, bool(strays), life["said"]))
    assert {(False, False, ""), (True, False, "saved")} <= seen


def rows(store):
    """A run's checkpoints, oldest first. Whoever asks brings a store to rest whose process has died."""
    with onthefly.connect(store) as client:
        return client.checkpoints(RUN)


def assert_clean(store):
    assert cli.main(["fsck", "--store", str(store)]) == 0
