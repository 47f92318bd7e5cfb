"""The dashboard in a real Chromium: how soon charts are drawn, what is dropped, how late a number comes, and what training pays for it.

Real hubs over stores that are filled as in `hub.py`. Times in the page are its own clock's, from the start of the navigation. With
the extra `bench` TensorBoard and trackio are given the same points and measured beside it (`--compare`).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hub as filling
import numpy as np
from harness import Report, percentile, ratio
from sqlalchemy import insert

from onthefly.samples.table import SampleTable
from onthefly.store import schema
from onthefly.store.store import Store

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run"),
)
LOOP = Path(__file__).with_name("logging_loop.py")
SIZE = {"width": 1440, "height": 900}
PATIENCE = 120_000  # milliseconds

# In the page, before anything of it runs: when its frame stood, when charts were drawn, when a message came, what a metric said.
PROBE = """
window.probe = {there: null, message: 0, frames: null, said: [], last: null}
const Plain = window.WebSocket
window.WebSocket = class extends Plain {
  constructor(...words) {
    super(...words)
    this.addEventListener('message', () => (probe.message = performance.now()))
  }
}
probe.charts = () =>
  [...document.querySelectorAll('.charts figure')].filter((one) => {
    const box = one.getBoundingClientRect()
    return box.top < innerHeight && box.bottom > 0
  })
probe.drawn = (lines) => {
  const all = probe.charts()
  const done = all.filter((one) => {
    const values = [...one.querySelectorAll('.legend b')]
    return one.querySelector('canvas') && values.length === lines && values.every((value) => /[0-9]/.test(value.innerText))
  })
  return all.length > 0 && done.length === all.length
}
const look = (now) => {
  if (probe.there === null && document.querySelector('nav a')) probe.there = now
  if (probe.frames) probe.frames.push(now)
  const tick = document.querySelector('figure[data-metric=tick] .legend b')?.textContent
  if (tick && probe.last !== tick) probe.said.push([(probe.last = tick), Date.now()])
  requestAnimationFrame(look)
}
requestAnimationFrame(look)
"""
# Waits in the page, so that the way between the two processes is no part of the time.
UNTIL_DRAWN = """(lines) => new Promise((told) => {
  const look = () => (probe.drawn(lines) ? requestAnimationFrame((now) => told(now)) : requestAnimationFrame(look))
  look()
})"""
UNTIL_SAID = """(before) => new Promise((told) => {
  const look = () => (probe.message > before ? requestAnimationFrame((now) => told(now)) : requestAnimationFrame(look))
  look()
})"""


def missing(*modules: str) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def chromium() -> str:
    """Raises `SystemExit` where there is none: nothing can be measured."""
    found = next((at for name in ("chromium", "chromium-browser", "google-chrome") if (at := shutil.which(name))), None)
    if found is None:
        raise SystemExit("benchmarks/browser.py needs Chromium: install it, for instance `apt-get install chromium`")
    return found


@contextlib.contextmanager
def browsing(core: int | None = None) -> Iterator[Any]:
    """A browser, on one core if that is named."""
    from playwright.sync_api import sync_playwright

    words = {"executable_path": chromium(), "args": list(FLAGS)}
    with sync_playwright() as driver, on(core):
        browser = driver.chromium.launch(**words)  # type: ignore[arg-type]
        yield browser
        browser.close()


@contextlib.contextmanager
def on(core: int | None) -> Iterator[None]:
    """What is started in here runs on that core."""
    before = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Hub:
    """A hub's process, just started."""

    def __init__(self, store: Path) -> None:
        words = [sys.executable, "-c", filling.MAIN, "ui", "--no-open", str(store)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        self.base = self.url.partition("?")[0]

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def cpu(self) -> float:
        """Seconds of a core that it has used."""
        words = Path(f"/proc/{self.process.pid}/stat").read_text("ascii").rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def page(self, browser: Any, name: str) -> Any:
        """A page in a profile of its own, signed in, at a page of the dashboard."""
        context = browser.new_context(viewport=SIZE)
        context.add_init_script(PROBE)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.request.get(self.url)  # the cookie
        page.goto(f"{self.base}#/{name}")
        return page


def frames(page: Any, act: Any) -> tuple[float, float]:
    """The longest frame in milliseconds while something is done, and how many there were a second."""
    page.evaluate("probe.frames = []")
    act()
    times = page.evaluate("probe.frames.splice(0)")
    page.evaluate("probe.frames = null")
    gaps = [b - a for a, b in itertools.pairwise(times)]
    return max(gaps), 1000 * len(gaps) / (times[-1] - times[0])


def large(report: Report, browser: Any, folder: Path, count: int, rounds: int) -> None:
    store = folder / "large"
    filling.fill(store, 1, 1, count)
    charted, whole, zooms = [], [], []
    for _ in range(rounds):
        with Hub(store) as hub:
            page = hub.page(browser, "charts")
            drawn = page.evaluate(UNTIL_DRAWN, 1)
            whole.append(drawn)
            charted.append(drawn - page.evaluate("probe.there"))
            zooms.append(zoomed(page))
            sent = page.evaluate(
                "[...performance.getEntriesByType('navigation'), ...performance.getEntriesByType('resource')]"
                ".filter((one) => !one.name.includes('/api/')).reduce((sum, one) => sum + one.transferSize, 0)"
            )
            page.context.close()
    report.judge(f"a chart of {count:,} points after the page is there", statistics.median(charted), 300, "ms")
    report.note("the same, from the start of the navigation", statistics.median(whole), "ms")
    report.note("zoomed, from letting go to the frame", statistics.median(zooms), "ms")
    report.judge("the page's own transfer", sent / 1024, 400, "KiB")


def zoomed(page: Any) -> float:
    """Milliseconds from letting go of a brush to the finer data."""
    box = page.locator(".charts figure .u-over").first.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.4, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, middle, steps=4)
    before = page.evaluate("performance.now()")
    page.mouse.up()
    return float(page.evaluate(UNTIL_SAID, before) - before)


