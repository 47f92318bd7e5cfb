"""Launching: how this process was started, and how a recorded one is started again.

A launch is a JSON value: ``{"argv", "executable", "cwd", "attach", "environment"}``; the environment holds the variables
that change what the same program computes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from onthefly.errors import ResumeError

Launch = Mapping[str, Any]

RESUME, REPLAY, STORE = "ONTHEFLY_RESUME", "ONTHEFLY_REPLAY", "ONTHEFLY_STORE"
_ORDERS = (RESUME, REPLAY)  # addressed to one process, never inherited by the next
_TELLING = (
    "PYTHONHASHSEED",
    "OMP_NUM_THREADS",  # the order in which a sum is split and added up
    "MKL_NUM_THREADS",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
)
_AFRESH = """
import os, signal, sys
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, ())
os.execv(sys.argv[1], sys.argv[1:])
"""
_TAKES_VALUE = "WX"  # interpreter options such as -W error; -c and -m end the options


def record(attach: int = 1) -> dict[str, Any] | None:
    """How this process was started: something to give to `relaunch` later, in any process.

    `attach` is which of its calls of `onthefly.attach` asks. None when there is no command line that would do the same
    again: an interactive session or notebook, a script piped in, a child of `multiprocessing`.
    """
    argv = list(sys.orig_argv)
    kind, place = _entry(argv)
    if kind in ("none", "stdin") or not sys.executable or _is_interactive() or _is_child():
        return None
    cwd = Path.cwd()
    if kind == "script":
        cwd, argv[place] = _where_started(cwd, argv[place])
    return {
        "argv": argv,
        "executable": sys.executable,
        "cwd": str(cwd),
        "attach": attach,
        "environment": {name: os.environ[name] for name in _TELLING if name in os.environ},
    }


def check_first(launch: Launch, run: str) -> None:
    """Raises `ResumeError` for a run that was not the first of its process: started again, the process would come to others."""
    if launch["attach"] != 1:
        raise ResumeError(
            f"{run!r} was attach number {launch['attach']} of its process, and a process that is started again can go on "
            "only with its first; give each run a process of its own to be able to resume and verify it"
        )


def environment(launch: Launch, extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment, with what was recorded of the other, without orders to others, and with `extra`."""
    # Another thread may take a variable away meanwhile, and `os.environ.items()` would fail.
    env = {name: value for name in os.environ if (value := os.environ.get(name)) is not None}
    same = {name: value for name, value in env.items() if name not in (*_ORDERS, *_TELLING)}
    return {**same, **launch["environment"], **extra}


def relaunch(launch: Launch, extra: Mapping[str, str]) -> NoReturn:
    """Become the recorded process: same program and arguments, in its working directory.

    Raises `ResumeError` when the interpreter, the folder or the script is gone; this process then goes on as it was.
    """
    _check(launch)
    sys.stdout.flush()
    sys.stderr.flush()
    before = Path.cwd()
    os.chdir(launch["cwd"])
    try:
        os.execve(launch["executable"], command_line(launch), environment(launch, extra))
    except OSError as e:
        os.chdir(before)
        raise ResumeError(f"cannot start {launch['executable']} again: {e.strerror or e}") from e


def spawn(launch: Launch, extra: Mapping[str, str], **options: Any) -> subprocess.Popen[bytes]:
    """Start the recorded command line as a child. `options` go to `subprocess.Popen`. Raises `ResumeError` as `relaunch`.

    The child begins with no signal ignored and none blocked, whatever this thread has: both would be inherited, and
    only a process itself can put them back. So for some 20 ms it is a Python that does, and then becomes the program.
    """
    _check(launch)
    words = command_line(launch)
    # Without `site`, and without the folder it stands in, where a user's own signal.py might be.
    first = [words[0], "-SPc", _AFRESH, *words]
    try:
        return subprocess.Popen(first, cwd=launch["cwd"], env=environment(launch, extra), **options)
    except OSError as e:
        raise ResumeError(f"cannot start {launch['executable']} again: {e.strerror or e}") from e


def command_line(launch: Launch) -> list[str]:
    """The arguments to start it with. The interpreter stands first by its full path, so that a virtual environment is found."""
    return [str(launch["executable"]), *map(str, launch["argv"][1:])]


def _check(launch: Launch) -> None:
    folder, executable = Path(launch["cwd"]), Path(launch["executable"])
    if not folder.is_dir():
        raise ResumeError(f"the folder that it was started in is gone: {folder}")
    if not os.access(executable, os.X_OK):
        raise ResumeError(f"the Python that it was started with is gone: {executable}")
    argv = list(map(str, launch["argv"]))
    kind, place = _entry(argv)
    if kind == "script" and not (folder / argv[place]).exists():
        raise ResumeError(f"the script that it was started from is gone: {folder / argv[place]}")


def _entry(argv: Sequence[str]) -> tuple[str, int]:
    """What a Python command line runs ("script", "module", "code", "stdin" or "none"), and at which place it names it."""
    place = 1
    while place < len(argv):
        word = argv[place]
        if word == "-":
            return "stdin", place
        if not word.startswith("-"):
            return "script", place
        if word.startswith("--"):
            place += 2 if word == "--check-hash-based-pycs" else 1
            continue
        for position, letter in enumerate(word[1:], 2):
            if letter in "cm":
                return ("code" if letter == "c" else "module"), place
            if letter in _TAKES_VALUE:
                place += position == len(word)  # its value is the next word, unless it follows at once
                break
        place += 1
    return "none", place


def _is_interactive() -> bool:
    return bool(sys.flags.interactive) or hasattr(sys, "ps1") or "ipykernel" in sys.modules


def _is_child() -> bool:
    from multiprocessing import parent_process  # takes a while to load, and only a training process asks

    return parent_process() is not None


def _where_started(cwd: Path, script: str) -> tuple[Path, str]:
    """The folder that the process was started in, should it have left it since, and how to name its script there."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    if main is None or os.path.isabs(script) or _is_same(cwd / script, main):
        return cwd, script
    started = Path(os.environ.get("PWD", "/"))  # of the shell
    if _is_same(started / script, main):
        return started, script
    return cwd, os.path.abspath(main)


def _is_same(one: Path, other: str) -> bool:
    return one.exists() and os.path.exists(other) and os.path.samefile(one, other)
