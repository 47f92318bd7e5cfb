import sys
from pathlib import Path

# By name, also in the processes that the tests start: those get this path from multiprocessing.
sys.path.insert(0, str(Path(__file__).parent))


def pytest_terminal_summary(terminalreporter):
    if (matrix := sys.modules.get("exactness_law")) is not None:
        terminalreporter.write_line(f"random cells of the exactness matrix: ONTHEFLY_SEED={matrix.SEED}")
