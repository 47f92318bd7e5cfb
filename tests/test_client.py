"""The Python door, against real processes that play sessions."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import onthefly.client
from onthefly.errors import (
    AmbiguousError,
    CheckpointNotFoundError,
    CommandTimeoutError,
    InvalidCommandError,
    MissingPartError,
    NoLiveSessionError,
    ResumeError,
    StoreError,
    UnknownReferenceError,
)

REPLAYER = Path(__file__).with_name("replayer.py")


@pytest.fixture
def client(own_store, play):
    """A client of a store in which one session is alive."""
    player = play()
    with onthefly.client.connect() as client:
        client.player = player
        yield client


def test_no_store_is_an_error_that_says_what_to_do(own_store):
    with pytest.raises(StoreError, match="ONTHEFLY_STORE"):
        onthefly.client.connect()


def test_commands_are_answered_with_the_step_at_which_they_were_done(client):
    paused = client.pause()
    assert paused["paused"] is True
    assert client.session().status == "paused"
    saved = client.save(pin=True)
    assert (saved["step"], saved["epoch"]) == (paused["step"], paused["epoch"])
    assert client.set(lr=1e-4)["changed"] == [{"name": "lr", "before": 1.0, "after": 1e-4}]
    assert client.set({"optimizer.0.lr": "*0.1"})["changed"][0]["after"] == "*0.1"
    assert client.test("val")["loss"] == 0.25
    assert client.reset()["generation"] == 1
    assert client.resume()["paused"] is False


def test_a_ref_is_loaded_by_path_and_hash(client):
    saved = client.save()
    loaded = client.load(f"baseline@{saved['step']}")
    assert (loaded["loaded"], loaded["hash"]) == (saved["path"], saved["hash"])


def test_a_file_that_the_store_does_not_know_is_loaded_as_it_is(client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("other.safetensors", "no_suffix"):
        Path(name).touch()
        assert client.resolve(name) == tmp_path / name
        assert client.load(name)["hash"] is None
    with pytest.raises(UnknownReferenceError, match="no file"):
        client.resolve("gone.safetensors")


def test_a_checkpoint_is_found_by_its_path_however_it_is_written(client, own_store, monkeypatch):
    saved = Path(client.save()["path"])
    monkeypatch.chdir(saved.parent)
    for text in (str(saved), f"./{saved.name}", saved.name):
        assert client.resolve(text).path == saved


def test_the_session_s_error_comes_as_its_own_class(client):
    with pytest.raises(MissingPartError, match="test"):
        client.test()


def test_wrong_arguments_never_reach_the_session(client):
    with pytest.raises(InvalidCommandError):
        client.set()
    with pytest.raises(InvalidCommandError, match="there are: pause"):
        client.command("explode")


def test_one_id_is_one_command(client):
    first = client.command("saveCheckpoint", id="once")
    client.set(lr=1.0)
    again = client.command("saveCheckpoint", id="once")
    assert again == first
    assert len(client.checkpoints()) == 1


def test_without_waiting_the_command_is_queued(client, wait_until):
    assert client.pause(wait=False)["status"] == "queued"
    wait_until(lambda: client.session().status == "paused")


def test_a_session_that_does_not_answer_is_a_timeout(play):
    play("deaf")
    with onthefly.client.connect() as client, pytest.raises(CommandTimeoutError, match="stays queued"):
        client.pause(timeout=0.2)


def test_a_session_that_is_killed_by_the_command_fails_it_at_once(play):
    play("dies=pause")
    with onthefly.client.connect() as client:
        with pytest.raises(NoLiveSessionError):
            client.pause(timeout=60)
        assert client.sessions()[0].outcome == "killed"
        assert client.run("baseline").status == "unfinished"


def test_a_command_to_a_dead_session_fails_at_once(client):
    os.kill(client.player.pid, signal.SIGKILL)
    client.player.wait()
    with pytest.raises(NoLiveSessionError, match="no session is alive"):
        client.pause(timeout=60)
    with pytest.raises(NoLiveSessionError):
        client.session(client.player.session)


def test_the_answer_of_a_session_that_ends_with_it_arrives(client):
    assert client.stop()["stopped"] is True
    client.player.wait()
    assert client.status().live == []
    assert client.status().last.outcome == "stopped"


def test_with_several_sessions_one_must_be_chosen(client, play):
    other = play("run=other")
    with pytest.raises(AmbiguousError, match=r"baseline.*other"):
        client.pause()
    client.pause(session="other")
    assert client.session(other.session).status == "paused"
    assert client.session("baseline").status == "running"
    with pytest.raises(NoLiveSessionError, match="alive: 1"):
        client.session("another")


def test_commands_of_several_clients_are_all_answered(client):
    saved = []

    def save():
        with onthefly.client.connect() as mine:
            saved.append(mine.save()["step"])

    threads = [threading.Thread(target=save) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(saved) == 8


def test_what_was_logged_is_read_back(client, wait_until):
    # A heartbeat tells of step 100 before, or after, the value logged there has been carried over.
    wait_until(lambda: len(client.series("baseline", "loss").values) == 100)
    series = client.series("baseline", "loss")
    assert series.values.tolist() == [1 / step for step in range(1, 101)]
    assert client.latest("baseline") == {"loss": 0.01}
    assert [event.kind for event in client.events(kinds=["sessionStarted"])] == ["sessionStarted"]
    assert client.events(after=(client.player.session, 10**9)) == []
    with pytest.raises(UnknownReferenceError, match="there are: baseline"):
        client.latest("fork1")


def test_best_is_judged_by_the_session_s_metric(client, wait_until):
    client.pause()
    client.save()
    client.resume()
    wait_until(lambda: client.session().step >= 100)
    client.save()
    best = min(client.checkpoints(), key=lambda row: row.metrics["val_loss"])
    assert client.resolve("baseline@best") == best


class TestResumeTarget:
    def test_is_the_only_unfinished_run(self, client):
        with pytest.raises(ResumeError, match="no unfinished run"):
            client.resume_target()
        with pytest.raises(ResumeError, match="being trained now"):
            client.resume_target("baseline")
        client.stop()
        client.player.wait()
        target = client.resume_target()
        assert target.run.name == "baseline"
        assert target.launch["argv"][-1].endswith("player.py")

    def test_is_ambiguous_among_several(self, play):
        for name in ("one", "two"):
            player = play(f"run={name}")
            player.kill()
            player.wait()
        with onthefly.client.connect() as client:
            with pytest.raises(AmbiguousError, match="one, two"):
                client.resume_target()
            assert client.resume_target("two").run.name == "two"
            with pytest.raises(UnknownReferenceError):
                client.resume_target("three")

    def test_is_not_a_finished_run(self, play):
        play("steps=3").wait()
        with onthefly.client.connect() as client, pytest.raises(ResumeError, match="finished"):
            client.resume_target("baseline")

    def test_is_not_a_notebook(self, play):
        player = play("notebook")
        player.kill()
        player.wait()
        with onthefly.client.connect() as client, pytest.raises(ResumeError, match="ONTHEFLY_RESUME=baseline"):
            client.resume_target()


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A store in which a toy was trained: checkpoints at steps 0, 3 and 7, and a `set` at step 5."""
    store = tmp_path_factory.mktemp("toy") / "store"
    command = [sys.executable, "-W", "error", str(REPLAYER)]
    subprocess.run(command, check=True, env={**os.environ, "ONTHEFLY_STORE": str(store)})
    return store


