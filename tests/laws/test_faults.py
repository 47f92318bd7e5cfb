"""Law 3: training never waits for, and never dies of, what only watches it; and it says what was not recorded."""

import contextlib
import errno
import os
import resource
import shutil
import sqlite3
import subprocess
import tempfile
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from law_programs import PER_EPOCH, can_write
from law_trainings import STATE, Trainings, assert_same, in_a_process, plain, until

from onthefly.checkpoints.format import open_checkpoint
from onthefly.errors import StoreBusyError
from onthefly.store import queries
from onthefly.store.store import Store

LAST = 3 * PER_EPOCH
NOBODY = 65534


class Disk:
    """A small file system in memory."""

    def __init__(self, folder):
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self):
        """Leave no room; a plain write proves it."""
        with open(self._filler, "wb", buffering=0) as file:
            for size in (1 << 16, 1 << 12, 1):
                with suppress(OSError):
                    while True:
                        file.write(bytes(size))
            with pytest.raises(OSError, match="No space left"):
                file.write(b"x")

    def free(self):
        self._filler.unlink()


@pytest.fixture
def disk():
    """Makes disks of so many KiB at folders."""
    mounted = []

    def make(folder, size):
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {result.stderr.strip()}")
        mounted.append(folder)
        return Disk(folder)

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def everything_is_recorded(store, end):
    """Every value of a run of one process, and its end."""
    store.recover(time.time())
    series = queries.series(store, "baseline", "loss")
    assert series.steps.tolist() == list(range(1, len(end["losses"]) + 1))
    assert series.values.tolist() == end["losses"]
    assert queries.run(store, "baseline").status == "finished"
    (session,) = queries.sessions(store)
    assert (session.status, session.outcome) == ("ended", "finished")


# -- no room for a checkpoint ----------------------------------------------------------------------------------


def test_a_full_disk_fails_the_save_and_nothing_else(trainings, disk, tmp_path):
    small = disk(tmp_path / "small", 512)
    training = trainings.start(stops=(7, 8, 12), config={"save_dir": str(small.folder)})
    training.go_on(7, "saveCheckpoint", pin=True)
    training.at(8)
    before = {path: path.read_bytes() for path in small.folder.iterdir()}
    small.fill()
    paused = training.deliver("pause", save=False)
    failed = training.deliver("saveCheckpoint")
    training.go().done(paused)
    assert training.failed(failed)["type"] == "CheckpointWriteError"
    training.client.resume()
    training.at(12)  # behind the epoch's end, whose checkpoint has failed as well
    training.event("checkpointFailed", 2)
    events = training.client.events(kinds=["checkpointFailed"])
    assert [(e.step, e.data["reason"], e.data["error"]) for e in events] == [
        (8, "manual", "CheckpointWriteError"),
        (10, "epoch", "CheckpointWriteError"),
    ]
    assert all("No space left" in event.data["message"] for event in events)
    left = {path: path.read_bytes() for path in small.folder.iterdir() if path.name != "filler"}
    assert left == before  # nothing partial beside them, either
    small.free()
    saved = training.deliver("saveCheckpoint", pin=True)
    training.go().done(saved)
    end = training.end()
    assert_same(end, plain())
    for row in training.client.checkpoints("baseline"):
        assert open_checkpoint(row.path).hash == row.hash
    with trainings.opened() as store:
        everything_is_recorded(store, end)


def test_without_room_for_its_origin_a_run_trains_all_the_same(trainings, disk, tmp_path):
    small = disk(tmp_path / "small", 64)
    small.fill()
    training = trainings.start(stops=(2,), config={"save_dir": str(small.folder)})
    reset = training.at(2).deliver("resetSession")
    assert training.go().failed(reset)["type"] == "CheckpointNotFoundError"
    assert_same(training.end(), plain())
    assert training.client.events(kinds=["checkpointFailed"])[0].data["reason"] == "origin"


def test_a_fork_whose_beginning_cannot_be_saved_says_so_and_trains(trainings, disk, tmp_path):
    small = disk(tmp_path / "small", 512)
    alone = trainings.start(store="alone", stops=(7,))
    alone.go_on(7, "forkRun", values={"lr": "*0.5"})
    training = trainings.start(stops=(7, 8, 9), config={"save_dir": str(small.folder)})
    training.at(7)
    until(lambda: 5 in {row.step for row in training.client.checkpoints("baseline")}, "the save of the first epoch")
    small.fill()
    fork = training.deliver("forkRun", values={"lr": "*0.5"})
    error = training.go().failed(fork)
    assert error["type"] == "CheckpointError"
    assert "training is on fork1" in error["message"]
    training.at(8)
    small.free()
    saved = training.deliver("saveCheckpoint")
    training.go().done(saved)
    training.at(9).kill()
    with trainings.opened() as store:
        store.recover(time.time())
        assert {run.name: run.status for run in queries.runs(store)} == {"baseline": "left", "fork1": "unfinished"}
    resumed = trainings.resume(training, run="fork1")
    assert_same(resumed.end(), alone.end(), *STATE)


