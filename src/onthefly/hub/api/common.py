"""What the paths share: how they find their store, how they answer, and how an error is said."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Depends, Path, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticSerializationError, to_json

from onthefly import errors
from onthefly.errors import OnTheFlyError, UnknownReferenceError, said
from onthefly.hub.child import Children
from onthefly.hub.columns import finite
from onthefly.hub.stores import OpenStore, Stores
from onthefly.store.queries import SessionRow

STATUS: tuple[tuple[type[OnTheFlyError], int], ...] = (
    (errors.UnknownReferenceError, 404),
    (errors.CheckpointNotFoundError, 404),
    (errors.InvalidCommandError, 422),
    (errors.CommandTimeoutError, 504),
    (errors.CommandError, 409),
    (errors.CorruptCheckpointError, 409),
    (errors.ResumeError, 409),
    (errors.StoreBusyError, 503),
)
"""What an error is in HTTP; the first that fits. 500 for others."""

LARGEST = 2**63 - 1
"""What a whole number in the database may be."""

Id = Annotated[int, Path(ge=0, le=LARGEST)]


class Json(JSONResponse):
    """JSON in which a number that is not finite is null."""

    def render(self, content: Any) -> bytes:
        try:
            return to_json(content, inf_nan_mode="null")
        except PydanticSerializationError:  # text that is no valid Unicode: escaped, it is still JSON
            return json.dumps(finite(content), default=str).encode()


class View(BaseModel):
    """An answer. It is made from a row by the names of its fields."""

    model_config = ConfigDict(from_attributes=True)


class Problem(BaseModel):
    type: str
    message: str


class Refusal(BaseModel):
    """Every answer with a status of 400 or more."""

    error: Problem


def refusal(error: OnTheFlyError) -> Json:
    """What is answered when an error of ours comes out of a path."""
    status = next((status for kind, status in STATUS if isinstance(error, kind)), 500)
    headers = {"Retry-After": "1"} if status == 503 else None
    return Json({"error": problem(error)}, status, headers)


def problem(error: OnTheFlyError) -> dict[str, str]:
    return {"type": type(error).__name__, "message": said(error)}


def _stores(request: Request) -> Stores:
    found = request.app.state.stores
    assert isinstance(found, Stores)
    return found


def _children(request: Request) -> Children:
    found = request.app.state.children
    assert isinstance(found, Children)
    return found


StoresHere = Annotated[Stores, Depends(_stores)]
ChildrenHere = Annotated[Children, Depends(_children)]


def _store(stores: StoresHere, store: Annotated[str, Path(max_length=64)]) -> OpenStore:
    return stores.get(store)


Here = Annotated[OpenStore, Depends(_store)]
"""The store that a path names."""


@dataclass(frozen=True)
class Asker:
    """Who sent a request, for the audit trail."""

    door: Literal["dashboard", "api"]
    """A page has a cookie; a program sends the token."""
    name: str
    """The address that it came from."""


def _asker(request: Request) -> Asker:
    bearer = request.headers.get("authorization", "").lower().startswith("bearer ")
    return Asker("api" if bearer else "dashboard", request.client.host if request.client is not None else "")


AskerHere = Annotated[Asker, Depends(_asker)]

RunName = Annotated[str, Path(max_length=100)]


def session_of(store: OpenStore, id: int) -> SessionRow:
    """Raises `UnknownReferenceError`."""
    for row in store.client.sessions():
        if row.id == id:
            return row
    raise UnknownReferenceError(f"there is no session {id}")


REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Refusal} for status in (400, 401, 403, 404, 405, 409, 413, 421, 422, 429, 500, 503, 504)
}
"""For the OpenAPI document: every path may answer so."""
