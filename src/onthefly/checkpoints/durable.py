"""A file that is there whole, or not at all.

It is written beside its place under a hidden name, made durable, and renamed. While that lasts its writer holds a lock on
it, so that what a killed process left behind can be told from what is being written, by any process, in any container.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from onthefly.errors import CheckpointWriteError

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.onthefly\.tmp", re.DOTALL)


@contextmanager
def replacing(target: Path, handles: set[int] | None = None) -> Iterator[int]:
    """A handle to write a file with. When the block ends well the file stands at `target`, durable.

    While it is open the handle is in `handles`, if given: a process that is forked meanwhile inherits it, and keeps the
    file's disk space for as long as it lives, unless it closes it.

    Otherwise nothing is left of it, and an older file at `target` is as it was. Raises `CheckpointWriteError` for any
    `OSError`, also for one from inside the block.
    """
    try:
        temporary, handle = _create(target)
        if handles is not None:
            handles.add(handle)
        try:
            yield handle
            os.fsync(handle)
            os.replace(temporary, target)
        except BaseException:
            with suppress(FileNotFoundError):
                temporary.unlink()
            raise
        finally:
            if handles is not None:
                handles.discard(handle)
            os.close(handle)
        sync_folder(target.parent)
    except CheckpointWriteError:
        raise
    except OSError as e:
        raise CheckpointWriteError(e.errno, f"cannot write the checkpoint: {e.strerror or e}", str(target)) from e


def replace_durably(target: Path, data: bytes) -> None:
    """Put these bytes at `target`, whole or not at all. Raises `CheckpointWriteError`."""
    with replacing(target) as handle:
        write_all(handle, memoryview(data), 0)


def write_all(handle: int, data: memoryview, offset: int) -> None:
    """Write everything; one `os.pwrite` may stop short, at 2 GiB for one."""
    while data:
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written


def reserve(handle: int, size: int) -> None:
    """Take the space for a file of this size, where the file system can: a full disk is found out at once. Raises `OSError`."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as e:
            if e.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise


def remove_stray(folder: Path) -> list[Path]:
    """Delete the unfinished files in a folder that nobody is writing any more. Returns them."""
    removed = []
    for name in sorted(os.listdir(folder)):
        if _TEMPORARY.fullmatch(name) and _remove_unlocked(folder / name):
            removed.append(folder / name)
    return removed


def strays(folder: Path) -> list[Path]:
    """What `remove_stray` would delete, but for what came within the last second: asking for a lock would get in its way."""
    return [
        folder / name for name in sorted(os.listdir(folder)) if _TEMPORARY.fullmatch(name) and _is_left(folder / name)
    ]


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _create(target: Path) -> tuple[Path, int]:
    while True:
        path = target.with_name(f".{target.name}.{secrets.token_hex(4)}.onthefly.tmp")
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # `remove_stray` came between the two calls, and takes the file away
            os.close(handle)
            continue
        except OSError:  # a file system without locks: `remove_stray` cannot lock there either, and leaves all alone
            return path, handle
        if os.fstat(handle).st_nlink:
            return path, handle
        os.close(handle)


def _remove_unlocked(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:  # gone, or not ours
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except OSError:  # somebody is writing it, or it cannot be told
        return False
    finally:
        os.close(handle)
    return True


def _is_left(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        if abs(time.time() - os.fstat(handle).st_mtime) < 1:  # its writer may be about to lock it
            return False
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True
