"""The command line's manual page, made from the commands themselves: ``python -m onthefly.cli.reference > docs/cli.md``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

import click

from onthefly import errors
from onthefly.cli import INTERRUPTED, cli

_INTRODUCTION = """\
<!-- Made by `python -m onthefly.cli.reference > docs/cli.md`. Change the commands, not this page. -->

# Command line

{help}

Every listing, and every command to a session, takes `--json` and then prints one JSON document whose keys are stable. NaN and
infinities are the texts `"NaN"`, `"Infinity"` and `"-Infinity"` in it. An error is said in one line on stderr that begins with
`error:`, and gives the exit code. `NO_COLOR` turns colours off; what is piped has none.
"""


_SHARED = ("session_id", "run_name", "no_wait", "timeout", "store", "as_json")


def page() -> str:
    """The whole page, as Markdown."""
    context = click.Context(cli, info_name="onthefly")
    parts = [_INTRODUCTION.format(help=_prose(cli.help or ""))]
    for name, command in _commands(cli, context):
        parts.append(_group(name, command) if isinstance(command, click.Group) else _command(name, command))
    shared = [option for option in _options(cli.get_command(context, "pause")) if option.name in _SHARED]
    parts.append("\n".join(["## Options that many commands share", "", *_table(shared), ""]))
    parts.append("\n".join(["## Exit codes", "", *_exit_codes(), ""]))
    return "\n".join(parts)


def _commands(group: click.Group, context: click.Context) -> Iterator[tuple[str, click.Command]]:
    """Every command of a group under its whole name, each group before what is in it."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {below}", inner) for below, inner in _commands(command, context))


def _group(name: str, group: click.Group) -> str:
    inner = "\n".join(f"onthefly {name} {below}" for below in group.commands)
    lines = [f"## onthefly {name}", "", "```", inner, "```", "", _prose(group.help or ""), ""]
    own = [option for option in _options(group) if option.name not in _SHARED]
    return "\n".join([*lines, *([*_table(own), ""] if own else [])])


def _command(name: str, command: click.Command) -> str:
    options = _options(command)
    arguments = [_metavar(p) for p in command.params if isinstance(p, click.Argument)]
    usage = " ".join(["onthefly", name, "[OPTIONS]", *arguments])
    lines = [f"## onthefly {name}", "", "```", usage, "```", "", _prose(command.help or ""), ""]
    own = [option for option in options if option.name not in _SHARED]
    if own:
        lines += [*_table(own), ""]
    shared = ", ".join(f"`{option.opts[0]}`" for option in options if option.name in _SHARED)
    return "\n".join([*lines, f"Also {shared}: [see below](#options-that-many-commands-share).", ""])


def _options(command: click.Command | None) -> list[click.Option]:
    return [p for p in command.params if isinstance(p, click.Option)] if command is not None else []


def _table(options: Sequence[click.Option]) -> list[str]:
    rows = ["| option | |", "|---|---|"]
    for option in options:
        words = [", ".join(option.opts), "" if option.is_flag else _metavar(option)]
        value = ", ".join(map(str, option.default)) if isinstance(option.default, tuple) else option.default
        default = "" if option.is_flag or not option.show_default else f" Default: {value}."
        rows.append(f"| `{' '.join(words).strip()}` | {_escaped(option.help or '')}{default} |")
    return rows


def _metavar(parameter: click.Parameter) -> str:
    """How the value is called. Not left to click, whose versions differ in it."""
    if isinstance(parameter.type, click.Choice):
        return " or ".join(parameter.type.choices)
    name = parameter.metavar or (parameter.name or "").upper()
    return name if parameter.required or isinstance(parameter, click.Option) else f"[{name}]"


def _prose(help: str) -> str:
    """click's help text as Markdown: a paragraph that it keeps as it is becomes code."""
    paragraphs = []
    for paragraph in inspect.cleandoc(help).split("\n\n"):
        if paragraph.startswith("\b"):
            paragraphs.append("\n".join(["```", inspect.cleandoc(paragraph.removeprefix("\b")), "```"]))
        else:
            paragraphs.append(_escaped(" ".join(paragraph.split())))
    return "\n\n".join(paragraphs)


def _escaped(text: str) -> str:
    return text.replace("*", r"\*").replace("|", r"\|").replace("<", r"\<")


def _exit_codes() -> Iterator[str]:
    meanings: dict[int, list[str]] = {}
    for error in _tree(errors.OnTheFlyError):
        summary = (inspect.getdoc(error) or "").split("\n\n")[0].replace("\n", " ")
        meanings.setdefault(error.exit_code, []).append(f"`{error.__name__}`: {_escaped(summary)}")
    meanings[2].append("a command line that makes no sense")
    yield from ["| code | |", "|---|---|", "| 0 | done |"]
    for code, lines in sorted(meanings.items()):
        yield f"| {code} | {'<br>'.join(lines)} |"
    yield f"| {INTERRUPTED} | ended by Ctrl-C; what was asked of a session stays asked |"


def _tree(error: type[errors.OnTheFlyError]) -> Iterator[type[errors.OnTheFlyError]]:
    yield error
    for below in error.__subclasses__():
        yield from _tree(below)


if __name__ == "__main__":
    print(page(), end="")
