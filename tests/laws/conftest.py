"""Trainings in processes of their own. Their module stands beside this file, where children can import it too."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from law_trainings import Trainings


@pytest.fixture
def trainings(tmp_path):
    """Starts trainings below the test's folder, and ends those that are left."""
    with Trainings(tmp_path) as started:
        yield started
