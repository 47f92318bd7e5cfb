import os
import random
import sys
from pathlib import Path

# By name, also in the processes that the tests start: those get this path from multiprocessing.
sys.path.insert(0, str(Path(__file__).parent))

SEED = int(os.environ.get("ONTHEFLY_SEED") or random.randrange(10**6))


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"random cells of the exactness matrix: ONTHEFLY_SEED={SEED}")
