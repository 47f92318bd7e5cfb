"""The list of checkpoints changes without a session: whole, with its event, and never behind a live one's back."""

import pytest
from sqlalchemy import update

from onthefly.errors import CommandError
from onthefly.store import catalog, queries, schema
from onthefly.store.journal import Journal
from onthefly.store.projection import project

WHERE = {"run": "baseline", "generation": 0, "step": 3, "epoch": 1}
SAVED = {"hash": "ab" * 32, "size": 10, "reason": "step", "pinned": False, "metrics": {"loss": 0.5}}


@pytest.fixture
def ended(store, new_session):
    """A run whose only session saved a checkpoint and has ended; its row."""
    session = new_session(store.create_run(None, project="p"))
    path = store.checkpoints_dir / "baseline-step00000003.safetensors"
    journal = Journal(store.journal_path(session))
    journal.fact("checkpoint", {**WHERE, **SAVED, "time": 2.5, "path": str(path), "captured": 7})
    journal.fact("session", {"status": "ended", "outcome": "stopped", "ended": 9.0})
    journal.close()
    project(store, session)
    return only(store)


def only(store):
    (row,) = queries.checkpoints(store, evicted=True)
    return row


def told(store):
    return [(event.session, event.seq, event.kind, event.step, event.data) for event in queries.events(store)][1:]


def test_a_pin_and_its_end_are_events(store, ended):
    about = {"path": "checkpoints/baseline-step00000003.safetensors", "hash": SAVED["hash"]}
    catalog.pin(store, ended, True)
    catalog.pin(store, ended, True)
    assert only(store).pinned
    catalog.pin(store, ended, False)
    assert not only(store).pinned
    assert told(store) == [
        (1, 8, "checkpointPinned", 3, about),
        (1, 9, "checkpointUnpinned", 3, about),
    ]


def test_a_tombstone_says_when_and_why_and_stays(store, ended):
    ended.path.write_bytes(b"the file is the caller's business")
    catalog.bury(store, ended, "by hand")
    buried = only(store)
    assert (buried.evicted_reason, buried.evicted > 9.0, ended.path.exists()) == ("by hand", True, True)
    catalog.bury(store, ended, "again")
    assert only(store) == buried
    about = {"path": "checkpoints/baseline-step00000003.safetensors", "hash": SAVED["hash"], "reason": "by hand"}
    assert told(store) == [(1, 8, "checkpointEvicted", 3, about)]
    with pytest.raises(CommandError, match=r"baseline@3 abababababab was removed"):
        catalog.pin(store, ended, True)


def test_a_new_row_is_the_newest_of_its_run(store, ended, tmp_path):
    outside = tmp_path / "mine.safetensors"
    more = {**WHERE, **SAVED, "step": 2, "reason": "imported", "pinned": True}
    catalog.record(store, **more, path=outside)
    newest = queries.newest_checkpoint(store, "baseline")
    assert (newest.path, newest.step, newest.pinned, newest.metrics) == (outside, 2, True, {"loss": 0.5})
    assert (newest.session, newest.captured) == (1, 8)
    catalog.record(store, **{**more, "hash": "cd" * 32}, path=outside)
    _, old, new = queries.checkpoints(store, evicted=True)
    assert (old.evicted_reason, old.evicted, new.evicted, new.captured) == ("replaced", new.time, None, 9)
    saved = {key: more[key] for key in SAVED} | {"path": str(outside)}
    assert told(store) == [
        (1, 8, "checkpointSaved", 2, saved),
        (1, 9, "checkpointSaved", 2, saved | {"hash": "cd" * 32}),
    ]


def test_changes_follow_the_newest_session_of_the_run(store, ended, new_session):
    later, other = new_session("baseline"), new_session("other")
    with store.begin() as connection:
        connection.execute(update(schema.session).values(ended=10.0))
    catalog.bury(store, ended, "by hand")
    assert other > later
    assert told(store)[-1][:3] == (later, 1, "checkpointEvicted")


CHANGES = {
    "pin": lambda store, row: catalog.pin(store, row, True),
    "bury": lambda store, row: catalog.bury(store, row, "by hand"),
    "record": lambda store, row: catalog.record(store, **WHERE, **SAVED, path=row.path),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_run_with_a_live_session_is_left_to_it(store, ended, new_session, change):
    live = new_session("baseline")
    before = told(store)
    with pytest.raises(CommandError, match=f"session {live} .* owns its checkpoints"):
        change(store, ended)
    assert only(store) == ended
    assert told(store) == before


def test_a_run_without_any_session_has_no_place_for_a_row(store, tmp_path):
    with pytest.raises(CommandError, match="no session of 'new' has ended"):
        catalog.record(store, **{**WHERE, "run": "new"}, **SAVED, path=tmp_path / "x")
    assert queries.checkpoints(store) == []
