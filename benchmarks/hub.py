"""The hub's server: a chart of 10M points, a page of 50 runs x 20 metrics x 20k points, lists of 1,000 runs.

The hub is a process of its own, asked over loopback. `server` is the time inside it, from the parsed request to the packed answer;
`asked` is what the asking process waits. What a browser makes of it is measured elsewhere.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from harness import Report
from sqlalchemy import insert

from onthefly.store import points, schema
from onthefly.store.points import POINT
from onthefly.store.projection import FULL
from onthefly.store.store import Store

MAIN = "import sys; from onthefly.cli import main; sys.exit(main())"
WIDTH = 1400  # pixels of a large chart
SMALL = 320  # of one among many


def series(count: int, seed: int) -> np.ndarray:
    """A noisy curve that falls."""
    made = np.empty(count, POINT)
    made["step"] = np.arange(1, count + 1)
    draw = np.random.default_rng(seed)
    made["value"] = 5 / np.sqrt(1 + made["step"] / 1000) + draw.normal(0, 0.1, count)
    made["time"] = 1.7e9 + made["step"] * 0.01
    return made


def chunks(key: dict[str, Any], made: np.ndarray) -> Iterator[dict[str, Any]]:
    """As the recorder leaves them, in the end."""
    for start in range(0, len(made), FULL):
        part = made[start : start + FULL]
        full = len(part) == FULL
        rollups = {f"rollup_{n}": points.extremes(part, n).tobytes() if full else None for n in points.RESOLUTIONS}
        yield {**key, **points.packed(part), **rollups, "level": 0}


def fill(folder: Path, runs: int, metrics: int, count: int) -> None:
    store = Store.open(folder, create=True)
    made = [series(count, seed) for seed in range(min(metrics, 4))]
    for _ in range(runs):
        run = store.create_run(None, project="bench")
        with store.begin() as connection:
            for metric in range(metrics):
                key = {"run": run, "generation": 0, "name": f"metric{metric:02}"}
                connection.execute(insert(schema.metric_chunk), list(chunks(key, made[metric % len(made)])))
    store.close()


@contextmanager
def serving(store: Path) -> Iterator[tuple[httpx.Client, str]]:
    """A hub that was just started; a client, and the path of its store."""
    began = time.perf_counter()
    words = [sys.executable, "-c", MAIN, "ui", "--no-open", str(store)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        base, _, token = process.stdout.readline().strip().partition("/?token=")
        with httpx.Client(base_url=base, headers={"Authorization": f"Bearer {token}"}, timeout=60) as client:
            found = client.get("/api/v1/stores").json()
            serving.started = time.perf_counter() - began  # type: ignore[attr-defined]
            yield client, f"/api/v1/stores/{found[0]['id']}"
    finally:
        process.kill()
        process.wait()


def asked(client: httpx.Client, path: str, body: dict[str, Any] | None = None) -> tuple[float, float, httpx.Response]:
    """Milliseconds that were waited, milliseconds inside the server if it says so, and the answer."""
    began = time.perf_counter()
    answer = client.post(path, json=body) if body is not None else client.get(path)
    waited = (time.perf_counter() - began) * 1e3
    answer.raise_for_status()
    inside = answer.headers.get("server-timing", "chart;dur=nan").partition("dur=")[2]
    return waited, float(inside), answer


def large(report: Report, folder: Path, count: int, rounds: int) -> None:
    store = folder / "large"
    fill(store, 1, 1, count)
    pair, first, later, zooms = ["baseline", "metric00"], [], [], []
    for number in range(rounds):
        with serving(store) as (client, at):
            waited, inside, answer = asked(client, f"{at}/series", {"series": [pair], "points": 2 * WIDTH})
            first.append(inside)
            later.append(waited)
            low = count // 3 + number * 1000
            body = {"series": [pair], "points": 2 * WIDTH, "from": low, "to": low + count // 100}
            zooms.append(asked(client, f"{at}/series", body)[1])
            apart = asked(client, f"{at}/series", {"series": [pair], "points": 2 * WIDTH, "grid": False})[1]
    report.judge(f"a chart of {count:,} points, hub just started, server", statistics.median(first), 60, "ms")
    report.note("the same, asked", statistics.median(later), "ms")
    report.note("the same by MinMaxLTTB, server", apart, "ms")
    report.note("zoomed to a hundredth, server", statistics.median(zooms), "ms")
    report.note("its answer", len(answer.content) / 1024, "KiB")


def wide(report: Report, folder: Path, runs: int, metrics: int, count: int) -> None:
    store = folder / "wide"
    fill(store, runs, metrics, count)
    names = ["baseline", *(f"baseline{n}" for n in range(2, runs + 1))]
    with serving(store) as (client, at):
        began = time.perf_counter()
        for path in ("/sessions", "/runs", "/graph", "/metrics"):
            report.note(f"GET {path}", asked(client, at + path)[0], "ms")
        sizes = []
        for metric in range(8):  # as many charts as one sees at once
            body = {"series": [[run, f"metric{metric:02}"] for run in names], "points": 2 * SMALL}
            sizes.append(len(asked(client, f"{at}/series", body)[2].content))
        page = (time.perf_counter() - began) * 1e3
        began = time.perf_counter()
        for metric in range(8, 16):
            body = {"series": [[run, f"metric{metric:02}"] for run in names], "points": 2 * SMALL}
            asked(client, f"{at}/series", body)
        following = (time.perf_counter() - began) * 1e3
        body = {"series": [[run, "metric00"] for run in names], "points": 2 * SMALL}
        again = asked(client, f"{at}/series", body)[1]
    report.judge(f"first page of {runs} x {metrics} x {count:,}, 8 charts, asked", page, 1500, "ms")
    report.judge("next page, asked", following, 500, "ms")
    report.note("a chart that was drawn before, server", again, "ms")
    report.note("a page's answers", sum(sizes) / 2**20, "MiB")


def many(report: Report, folder: Path, runs: int) -> None:
    store = folder / "many"
    fill(store, runs, 2, 100)
    with serving(store) as (client, at):
        for path in ("/runs?metrics=metric00,metric01", "/graph"):
            asked(client, at + path)
            report.note(f"GET {path}, {runs:,} runs", asked(client, at + path)[0], "ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    report = Report("hub")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        large(report, folder, options.points // (20 if options.quick else 1), options.rounds)
        wide(report, folder, *((5, 4, 2000) if options.quick else (50, 20, 20_000)))
        many(report, folder, 50 if options.quick else 1000)
    report.note("from nothing to the hub's first answer", serving.started, "s")  # type: ignore[attr-defined]
    report.end()


if __name__ == "__main__":
    main()