def test_a_merge_that_finds_no_room_leaves_the_training_as_it_was(trainings, disk, tmp_path):
    small = disk(tmp_path / "small", 1024)
    alone = trainings.start(store="alone", stops=(3,))
    alone.go_on(3, "forkRun")
    training = trainings.start(stops=(3, 7), config={"save_dir": str(small.folder)})
    content = training.go_on(3, "forkRun")["hash"]
    training.at(7)
    (row,) = [row for row in training.client.checkpoints("baseline") if row.hash == content]
    small.fill()
    parents = [{"path": str(row.path), "hash": row.hash}, {}]
    merge = training.deliver("mergeRuns", parents=parents, strategies=["swa"], commit="swa", floor=False)
    error = training.go().failed(merge)
    assert error["type"] == "CheckpointWriteError"
    assert "No space left" in error["message"]
    assert_same(training.end(), alone.end(), *STATE)
    assert [path.name for path in small.folder.iterdir() if path.name.startswith(".")] == []
    assert {run.name: run.status for run in training.client.runs()} == {"baseline": "left", "fork1": "finished"}


# -- no room for the journal -----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["store", "journals"], ids=["of the store", "of the journal alone"])
def test_a_full_disk_holds_up_nothing_and_loses_nothing(trainings, disk, tmp_path, what):
    full = disk(tmp_path / "store" if what == "store" else tmp_path / "store" / "journals", 2048)
    # What is left of the journal's last page can still be written; it does not last for so many steps.
    training = trainings.start(stops=(7, 190), epochs=40)
    training.at(7).client.sessions()
    full.fill()
    training.go().at(190)
    until(lambda: "cannot be used" in training.said, "a word of it")
    full.free()
    training.go()
    end = training.end()
    assert_same(end, plain(epochs=40))
    with trainings.opened() as store:
        everything_is_recorded(store, end)
        (event,) = queries.events(store, kinds=["storeUnavailable"])
        assert event.data["metrics"] == 0
        assert queries.events(store, kinds=["lost"]) == []


def test_what_a_full_disk_did_lose_is_reported(trainings, disk, tmp_path):
    full = disk(tmp_path / "store" / "journals", 512)
    training = trainings.start(stops=(7, 9), flood=8)
    training.at(7)
    full.fill()
    training.go().at(9)
    # A journal that gets its room back has to find room for all that is held.
    subprocess.run(["mount", "-o", "remount,size=64m", str(full.folder)], check=True)
    full.free()
    training.go()
    end = training.end()
    assert_same(end, plain())
    with trainings.opened() as store:
        store.recover(time.time())
        (event,) = queries.events(store, kinds=["lost"])
        flooded = len(queries.series(store, "baseline", "flood0").steps)
        steps = queries.series(store, "baseline", "loss").steps.tolist()
        assert flooded < 1500
        # A call of `log` is one record, whatever the number of its values.
        assert (1500 - flooded) + (LAST - len(steps)) == event.data["metrics"]
        assert {*range(1, 9), *range(10, LAST + 1)} <= set(steps)
        assert queries.run(store, "baseline").status == "finished"


# -- a database that others hold -------------------------------------------------------------------------------