class TestVerify:
    @pytest.fixture
    def trained(self, once, own_store, monkeypatch):
        """A client of a copy of it: a store can be moved. The word says what goes wrong in replays."""
        shutil.copytree(once, own_store)

        def connect(trouble=""):
            monkeypatch.setenv("TOY", trouble)
            return onthefly.client.connect()

        return connect

    def test_the_newest_stretch_comes_out_equal_with_its_commands(self, trained):
        with trained() as client:
            found = client.verify(timeout=300)
            assert found.equal, found
            assert (found.start.step, found.end.step, found.commands) == (3, 7, 1)
            assert found.replayed_hash == found.recorded_hash == found.end.hash
            assert found.differences == found.causes == []
            assert [row.name for row in client.runs()] == ["toy"]  # nothing of the replay is in the store

    def test_which_stretch_is_chosen(self, trained, play):
        with trained() as client:

            def stretch(*refs):
                plan = client.plan(*refs)
                return plan.start.step, plan.end.step, len(plan.commands)

            play("run=younger")
            client.save()  # with a single checkpoint no stretch leads there
            assert stretch() == stretch("toy") == stretch("toy@7") == stretch("toy@3") == (3, 7, 1)
            assert stretch("toy@0") == (0, 3, 0)
            assert stretch("toy@0", "toy@7") == (0, 7, 1)
            with pytest.raises(InvalidCommandError, match="no steps lead"):
                client.plan("toy@7", "toy@3")
            Path(client.store.root / "foreign.safetensors").touch()
            with pytest.raises(UnknownReferenceError, match="not a recorded checkpoint"):
                client.plan(str(client.store.root / "foreign.safetensors"))

    def test_a_difference_is_named(self, trained):
        with trained("drifts") as client:
            found = client.verify(timeout=300)
        assert not found.equal
        assert any(line.startswith("model/w: 1 of 4 values differ") for line in found.differences), found
        assert any(line.startswith("rng/torch: the random stream") for line in found.differences), found
        assert "counters/drift: recorded 0, replayed 1" in found.differences
        assert any("random numbers" in cause for cause in found.causes)
        assert "the session said: a kernel is nondeterministic" in found.causes

    def test_a_replay_that_fails_is_an_error_with_its_last_words(self, trained):
        with trained("fails") as client, pytest.raises(ResumeError, match=r"(?s)exit code 3.*no such luck"):
            client.verify(timeout=300)

    def test_a_replay_that_hangs_is_ended(self, trained):
        with trained("hangs") as client, pytest.raises(ResumeError, match=r"within 0\.5 s"):
            client.verify(timeout=0.5)

    def test_a_verify_that_is_terminated_takes_its_replay_and_its_files_along(self, trained, wait_until):
        with trained("hangs") as client:
            folder = client.store.checkpoints_dir
        command = [sys.executable, "-c", "import sys; from onthefly.cli import main; sys.exit(main())", "verify"]
        process = subprocess.Popen(command)
        wait_until(lambda: any(folder.glob(".verify-*/output.txt")))
        process.terminate()
        assert process.wait() == 128 + signal.SIGTERM
        assert list(folder.glob(".verify-*")) == []

    def test_a_lost_file_is_an_error(self, trained):
        with trained() as client:
            client.checkpoints()[1].path.unlink()
            with pytest.raises(CheckpointNotFoundError):
                client.verify()

    def test_one_checkpoint_is_not_enough(self, client):
        with pytest.raises(UnknownReferenceError, match="no checkpoint"):
            client.verify()
        client.save()
        with pytest.raises(UnknownReferenceError, match="only checkpoint"):
            client.verify()


def test_nothing_here_loads_torch(own_store, play):
    play()
    code = (
        "import sys, onthefly.client as door\n"
        "with door.connect() as client:\n    client.status(), client.events(), client.pause()\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
