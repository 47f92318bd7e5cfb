"""Trainings on real handwritten digits, in this process, and reports that are asked from another thread."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from digit_runs import Run


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains a `Digits` in a store of its own, and gives what came of it: see `digit_runs.Run`."""
    monkeypatch.delenv("ONTHEFLY_STORE", raising=False)
    return lambda digits, **options: Run(digits, tmp_path / options.pop("store", "store"), **options)