@contextmanager
def held(folder):
    """The store's database is this process's alone, to write."""
    with closing(sqlite3.connect(folder / "onthefly.db", isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with (
            pytest.raises(StoreBusyError),
            closing(Store.open(folder, busy_timeout=0.01)) as store,
            store.begin() as connection,
        ):
            connection.exec_driver_sql("SELECT 1")
        yield
        holder.execute("ROLLBACK")


@pytest.mark.parametrize(("workers", "epochs"), [(0, 20), (1, 60)])
def test_a_locked_database_holds_up_nothing_and_loses_nothing(trainings, workers, epochs):
    """Not even the fork of a loader's worker, of which there is one in each epoch."""
    kind = {"workers": workers, "augmented": False, "val_workers": False, "epochs": epochs}
    last = epochs * PER_EPOCH
    training = trainings.start(stops=(7, last), config={"ckpt_every_epoch": False}, **kind)
    training.at(7).client.sessions()
    with held(trainings.store):
        training.go().at(last, patience=25)  # seconds for two; forks that wait for others' locks take minutes
        until(lambda: "cannot be used" in training.said, "a word of it")
    training.go()
    end = training.end()
    assert_same(end, plain(**kind))
    with trainings.opened() as store:
        everything_is_recorded(store, end)
        (event,) = queries.events(store, kinds=["storeUnavailable"])
        assert event.data["seconds"] > 0
        assert queries.events(store, kinds=["lost", "checkpointFailed"]) == []


def test_a_command_given_before_the_database_was_locked_is_answered_after_it(trainings):
    training = trainings.start(stops=(7, 12))
    id = training.at(7).deliver("set", values={"lr": 0.03})
    with held(trainings.store):
        training.go().at(12)
        assert queries.command(training.client.store, id).status == "queued"
    assert training.done(id)["changed"][0]["after"] == 0.03
    training.go().end()


def test_a_training_ends_under_a_locked_database_and_the_next_reader_learns_of_it(trainings):
    training = trainings.start(stops=(7,))
    training.at(7).client.sessions()
    with held(trainings.store):
        end = training.go().end()
        assert queries.sessions(training.client.store)[0].ended is None
    assert_same(end, plain())
    with trainings.opened() as store:
        everything_is_recorded(store, end)


# -- a store that cannot be written ----------------------------------------------------------------------------


def test_a_store_that_has_become_read_only_holds_up_nothing(tmp_path_factory):
    """A child without root, and folders whose modes are changed while it trains."""
    if os.geteuid() != 0:
        pytest.skip("only root can start a training as somebody else")
    with tempfile.TemporaryDirectory() as folder, Trainings(Path(folder)) as trainings:
        os.chmod(folder, 0o777)
        training = trainings.start(stops=(7, 12), user=NOBODY)
        training.at(7)
        until(
            lambda: 5 in {row.step for row in training.client.checkpoints("baseline")},
            "the save of the first epoch's end",
        )
        folders = [trainings.store, *(path for path in trainings.store.iterdir() if path.is_dir())]
        for path in folders:
            path.chmod(0o555)
        for path in folders:
            assert in_a_process(can_write, str(path), NOBODY) == os.strerror(errno.EACCES)
        training.go().at(12)
        failed = training.event("checkpointFailed")
        assert (failed.step, failed.data["reason"], failed.data["error"]) == (10, "epoch", "CheckpointWriteError")
        for path in folders:
            path.chmod(0o755)
        training.go()
        end = training.end()
        assert_same(end, plain())
        with trainings.opened() as store:
            everything_is_recorded(store, end)
            assert queries.newest_checkpoint(store, "baseline").step == LAST


def test_a_process_that_may_write_nothing_any_more_trains_on(trainings):
    """As on a file system that was remounted read-only: not even files that are open can be written."""
    training = trainings.start(stops=(7, 12))
    training.at(7)
    until(
        lambda: 5 in {row.step for row in training.client.checkpoints("baseline")}, "the save of the first epoch's end"
    )
    before = resource.prlimit(training.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(training.pid, resource.RLIMIT_FSIZE, (0, before[1]))
    training.go().at(12)
    assert queries.series(training.client.store, "baseline", "loss").steps.max(initial=0) <= 7
    until(lambda: training.client.session().heartbeat < time.time() - 2, "a heartbeat that is missing")
    resource.prlimit(training.pid, resource.RLIMIT_FSIZE, before)
    training.go()
    end = training.end()
    assert_same(end, plain())
    with trainings.opened() as store:
        everything_is_recorded(store, end)
        (failed,) = queries.events(store, kinds=["checkpointFailed"])
        assert failed.step == 10
        assert queries.events(store, kinds=["storeUnavailable"])


@pytest.mark.parametrize("how", ["deleted", "moved away"])
def test_a_store_that_has_gone_holds_up_nothing(trainings, how):
    training = trainings.start(stops=(7,), epochs=8)
    training.at(7).client.sessions()
    if how == "deleted":
        while trainings.store.exists():  # a save may be writing into it at this moment
            with contextlib.suppress(OSError):
                shutil.rmtree(trainings.store)
    else:
        trainings.store.rename(trainings.folder / "away")
    end = training.go().end()
    assert_same(end, plain(epochs=8))
    assert "was not saved" in training.said
    assert not trainings.store.exists()  # nobody makes another in its place
    if how == "moved away":
        with trainings.opened("away") as store:
            everything_is_recorded(store, end)


def test_training_does_not_begin_in_a_store_that_cannot_be_made(trainings):
    trainings.store.write_text("not a folder")
    training = trainings.start()
    assert training.end(1) is None
    assert "StoreError" in training.said
