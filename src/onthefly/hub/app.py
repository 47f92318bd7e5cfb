"""The application: what a hub serves, put together. It keeps nothing that cannot be made again from its stores."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from onthefly.client import Client
from onthefly.errors import OnTheFlyError, StoreError
from onthefly.hub import live
from onthefly.hub.api import (
    checkpoints,
    commands,
    events,
    merging,
    metrics,
    proofs,
    reports,
    runs,
    samples,
    sessions,
    stores,
)
from onthefly.hub.api.common import REFUSALS, Json, refusal
from onthefly.hub.auth import Keys
from onthefly.hub.child import Children
from onthefly.hub.guard import Guard, Limits
from onthefly.hub.live import Feeds
from onthefly.hub.stores import Stores

WEB = Path(__file__).with_name("web") / "dist"
"""The dashboard, as it is built."""

API = "/api/v1"

_NOT_BUILT = """<!doctype html><html lang="en"><meta charset="utf-8"><title>OnTheFly</title>
<h1>The dashboard is not built</h1>
<p>This installation comes from sources. Build the dashboard once, in their folder:</p>
<pre>make web</pre>
<p>The interface for programs is there all the same: <a href="/api/v1/openapi.json">/api/v1/openapi.json</a>.</p></html>
"""


def create_app(
    clients: Sequence[Client],
    token: str,
    *,
    allow_hosts: Iterable[str] = (),
    limits: Limits | None = None,
    web: Path = WEB,
) -> FastAPI:
    """The application over some stores, which it closes when it ends. `web` is the folder of the built dashboard."""
    limits = limits or Limits()
    keys = Keys(token)
    opened = Stores(clients)

    @contextlib.asynccontextmanager
    async def living(app: FastAPI) -> AsyncIterator[None]:
        # Each thread may hold a connection to a database, and a pool has fifteen.
        anyio.to_thread.current_default_thread_limiter().total_tokens = limits.threads
        # FastAPI puts its routes together when they are first looked at: now, rather than while the first page waits.
        for route in app.router.routes:
            route.matches({"type": "http", "method": "GET", "path": f"{API}/", "root_path": "", "headers": []})
        for store in opened:
            with contextlib.suppress(StoreError):  # a page that asks is told
                store.charts.warm()
        yield
        opened.close()

    app = FastAPI(
        title="OnTheFly",
        version=version("onthefly"),
        description="Stores of training runs: read, and commanded. docs/api.md tells the rest.",
        lifespan=living,
        docs_url=None,  # they are pages with inline scripts from elsewhere
        redoc_url=None,
        openapi_url=f"{API}/openapi.json",
        default_response_class=Json,
        redirect_slashes=False,
    )
    app.state.keys = keys
    app.state.stores = opened
    app.state.started = time.time()
    app.state.children = Children()
    app.state.feeds = Feeds(opened, limits.sockets)
    for module in (stores, sessions, commands, runs, metrics, events, checkpoints, samples, merging, reports, proofs):
        app.include_router(module.router, prefix=API, responses=REFUSALS)
    app.include_router(live.router, prefix=API)
    app.add_exception_handler(OnTheFlyError, _ours)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)

    @app.get("/healthz", include_in_schema=False)
    def healthz() -> dict[str, str]:
        return {"hub": keys.hub}

    @app.get("/", include_in_schema=False)
    def index() -> Response:
        page = web / "index.html"
        headers = {"Cache-Control": "no-cache"}
        return FileResponse(page, headers=headers) if page.is_file() else HTMLResponse(_NOT_BUILT, headers=headers)

    if web.is_dir():
        app.mount("/", GZipMiddleware(_Files(directory=web), minimum_size=1024))
    app.add_middleware(Guard, keys=keys, allowed=tuple(allow_hosts), limits=limits)
    return app


class _Files(StaticFiles):
    """The built dashboard. What has its content's hash in its name never changes."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        lasting = "/assets/" in f"/{Path(args[0]).relative_to(self.directory or '/')}"
        response.headers["Cache-Control"] = "private, max-age=31536000, immutable" if lasting else "no-cache"
        return response


def _ours(request: Request, error: Exception) -> Response:
    assert isinstance(error, OnTheFlyError)
    return refusal(error)


def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Json({"error": {"type": "HTTPError", "message": str(error.detail)}}, error.status_code, error.headers)


def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors()[:5])
    return Json({"error": {"type": "InvalidCommandError", "message": problems}}, 422)
