"""Whether the process of a session still runs: it holds a record lock on the session's lock file.

The kernel frees such a lock when its process dies, however it dies. It is a POSIX record lock (`lockf`), because
an inherited `flock` lives on in forked loader workers.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class SessionLock:
    """The lock of one session, held by its process from `acquire` to `release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def acquire(self) -> None:
        """Take the lock. Raises `OSError` if the file cannot be made."""
        aside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        fd = os.open(aside, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Locked before it has its name: nobody can see the file and find it free.
            os.rename(aside, self.path)
        except OSError:
            os.close(fd)
            raise
        self._fd = fd

    def release(self) -> None:
        """Free the lock; the file stays. Nothing happens if it is not held."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def is_held(path: Path) -> bool:
    """Whether a process, this one included, holds the lock. Raises `FileNotFoundError` if it was never taken."""
    if _is_open_here(path):
        return True
    with open(path, "rb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
    return False


def _is_open_here(path: Path) -> bool:
    """Whether this process has the file open. POSIX drops a process' locks on a file when it closes *any* descriptor of it."""
    wanted = os.stat(path)
    for name in os.listdir("/dev/fd"):
        try:
            found = os.fstat(int(name))
        except OSError:  # the descriptor of the listing itself, or one that another thread has closed since
            continue
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    return False
