"""A store of one's own, and processes that play sessions in it (see `player.py`)."""

import gc
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# The processes that share the tests between them must choose the same random ones.
os.environ.setdefault("ONTHEFLY_SEED", str(random.randrange(10**6)))

sys.path.insert(0, str(Path(__file__).parent))  # for `checkpoint_stores`

PLAYER = Path(__file__).with_name("player.py")


@pytest.fixture
def own_store(tmp_path, monkeypatch):
    """A folder for a store, which every door in this test and every process that it starts takes by default."""
    monkeypatch.setenv("ONTHEFLY_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def play(own_store):
    """Starts a session; gives its process, with its id as `session`. It is ended with the test."""
    started = []

    def start(*options):
        command = [sys.executable, "-W", "error", str(PLAYER), *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        word, number = process.stdout.readline().split()
        assert word == "ready"
        process.session = int(number)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def wait_until():
    """Waits for something to become true, for as long as the test may take."""
    import time

    def wait(condition):
        while not (found := condition()):
            time.sleep(0.01)
        return found

    return wait


def pytest_collection_finish():
    """What every test stands on is not looked through again and again for what could go, here and in what is forked from here."""
    gc.collect()
    gc.freeze()


# A machine that is busy for a moment is no failure: no example has a time that it must keep.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

os.environ.pop("ONTHEFLY_STORE", None)  # a developer's own store is no business of the tests
