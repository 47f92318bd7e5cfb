"""Commands: given to a session, and their answers. One path for each kind, so that a form can be made from its schema."""

# Annotations are evaluated here: those of the paths are made from the list of commands.

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Path, Query, Response
from pydantic import Field
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool

from onthefly.control import commands
from onthefly.control.commands import Command
from onthefly.errors import InvalidCommandError, NoLiveSessionError, UnknownReferenceError
from onthefly.hub.api.common import LARGEST, Asker, AskerHere, Here, Id, View, session_of
from onthefly.hub.stores import OpenStore
from onthefly.store import queries, schema
from onthefly.store.queries import CommandRow

router = APIRouter(prefix="/stores/{store}", tags=["commands"])

_MANY = 100  # items of a list, of which more are not told in a list of commands
_POLL = 0.02  # seconds between two looks for an answer
_NOT_HERE = {commands.ExportSubset.kind, commands.AdoptScan.kind}  # they name files that are no checkpoints
_IN_LIST = {commands.PinCheckpoint.kind, commands.RemoveCheckpoint.kind, commands.LoadCheckpoint.kind}

Wait = Annotated[float, Query(ge=0, le=30, description="Seconds to wait for the answer.")]
Key = Annotated[
    str | None,
    Query(
        pattern=r"^[A-Za-z0-9_-]{1,64}$",
        description="Names the command: sent twice under one key, it is carried out once.",
    ),
]


Door = Literal["cli", "python", "dashboard", "api"]


class Failure(View):
    type: str
    message: str


class CommandView(View):
    """A command, and its answer as soon as there is one."""

    id: str
    number: int
    session: int
    kind: str
    arguments: dict[str, Any]
    created: float
    status: str
    result: dict[str, Any] | None
    error: Failure | None
    step: int | None
    epoch: int | None
    finished: float | None
    door: str | None
    asker: str | None
    run: str | None
    cut: dict[str, int] = Field(
        default_factory=dict,
        description="Of each list among the arguments that is not here whole, how long it is, by its place: `arguments.recipe.indices`.",
    )


def command_view(row: CommandRow) -> CommandView:
    error = None
    if row.error is not None:
        error = Failure(type=str(row.error.get("type")), message=str(row.error.get("message")))
    own = {name: getattr(row, name) for name in CommandView.model_fields if name not in ("error", "cut")}
    return CommandView(**own, error=error)


async def give(
    store: OpenStore,
    session: int,
    command: Command,
    wait: float,
    key: str | None,
    response: Response,
    asker: Asker,
) -> CommandView:
    """Queue a command, and wait so long for its answer. 202 while there is none. Raises as `Client.command`."""
    id = key or uuid.uuid4().hex
    row = await run_in_threadpool(_queue, store, session, command, id, asker)
    deadline = time.monotonic() + wait
    while row.status == "queued" and time.monotonic() < deadline:
        await asyncio.sleep(_POLL)
        row = await run_in_threadpool(_look, store, id)
    response.status_code = 202 if row.status == "queued" else 200
    return command_view(row)


def _queue(store: OpenStore, session: int, command: Command, id: str, asker: Asker) -> CommandRow:
    target = session_of(store, session)
    _check_paths(store, command)
    if not store.client.store.is_alive(target):
        store.client.store.recover(time.time())
        raise NoLiveSessionError(f"session {session} has ended; `onthefly resume` starts its run again")
    store.client.store.insert_command(
        session, id, command.kind, command.model_dump(), time.time(), door=asker.door, asker=asker.name
    )
    row = _found(store, id)
    if (row.session, row.kind, row.arguments) != (session, command.kind, command.model_dump(mode="json")):
        raise InvalidCommandError(f"another command was given under the key {id!r}")
    return row


def _look(store: OpenStore, id: str) -> CommandRow:
    store.recover()  # a session that dies answers nothing, but its commands fail
    return _found(store, id)


def _found(store: OpenStore, id: str) -> CommandRow:
    row = queries.command(store.client.store, id)
    if row is None:
        raise UnknownReferenceError(f"there is no command {id!r}")
    return row


