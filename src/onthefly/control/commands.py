"""Every command that a door may give a session, written once.

A command is a frozen pydantic model: its fields, their bounds and their documentation are what the command
line's options, the HTTP schema, the dashboard's forms and agents' tools are made from. Nothing here imports
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from onthefly.errors import InvalidCommandError

Scalar = bool | int | float | str | None


def _plain_values(values: dict[str, Any]) -> dict[str, Any]:
    for name, value in values.items():
        items = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(item, Scalar) for item in items):
            raise ValueError(f"{name}: a value is a number, a text, true, false, null, or a list of those")
    return values


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
    """Put the state of a checkpoint back into the live session, which goes on from there as a new run."""

    kind = "loadCheckpoint"
    changes_state = True
    path: str = Field(description="The checkpoint's file.")
    hash: str | None = Field(None, description="Refuse the file unless its content hash begins with this.")
    name: str | None = Field(None, description="Name of the new run. Default: rewind1, rewind2, ...")


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

    _plain = field_validator("values")(_plain_values)


class Chosen(Command):
    """A command about chosen samples of the train data: by a recipe, or by a selection that was made before."""

    recipe: dict[str, Any] | None = Field(None, description="Which samples, as a recipe: see onthefly.samples.recipes.")
    selection: str | None = Field(None, description="The digest of a selection that was made before.")

    @field_validator("recipe")
    @classmethod
    def _sound(cls, recipe: dict[str, Any] | None) -> dict[str, Any] | None:
        if recipe is None:
            return None
        from onthefly.samples.recipes import check  # brings NumPy, and most commands are about no samples

        return check(recipe)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.recipe is not None and self.selection is not None:
            raise ValueError("give a recipe or a selection, not both")
        return self


class ScanSamples(Command):
    """Compute the loss of every sample, and more, under the present weights. Training stands meanwhile, and is not affected."""

    kind = "scanSamples"
    data: str = Field("train", pattern="^(train|val|test)$", description="Which loader's data: train, val or test.")
    embeddings: bool = Field(False, description="Also an embedding of every sample.")


class ShowSamples(Command):
    """Read some samples from the data set, so that they can be looked at. Training stands meanwhile, and is not affected."""

    kind = "showSamples"
    data: str = Field("train", pattern="^(train|val|test)$", description="Which loader's data: train, val or test.")
    indices: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field(
        min_length=1, max_length=64, description="Which samples: at most 64."
    )


class CancelScan(Command):
    """Stop the scan that is under way, or the reading of samples."""

    kind = "cancelScan"


class AdoptScan(Command):
    """Record a scan of a checkpoint that a process beside this one has made."""

    kind = "adoptScan"
    run: str = Field(description="The checkpoint's run.")
    generation: int = Field(ge=0, description="Its generation.")
    step: int = Field(ge=0, description="Its step.")
    epoch: int = Field(ge=0, description="Its epoch.")
    checkpoint: str = Field(description="Its hash.")
    data: str = Field("train", pattern="^(train|val|test)$", description="Which loader's data were scanned.")
    columns: list[str] = Field(description="What was computed.")
    length: int = Field(ge=0, description="Of how many samples.")
    path: str = Field(description="The table's file, in the store.")
    hash: str = Field(description="The file's hash.")
    seconds: float = Field(ge=0, description="How long it took.")


class Subset(Chosen):
    """Train on chosen samples from the next step on; with neither recipe nor selection, on all of them again."""

    kind = "subset"
    changes_state = True


class ForkRun(Chosen):
    """Go on as a new run: on chosen samples, with changed values, or both."""

    kind = "forkRun"
    changes_state = True
    name: str | None = Field(None, description="Name of the new run. Default: fork1, fork2, ...")
    values: dict[str, Any] = Field(default_factory=dict, description="Values to change, as `set` does.")
    hold: bool = Field(False, description="Keep the changed values fixed, whatever a scheduler says.")
    beside: bool = Field(False, description="Start it as a process of its own; this session stays on its run.")
    fresh: bool = Field(False, description="Begin from the state that this run began with.")

    _plain = field_validator("values")(_plain_values)


class MergeParent(BaseModel):
    """A checkpoint to merge, or, without a path, the state that the session is in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str | None = Field(None, description="The checkpoint's file; none: the present state.")
    hash: str | None = Field(None, description="Refuse the file unless its content hash begins with this.")


