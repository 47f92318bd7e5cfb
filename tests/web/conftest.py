"""The dashboard in a real browser: one real training (examples/digits.py, slowed down), one hub, one Chromium, a new profile for each page."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import onthefly

REPOSITORY = Path(__file__).parents[2]
WEB = REPOSITORY / "src/onthefly/hub/web"
PLAYER = REPOSITORY / "tests/player.py"
MAIN = "import sys; from onthefly.cli import main; sys.exit(main())"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run"),
)
PATIENCE = 20_000  # milliseconds
LAST = "test_a_training_that_was_killed_is_said_to_be"


def chromium():
    return next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )


def pytest_collection_modifyitems(items):
    """These need a browser and the built dashboard. They share a training and go on from each other: one process runs them all, in their
    order."""
    missing = None
    if chromium() is None:
        missing = "there is no Chromium"
    elif not (WEB / "dist/index.html").is_file():
        missing = "the dashboard is not built: make web"
    elif os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") != "1":
        missing = "they follow upon each other: pytest tests/web, without -n"
    items.sort(key=lambda item: item.name == LAST)  # whatever file it is in: what comes after it has no training
    for item in items:
        if missing is not None and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=missing))


def ended(process):
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


class Stage:
    """A store with a real training, if it is to have one, and a hub."""

    def __init__(self, folder, *, trains=True):
        self.store = folder / "store"
        self.environment = {**os.environ, "ONTHEFLY_STORE": str(self.store)}
        words = [
            sys.executable,
            str(REPOSITORY / "examples/digits.py"),
            "--slow",
            "0.05",
            "--epochs",
            "400",
            "--workers",
            "0",
        ]
        self.trainer = self._start(words) if trains else None
        self.hub = None
        self.others = []

    def _start(self, words, **how):
        return subprocess.Popen(words, env=self.environment, stderr=subprocess.DEVNULL, text=True, **how)

    def wait(self, condition, seconds=120):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if (found := condition()) is not None and found is not False:
                return found
            time.sleep(0.05)
        raise AssertionError("it did not come true")

    def until_it_trains(self):
        with onthefly.connect(self.store) as client:
            self.wait(lambda: bool(client.sessions()) and client.session().step > 5)

    def start_hub(self):
        self.hub = self._start([sys.executable, "-c", MAIN, "ui", "--no-open", str(self.store)], stdout=subprocess.PIPE)
        self.url = self.hub.stdout.readline().strip()
        assert self.url, "the hub did not start"

    def kill_hub(self):
        self.hub.send_signal(signal.SIGKILL)
        ended(self.hub)

    def start_player(self, *options):
        """A session beside the real one, that plays (`tests/player.py`)."""
        player = self._start([sys.executable, str(PLAYER), *options], stdout=subprocess.PIPE)
        self.others.append(player)
        assert player.stdout.readline().startswith("ready")
        return player

    def stop_others(self):
        while self.others:
            ended(self.others.pop())

    def end(self):
        self.stop_others()
        for process in (self.trainer, self.hub):
            if process is not None:
                ended(process)


@pytest.fixture(scope="session")
def stage(tmp_path_factory):
    made = Stage(tmp_path_factory.mktemp("web"))
    try:
        made.wait((made.store / "onthefly.db").exists)
        made.start_hub()
        made.until_it_trains()
        yield made
    finally:
        made.end()


@pytest.fixture(scope="session")
def played(tmp_path_factory):
    """A store whose session is played (`tests/player.py`), with a hub of its own: for what needs no training."""
    made = Stage(tmp_path_factory.mktemp("played"), trains=False)
    try:
        made.start_player("run=played")
        made.start_hub()
        yield made
    finally:
        made.end()


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE)

    with sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        yield made
        made.close()


def is_complaint(said):
    """That a run has no checkpoint yet is a 404, which Chromium writes down."""
    return said.type in ("error", "warning") and not said.location["url"].endswith("/values")


@pytest.fixture
def open_page(request, browser):
    """Opens the dashboard (of the training's store, or `on` another stage) in a profile of its own. After the test nothing may have been
    written to the console."""
    opened, complaints = [], []

    def start(page="overview", *, width=1440, height=900, offline=False, on=None, **how):
        on = on or request.getfixturevalue("stage")
        context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True, **how)
        made = context.new_page()
        made.set_default_timeout(PATIENCE)
        made.on("dialog", lambda dialog: complaints.append(f"a dialog: {dialog.message}") or dialog.dismiss())
        if not offline:
            made.on(
                "console",
                lambda said: complaints.append(f"{said.text} {said.location}") if is_complaint(said) else None,
            )
        made.on("pageerror", lambda error: complaints.append(str(error)))
        made.goto(on.url)
        made.goto(on.url.partition("?")[0] + f"#/{page}")
        made.locator("nav a[aria-current=page]").wait_for()
        opened.append(context)
        return made

    yield start
    said = list(complaints)  # what is said while it closes is no complaint
    for context in opened:
        context.close()
    assert said == []
