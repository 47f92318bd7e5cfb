"""Every command that a door may give a session, written once.

A command is a frozen pydantic model: its fields, their bounds and their documentation are what the command
line's options, the HTTP schema, the dashboard's forms and agents' tools are made from. Nothing here imports
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from onthefly.errors import InvalidCommandError

Scalar = bool | int | float | str | None


class Command(BaseModel):
    """A request to a live session, carried out on its training thread between two steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ClassVar[str]
    changes_state: ClassVar[bool] = False
    """Whether the steps after it may differ; such a command is applied again, at its step, when steps are replayed."""


class Pause(Command):
    """Hold training at the next step boundary."""

    kind = "pause"
    save: bool = Field(True, description="Save a checkpoint once paused.")


class Resume(Command):
    """Let a paused session train on."""

    kind = "resume"


class Stop(Command):
    """Finish the step, save a checkpoint and end the process. `onthefly resume` goes on from there."""

    kind = "stop"
    save: bool = Field(True, description="Save a checkpoint before leaving.")


class SaveCheckpoint(Command):
    """Save a checkpoint at the next step boundary."""

    kind = "saveCheckpoint"
    path: str | None = Field(None, description="Write it to this file instead of into the store.")
    pin: bool = Field(False, description="Never evict it.")


class PinCheckpoint(Command):
    """Keep a checkpoint of this run whatever retention says, or let retention have it again."""

    kind = "pinCheckpoint"
    path: str = Field(description="The checkpoint's file.")
    pinned: bool = Field(True, description="Whether it is to be pinned.")


class RemoveCheckpoint(Command):
    """Remove a checkpoint of this run. Its row stays, as a tombstone."""

    kind = "removeCheckpoint"
    path: str = Field(description="The checkpoint's file.")


class LoadCheckpoint(Command):
    """Put the state of a checkpoint back into the live session."""

    kind = "loadCheckpoint"
    changes_state = True
    path: str = Field(description="The checkpoint's file.")
    hash: str | None = Field(None, description="Refuse the file unless its content hash begins with this.")


class ResetSession(Command):
    """Go back to the state that the session began with. It shows as a new generation of the run."""

    kind = "resetSession"
    changes_state = True


class TestRun(Command):
    """Evaluate the model on the test data. Training is not affected."""

    __test__: ClassVar[bool] = False  # its name makes pytest think that it is a test class
    kind = "testRun"
    data: str = Field("test", pattern="^(test|val)$", description="Which loader: test or val.")
    save: bool = Field(True, description="Save a checkpoint of the tested state.")


class SetValue(Command):
    """Change hyper-parameters from the next step on."""

    kind = "set"
    changes_state = True
    values: dict[str, Any] = Field(
        min_length=1,
        description="Name to value: a knob, grad_clip, a group value such as lr, or one group's, such as optimizer.0.lr.",
    )
    hold: bool = Field(False, description="Keep the value fixed, whatever a scheduler says.")
    release: bool = Field(False, description="Give the named values back to their scheduler or their script.")

    @field_validator("values")
    @classmethod
    def _plain(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name, value in values.items():
            items = value if isinstance(value, list | tuple) else [value]
            if not all(isinstance(item, Scalar) for item in items):
                raise ValueError(f"{name}: a value is a number, a text, true, false, null, or a list of those")
        return values


COMMANDS: tuple[type[Command], ...] = (
    Pause,
    Resume,
    Stop,
    SaveCheckpoint,
    PinCheckpoint,
    RemoveCheckpoint,
    LoadCheckpoint,
    ResetSession,
    TestRun,
    SetValue,
)


def build(kind: str, arguments: Mapping[str, Any]) -> Command:
    """The command of that kind with those arguments. Raises `InvalidCommandError`, saying what is wrong."""
    for command in COMMANDS:
        if command.kind == kind:
            try:
                return command.model_validate(arguments)
            except ValidationError as e:
                problems = "; ".join(f"{'.'.join(map(str, p['loc'])) or kind}: {p['msg']}" for p in e.errors())
                raise InvalidCommandError(f"{kind}: {problems}") from e
    raise InvalidCommandError(f"there is no command {kind!r}; there are: {', '.join(c.kind for c in COMMANDS)}")
