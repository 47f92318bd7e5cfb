"""Death at a chosen system call: a child is traced by ptrace, and killed as it enters or leaves its n-th one.

The child does what it must beforehand and calls `begin`; from there on the system calls of all its threads are counted, each
twice: before the kernel does it, and after. Linux only; `why_not` says why not elsewhere.
"""

import ctypes
import os
import platform
import signal
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass

_TRACEME, _SYSCALL, _SETOPTIONS, _SYSCALL_INFO = 0, 24, 0x4200, 0x420E
_OPTIONS = 0x1 | 0x8 | 0x100000  # TRACESYSGOOD, TRACECLONE, EXITKILL
_WAIT_ALL = 0x40000000  # __WALL: threads, too
_AT_A_CALL = signal.SIGTRAP | 0x80

WRITES = {
    "x86_64": {18: "pwrite", 74: "fsync", 82: "rename"},
    "aarch64": {68: "pwrite", 82: "fsync", 38: "rename", 276: "rename"},
}.get(platform.machine(), {})
"""The calls that make a file durable, by their numbers."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Life:
    """How a child lived."""

    killed: bool
    """Or it came to its end first."""
    stops: int
    """System calls entered or left since `begin`, in all threads."""
    call: int | None
    """The number of the system call that it was killed at."""
    said: str
    """What it had written to its pipe."""
    calls: tuple[tuple[int, int], ...]
    """Number and first argument of every call that it made, if it came to its end."""


def why_not():
    """Why no child can be traced here, or None. Said by `python syscalls.py`, too."""
    if sys.platform != "linux":
        return "ptrace is used as Linux has it"
    try:
        life = live(lambda pipe: begin(), 1)
    except OSError as e:
        return f"a child cannot be traced here: {e.strerror}"
    return None if life.killed else "a traced child's system calls are not seen here"


def begin():
    """Called by the child: what follows is counted."""
    signal.pthread_kill(threading.main_thread().ident, signal.SIGSTOP)


def live(work, last=None):
    """Run `work(pipe)` in a forked child, and kill it at stop number `last` since `begin`. It may write to the pipe.

    Fork from a process that has one thread, and no other child. Raises `OSError` when the child cannot be traced, and
    `RuntimeError` when it fails.
    """
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        _be_the_child(work, theirs)
    os.close(theirs)
    try:
        killed, stops, calls = _follow(pid, last)
        said = os.read(ours, 4096).decode()
        if killed:
            return Life(True, stops, calls[-1][0] if calls else None, said, ())
        return Life(False, stops, None, said, tuple(calls))
    except BaseException:
        _kill(pid)
        raise
    finally:
        os.close(ours)


def _be_the_child(work, pipe):
    try:
        _ptrace(_TRACEME, 0)
        begin()  # the first stop, in which the tracer says what it wants to see
        work(pipe)
        os._exit(0)
    except BaseException:  # noqa: BLE001  it must not go on as if it were its parent
        traceback.print_exc()
        os._exit(1)


def _follow(pid, last):
    """(killed, stops, calls) of a child and all its threads; of one that is killed, the call at which it was."""
    marks = stops = 0
    calls = []
    while True:
        thread, status = os.waitpid(-1, _WAIT_ALL)
        if not os.WIFSTOPPED(status):
            if thread != pid:
                continue
            if status:
                raise RuntimeError(f"the child failed, with status {status:#x}")
            return False, stops, calls
        found, passed_on = os.WSTOPSIG(status), 0
        if found == _AT_A_CALL:
            stops += marks > 1
            if stops == last or (last is None and marks > 1):
                calls += _call_of(thread)
            if stops == last:
                _kill(pid)
                return True, stops, calls
        elif found == signal.SIGSTOP and thread == pid:
            marks += 1
            if marks == 1:
                _ptrace(_SETOPTIONS, pid, _OPTIONS)
        elif found not in (signal.SIGSTOP, signal.SIGTRAP):  # these say that a thread begins
            passed_on = found
        with suppress(ProcessLookupError):  # a thread that has just ended
            _ptrace(_SYSCALL, thread, passed_on)


def _kill(pid):
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        while os.waitpid(-1, _WAIT_ALL)[0] != pid:  # its threads end one by one, and it last
            pass


def _call_of(thread):
    """[(number, first argument)] of the call that a thread enters; nothing where it leaves one, and before Linux 5.3."""
    info = (ctypes.c_uint64 * 16)()  # op and architecture, two pointers, the number, the arguments
    try:
        _ptrace(_SYSCALL_INFO, thread, ctypes.addressof(info), ctypes.sizeof(info))
    except OSError:
        return []
    return [(info[3], info[4])] if info[0] & 0xFF == 1 else []


def _ptrace(request, thread, data=0, size=0):
    pointers = ctypes.c_void_p(size), ctypes.c_void_p(data)
    if _libc.ptrace(ctypes.c_long(request), ctypes.c_long(thread), *pointers) == -1:
        e = ctypes.get_errno()
        raise OSError(e, os.strerror(e))


if __name__ == "__main__":
    print(why_not() or "")
