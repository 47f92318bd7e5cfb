"""Every error that OnTheFly raises on purpose, with the exit code that the command line gives it.

OnTheFlyError                                        1
├── StateError                                       3  a value or state that cannot be captured or restored
│   ├── UnsupportedValueError  (TypeError)           3  a value without an exact stored form; names its path
│   ├── StateMismatchError     (ValueError)          3  a checkpoint does not fit the live objects
│   └── UnsupportedLoaderError (TypeError)           3  a loader that cannot be rebuilt exactly
├── CheckpointError                                  4  a checkpoint file cannot be used
│   ├── CorruptCheckpointError (ValueError)          4  truncated, altered, foreign or malicious
│   ├── CheckpointNotFoundError(FileNotFoundError)   4  no such file, run or step
│   ├── CheckpointWriteError   (OSError)             4  disk full, quota, permission, I/O error
│   └── HalfRestoredError                            4  the disk failed in the middle of a load
├── StoreError                                       5  the store cannot be used
│   ├── StoreBusyError         (TimeoutError)        5  another process holds it for too long
│   └── SchemaVersionError     (ValueError)          5  made by another version
├── CommandError                                     6  a command was refused or failed
│   ├── InvalidCommandError    (ValueError)          2  its arguments are wrong
│   ├── NoLiveSessionError     (LookupError)         6  no live session to command
│   ├── AmbiguousError         (LookupError)         2  several fit; the message lists them
│   ├── MissingPartError       (LookupError)         6  the session was not given what the command needs
│   └── CommandTimeoutError    (TimeoutError)        6  no answer yet; the command stays queued
├── UnknownReferenceError      (LookupError)         2  a REF that names nothing
├── ResumeError                (RuntimeError)        7  a run cannot be started again
├── HubError                   (RuntimeError)        9  the dashboard's server cannot be started, or not so
└── InexactError               (RuntimeError)        8  a replay differed from what was recorded
"""

from __future__ import annotations

from typing import ClassVar


class OnTheFlyError(Exception):
    """Root of all errors raised by OnTheFly."""

    exit_code: ClassVar[int] = 1


def said(error: BaseException) -> str:
    """What an error says, without the number that the operating system gives it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


class StateError(OnTheFlyError):
    """The train state cannot be captured or restored."""

    exit_code = 3


class UnsupportedValueError(StateError, TypeError):
    """A value has no exact stored form. The message names its path in the tree."""


class StateMismatchError(StateError, ValueError):
    """What was stored does not fit the live objects. Nothing was changed."""


class UnsupportedLoaderError(StateError, TypeError):
    """A loader cannot be rebuilt with the same batches; the message says what to pass instead."""


class CheckpointError(OnTheFlyError):
    """A checkpoint file cannot be used."""

    exit_code = 4


class CorruptCheckpointError(CheckpointError, ValueError):
    """The file is truncated, altered, foreign or malicious. Nothing of it was loaded or executed."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no such checkpoint."""


class CheckpointWriteError(CheckpointError, OSError):
    """The checkpoint could not be made durable. Older checkpoints are untouched and no partial file is left."""


class HalfRestoredError(CheckpointError):
    """The disk failed in the middle of a load: some live objects have changed. A session ends then, without saving."""


class StoreError(OnTheFlyError):
    """The store cannot be used."""

    exit_code = 5


class StoreBusyError(StoreError, TimeoutError):
    """Another process holds the store's database for too long."""


class SchemaVersionError(StoreError, ValueError):
    """The store was made by another version of OnTheFly."""


class CommandError(OnTheFlyError):
    """A command was refused, or failed in the session. The session goes on as it was."""

    exit_code = 6


class InvalidCommandError(CommandError, ValueError):
    """A command's name or arguments are wrong."""

    exit_code = 2


class NoLiveSessionError(CommandError, LookupError):
    """There is no live session to command."""


class AmbiguousError(CommandError, LookupError):
    """Several sessions, runs or checkpoints fit. The message lists them."""

    exit_code = 2


class MissingPartError(CommandError, LookupError):
    """The session was not given what this command needs, such as a `loss_fn` or a `test_loader`."""


class CommandTimeoutError(CommandError, TimeoutError):
    """The session has not answered yet. The command stays queued."""


class UnknownReferenceError(OnTheFlyError, LookupError):
    """A REF names no run, step, hash or file."""

    exit_code = 2


class ResumeError(OnTheFlyError, RuntimeError):
    """A run cannot be started again."""

    exit_code = 7


class HubError(OnTheFlyError, RuntimeError):
    """The dashboard's server cannot be started, or not in the way that was asked for."""

    exit_code = 9


class InexactError(OnTheFlyError, RuntimeError):
    """A replay differed from what was recorded."""

    exit_code = 8
