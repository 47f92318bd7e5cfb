"""The public surface is what it says it is, and cheap to import."""

import subprocess
import sys

import onthefly

NAMES = {"OnTheFlyError", "Session", "SessionConfig", "Trainer", "attach", "checkpoints", "connect", "merging"}


def test_the_public_names_are_these():
    assert set(onthefly.__all__) == NAMES == set(dir(onthefly))
    assert all(getattr(onthefly, name) is not None for name in NAMES)


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(onthefly, "Traniner")


def test_importing_the_package_the_client_and_the_command_line_loads_no_torch():
    code = "import sys, onthefly, onthefly.cli, onthefly.control.commands; onthefly.connect; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