class MergeRuns(Command):
    """Merge checkpoints of several runs, judge what comes of it beside them, and, if asked to, go on with the best."""

    kind = "mergeRuns"
    changes_state = True
    parents: list[MergeParent] = Field(min_length=2, description="What is merged.")
    base: MergeParent | None = Field(
        None, description="What the parents come from, for strategies that merge differences."
    )
    strategies: list[str] = Field(["swa"], min_length=1, description="Their names; all: each that can be used here.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the strategies, by name.")
    weights: list[float] | None = Field(None, description="One for each parent.")
    data: str = Field("val", pattern="^(val|test)$", description="The data that judge: val or test.")
    slices: dict[str, dict[str, Any] | str] = Field(
        default_factory=dict,
        description="Further rows: parts of those data, as recipes on the values of the first parent, or as their short notation.",
    )
    judge: str | None = Field(None, description="The slice by which the best is told. Default: all of the data.")
    metric: str | None = Field(
        None,
        pattern="^(loss|accuracy)$",
        description="What is compared. Default: accuracy for classifiers, or else loss.",
    )
    commit: str | None = Field(
        None, description="best, or a strategy: the one to go on with. Default: none, a preview."
    )
    floor: bool = Field(True, description="Commit nothing that is worse than the best parent.")
    name: str | None = Field(None, description="Name of the new run. Default: merge1, merge2, ...")
    optimizer: str = Field(
        "reset",
        pattern="^(reset|first|average)$",
        description="Its state after the merge: empty, the first parent's, or averaged.",
    )
    warmup: int = Field(0, ge=0, description="Steps over which the learning rate rises again.")
    recalibrate: int = Field(
        2048, ge=0, description="Train samples that batch-norm statistics are estimated on anew; 0: none."
    )
    fisher: str = Field(
        "empirical",
        pattern="^(empirical|true)$",
        description="Fisher information by the data's labels, or the model's own.",
    )
    samples: int = Field(256, ge=1, description="How many samples of a parent's own data its statistics are taken of.")

    @field_validator("slices")
    @classmethod
    def _sound(cls, slices: dict[str, Any]) -> dict[str, Any]:
        from onthefly.samples.recipes import check, parse

        return {name: parse(told) if isinstance(told, str) else check(told) for name, told in slices.items()}


class SwitchRun(Command):
    """Go over to another run, and on with it from where it stands."""

    kind = "switchRun"
    changes_state = True
    run: str = Field(description="The run to go on with.")


class Undo(Command):
    """Take back the last command that changed the state (load, set, fork, switch, subset, reset), with the steps after it."""

    kind = "undo"
    changes_state = True


class ReportRun(Command):
    """Look at the training for some steps, and say what is wrong with it. Training goes on meanwhile, and is not affected."""

    kind = "report"
    report: str = Field(
        "health",
        pattern="^(health|numerics|activations|gradients|determinism|throughput|distribution)$",
        description="Which report; health is the summary of all.",
    )
    steps: int = Field(20, ge=1, le=10_000, description="How many steps to look into.")
    double_run: bool = Field(
        False, description="For determinism: save two checkpoints three steps apart, for a fresh process to repeat."
    )


class CancelReport(Command):
    """End the report that is under way: it is of what was seen until then."""

    kind = "cancelReport"


class ExportSubset(Chosen):
    """Write the chosen samples, with what is known of each, to a file; by default the samples that are trained on."""

    kind = "exportSubset"
    path: str = Field(description="A new file: .parquet, .csv or .json.")


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
    ScanSamples,
    ShowSamples,
    CancelScan,
    AdoptScan,
    Subset,
    ForkRun,
    MergeRuns,
    SwitchRun,
    Undo,
    ReportRun,
    CancelReport,
    ExportSubset,
)


def build(kind: str, arguments: Mapping[str, Any]) -> Command:
    """The command of that kind with those arguments. Raises `InvalidCommandError`, saying what is wrong."""
    for command in COMMANDS:
        if command.kind == kind:
            try:
                return command.model_validate(arguments)
            except ValidationError as e:
                problems = "; ".join(
                    f"{'.'.join(map(str, p['loc'])) or kind}: {p['msg'].removeprefix('Value error, ')}"
                    for p in e.errors()
                )
                raise InvalidCommandError(f"{kind}: {problems}") from e
    raise InvalidCommandError(f"there is no command {kind!r}; there are: {', '.join(c.kind for c in COMMANDS)}")
