"""docs/cli.md is made from the commands, and must not go stale."""

from pathlib import Path

from onthefly import errors
from onthefly.cli import cli, reference

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def test_the_page_is_what_the_commands_say():
    assert PAGE.read_text() == reference.page(), "run: python -m onthefly.cli.reference > docs/cli.md"


def test_every_command_and_error_is_on_the_page():
    page = reference.page()
    for name in cli.list_commands(None):
        assert f"## onthefly {name}\n" in page
        for below in getattr(cli.get_command(None, name), "commands", ()):
            assert f"## onthefly {name} {below}\n" in page
    for name, kind in vars(errors).items():
        if isinstance(kind, type):
            assert f"`{name}`" in page
