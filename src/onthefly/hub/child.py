"""Commands of the command line as child processes: for what needs torch, or minutes, and has no place in a server."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from starlette.requests import Request

from onthefly import errors
from onthefly.errors import CommandError, CommandTimeoutError, OnTheFlyError

_LOOK = 0.5  # seconds between two looks whether anybody still waits
_PATIENCE = 10.0  # seconds that a child has to end in order
_PROGRAM = "import sys; from onthefly.cli import main; sys.exit(main())"


class Children:
    """At most `limit` children at once. Owns them: they end when nobody waits for their answer any more."""

    def __init__(self, limit: int = 2) -> None:
        self._free = limit
        self._making: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def making(self, what: str) -> asyncio.Lock:
        """Held by whoever makes a thing that stays, so that two who want it at once do not both make it."""
        return self._making.setdefault(what, asyncio.Lock())

    async def ask(
        self,
        options: Sequence[str],
        named: Sequence[str],
        store: Path,
        request: Request,
        *,
        timeout: float,
        fine: Sequence[int] = (0,),
    ) -> Any:
        """The JSON document that ``onthefly OPTIONS --json -- NAMED`` prints, with an exit code among `fine`.

        Raises `CommandError` when too many run already, `CommandTimeoutError` when time is over, and the child's own error.
        """
        if self._free <= 0:
            raise CommandError("as many such commands as may run at once are running; wait for them")
        self._free -= 1
        try:
            words = [*options, "--json", "--store", str(store), "--", *named]  # what somebody named is never an option
            return await self._ask(words, request, timeout, fine)
        finally:
            self._free += 1

    async def _ask(self, words: Sequence[str], request: Request, timeout: float, fine: Sequence[int]) -> Any:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            _PROGRAM,
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        answer = asyncio.ensure_future(process.communicate())
        try:
            async with asyncio.timeout(timeout):
                while not (await asyncio.wait([answer], timeout=_LOOK))[0]:
                    if await request.is_disconnected():
                        raise CommandError("nobody waits for the answer any more")
        except TimeoutError:
            raise CommandTimeoutError(f"`onthefly {words[0]}` has not ended within {timeout:g} s") from None
        finally:
            if not answer.done():
                await _end(process, answer)
        output, problems = answer.result()
        if process.returncode not in fine:
            raise _error(problems.decode("utf-8", "replace"), process.returncode or 1)
        return json.loads(output)


async def _end(process: asyncio.subprocess.Process, answer: asyncio.Future[tuple[bytes, bytes]]) -> None:
    """Asks it to end, so that it takes along what it has started; then makes it."""
    process.terminate()
    if not (await asyncio.wait([answer], timeout=_PATIENCE))[0]:
        process.kill()
        await answer


def _error(problems: str, code: int) -> OnTheFlyError:
    """What the command line said on stderr, as the first error that has this exit code."""
    lines = [line for line in problems.splitlines() if line.startswith("error: ")]
    message = lines[-1].removeprefix("error: ") if lines else f"the command ended with {code}: {problems[-500:]}"
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, OnTheFlyError)]
    kind = next((kind for kind in kinds if kind.exit_code == code), CommandError)
    if code == errors.InvalidCommandError.exit_code:  # words that it was given wrong, or that name nothing
        kind = (
            errors.UnknownReferenceError
            if "there is no" in message or "neither" in message
            else errors.InvalidCommandError
        )
    return kind(message)
