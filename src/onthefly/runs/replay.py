"""Starting a recorded command line again under orders: the new process takes a checkpoint, does what they say at a boundary,
leaves a file, and ends. It knows only a store of its own, in a folder that goes with it.

What orders say is between who gives them and `control.start`; here they are JSON with an ``out``, the file to leave.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from onthefly import errors
from onthefly.errors import ResumeError
from onthefly.runs import launch as launching
from onthefly.runs.launch import Launch

_OWN = re.compile(r"onthefly\.errors\.(\w+): (.*)")  # the last line of the traceback of an error of ours
_WORKROOM = re.compile(r"\.(scan|verify)-[a-z0-9_]{8}")
_MARK = "onthefly-workroom"  # a file in each: holds the name of the host, as a lock may be known there only
_FRESH = 60.0  # seconds: a younger workroom may not be locked yet
_TAIL = 15  # lines of its output that the error quotes
_LOOK = 0.1  # seconds between two looks at how far it is


def launch_of(run: str, launches: Iterable[Launch | None], purpose: str) -> Launch:
    """The first of these ways to start a run that there is. Raises `ResumeError` when there is none, or none that leads to it."""
    launch = next((one for one in launches if one is not None), None)
    if launch is None:
        raise ResumeError(
            f"{run!r} was not started by a command line that can be run again (a notebook, or a script piped in); "
            f"put the loop into a file to {purpose} it"
        )
    launching.check_first(launch, run)
    return launch


@contextmanager
def workroom(checkpoint: Path, prefix: str) -> Iterator[Path]:
    """A folder that is gone afterwards, where there is room for one more checkpoint: beside that one, or, if that place
    is read-only, the system's. One of a process that was killed is found by `left_workrooms`."""
    beside = checkpoint.parent if os.access(checkpoint.parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=prefix, dir=beside) as name, _in_use(Path(name)):
        (Path(name) / _MARK).write_text(socket.gethostname())
        yield Path(name)


@contextmanager
def _in_use(folder: Path) -> Iterator[int]:
    """A descriptor with a shared lock on a folder. The kernel frees it when every process that has the descriptor has ended."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: there, nothing is ever taken for left
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield fd
    finally:
        os.close(fd)


def left_workrooms(folder: Path) -> list[Path]:
    """The workrooms in a folder that no process uses any more."""
    return [path for path in sorted(folder.iterdir()) if _WORKROOM.fullmatch(path.name) and _is_left(path)]


def remove_workroom(path: Path) -> bool:
    """Remove a workroom if no process uses it; gives whether it is gone. Raises `OSError`."""
    if path.exists() and not _is_left(path):
        return False
    shutil.rmtree(path)
    return True


def _is_left(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # gone meanwhile, or no folder
        return False
    try:
        if (path / _MARK).read_bytes() != socket.gethostname().encode():
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return time.time() - os.fstat(fd).st_mtime > _FRESH
    except OSError:  # somebody uses it, or nobody made it a workroom
        return False
    finally:
        os.close(fd)


def held(path: Path, name: Path) -> Path:
    """Another name of a file, or a copy where there are no links: a live run may evict it meanwhile."""
    try:
        os.link(path, name)
    except OSError:
        shutil.copyfile(path, name)
    return name


def store_in(folder: Path) -> Path:
    """The store that a process under orders has in its folder."""
    return folder / "store"


def run(
    launch: Launch,
    orders: Mapping[str, Any],
    folder: Path,
    *,
    aim: str,
    timeout: float | None = None,
    look: Callable[[], object] | None = None,
) -> None:
    """Start it, and wait until it has left its file. `aim` says what it is to have done: "saved toy@7". `look` is called now and
    then meanwhile.

    Raises `ResumeError`, quoting its last words, when it ends without its file, or does not end within `timeout` seconds.
    It and its loader workers are gone then.
    """
    extra = {launching.REPLAY: json.dumps(dict(orders)), launching.STORE: str(store_in(folder))}
    log = folder / "output.txt"
    # The process has a lock of its own: it may outlive this one, and uses the folder until it ends.
    with open(log, "wb") as output, _in_use(folder) as lock:
        process = launching.spawn(
            launch,
            extra,
            pass_fds=(lock,),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its loader workers can be ended with it
        )
        try:
            code = _wait(process, timeout, look)
        except subprocess.TimeoutExpired as e:
            raise ResumeError(f"the replay had not {aim} within {timeout:g} s") from e
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code == 0 and Path(orders["out"]).is_file():
        return
    ended = f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
    lines = log.read_text("utf-8", "replace").rstrip().splitlines()[-_TAIL:]
    if lines and (own := _OWN.fullmatch(lines[-1])) and (kind := getattr(errors, own[1], None)):
        raise kind(own[2])
    said = "\n".join(["; its last words:", *(f"  {line}" for line in lines)]) if lines else ", without a word"
    raise ResumeError(f"the replay {ended} before it had {aim}{said}")


def _wait(process: subprocess.Popen[bytes], timeout: float | None, look: Callable[[], object] | None) -> int:
    if look is None:
        return process.wait(timeout)
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        left = _LOOK if deadline is None else min(_LOOK, max(deadline - time.monotonic(), 0))
        try:
            return process.wait(left)
        except subprocess.TimeoutExpired:
            if deadline is not None and time.monotonic() >= deadline:
                raise
        look()
