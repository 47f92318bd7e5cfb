"""Names of runs: the next default one, and a user's made free. They become parts of files' names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from onthefly.errors import InvalidCommandError

_STEMS = {"root": "baseline", "fork": "fork", "rewind": "rewind", "merge": "merge"}
_SEEDS = {"fork": "ONTHEFLY_FORK_COUNTER_INIT", "merge": "ONTHEFLY_MERGE_COUNTER_INIT"}


def next_name(kind: str, taken: Collection[str], environment: Mapping[str, str]) -> str:
    """The default name of the next run: `baseline`, `baseline2`, ..., or `fork1`, `fork2`, ..., `rewind1`, ..., `merge1`, ....

    A counter goes on behind the highest number taken. The environment's `ONTHEFLY_FORK_COUNTER_INIT` and
    `ONTHEFLY_MERGE_COUNTER_INIT` say how many there were before, elsewhere: with 4, the first is `fork5`. Raises
    `InvalidCommandError` (a `ValueError`) if one is not a whole number of at least 0.
    """
    stem = _STEMS[kind]
    following = max([_seed(kind, environment), *(_number(stem, name.casefold()) for name in taken)]) + 1
    return stem if kind == "root" and following == 1 else f"{stem}{following}"


def free_name(name: str, taken: Collection[str]) -> str:
    """`name`, or `name-2`, `name-3`, ... when it is taken. Names that differ only in case are one: files may be.

    Raises `InvalidCommandError` (a `ValueError`) for a name that is not one to 100 letters, digits and `._+-`, the
    first a letter or digit.
    """
    if not re.fullmatch(r"[^\W_][\w.+-]{0,99}", name):
        raise InvalidCommandError(
            f"{name!r} cannot name a run: use up to 100 letters, digits and ._+- beginning with a letter or a digit"
        )
    folded = {other.casefold() for other in taken}
    candidate, number = name, 1
    while candidate.casefold() in folded:
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def _number(stem: str, name: str) -> int:
    """The counter in a default name, or 0 if it is another kind of name."""
    if name == stem == "baseline":
        return 1
    match = re.fullmatch(rf"{stem}([1-9][0-9]*)", name)
    return int(match[1]) if match else 0


def _seed(kind: str, environment: Mapping[str, str]) -> int:
    variable = _SEEDS.get(kind, "")
    text = environment.get(variable, "0")
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise InvalidCommandError(f"{variable}={text!r} is not a whole number of at least 0")
    return int(text)