def wide(report: Report, browser: Any, store: Path, runs: int, metrics: int, count: int, rounds: int) -> None:
    name = f"{runs} x {metrics} x {count:,}"
    first, every, following, zooms = [], [], [], []
    for _ in range(rounds):
        with Hub(store) as hub:
            page = hub.page(browser, "charts")
            first.append(page.evaluate(UNTIL_DRAWN, min(8, runs)))
            began = page.evaluate("performance.now()")
            page.get_by_role("button", name="all", exact=True).click()
            every.append(page.evaluate(UNTIL_DRAWN, runs) - began)
            began = page.evaluate("(document.querySelector('section').scrollBy(0, innerHeight), performance.now())")
            following.append(page.evaluate(UNTIL_DRAWN, runs) - began)
            page.evaluate("document.querySelector('section').scrollTo(0, 0)")
            page.evaluate(UNTIL_DRAWN, runs)
            zooms.append(zoomed(page))
            page.context.close()
    report.judge(f"first page of {name}, as it opens (8 runs)", statistics.median(first), 1500, "ms")
    report.judge("the same with every run ticked, from the click", statistics.median(every), 1500, "ms")
    report.judge("next page, every run, from the scroll", statistics.median(following), 500, "ms")
    report.note("zoomed, every run, from letting go to the frame", statistics.median(zooms), "ms")


def lists(report: Report, browser: Any, folder: Path, rows: int, nodes: int) -> None:
    table, graph = folder / "rows", folder / "nodes"
    filling.fill(table, rows, 2, 100)
    store = Store.open(graph, create=True)
    names = [store.create_run(None, project="bench")]
    draw = np.random.default_rng(0)
    for number in range(1, nodes):
        parent = names[int(draw.integers(max(0, number - 12), number))]
        names.append(store.create_run(None, project="bench", kind="fork", parents=[(parent, f"{number:064x}")]))
    store.close()
    with Hub(table) as hub:
        page = hub.page(browser, "runs")
        page.get_by_role("button", name="Table", exact=True).click()
        page.locator(".table").hover()

        def scroll() -> None:
            for _ in range(60):
                page.mouse.wheel(0, 400)
                page.wait_for_timeout(16)

        longest, rate = frames(page, scroll)
        page.context.close()
    report.judge(f"longest frame while {rows:,} runs are scrolled in the table", longest, 1000, "ms")
    report.note("frames a second meanwhile", rate)
    with Hub(graph) as hub:
        page = hub.page(browser, "runs")
        picture = page.locator("svg[aria-label='Lineage of the runs'], [aria-label='Lineage of the runs']").first
        picture.wait_for()
        box = picture.bounding_box()

        def pan() -> None:
            page.mouse.move(box["x"] + 20, box["y"] + 20)
            page.mouse.down()
            for at in range(60):
                page.mouse.move(box["x"] + 20 + 5 * at, box["y"] + 20 + 3 * at)
                page.wait_for_timeout(16)
            page.mouse.up()
            for at in range(20):
                page.mouse.wheel(0, 120 if at % 2 else -120)
                page.wait_for_timeout(16)

        longest, rate = frames(page, pan)
        page.context.close()
    report.judge(f"longest frame while {nodes} runs are panned and zoomed in the graph", longest, 1000, "ms")
    report.note("frames a second meanwhile", rate)


