"""A store, and other processes that use it."""

import os
import subprocess
import sys

import pytest

from onthefly.store.store import Store


@pytest.fixture
def store(tmp_path):
    made = Store.open(tmp_path / "store", create=True)
    yield made
    made.close()


@pytest.fixture
def new_session(store):
    """Makes sessions, of this process unless told otherwise."""

    def make(run="baseline", pid=None, host="here"):
        nothing = {"launch": None, "environment": {}, "inexact": [], "config": {}}
        return store.create_session(project="p", run=run, pid=pid or os.getpid(), host=host, time=1.0, **nothing)

    return make


@pytest.fixture
def python():
    """Starts Python processes, and ends those that are left."""
    started = []

    def start(code, *arguments):
        command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
