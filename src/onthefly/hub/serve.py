"""The process of a hub: it claims its stores, listens, tells where, and serves until it is told to end."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from onthefly.client import Client, connect
from onthefly.errors import HubError, said
from onthefly.hub.app import create_app
from onthefly.hub.guard import Limits
from onthefly.store import hubs
from onthefly.store.hubs import Claim, Note

_GRACE = 3  # seconds that open requests have when the hub ends
_LONGEST = 1 << 16  # bytes of a message on a WebSocket


@dataclass(frozen=True)
class Where:
    """Where a hub listens. Port None: where the one before did, or else any that is free.

    Raises `HubError` for a host beyond this machine without TLS, unless `insecure`, and for half a certificate.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    allow_hosts: tuple[str, ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise HubError("TLS takes both: --tls-cert and --tls-key")
        if not is_loopback(self.host) and self.tls_cert is None and not self.insecure:
            raise HubError(
                f"{self.host} can be reached from other machines, and whoever listens in could take the token: give --tls-cert "
                "and --tls-key, use a tunnel (ssh -L) instead, or say --insecure"
            )

    @property
    def scheme(self) -> str:
        return "http" if self.tls_cert is None else "https"

    @property
    def names(self) -> tuple[str, ...]:
        """The hosts, besides those of loopback, by which it may be called."""
        own = () if is_loopback(self.host) or self.host in ("0.0.0.0", "::") else (_bracketed(self.host),)
        return (*self.allow_hosts, *own)

    def url(self, port: int) -> str:
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else _bracketed(self.host)
        return f"{self.scheme}://{host}:{port}"


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def serve(
    stores: Sequence[Path], where: Where, *, on_ready: Callable[[str], object], limits: Limits | None = None
) -> None:
    """Serve stores until SIGINT or SIGTERM. `on_ready` is told the URL with the token as soon as it listens.

    Raises `HubError` when another hub serves one of them, or when it cannot listen there; `StoreError`.
    """
    limits = limits or Limits()
    with contextlib.ExitStack() as stack:
        clients = [_client(stack, store) for store in stores]
        roots = list(dict.fromkeys(client.store.root for client in clients))
        claims = list(_claimed(stack, roots))
        token = hubs.token(roots[0])
        before = hubs.last(roots[0])
        listener = stack.enter_context(contextlib.closing(_listen(where, before.port if before is not None else None)))
        port = int(listener.getsockname()[1])
        note = Note(os.getpid(), where.url(port), port, tuple(map(str, roots)), str(roots[0]))
        app = create_app(clients, token, allow_hosts=where.names, limits=limits)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,  # it would write down the token
            server_header=False,
            limit_concurrency=limits.connections,
            timeout_graceful_shutdown=_GRACE,
            timeout_keep_alive=20,
            ws="websockets-sansio",
            ws_max_size=_LONGEST,
            ws_per_message_deflate=False,
            ws_ping_interval=20,
            proxy_headers=False,  # anybody could say that he is another
            ssl_certfile=where.tls_cert,
            ssl_keyfile=where.tls_key,
        )
        server = _Server(config, lambda: _tell(claims, note, token, on_ready))
        try:
            server.run(sockets=[listener])
        except OSError as e:  # a certificate that cannot be read
            raise HubError(f"the hub cannot serve: {said(e)}") from e


def with_token(note: Note) -> str:
    """The URL that signs a browser in. Raises `HubError` when the token cannot be read."""
    return f"{note.url}/?token={hubs.token(Path(note.home))}"


class _Server(uvicorn.Server):
    """Tells when it listens."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], object]) -> None:
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_started()


def _tell(claims: Sequence[Claim], note: Note, token: str, on_ready: Callable[[str], object]) -> None:
    for claim in claims:
        claim.tell(note)
    on_ready(f"{note.url}/?token={token}")


def _client(stack: contextlib.ExitStack, store: Path) -> Client:
    return stack.enter_context(connect(store))


def _claimed(stack: contextlib.ExitStack, roots: Sequence[Path]) -> Iterator[Claim]:
    for root in roots:
        claim = Claim(root)
        claim.take()
        stack.callback(claim.release)
        yield claim


def _listen(where: Where, before: int | None) -> socket.socket:
    """A listening socket: at the port that was asked for, or that of the hub before, or any."""
    if where.port is not None:
        return _bound(where.host, where.port)
    if before is not None:
        try:
            return _bound(where.host, before)
        except HubError:  # somebody else has it now
            pass
    return _bound(where.host, 0)


def _bound(host: str, port: int) -> socket.socket:
    plain = host.strip("[]")
    family = socket.AF_INET6 if ":" in plain else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it. Without it an answer's body waits 40 ms for the other side to have said that it has the head.
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.bind((plain, port))
    except OSError as e:
        made.close()
        raise HubError(f"cannot listen on {_bracketed(plain)}:{port}: {e.strerror or e}") from e
    return made


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
