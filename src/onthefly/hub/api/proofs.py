"""Proofs: commands of the command line that take a while, and are run as children."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from onthefly.errors import CheckpointError, InexactError
from onthefly.hub.api.common import ChildrenHere, Here

router = APIRouter(prefix="/stores/{store}", tags=["proofs"])

_CHECKING = 3600.0  # seconds


class VerifyBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    ref: str | None = Field(
        None, max_length=1000, description="Where to begin. Default: the newest stretch of the store."
    )
    to: str | None = Field(None, max_length=1000, description="Where to end. Default: the next checkpoint of that run.")
    timeout: float = Field(600.0, gt=0, le=86_400)


@router.post("/fsck")
async def fsck(store: Here, children: ChildrenHere, request: Request, full: bool = False) -> dict[str, Any]:
    """Whether everything that the store promises is there; with `full`, byte by byte. What is lost is a finding, no error."""
    options = ["fsck"] if full else ["fsck", "--quick"]
    fine = (0, CheckpointError.exit_code)
    found = await children.ask(options, [], store.path, request, timeout=_CHECKING, fine=fine)
    assert isinstance(found, dict)
    return found


@router.post("/verify")
async def verify(store: Here, children: ChildrenHere, request: Request, body: VerifyBody) -> dict[str, Any]:
    """Train a recorded stretch again in a fresh process, and compare it with what was recorded, bit by bit."""
    options = ["verify", f"--timeout={body.timeout}", *([f"--to={body.to}"] if body.to is not None else [])]
    named = [body.ref] if body.ref is not None else []
    fine = (0, InexactError.exit_code)
    found = await children.ask(options, named, store.path, request, timeout=body.timeout + 60, fine=fine)
    assert isinstance(found, dict)
    return found