def _check_paths(store: OpenStore, command: Command) -> None:
    """A page says which file by its checkpoint, and never makes a session read or write another one."""
    path = getattr(command, "path", None)
    if path is None:
        return
    if command.kind not in _IN_LIST:
        raise InvalidCommandError(f"{command.kind}: path: through the hub, checkpoints are written into the store only")
    if not any(str(row.path) == path for row in store.client.checkpoints()):
        raise InvalidCommandError(f"{command.kind}: path: the store has no checkpoint {path!r}")


def _path_for(command: type[Command]) -> Callable[..., Awaitable[CommandView]]:
    """The endpoint of one kind of command. All of its fields may be left out when all have defaults."""
    needed = any(field.is_required() for field in command.model_fields.values())
    default: Any = ... if needed else command()

    async def endpoint(
        store: Here,
        session: Id,
        response: Response,
        asker: AskerHere,
        body: Annotated[command, Body()] = default,  # type: ignore[valid-type]
        wait: Wait = 0.0,
        key: Key = None,
    ) -> CommandView:
        return await give(store, session, body, wait, key, response, asker)

    endpoint.__doc__ = command.__doc__
    return endpoint


for _command in commands.COMMANDS:
    if _command.kind not in _NOT_HERE:
        router.add_api_route(
            f"/sessions/{{session}}/commands/{_command.kind}",
            _path_for(_command),
            methods=["POST"],
            response_model=CommandView,
            name=_command.kind,
            operation_id=f"command_{_command.kind}",
            summary=(_command.__doc__ or "").split("\n")[0],
            responses={202: {"model": CommandView, "description": "It is queued, and not answered yet."}},
        )


@router.get("/schemas/{kind}")
def get_schema(store: Here, kind: Annotated[str, Path(max_length=100)]) -> dict[str, Any]:
    """The JSON schema of a command's arguments, for a form: what there is, within which bounds, and what it is by default."""
    for command in commands.COMMANDS:
        if command.kind == kind and kind not in _NOT_HERE:
            return command.model_json_schema()
    raise UnknownReferenceError(f"there is no command {kind!r}")


@router.get("/commands/{command}")
def get_command(store: Here, command: str) -> CommandView:
    """A command, with its answer when there is one."""
    store.recover()
    return command_view(_found(store, command))


@router.get("/commands")
def get_commands(
    store: Here,
    session: Annotated[int | None, Query(ge=0, le=LARGEST)] = None,
    status: Literal["queued", "done", "failed"] | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    kind: Annotated[str | None, Query(max_length=100)] = None,
    door: Door | None = None,
    before: Annotated[int | None, Query(ge=0, le=LARGEST, description="Those with a lower number.")] = None,
    without: Annotated[list[str], Query(max_length=20)] = [],  # noqa: B006  FastAPI copies it
) -> list[CommandView]:
    """Commands, the newest first: the audit trail of who asked for what, through which door, and what came of it.

    Of long lists among the arguments only the first 100 items are here: `GET /commands/{id}` has them whole. The tables of a report
    are left out, which `GET /reports/{id}` has.
    """
    table = schema.command
    wanted = select(table).order_by(table.c.number.desc()).limit(limit)
    if session is not None:
        wanted = wanted.where(table.c.session == session)
    if status is not None:
        wanted = wanted.where(table.c.status == status)
    if without:
        wanted = wanted.where(table.c.kind.not_in(without))
    if kind is not None:
        wanted = wanted.where(table.c.kind == kind)
    if door is not None:
        wanted = wanted.where(table.c.door == door)
    if before is not None:
        wanted = wanted.where(table.c.number < before)
    with store.client.store.read() as connection:
        rows = [CommandRow(**row) for row in connection.execute(wanted).mappings()]
    return [_in_list(command_view(row)) for row in rows]


def _in_list(view: CommandView) -> CommandView:
    """A command without what is long: a fork may name a million samples."""
    cut: dict[str, int] = {}

    def brief(value: Any, place: str) -> Any:
        if isinstance(value, dict):
            return {name: brief(item, f"{place}.{name}") for name, item in value.items()}
        if not isinstance(value, list):
            return value
        if len(value) > _MANY:
            cut[place] = len(value)
        return [brief(item, f"{place}.{number}") for number, item in enumerate(value[:_MANY])]

    result = view.result
    if view.kind == commands.ReportRun.kind and result is not None:
        result = {name: value for name, value in result.items() if name != "tables"}
    return view.model_copy(update={"arguments": brief(view.arguments, "arguments"), "result": result, "cut": cut})
