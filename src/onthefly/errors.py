"""Every error that OnTheFly raises on purpose.

OnTheFlyError
├── StateError                 a value or a state that cannot be captured or restored
│   ├── UnsupportedValueError  (TypeError)   a value that has no exact stored form; names its path
│   └── StateMismatchError     (ValueError)  a checkpoint does not fit the live objects
└── CheckpointError            a file that is not what it should be
    └── CorruptCheckpointError (ValueError)  truncated, altered, foreign or malicious
"""


class OnTheFlyError(Exception):
    """Root of all errors raised by OnTheFly."""


class StateError(OnTheFlyError):
    """The train state cannot be captured or restored."""


class UnsupportedValueError(StateError, TypeError):
    """A value has no exact stored form. The message names its path in the tree."""


class StateMismatchError(StateError, ValueError):
    """What was stored does not fit the live objects. Nothing was changed."""


class CheckpointError(OnTheFlyError):
    """A checkpoint file cannot be used."""


class CorruptCheckpointError(CheckpointError, ValueError):
    """The file is truncated, altered, foreign or malicious. Nothing of it was loaded or executed."""
