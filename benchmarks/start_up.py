"""Seconds for `python -c "import onthefly"` and for `onthefly status`."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import Report, ratio, seconds

ROUNDS = 11


def main() -> None:
    report = Report("start_up")
    command = Path(sys.executable).with_name("onthefly")
    with tempfile.TemporaryDirectory() as folder:
        make = "import sys\nfrom onthefly.store.store import Store\nStore.open(sys.argv[1], create=True).close()"
        subprocess.run([sys.executable, "-c", make, folder], check=True)
        environment = {**os.environ, "ONTHEFLY_STORE": folder}
        for name, line in (
            ('python -c "import onthefly"', [sys.executable, "-c", "import onthefly"]),
            ("onthefly status", [str(command), "status"]),
        ):
            run = lambda line=line: subprocess.run(line, env=environment, capture_output=True, check=False)  # noqa: E731
            run()
            times, again = [], []
            for _ in range(ROUNDS):
                times.append(seconds(run))
                again.append(seconds(run))
            report.judge(f"{name}, median", statistics.median(times), 0.5, "s")
            report.note(f"{name}: A/A ratio", ratio(again, times))
    report.end()


if __name__ == "__main__":
    main()