def brushing(report: Report, browser: Any, folder: Path, samples: int) -> None:
    path = folder / "scanned"
    store = Store.open(path, create=True)
    run = store.create_run(None, project="bench")
    draw = np.random.default_rng(0)
    loss = draw.gamma(1.5, 0.4, samples).astype(np.float32)
    confidence = np.exp(-loss) * draw.uniform(0.8, 1, samples).astype(np.float32)
    label = draw.integers(0, 10, samples)
    columns = {"loss": loss, "confidence": confidence, "label": label, "correct": loss < 1}
    file = store.scans_dir / "bench.arrow"
    content = SampleTable(columns, {"data": "val"}).write(file)
    about = {"run": run, "generation": 0, "step": 1, "epoch": 0, "time": time.time(), "checkpoint": "00" * 32}
    about |= {"data": "val", "columns": list(columns), "length": samples, "path": store.stored_path(file)}
    with store.begin() as connection:
        connection.execute(insert(schema.scan).values(**about, hash=content, seconds=1.0, session=1))
    store.close()
    with Hub(path) as hub:
        page = hub.page(browser, "samples")
        for label_text, name in (("Histogram of", "histogram"), ("Map of", "map")):
            shown = page.locator(f"[aria-label^='{label_text}']")
            shown.wait_for()
            page.wait_for_timeout(1000)
            box = shown.bounding_box()

            def brush(box: dict[str, float] = box) -> None:
                page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.3)
                page.mouse.down()
                for at in range(80):
                    share = 0.2 + 0.6 * at / 80
                    tall = 0.3 + 0.4 * (at % 40) / 40
                    page.mouse.move(box["x"] + box["width"] * share, box["y"] + box["height"] * tall)
                    page.wait_for_timeout(10)
                page.mouse.up()

            longest, rate = frames(page, brush)
            report.judge(f"{samples:,} samples brushed in the {name}", rate, 30, "frames a second", least=True)
            report.note("the longest frame", longest, "ms")
        page.context.close()


