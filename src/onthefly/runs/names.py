"""Names of runs: the next default one, and one like a user's that is still free."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

_STEMS = {"root": "baseline", "fork": "fork", "merge": "merge"}
_SEEDS = {"fork": "ONTHEFLY_FORK_COUNTER_INIT", "merge": "ONTHEFLY_MERGE_COUNTER_INIT"}


def next_name(kind: str, taken: Collection[str], environment: Mapping[str, str]) -> str:
    """The default name of the next run: `baseline`, `baseline2`, ..., or `fork1`, `fork2`, ..., or `merge1`, ....

    A counter goes on behind the highest number taken. The environment's `ONTHEFLY_FORK_COUNTER_INIT` and
    `ONTHEFLY_MERGE_COUNTER_INIT` say how many there were elsewhere: with 4, the first is `fork5`. Raises
    `ValueError` if one is not a whole number of at least 0.
    """
    stem = _STEMS[kind]
    numbers = [_number(stem, name) for name in taken]
    following = max([*numbers, _seed(kind, environment)]) + 1
    return stem if (stem, following) == ("baseline", 1) else f"{stem}{following}"


def free_name(name: str, taken: Collection[str]) -> str:
    """`name`, or `name-2`, `name-3`, ... when it is taken."""
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def _number(stem: str, name: str) -> int:
    """The counter in a default name, or 0."""
    if name == stem == "baseline":
        return 1
    match = re.fullmatch(rf"{stem}([1-9][0-9]*)", name)
    return int(match[1]) if match else 0


def _seed(kind: str, environment: Mapping[str, str]) -> int:
    variable = _SEEDS.get(kind, "")
    text = environment.get(variable, "0")
    if not re.fullmatch(r"[0-9]+", text):
        raise ValueError(f"{variable}={text!r} is not a whole number of at least 0")
    return int(text)
