"""Pictures of the dashboard for the README: a real training that is forked, scanned and merged, looked at in Chromium.

make screenshots        writes docs/images/*.png: light, and one dark; takes about two minutes
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onthefly
from onthefly.client import Client

REPOSITORY = Path(__file__).resolve().parents[1]
MAIN = "import sys; from onthefly.cli import main; sys.exit(main())"
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
SIZE = {"width": 1440, "height": 900}
LARGEST = 150_000  # bytes of a picture
PATIENCE = 120.0  # seconds for whatever is waited for


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=REPOSITORY / "docs/images", help="the folder for the pictures")
    to: Path = parser.parse_args().to
    browser = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if browser is None:
        print("error: there is no Chromium; install one to take pictures", file=sys.stderr)
        return 1
    to.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # what was started ends, too
    with tempfile.TemporaryDirectory(prefix="onthefly-") as folder:
        store = Path(folder) / "demo" / ".onthefly"
        environment = {**os.environ, "ONTHEFLY_STORE": str(store)}
        training = [sys.executable, str(REPOSITORY / "examples/digits.py"), "--slow", "0.01", "--epochs", "400"]
        started: list[subprocess.Popen[Any]] = [
            subprocess.Popen([*training, "--workers", "0"], env=environment, stderr=subprocess.DEVNULL)
        ]
        try:
            wait(lambda: (store / "onthefly.db").exists())
            words = [sys.executable, "-c", MAIN, "ui", "--no-open", str(store)]
            hub = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
            started.append(hub)
            assert hub.stdout is not None
            url = hub.stdout.readline().strip()
            with onthefly.connect(store) as client:
                history(client)
            pictures(url, browser, to)
        finally:
            for process in started:
                process.kill()
                process.wait()
    return 0


def history(client: Client) -> None:
    """What there is to be seen: two forks, one of them on hard samples, a merge of both, scans, and the first run gone on with."""
    wait(lambda: bool(client.sessions(alive=True)) and client.session().step > 0)
    first = client.session().run
    train(client, 120)
    client.scan(embeddings=True)
    client.fork(name="warm", values={"lr": 0.004})
    train(client, 80)
    client.fork("quantile(loss, 0.6, 1)", name="hard")
    train(client, 60)
    client.merge(["warm", "hard"], "swa", commit="swa", floor=False, timeout=PATIENCE)
    train(client, 40)
    client.switch(first)
    client.set({"weight_decay": 0.02})
    train(client, 80)
    client.test("val")
    client.scan(embeddings=True)
    train(client, 40)


def train(client: Client, steps: int) -> None:
    goal = client.session().step + steps
    wait(lambda: client.session().step >= goal)


def wait(condition: Callable[[], bool]) -> None:
    """Raises `TimeoutError`."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("what was waited for did not come")
        time.sleep(0.05)


def pictures(url: str, browser: str, to: Path) -> None:
    from playwright.sync_api import sync_playwright

    base = url.partition("?")[0]
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=list(FLAGS))
        for scheme in ("light", "dark"):
            page = chromium.new_context(viewport=SIZE, color_scheme=scheme).new_page()  # type: ignore[arg-type]
            page.set_default_timeout(PATIENCE * 1000)
            page.goto(url)
            for name in ("overview",) if scheme == "dark" else ("overview", "charts", "runs", "samples", "merge"):
                page.goto(f"{base}#/{name}")
                page.locator("nav a[aria-current=page]").wait_for()
                PREPARED.get(name, settled)(page)
                page.locator("header .path").evaluate_all("all => all.forEach(one => (one.textContent = '.onthefly'))")
                page.wait_for_timeout(1500)  # curves are drawn, messages are gone
                place = to / f"{name}{'-dark' if scheme == 'dark' else ''}.png"
                place.write_bytes(small(page.screenshot()))
                print(place, place.stat().st_size)
        chromium.close()


def settled(page: Any) -> None:
    page.locator("main canvas").first.wait_for()


def in_graph(page: Any) -> None:
    page.locator("[data-run=hard]").click()
    page.get_by_role("complementary", name="Run hard").get_by_text("Last metrics").wait_for()


def merged(page: Any) -> None:
    page.locator("[data-run=warm]").click()
    page.locator("[data-run=hard]").click()
    page.get_by_role("button", name="Preview").click()
    page.get_by_role("button", name="Commit the best").wait_for()
    page.locator(".toast, [role=status] button").first.wait_for(state="detached")


PREPARED: dict[str, Callable[[Any], None]] = {"runs": in_graph, "merge": merged}


def small(picture: bytes) -> bytes:
    """A PNG that fits `LARGEST`: as it is if it does, or else with a palette, of as many colours as fit; where Pillow is not installed, as
    it is."""
    try:
        from PIL import Image
    except ImportError:
        return picture
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    for colours in (256, 128, 64):
        if buffer.tell() <= LARGEST:
            break
        buffer = io.BytesIO()
        # Few pixels have the colour of a run, and it must stay: the palette covers what colours there are, not what is frequent.
        reduced = image.quantize(colours, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        reduced.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
