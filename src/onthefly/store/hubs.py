"""Which hub serves a store: a lock that its process holds, and a note of where it listens.

    <store>/hub/lock      a record lock, held while a hub serves the store
    <store>/hub/hub.json  where it listens; kept when it ends, so that the next one takes the same port and open pages find it
    <store>/hub/token     what lets one in, for the owner's eyes only; it outlives the hub

The folder is its owner's alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from onthefly.errors import HubError, said
from onthefly.store import liveness

_TOKEN_BYTES = 32


@dataclass(frozen=True)
class Note:
    """Where a hub listens. `url` has no token; `stores` are the folders that it serves; `home` is the one with its token."""

    pid: int
    url: str
    port: int
    stores: tuple[str, ...]
    home: str


class Claim:
    """A store's lock, held by the hub that serves it, from `take` to `release`."""

    def __init__(self, store: Path) -> None:
        self._folder = _folder(store)
        self._fd: int | None = None

    def take(self) -> None:
        """Raises `HubError` when a hub serves the store already, or when the disk does not take it."""
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            fd = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as e:
            raise HubError(f"{self._folder}: {said(e)}") from e
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(fd)
            raise HubError(f"another hub serves {self._folder.parent} already") from e
        self._fd = fd

    def tell(self, note: Note) -> None:
        """Say where the hub listens. Raises `HubError` when the disk does not take it."""
        temporary = self._folder / f".hub.{os.getpid()}.tmp"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(fd, "w", encoding="utf-8") as file:
                json.dump(asdict(note), file)
            os.replace(temporary, self._folder / "hub.json")
        except OSError as e:
            raise HubError(f"{self._folder}: {said(e)}") from e

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def is_served(store: Path) -> bool:
    """Whether a hub serves the store, or is about to."""
    try:
        return liveness.is_held(_folder(store) / "lock")
    except OSError:  # there was never one
        return False


def running(store: Path) -> Note | None:
    """Where the hub of a store listens; None when there is none, or when it does not listen yet."""
    note = last(store)
    if note is None or not is_served(store):
        return None
    try:
        os.kill(note.pid, 0)
    except ProcessLookupError:  # a note of the hub before: the new one has not told yet
        return None
    except PermissionError:
        return note
    return note


def last(store: Path) -> Note | None:
    """Where the newest hub of a store listens, or did."""
    try:
        value = json.loads((_folder(store) / "hub.json").read_text("utf-8"))
        return Note(
            int(value["pid"]), str(value["url"]), int(value["port"]), tuple(value["stores"]), str(value["home"])
        )
    except (OSError, ValueError, LookupError, TypeError):
        return None


def token(store: Path) -> str:
    """The token that lets one into the hubs of a store; it is made when there is none.

    Raises `HubError` when it cannot be read or written, and when others than its owner can read it.
    """
    path = _folder(store) / "token"
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if not path.exists():
            temporary = path.with_name(f".token.{secrets.token_hex(4)}.tmp")
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(fd, "w", encoding="ascii") as file:
                file.write(secrets.token_urlsafe(_TOKEN_BYTES))
            try:
                os.link(temporary, path)  # of two that make one at once, the first wins, and both read the same
            except FileExistsError:
                pass
            finally:
                temporary.unlink()
        if path.stat().st_mode & 0o077:
            raise HubError(f"{path} can be read by others: remove it, and the next hub makes a new token")
        found = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise HubError(f"{path}: {said(e)}") from e
    if len(found) < _TOKEN_BYTES:
        raise HubError(f"{path} holds no token: remove it, and the next hub makes a new one")
    return found


def _folder(store: Path) -> Path:
    return store / "hub"
