"""A run's manifest: what it began from, written once, under the hash of its content.

It names its parents' checkpoints by hash, so that a line of runs can be proved from files alone. Equal manifests are equal
bytes, see `canonical`.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3

from onthefly.errors import InvalidCommandError, SchemaVersionError, StoreError, UnsupportedValueError, said

FORMAT_VERSION = 1
_NAME_DIGITS = 16
_HIGH_SURROGATE = re.compile(r"[\ud800-\udbff]")
_OF_ANOTHER_REPOSITORY = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # a hook of git has them set


@dataclass(frozen=True)
class Parent:
    """The checkpoint of another run that a run began from; several for a merge."""

    run: str
    step: int
    epoch: int
    hash: str


@dataclass(frozen=True)
class Manifest:
    """What a run began from: all that decides what it then computes, and nothing of where on a machine it was.

    The JSON values in it are copied: what becomes of those that it was given does not touch it. Raises
    `UnsupportedValueError` for a value that is not JSON, and `InvalidCommandError` (a `ValueError`) for one of another
    type than its field's, and for a parent whose checkpoint has no hash yet.
    """

    run: str
    kind: Literal["root", "fork", "rewind", "merge"]
    created: float  # Unix seconds
    seed: int  # `torch.initial_seed()`
    argv: tuple[str, ...]  # as typed
    code: Mapping[str, Any]  # `code_version`
    environment: Mapping[str, Any]  # versions of libraries, device, threads, ...
    parents: tuple[Parent, ...] = ()
    selection: Mapping[str, Any] | None = None  # the manifest of the samples that it trains on; None for all
    changes: Mapping[str, Any] = field(default_factory=dict)  # what was set at its beginning
    merge: Mapping[str, Any] | None = None  # how its parents became one; left out where nothing was merged
    format: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        value = json.loads(self._canonical())
        _check(value)
        for name in ("code", "environment", "selection", "changes"):
            object.__setattr__(self, name, value[name])
        object.__setattr__(self, "merge", value.get("merge"))
        for name in ("argv", "parents"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def digest(self) -> str:
        """The blake3 of its canonical bytes, 64 hex digits."""
        return _digest(self._canonical())

    def write(self, folder: Path) -> Path:
        """Make it durable as ``<first 16 digits of the digest>.json`` in a folder, and give its path.

        One that is there already is left alone, unless it is damaged. Raises `StoreError` when the disk does not take it.
        """
        content = self._canonical()
        target = folder / f"{_digest(content)[:_NAME_DIGITS]}.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (target.is_file() and target.read_bytes() == content):
                _replace(target, content)
            _sync(folder)  # also when another process renamed it a moment ago, and has not come to this
        except OSError as e:
            raise StoreError(f"cannot write the manifest of {self.run!r} in {folder}: {said(e)}") from e
        return target

    def _canonical(self) -> bytes:
        value = asdict(self)
        return canonical(value if self.merge is not None else {k: v for k, v in value.items() if k != "merge"})


def read(path: Path) -> Manifest:
    """The manifest in a file, proved by the file's name.

    Raises `StoreError` if it cannot be read, has another content than its name says, or holds no manifest, and
    `SchemaVersionError` (also a `StoreError`) for one of another version of OnTheFly.
    """
    try:
        content = path.read_bytes()
    except OSError as e:
        raise StoreError(f"cannot read the manifest {path}: {said(e)}") from e
    digest = _digest(content)[:_NAME_DIGITS]
    if path.name != f"{digest}.json":
        raise StoreError(
            f"{path}: by its content it would be called {digest}.json; it was altered or renamed, bring back a copy"
        )
    try:
        value = json.loads(content)
        if isinstance(value, dict) and type(value.get("format")) is int and value["format"] != FORMAT_VERSION:
            raise SchemaVersionError(
                f"{path}: a manifest of format {value['format']}, and this version of OnTheFly reads {FORMAT_VERSION}"
            )
        found = Manifest(**{**value, "parents": tuple(Parent(**parent) for parent in value["parents"])})
        if found._canonical() != content:
            raise ValueError("it is not in canonical form")
    except SchemaVersionError:
        raise
    except (ValueError, TypeError, LookupError, RecursionError) as e:
        raise StoreError(f"{path} is no manifest: {e}") from e
    return found


def canonical(value: object) -> bytes:
    """A JSON value as the bytes that every equal one has: keys sorted by code point, no spaces, UTF-8.

    What it relies on: Python writes a float as the shortest decimal number that is read back as the same 64 bits
    (`repr`; Steele & White 1990, Gay 1990), on every platform, so that a float has one text and a text one float, -0.0
    and 1e22 included. 1, 1.0 and True are equal in Python and are three different values here. Tuples are lists. It
    is not RFC 8785, which writes numbers as JavaScript does.

    Raises `UnsupportedValueError`, naming the place, for NaN and infinities, for what is no JSON value (NumPy's
    integers, keys that are no strings), for integers that Python itself refuses to write (`sys.set_int_max_str_digits`),
    and for text that is no Unicode. Bytes of an argument that is no UTF-8 (`os.fsdecode`) are escaped, and read back equal.
    """
    try:
        text = json.dumps(
            _plain(value, "$"), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
    except RecursionError as e:
        raise UnsupportedValueError("the value is nested too deeply, or contains itself") from e
    # Only surrogates have no UTF-8, and what Python then writes of them is their escape in JSON.
    return text.encode("utf-8", "backslashreplace")


def code_version(folder: Path, *, script: Path | None = None, timeout: float = 5.0) -> dict[str, Any]:
    """The git commit that a folder is at, and whether files under version control differ from it.

    ``{"commit": "3f9a...", "dirty": False}``, with `script` also its place in the repository, if it lies inside:
    ``"script": "examples/train.py"``. When nothing can be told, ``{"commit": None, "why": "..."}``: no git, no repository,
    no commit, or no answer within `timeout` seconds. Never raises, and takes no lock of the repository.
    """
    until = time.monotonic() + timeout
    try:
        commit, top = _git(folder, until, "rev-parse", "HEAD", "--show-toplevel").removesuffix("\n").split("\n", 1)
        changed = _git(folder, until, "status", "--porcelain", "--untracked-files=no")
        found: dict[str, Any] = {"commit": commit, "dirty": bool(changed)}
        if script is not None and (place := (folder / script).resolve()).is_relative_to(top):
            found["script"] = place.relative_to(top).as_posix()
        return found
    except FileNotFoundError:
        return {"commit": None, "why": "git is not installed" if folder.is_dir() else "the folder is not there"}
    except subprocess.TimeoutExpired:
        return {"commit": None, "why": f"git gave no answer within {timeout:g} s"}
    except subprocess.CalledProcessError as e:
        foreign = "dubious ownership" in e.stderr  # what git says holds paths, which are nobody's business
        return {
            "commit": None,
            "why": "git refuses the repository of another user" if foreign else "there is no git commit",
        }
    except (OSError, ValueError, RuntimeError) as e:  # a folder that is none; a loop of links
        return {"commit": None, "why": f"git cannot be asked ({type(e).__name__})"}


def _git(folder: Path, until: float, *arguments: str) -> str:
    """What a git command prints. It is ended, with all that it started, when it takes too long."""
    environment = {name: value for name, value in os.environ.items() if name not in _OF_ANOTHER_REPOSITORY}
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", *arguments]
    with subprocess.Popen(
        command,
        cwd=folder,
        env={**environment, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="surrogateescape",
        start_new_session=True,  # a group of its own: what git starts is ended with it
    ) as process:
        try:
            out, err = process.communicate(timeout=max(until - time.monotonic(), 0))
        except BaseException:
            with suppress(ProcessLookupError, PermissionError):  # what macOS says of one that has ended
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, out, err)
    return out


def _plain(value: object, place: str) -> object:
    """The value in lists and dicts, every part of it one that JSON has an exact form for."""
    match value:
        case None | bool():
            return value
        case str():
            if _HIGH_SURROGATE.search(value):  # two of them would be read back as one character
                raise UnsupportedValueError(f"{place}: the text {value!r} is no Unicode")
            return value
        case int():
            try:
                int.__repr__(value)
            except ValueError as e:
                raise UnsupportedValueError(f"{place}: Python writes no integer of so many digits") from e
            return value
        case float():
            if value - value != 0:
                raise UnsupportedValueError(f"{place}: {value!r} has no form in JSON")
            return value
        case Mapping():
            found = {}
            for key, part in value.items():
                if not isinstance(key, str):
                    raise UnsupportedValueError(f"{place}: the key {key!r} is no string")
                found[_plain(key, place)] = _plain(part, f"{place}.{key}")
            return found
        case list() | tuple():
            return [_plain(part, f"{place}[{index}]") for index, part in enumerate(value)]
    raise UnsupportedValueError(f"{place}: a {type(value).__name__} is no JSON value")


def _check(value: Mapping[str, Any]) -> None:
    """Raises `InvalidCommandError` for the JSON of a manifest with a value that its field does not take."""
    types: Mapping[str, tuple[type, ...]] = {
        "run": (str,),
        "created": (float, int),
        "seed": (int,),
        "argv": (list,),
        "code": (dict,),
        "environment": (dict,),
        "parents": (list,),
        "selection": (dict, type(None)),
        "changes": (dict,),
        "merge": (dict, type(None)),
    }
    wrong = [name for name, allowed in types.items() if type(value.get(name)) not in allowed]
    wrong += ["kind"] if value["kind"] not in ("root", "fork", "rewind", "merge") else []
    wrong += ["format"] if value["format"] != FORMAT_VERSION else []
    if wrong:
        raise InvalidCommandError(f"in the manifest of {value['run']!r}, these are not what they should be: {wrong}")
    if value.get("merge") is not None and not _is_merge(value["merge"]):
        raise InvalidCommandError(f"in the manifest of {value['run']!r}, no merge is described by {value['merge']}")
    if not all(isinstance(word, str) for word in value["argv"]):
        raise InvalidCommandError(f"in the manifest of {value['run']!r}, argv is a list of words, not {value['argv']}")
    for parent in value["parents"]:
        if [type(parent[name]) for name in ("run", "step", "epoch", "hash")] != [str, int, int, str]:
            raise InvalidCommandError(f"in the manifest of {value['run']!r}, no checkpoint is described by {parent}")
        if not parent["hash"]:
            raise InvalidCommandError(
                f"the checkpoint of {parent['run']!r} at step {parent['step']} has no hash yet; "
                f"make the manifest of {value['run']!r} when it is durable"
            )


def _is_merge(told: Mapping[str, Any]) -> bool:
    """Whether all is there that computing it again reads. Files are names, and lead nowhere else."""
    types: Mapping[str, tuple[type, ...]] = {
        "strategy": (str,),
        "part": (str,),
        "options": (dict,),
        "weights": (list, type(None)),
        "base": (str, type(None)),
        "members": (list,),
        "statistics": (list,),
        "recalibrated": (dict,),
    }
    if not all(type(told.get(name)) in allowed for name, allowed in types.items()):
        return False
    files = [file for file in told["statistics"] if isinstance(file, dict)]
    return (
        len(files) == len(told["statistics"])
        and all(isinstance(file.get("hash"), str) and isinstance(file.get("file"), str) for file in files)
        and all(Path(file["file"]).name == file["file"] for file in files)
        and all(isinstance(content, str) for content in told["members"])
        and isinstance(told["recalibrated"].get("buffers"), list)
    )


def _digest(content: bytes) -> str:
    return blake3(content).hexdigest()


def _replace(target: Path, content: bytes) -> None:
    """Put these bytes at `target`, whole or not at all."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def _sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
