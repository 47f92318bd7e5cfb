"""Real hubs on free ports, over the stores of real trainings and of players (`tests/player.py`)."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import connect

import onthefly
from onthefly.hub.columns import unpack

TRAINING = Path(__file__).with_name("training.py")
MAIN = "import sys; from onthefly.cli import main; sys.exit(main())"


def ended(process):
    process.kill()
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


class Hub:
    """A hub's process, and how to talk to it."""

    def __init__(self, *stores, options=()):
        words = [sys.executable, "-c", MAIN, "ui", "--no-open", *options, *map(str, stores)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()
        if not self.url:
            raise RuntimeError(self.process.stderr.read())
        self.base, _, self.token = self.url.partition("/?token=")
        self.port = int(self.base.rpartition(":")[2])
        self.bearer = {"Authorization": f"Bearer {self.token}"}
        self.http = httpx.Client(base_url=self.base, headers=self.bearer, timeout=60)
        self.bare = httpx.Client(base_url=self.base, timeout=60)
        self.stores = [store["id"] for store in self.http.get("/api/v1/stores").json()]
        self.at = f"/api/v1/stores/{self.stores[0]}"

    def get(self, path, **how):
        answer = self.http.get(self.at + path, **how)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def columns(self, method, path, **how):
        answer = self.http.request(method, self.at + path, **how)
        assert answer.status_code == 200, answer.text
        return unpack(answer.content)

    def give(self, session, kind, wait=30, **arguments):
        answer = self.http.post(f"{self.at}/sessions/{session}/commands/{kind}?wait={wait}", json=arguments)
        assert answer.status_code in (200, 202), answer.text
        return answer.json()

    def cookie(self):
        """The cookie of a browser that has opened the URL."""
        answer = self.bare.get("/", params={"token": self.token})
        self.bare.cookies.clear()
        return answer.headers["set-cookie"].partition(";")[0]

    @contextmanager
    def tab(self, **headers):
        """A WebSocket as a page has one."""
        how = {"Cookie": self.cookie(), "Origin": self.base} | headers
        url = self.base.replace("http", "ws", 1) + "/api/v1/live"
        with connect(url, additional_headers={k: v for k, v in how.items() if v is not None}, proxy=None) as socket:
            yield Tab(socket)

    def end(self):
        self.http.close()
        self.bare.close()
        ended(self.process)


class Tab:
    """The page's end of a WebSocket."""

    def __init__(self, socket):
        self.socket = socket
        self.welcome = json.loads(socket.recv(timeout=20))

    def say(self, **message):
        self.socket.send(json.dumps(message))

    def next(self, timeout=20):
        """The next message: text, or a frame's columns and meta."""
        message = self.socket.recv(timeout=timeout)
        return json.loads(message) if isinstance(message, str) else unpack(message)

    def frame(self, store, timeout=20):
        """The next frame that has something of a store; it is drawn. Gives what it says of it, and the columns."""
        while True:
            columns, meta = self.next(timeout)
            self.say(type="drawn", frame=meta["frame"])
            if store in meta["stores"]:
                return meta["stores"][store], columns

    def until(self, store, condition, timeout=20):
        """Frames are drawn until what one says of a store fulfils a condition."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            found, _ = self.frame(store)
            if condition(found):
                return found
        raise AssertionError("no such frame came")


@pytest.fixture
def start_hub():
    """Starts hubs, which end with the test."""
    started = []

    def start(*stores, options=()):
        started.append(Hub(*stores, options=options))
        return started[-1]

    yield start
    for hub in started:
        hub.end()


class Training:
    """A real training process, alive, with its hub."""

    def __init__(self, store):
        self.store = store
        words = [sys.executable, "-W", "error", str(TRAINING), str(store)]
        self.process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        while not (store / "onthefly.db").exists():
            assert self.process.poll() is None, self.process.stderr.read()
            time.sleep(0.02)
        with onthefly.connect(store) as client:
            while not client.sessions() or client.session().step < 10:
                assert self.process.poll() is None, self.process.stderr.read()
                time.sleep(0.02)
            self.session = client.session().id
        self.hub = Hub(store)

    def end(self):
        self.hub.end()
        ended(self.process)


@pytest.fixture(scope="package")
def training(tmp_path_factory):
    """One for all tests of the hub: each leaves it running, on whatever run."""
    made = Training(tmp_path_factory.mktemp("training") / "store")
    yield made
    made.end()


@pytest.fixture(scope="package")
def hub(training):
    """The hub of the real training."""
    return training.hub


@pytest.fixture
def kill():
    def now(process):
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

    return now
