"""The command line: a thin layer over `onthefly.client`, one module per group of commands.

It may import `client`, `errors` and what they import, never torch; nothing imports it. A command's module is loaded
when that command is called, so that `onthefly status` answers at once.
"""

from __future__ import annotations

import importlib
import os
import sys

import click

from onthefly.errors import OnTheFlyError, said

_MODULES = {
    "status": "status",
    "watch": "watch",
    "ui": "ui",
    "pause": "steer",
    "resume": "resume",
    "save": "steer",
    "load": "steer",
    "set": "steer",
    "test": "steer",
    "fork": "branch",
    "switch": "branch",
    "subset": "branch",
    "undo": "branch",
    "merge": "merge",
    "reset": "steer",
    "stop": "steer",
    "checkpoints": "history",
    "checkpoint": "checkpoint",
    "runs": "runs",
    "diff": "runs",
    "scan": "samples",
    "samples": "samples",
    "show": "samples",
    "map": "samples",
    "export": "samples",
    "report": "report",
    "log": "history",
    "verify": "verify",
    "fsck": "fsck",
    "gc": "garbage",
}
"""Command to module, in the order of `onthefly --help`."""

_COMPLETE = "_ONTHEFLY_COMPLETE"  # set by the shell's completion script
INTERRUPTED = 130
"""What a shell says of a program that was ended by Ctrl-C."""


class _Commands(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _MODULES:
            return None
        module = importlib.import_module(f"onthefly.cli.{_MODULES[cmd_name]}")
        command = getattr(module, f"{cmd_name}_command")
        assert isinstance(command, click.Command)
        return command


def _version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"onthefly {version('onthefly')}")
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Say the version.")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Steer PyTorch training runs while they run, and bring them back bit for bit.

    A REF names a checkpoint: RUN (its latest), RUN@STEP, RUN@latest, RUN@best, the start of a content hash (6 digits
    or more), or a file. Commands go to the one live session; with several, choose one by --session or --run.
    """
    if os.environ.get("NO_COLOR"):
        ctx.color = False


def main(arguments: list[str] | None = None) -> int:
    """Run a command line. Returns its exit code: 0, or that of the error, which is said in one line on stderr."""
    if instruction := os.environ.get(_COMPLETE):
        from click.shell_completion import shell_complete

        return shell_complete(cli, {}, "onthefly", _COMPLETE, instruction)
    words = sys.argv[1:] if arguments is None else arguments
    try:
        # Not `cli.main`, which says in its own way, and differently from version to version, what went wrong.
        with cli.make_context("onthefly", words or ["--help"]) as context:
            cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as e:
        return e.exit_code
    except OnTheFlyError as e:
        return _fail(said(e), e.exit_code)
    except click.UsageError as e:
        where = f"; see `{e.ctx.command_path} --help`" if e.ctx is not None else ""
        return _fail(f"{e.format_message().rstrip('.')}{where}", e.exit_code)
    except click.ClickException as e:
        return _fail(e.format_message(), e.exit_code)
    except (KeyboardInterrupt, click.Abort) as e:
        if str(e):
            click.echo(str(e), err=True)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has had enough; what is still to be flushed goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _fail(message: str, code: int) -> int:
    click.echo(f"{click.style('error:', fg='red', bold=True)} {message}", err=True)
    return code
