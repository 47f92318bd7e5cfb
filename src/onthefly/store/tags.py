"""Words that people give to single samples. A sample is known by its project, its data (train, val or test), and its index there.

They are beside the history and no part of it: nothing that training does depends on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from sqlalchemy import Connection, delete, insert, select

from onthefly.errors import InvalidCommandError
from onthefly.store import schema
from onthefly.store.store import Store

DISCARDED = "discarded"
"""The tag of samples that nothing is to be trained on. It is a wish: a fork leaves them out when whoever asks for it does."""

MOST = 64
"""Tags that a project's data may have."""

_LONGEST = 64  # characters
_LARGEST = 2**31

Tags = Mapping[str, np.ndarray]
"""By tag, the indices of its samples: int64, sorted, each once."""


def read(store: Store, project: str, data: str) -> Tags:
    """The tags of a project's samples, by name."""
    with store.read() as connection:
        return dict(sorted(_read(connection, project, data).items()))


def change(store: Store, project: str, data: str, tag: str, indices: Sequence[int], *, tagged: bool) -> Tags:
    """Give a tag to samples, or take it from them. Samples that have it already, or have not, stay as they are. Gives all tags.

    Raises `InvalidCommandError` for a tag that is no word of 1 to 64 printable characters without ";" or that begins with = + - @, for an
    index that cannot be one, and for more than 64 tags.
    """
    tag = tag.strip()
    # A spreadsheet takes a cell that begins with one of these for a formula, and exports have tags.
    if not 0 < len(tag) <= _LONGEST or not tag.isprintable() or ";" in tag or tag[0] in "=+-@":
        raise InvalidCommandError(
            f'a tag is 1 to {_LONGEST} printable characters without ";", and does not begin with = + - @; not {tag[:80]!r}'
        )
    if any(not 0 <= index < _LARGEST for index in indices):
        raise InvalidCommandError(f"the index of a sample is 0 to {_LARGEST - 1}")
    asked = np.unique(np.asarray(indices, dtype=np.int64))
    with store.begin() as connection:  # holds the write lock: nobody else changes them in between
        tags = _read(connection, project, data)
        before = tags.get(tag, np.empty(0, np.int64))
        after = np.union1d(before, asked) if tagged else np.setdiff1d(before, asked, assume_unique=True)
        if len(after) and tag not in tags and len(tags) >= MOST:
            raise InvalidCommandError(f"there are {MOST} tags already; take one from all of its samples first")
        tags[tag] = after
        table = schema.sample_tag
        here = (table.c.project == project) & (table.c.data == data) & (table.c.tag == tag)
        connection.execute(delete(table).where(here))
        if len(after):
            packed = after.astype("<i8").tobytes()
            connection.execute(insert(table).values(project=project, data=data, tag=tag, samples=packed))
        else:
            del tags[tag]
    return dict(sorted(tags.items()))


def column(tags: Tags, length: int) -> np.ndarray:
    """The tags of each of `length` samples as one text, with "; " between them: objects [N]."""
    found: list[list[str]] = [[] for _ in range(length)]
    for tag, indices in tags.items():
        for index in indices[indices < length].tolist():
            found[index].append(tag)
    return np.array(["; ".join(words) for words in found], dtype=object)


def _read(connection: Connection, project: str, data: str) -> dict[str, np.ndarray]:
    table = schema.sample_tag
    wanted = select(table.c.tag, table.c.samples).where((table.c.project == project) & (table.c.data == data))
    return {tag: np.frombuffer(samples, "<i8").astype(np.int64) for tag, samples in connection.execute(wanted)}