class Loop:
    """A training that says what it does: `logging_loop.py`."""

    def __init__(self, store: Path, pause: float) -> None:
        words = [sys.executable, str(LOOP), str(store), "--pause", str(pause)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.lines: list[tuple[int, float, float]] = []  # step, when it logged, seconds that it took
        threading.Thread(target=self._read, daemon=True).start()
        while not self.lines:
            if self.process.poll() is not None:
                raise RuntimeError("the training ended")
            time.sleep(0.05)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            step, logged, took = line.split()
            self.lines.append((int(step), float(logged), float(took)))

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def latency(report: Report, browser: Any, folder: Path, seconds: float) -> None:
    """From `session.log` to the pixel, with four windows that are seen and four tabs behind them that are not."""
    with Loop(folder / "live", 0.25) as loop, Hub(folder / "live") as hub:
        pages = [hub.page(browser, "charts") for _ in range(8)]
        for page in pages:
            page.evaluate(UNTIL_DRAWN, 1)
        for page in pages[4:]:  # headless Chromium hides no tab by itself
            page.evaluate(
                "Object.defineProperty(document, 'hidden', {get: () => true}),"
                "document.dispatchEvent(new Event('visibilitychange'))"
            )
        for page in pages:
            page.evaluate("probe.said.splice(0)")
        time.sleep(1)
        used, began = hub.cpu, time.time()
        time.sleep(seconds)
        used, ended = hub.cpu - used, time.time()
        when = {step: logged for step, logged, _ in loop.lines if began <= logged <= ended - 2}
        late = []
        for page in pages[:4]:
            seen = {int("".join(filter(str.isdigit, text))): at / 1e3 for text, at in page.evaluate("probe.said")}
            # A number that the next one overtook was as late as that.
            order = sorted(seen)
            for step, logged in when.items():
                shown = next((seen[other] for other in order if other >= step), ended)
                late.append(1e3 * (shown - logged))
        hidden = sum(len(page.evaluate("probe.said")) for page in pages[4:])
        for page in pages:
            page.context.close()
    report.judge("session.log to the pixel, 4 windows of 8 tabs, p99", percentile(late, 0.99), 300, "ms")
    report.note("the same, median", statistics.median(late), "ms")
    report.note("updates that hidden tabs drew", hidden)
    report.judge("the hub's CPU meanwhile", 100 * used / (ended - began), 15, "% of a core")


def beside(report: Report, folder: Path, seconds: float, rounds: int) -> None:
    """A step of training on one core, with and without hub and browser on another."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("   the step beside hub and browser: not measured, it needs two cores")
        return
    with on(cores[0]):
        loop = Loop(folder / "beside", 0)
    alone: list[list[float]] = []
    watched: list[list[float]] = []
    with loop:

        def block() -> list[float]:
            began = len(loop.lines)
            time.sleep(seconds)
            return [took for _, _, took in loop.lines[began:]]

        with browsing(cores[1]) as browser, on(cores[1]), Hub(folder / "beside") as hub:
            for _ in range(rounds):
                # Stopped, they take nothing from anybody.
                hub.process.send_signal(signal.SIGSTOP)
                alone.append(block())
                hub.process.send_signal(signal.SIGCONT)
                page = hub.page(browser, "charts")
                page.evaluate(UNTIL_DRAWN, 1)
                watched.append(block())
                page.context.close()
    medians = [statistics.median(one) for one in alone]
    halves = [(statistics.median(one[::2]), statistics.median(one[1::2])) for one in alone]
    report.note("a step with hub and browser / without", ratio([statistics.median(one) for one in watched], medians))
    report.note("A/A: steps without, odd / even", ratio([a for a, _ in halves], [b for _, b in halves]))
    report.note("A/A: blocks without, each / the one before", ratio(medians[1:], medians[:-1]))
    report.note("a step without", 1e3 * statistics.median(medians), "ms")


# -- others, with the same points ----------------------------------------------------------------------------------


def points_of(metrics: int, count: int) -> list[np.ndarray]:
    made = [filling.series(count, seed)["value"] for seed in range(min(metrics, 4))]
    return [made[metric % len(made)] for metric in range(metrics)]


@contextlib.contextmanager
def serving(words: Sequence[str], port: int, **environment: str) -> Iterator[None]:
    """A server of somebody else's, until it answers."""
    import httpx

    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(words, stdout=said, stderr=said, env={**os.environ, **environment})
        try:
            for _ in range(600):
                with contextlib.suppress(httpx.HTTPError):
                    httpx.get(f"http://127.0.0.1:{port}/")
                    break
                if process.poll() is not None:
                    said.seek(0)
                    raise RuntimeError(said.read().decode(errors="replace"))
                time.sleep(0.2)
            yield
        finally:
            process.kill()
            process.wait()


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def first_paint(browser: Any, url: str, drawn: str) -> tuple[float, Any]:
    """Milliseconds from the navigation until an expression holds in a page, and the page."""
    page = browser.new_context(viewport=SIZE).new_page()
    page.set_default_timeout(10 * PATIENCE)
    began = time.perf_counter()
    page.goto(url, wait_until="commit")
    page.wait_for_function(drawn, polling="raf")
    return 1e3 * (time.perf_counter() - began), page


def tensorboard(report: Report, browser: Any, folder: Path, runs: int, metrics: int, count: int) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    columns = points_of(metrics, count)
    for run in range(runs):
        writer = EventFileWriter(str(folder / f"run{run:02}"), max_queue_size=10_000, flush_secs=600)
        for step in range(count):
            values = [
                Summary.Value(tag=f"metric{n:02}", simple_value=float(column[step])) for n, column in enumerate(columns)
            ]
            writer.add_event(Event(wall_time=1.7e9 + step, step=step + 1, summary=Summary(value=values)))
        writer.close()
    port = free_port()
    words = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(folder),
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
    ]
    drawn = "document.querySelector('scalar-card')?.innerText.includes('run00')"  # its table of values has come
    with serving(words, port):
        took, page = first_paint(browser, f"http://127.0.0.1:{port}/#timeseries", drawn)
        page.context.close()
    report.note("TensorBoard, server there: navigation to the first chart", took, "ms")


