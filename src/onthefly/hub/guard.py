"""What every request and every WebSocket must pass before anything else sees it, and the headers of every answer."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onthefly.hub.auth import Keys

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>OnTheFly</title>
<h1>Not signed in</h1>
<p>Open the URL that <code>onthefly ui</code> has printed; say <code>onthefly ui</code> again to see it.</p>
<p>If you have just opened it from another page: <a href="/">go on to the dashboard</a>.</p></html>
"""
_HEADERS = {
    # No inline script, nothing from elsewhere, and no page of somebody else's around it.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; font-src 'self'; "
        "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True)
class Limits:
    """How much a hub takes. `requests` are those a second, on the average, with as many again at once."""

    body: int = 1 << 20
    requests: float = 200.0
    failures: float = 2.0
    sockets: int = 64
    connections: int = 256
    threads: int = 8


class Bucket:
    """Lets `rate` a second through, and up to `burst` at once."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst = rate, burst
        self._left, self._then = burst, time.monotonic()

    def takes(self) -> bool:
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._then) * self._rate)
        self._then = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Guard:
    """An ASGI middleware: hosts, origins, tokens and cookies, sizes and rates.

    It is the outermost: what it refuses nobody else sees. `allowed` are hosts besides those of loopback.
    """

    def __init__(self, app: ASGIApp, keys: Keys, allowed: Iterable[str], limits: Limits) -> None:
        self._app = app
        self._keys = keys
        self._hosts = {*_LOOPBACK, *(host.lower() for host in allowed)}
        self._limits = limits
        self._requests = Bucket(limits.requests, 2 * limits.requests)
        self._failures = Bucket(limits.failures, 10 * limits.failures)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if refused := self._refused(scope, headers):
            await _refuse(scope, send, *refused)
        elif scope["type"] == "websocket":
            await self._app(scope, receive, send)
        elif scope["path"] == "/" and b"token=" in scope["query_string"]:
            await self._sign_in(scope, send)
        else:
            await self._app(scope, _limited(receive, self._limits.body), _with_headers(send, scope["path"]))

    def _refused(self, scope: Scope, headers: Headers) -> tuple[int, str, str] | None:
        """Status, type and words of a refusal; None lets it in."""
        hosts = headers.getlist("host")
        match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if match is None or match[1].lower() not in self._hosts:
            return 421, "HTTPError", "this hub is not called so; `onthefly ui --allow-host NAME` lets a name in"
        origins = headers.getlist("origin")
        scheme = {"ws": "http", "wss": "https"}.get(scope["scheme"], scope["scheme"])
        if origins and origins != [f"{scheme}://{hosts[0]}"]:
            return 403, "HTTPError", "a page of another origin has no business here"
        if scope["path"] == "/healthz":
            return None
        if not self._is_known(scope, headers):
            if not self._failures.takes():
                return 429, "HTTPError", "too many requests without a token; wait a second"
            return 401, "HTTPError", "open the URL that `onthefly ui` has printed, or send Authorization: Bearer TOKEN"
        if not self._requests.takes():
            return 429, "HTTPError", "too many requests; wait a second"
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length) > self._limits.body:
            return 413, "HTTPError", f"a body may have {self._limits.body} bytes"
        return None

    def _is_known(self, scope: Scope, headers: Headers) -> bool:
        if scope["path"] == "/" and scope["type"] == "http" and (token := _token(scope)) is not None:
            return self._keys.is_token(token)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self._keys.is_token(token.strip())
        return any(self._keys.is_session(value) for value in _cookies(headers, self._keys.cookie))

    async def _sign_in(self, scope: Scope, send: Send) -> None:
        """The token goes out of the address, and a cookie comes in its place."""
        secure = "; Secure" if scope["scheme"] == "https" else ""
        cookie = f"{self._keys.cookie}={self._keys.new_session()}; Path=/; HttpOnly; SameSite=Strict{secure}"
        cookie += f"; Max-Age={self._keys.lasts}"
        headers = {"location": "/", "set-cookie": cookie, "content-length": "0", "cache-control": "no-store"}
        await _answer(send, 303, headers, b"")


def _token(scope: Scope) -> str | None:
    found = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
    return found[0] if len(found) == 1 else None


def _cookies(headers: Headers, name: str) -> list[str]:
    found = []
    for text in headers.getlist("cookie"):
        jar = SimpleCookie()
        try:
            jar.load(text)
        except CookieError:
            continue
        if name in jar:
            found.append(jar[name].value)
    return found


def _limited(receive: Receive, most: int) -> Receive:
    """A body without a length is counted while it comes."""
    taken = 0

    async def counted() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > most:
            raise HTTPException(413, f"a body may have {most} bytes")
        return message

    return counted


def _with_headers(send: Send, path: str) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers[name] = value
            if path.startswith("/api/") and "cache-control" not in headers:
                headers["cache-control"] = "no-store"
        await send(message)

    return sent


async def _refuse(scope: Scope, send: Send, status: int, kind: str, message: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})  # before it is accepted: a 403
        return
    body = json.dumps({"error": {"type": kind, "message": message}}).encode()
    headers = {"content-type": "application/json"}
    if status == 401 and scope["path"] == "/":
        body, headers = _PAGE.encode(), {"content-type": "text/html; charset=utf-8"}
    if status == 429:
        headers["retry-after"] = "1"
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    await _answer(send, status, {**headers, "content-length": str(len(body)), "cache-control": "no-store"}, body)


async def _answer(send: Send, status: int, headers: dict[str, str], body: bytes) -> None:
    raw = [(name.encode(), value.encode()) for name, value in {**_HEADERS, **headers}.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
