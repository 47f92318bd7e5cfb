"""Tags of single samples: kept by project and data, changed by several at once, and no part of what a store must have."""

import threading

import numpy as np
import pytest

from onthefly.errors import InvalidCommandError
from onthefly.store import tags
from onthefly.store.store import Store


def plain(found):
    return {tag: indices.tolist() for tag, indices in found.items()}


def test_a_tag_is_given_and_taken(store):
    assert tags.read(store, "p", "train") == {}
    tags.change(store, "p", "train", "odd", [9, 2, 9], tagged=True)
    tags.change(store, "p", "val", "odd", [1], tagged=True)
    assert plain(tags.change(store, "p", "train", "even", [2], tagged=True)) == {"even": [2], "odd": [2, 9]}
    assert plain(tags.change(store, "p", "train", "odd", [2, 3], tagged=False)) == {"even": [2], "odd": [9]}
    assert plain(tags.change(store, "p", "train", "odd", [9], tagged=False)) == {"even": [2]}
    assert plain(tags.read(store, "p", "val")) == {"odd": [1]}
    assert plain(tags.read(store, "q", "train")) == {}
    words = tags.column({"a": np.array([0, 2]), "b": np.array([2, 7])}, 3)
    assert words.tolist() == ["a", "", "a; b"]


def test_nothing_is_lost_when_several_tag_at_once(store):
    def work(number):
        own = Store.open(store.root)
        for index in range(number, 80, 4):
            tags.change(own, "p", "train", "odd", [index], tagged=True)
        own.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert plain(tags.read(store, "p", "train")) == {"odd": list(range(80))}


def test_tags_have_their_limits(store):
    for wrong in ("", "  ", "a;b", "a\nb", "x" * 65, "=1+1", "@x"):
        with pytest.raises(InvalidCommandError):
            tags.change(store, "p", "train", wrong, [1], tagged=True)
    with pytest.raises(InvalidCommandError):
        tags.change(store, "p", "train", "odd", [2**31], tagged=True)
    for number in range(tags.MOST):
        tags.change(store, "p", "train", str(number), [1], tagged=True)
    with pytest.raises(InvalidCommandError):
        tags.change(store, "p", "train", "more", [1], tagged=True)
    tags.change(store, "p", "train", "0", [2], tagged=True)