def trackio(report: Report, browser: Any, folder: Path, runs: int, metrics: int, count: int) -> None:
    os.environ["TRACKIO_DIR"] = str(folder)
    from trackio.sqlite_storage import SQLiteStorage

    columns = points_of(metrics, count)
    for run in range(runs):
        for start in range(0, count, 1000):
            steps = range(start, min(count, start + 1000))
            rows = [{f"metric{n:02}": float(column[step]) for n, column in enumerate(columns)} for step in steps]
            SQLiteStorage.bulk_log("bench", f"run{run:02}", rows, steps=list(steps))
    port = free_port()
    show = f"open_browser=False, block_thread=True, host='127.0.0.1', server_port={port}"
    start = f"import trackio; trackio.show('bench', {show})"
    settings = {"TRACKIO_DIR": str(folder), "HF_HUB_OFFLINE": "1"}
    drawn = "document.querySelectorAll('canvas, svg .mark-line path, .vega-embed svg, .plot svg path').length > 0"
    with serving([sys.executable, "-c", start], port, **settings):
        took, page = first_paint(browser, f"http://127.0.0.1:{port}/?project=bench", drawn)
        page.context.close()
    report.note("trackio, server there: navigation to the first chart", took, "ms")


def compare(report: Report, browser: Any, folder: Path, runs: int, metrics: int, count: int) -> None:
    for name, measure in (("tensorboard", tensorboard), ("trackio", trackio)):
        if missing(name):
            print(f"   {name}: not measured, it is not installed: pip install 'onthefly[bench]'")
            continue
        (folder / name).mkdir()
        try:
            measure(report, browser, folder / name, runs, metrics, count)
        except Exception as e:  # noqa: BLE001  somebody else's program: what it could not do is told, and the rest goes on
            print(f"   {name}: not measured: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}")


PARTS = ("large", "wide", "lists", "samples", "latency", "beside", "compare")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=[*PARTS[:-1]], help="compare is left out by default"
    )
    parser.add_argument("--compare", action="store_true", help="TensorBoard and trackio, too; needs the extra `bench`")
    parser.add_argument("--steps", type=int, default=20_000, help="of each of the 50 x 20 series")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if missing("playwright"):
        raise SystemExit("benchmarks/browser.py needs Playwright: pip install 'onthefly[dev]'")
    parts = {*options.only, *(["compare"] if options.compare else [])}
    size = (5, 4, 2000) if options.quick else (50, 20, options.steps)
    report = Report("browser")
    report.note("load of the machine as it begins", os.getloadavg()[0])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with browsing() as browser:
            if "large" in parts:
                large(report, browser, folder, 10_000_000 // (20 if options.quick else 1), options.rounds)
            if parts & {"wide", "compare"}:
                filling.fill(folder / "wide", *size)
                wide(report, browser, folder / "wide", *size, options.rounds)
            if "lists" in parts:
                lists(report, browser, folder, *((50, 20) if options.quick else (1000, 200)))
            if "samples" in parts:
                brushing(report, browser, folder, 5_000 if options.quick else 100_000)
            if "latency" in parts:
                latency(report, browser, folder, 5 if options.quick else 30)
            if "compare" in parts:
                compare(report, browser, folder, *size)
        if "beside" in parts:
            beside(report, folder, 2 if options.quick else 5, 3 if options.quick else 8)
    report.note("load of the machine as it ends", os.getloadavg()[0])
    report.end()


if __name__ == "__main__":
    main()
