"""`onthefly ui`: the dashboard in a browser, served by a process of its own."""

from __future__ import annotations

import os
import time
from pathlib import Path

import click

from onthefly.errors import HubError, MissingPartError
from onthefly.store import hubs
from onthefly.store.store import DATABASE

_STARTING = 10.0  # seconds that a hub of another process has to tell where it listens


@click.command("ui", short_help="The dashboard, in a browser.")
@click.argument("stores", nargs=-1, type=click.Path(path_type=Path), metavar="[STORE]...")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where to listen.")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    metavar="PORT",
    help="Default: where this store's last dashboard was, or any that is free.",
)
@click.option(
    "--allow-host", "allow_hosts", multiple=True, metavar="NAME", help="Another name that browsers may call it by."
)
@click.option("--tls-cert", type=click.Path(path_type=Path, exists=True), metavar="FILE", help="Serve HTTPS.")
@click.option("--tls-key", type=click.Path(path_type=Path, exists=True), metavar="FILE", help="The certificate's key.")
@click.option("--insecure", is_flag=True, help="Listen beyond this machine without TLS.")
@click.option("--no-open", is_flag=True, help="Do not open a browser.")
@click.option("--print-token", is_flag=True, help="Print the token, for programs, and end.")
def ui_command(
    stores: tuple[Path, ...],
    host: str,
    port: int | None,
    allow_hosts: tuple[str, ...],
    tls_cert: Path | None,
    tls_key: Path | None,
    insecure: bool,
    no_open: bool,
    print_token: bool,
) -> None:
    """Serve the dashboard of one store or of several, and print the one URL that opens it, until Ctrl-C. When a dashboard of these
    stores runs already, only its URL is printed.

    Training never waits for it, and does not end with it. Without STORE it is $ONTHEFLY_STORE, or .onthefly in the working directory.
    """
    roots = _roots(stores)
    if print_token:
        click.echo(hubs.token(roots[0]))
        return
    if (url := _running(roots)) is not None:
        _show(url, not no_open)
        return
    try:
        from onthefly.hub import serve
    except ImportError as e:
        raise MissingPartError(
            f"the dashboard needs packages that are not here ({e.name}): pip install 'onthefly[ui]'"
        ) from e
    where = serve.Where(host, port, allow_hosts, tls_cert, tls_key, insecure)
    try:
        serve.serve(roots, where, on_ready=lambda url: _show(url, not no_open))
    except HubError:
        # Another process may have been faster by a moment.
        if (url := _running(roots)) is None:
            raise
        _show(url, not no_open)


def _roots(stores: tuple[Path, ...]) -> list[Path]:
    named = stores or (Path(os.environ.get("ONTHEFLY_STORE") or ".onthefly"),)
    roots = list(dict.fromkeys(store.resolve() for store in named))
    for root in roots:
        if not (root / DATABASE).is_file():
            raise HubError(f"there is no store in {root}: a training that attaches makes one")
    return roots


def _running(roots: list[Path]) -> str | None:
    """The URL of the hub that serves all of these stores. Raises `HubError` when one serves some of them."""
    served = [root for root in roots if hubs.is_served(root)]
    if not served:
        return None
    note = hubs.running(served[0])
    deadline = time.monotonic() + _STARTING
    while note is None and time.monotonic() < deadline and hubs.is_served(served[0]):
        time.sleep(0.05)
        note = hubs.running(served[0])
    if note is None:
        return None
    if missing := [str(root) for root in roots if str(root) not in note.stores]:
        raise HubError(
            f"{note.url} (pid {note.pid}) serves {served[0]} already, without {', '.join(missing)}: end it first, or leave "
            "out what it serves"
        )
    return f"{note.url}/?token={hubs.token(Path(note.home))}"


def _show(url: str, opening: bool) -> None:
    click.echo(url)
    if opening:
        import webbrowser

        webbrowser.open(url)
