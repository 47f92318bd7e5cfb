"""docs/reports.md names every report and every threshold, with its value."""

import importlib
from pathlib import Path

from onthefly.health.findings import KINDS

PAGE = (Path(__file__).parents[2] / "docs" / "reports.md").read_text()


def test_every_report_is_on_the_page():
    for kind in KINDS:
        assert f"| `{kind}` |" in PAGE


def test_every_threshold_is_on_the_page():
    for name in KINDS:
        for constant, value in vars(importlib.import_module(f"onthefly.health.{name}")).items():
            if constant.isupper() and isinstance(value, int | float) and constant != "NAMED":
                assert f"| {name} | `{constant}` | {value:g} |" in PAGE
