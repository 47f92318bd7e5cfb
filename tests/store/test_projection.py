"""Every record of a journal comes into the tables once, however and by whomever it is brought there."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select

from onthefly.errors import StoreError
from onthefly.store import points, queries, schema
from onthefly.store.journal import Journal, read
from onthefly.store.projection import FULL, MERGED, project
from onthefly.store.store import Store

WHERE = {"run": "baseline", "generation": 0, "step": 3, "epoch": 1, "time": 2.5}


@pytest.fixture
def session(store, new_session):
    return new_session(store.create_run(None, project="p"))


@pytest.fixture
def journal(store, session):
    made = Journal(store.journal_path(session))
    yield made
    made.close()


def checkpoint(path, hash="ab", captured=1, **more):
    about = {"size": 10, "reason": "step", "pinned": False, "metrics": {"loss": 0.5}}
    return {**WHERE, **about, "path": str(path), "hash": hash, "captured": captured, **more}


# -- facts -------------------------------------------------------------------------------------------------------------


def test_an_event(store, session, journal):
    seq = journal.fact("event", {**WHERE, "event": "paused", "data": {"by": "alice"}})
    assert project(store, session) == 1
    assert project(store, session) == 0
    wanted = queries.EventRow(session, seq, "baseline", 0, 3, 1, 2.5, "paused", {"by": "alice"})
    assert queries.events(store) == [wanted]


def test_a_checkpoint_its_replacement_and_its_eviction(store, session, journal):
    path = store.checkpoints_dir / "baseline-step00000003.safetensors"
    journal.fact("checkpoint", checkpoint(path, "old"))
    journal.fact("checkpoint", checkpoint(path, "new", captured=2, metrics={"loss": math.nan}))
    project(store, session)
    (live,) = queries.checkpoints(store, "baseline")
    assert (live.path, live.hash, live.session, live.captured, live.pinned) == (path, "new", session, 2, False)
    assert math.isnan(live.metrics["loss"])
    old, _ = queries.checkpoints(store, evicted=True)
    assert (old.hash, old.evicted, old.evicted_reason) == ("old", 2.5, "replaced")

    journal.fact("evicted", {"path": str(path), "hash": "old", "reason": "retention", "time": 4.0})
    journal.fact("evicted", {"path": str(path), "hash": "new", "reason": "retention", "time": 5.0})
    project(store, session)
    assert queries.checkpoints(store) == []
    rows = queries.checkpoints(store, evicted=True)
    assert [(row.hash, row.evicted, row.evicted_reason) for row in rows] == [
        ("old", 2.5, "replaced"),
        ("new", 5.0, "retention"),
    ]
    told = [(event.kind, event.data["hash"], event.step, event.time) for event in queries.events(store)]
    assert told == [
        ("checkpointSaved", "old", 3, 2.5),
        ("checkpointSaved", "new", 3, 2.5),
        ("checkpointEvicted", "old", None, 4.0),  # it was replaced by then: there is no live row to tell its step
        ("checkpointEvicted", "new", 3, 5.0),
    ]


def test_a_result(store, session, journal):
    for id in ("good", "bad"):
        store.insert_command(session, id, "pause", {}, 1.0)
    at = {"step": 3, "epoch": 1, "time": 2.0}
    journal.fact("result", {"command": "good", "status": "done", "result": {"step": 3}, "error": None, **at})
    error = {"type": "CommandError", "message": "no", "exit_code": 6}
    journal.fact("result", {"command": "bad", "status": "failed", "result": None, "error": error, **at})
    project(store, session)
    good, bad = queries.command(store, "good"), queries.command(store, "bad")
    assert (good.status, good.result, good.error, good.step, good.finished) == ("done", {"step": 3}, None, 3, 2.0)
    assert (bad.status, bad.result, bad.error, bad.epoch) == ("failed", None, error, 1)
    assert store.queued_commands(session) == []


def test_changes_of_the_run_and_the_session(store, session, journal):
    base = {"path": str(store.checkpoints_dir / "a.safetensors"), "hash": "ab", "step": 3, "epoch": 1}
    journal.fact("run", {"run": "baseline", "generation": 2, "base": base})
    journal.fact("run", {"run": "baseline", "status": "finished"})
    journal.fact("session", {"status": "ended", "outcome": "finished", "ended": 9.0})
    store.insert_command(session, "late", "pause", {}, 1.0)
    project(store, session)
    run, row = queries.run(store, "baseline"), queries.session(store, session)
    assert (run.generation, run.status, run.base) == (2, "finished", base)
    assert (row.status, row.outcome, row.ended) == ("ended", "finished", 9.0)
    assert queries.command(store, "late").error["type"] == "NoLiveSessionError"
    store.heartbeat(session, status="running", step=8, epoch=0, time=10.0)
    assert queries.session(store, session).status == "ended"


def test_a_fact_of_a_newer_version_is_kept_as_an_event(store, session, journal):
    journal.fact("novelty", {"x": 1, "time": 3.0})
    project(store, session)
    (event,) = queries.events(store)
    assert (event.kind, event.time, event.data) == ("novelty", 3.0, {"x": 1, "time": 3.0})


def test_a_record_that_makes_no_sense_is_named_and_nothing_is_projected(store, session, journal):
    journal.fact("event", {**WHERE, "event": "paused", "data": {}})
    journal.fact("checkpoint", {"path": "x"})
    with pytest.raises(StoreError, match="record 2 makes no sense"):
        project(store, session)
    assert queries.events(store) == []


def test_no_such_session(store):
    with pytest.raises(StoreError, match="no session 7"):
        project(store, 7)


# -- series ------------------------------------------------------------------------------------------------------------


def chunks(store, name):
    table = schema.metric_chunk
    with store.read() as connection:
        return connection.execute(
            select(table.c.level, table.c["count"]).where(table.c.name == name).order_by(table.c.id)
        ).all()


def test_chunks_stay_few_and_in_order(store, session, journal):
    loss = journal.series("baseline", 0, "loss")
    for step in range(5000):
        journal.metrics(step, 0, float(step), [loss, -float(step)])
        if step % 7 < 3:
            project(store, session)
        if step % 50 == 0:
            levels = [level for level, _ in chunks(store, "loss")]
            assert levels == sorted(levels, reverse=True)
            assert max(levels.count(level) for level in levels) < MERGED
    project(store, session)
    series = queries.series(store, "baseline", "loss")
    assert np.array_equal(series.steps, np.arange(5000))
    assert np.array_equal(series.values, -np.arange(5000.0))
    assert np.array_equal(series.times, np.arange(5000.0))
    assert {name: queries.metric_names(store, name) for name in ("baseline", "x")} == {"baseline": ["loss"], "x": []}


def test_full_chunks_are_full_and_come_first(store, session, journal):
    loss = journal.series("baseline", 0, "loss")
    for step in range(3 * FULL + 5):
        journal.metrics(step, 0, 0.0, [loss, 1.0])
        if step in (10, FULL // 2, FULL, FULL + 3):
            project(store, session)
    project(store, session)
    counts = [count for _, count in chunks(store, "loss")]
    assert counts[:3] == [FULL] * 3
    assert sum(counts) == 3 * FULL + 5
    assert np.array_equal(queries.series(store, "baseline", "loss").steps, np.arange(3 * FULL + 5))


@given(
    st.lists(st.floats() | st.sampled_from([0.0, math.nan, math.inf, -math.inf]), min_size=1, max_size=50),
    st.integers(1, 20),
)
def test_extremes_are_the_lowest_and_the_highest_of_each_bucket(values, size):
    made = np.array([(step, value, 0.0) for step, value in enumerate(values)], points.POINT)
    found = points.extremes(made, size)
    assert np.all(np.diff(found["step"]) > 0)
    for start in range(0, len(values), size):
        bucket = [value for value in values[start : start + size] if not math.isnan(value)]
        kept = found[(found["step"] >= start) & (found["step"] < start + size)]
        assert 1 <= len(kept) <= 2
        assert all(
            repr(values[step]) == repr(float(value)) for step, value in zip(kept["step"], kept["value"], strict=True)
        )
        if bucket:
            assert (np.nanmin(kept["value"]), np.nanmax(kept["value"])) == (min(bucket), max(bucket))


# -- once --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_journal(tmp_path_factory):
    """The bytes of a journal with facts and with series of one, a thousand and twenty thousand points."""
    path = tmp_path_factory.mktemp("long") / "1.journal"
    journal = Journal(path)
    rng = np.random.default_rng(3)
    rare, some, dense = (journal.series("baseline", 0, name) for name in ("rare", "some", "dense"))
    for step in range(20_000):
        values = [dense, rng.normal()] + [some, math.nan if step % 60 == 0 else 1 / (step + 1)] * (step % 20 == 0)
        journal.metrics(step, 0, step / 10, values)
        if step % 1000 == 0:
            journal.fact("checkpoint", checkpoint(f"/elsewhere/{step % 3000}", str(step), journal.seq))
        if step % 700 == 0:
            journal.fact("event", {**WHERE, "event": "paused", "data": {"step": step}})
    journal.metrics(20_000, 1, 0.0, [rare, 1.0])
    journal.fact("run", {"run": "baseline", "status": "finished"})
    journal.close()
    return path.read_bytes()


def projected(folder, pieces):
    """Everything that can be queried after a journal came, and was projected, in these pieces."""
    store = Store.open(folder, create=True)
    store.create_run(None, project="p")
    nothing = {"launch": None, "environment": {}, "inexact": [], "config": {}}
    session = store.create_session(project="p", run="baseline", pid=1, host="here", time=1.0, **nothing)
    count = 0
    for piece in pieces:
        with open(store.journal_path(session), "ab") as file:
            file.write(piece)
        count += project(store, session)
    found = [
        count,
        queries.events(store),
        queries.checkpoints(store, evicted=True),
        queries.run(store, "baseline").status,
    ]
    for name in queries.metric_names(store, "baseline"):
        for resolution in (1, 16, 256, 4096):
            series = queries.series(store, "baseline", name, resolution=resolution)
            found.append((name, resolution, *(part.tobytes() for part in (series.steps, series.values, series.times))))
    store.close()
    return found


@pytest.fixture(scope="module")
def at_once(long_journal, tmp_path_factory):
    return projected(tmp_path_factory.mktemp("once"), [long_journal])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_in_pieces_it_is_the_same_as_at_once(long_journal, at_once, tmp_path_factory, data):
    cuts = data.draw(st.lists(st.integers(0, len(long_journal)), max_size=150).map(sorted))
    edges = [0, *cuts, len(long_journal)]
    pieces = [long_journal[a:b] for a, b in pairwise(edges)]
    assert projected(tmp_path_factory.mktemp("pieces"), pieces) == at_once


PROJECT = """
import sys
from pathlib import Path
from onthefly.store.projection import project
from onthefly.store.store import Store
store = Store.open(sys.argv[1], busy_timeout=60)
print("ready", flush=True)
total = 0
while not Path(sys.argv[2]).exists():
    total += project(store, 1)
print(total)
"""


def test_processes_that_project_at_once_bring_each_record_once(store, session, journal, python, tmp_path):
    processes = [python(PROJECT, store.root, tmp_path / "enough") for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    loss = journal.series("baseline", 0, "loss")
    for step in range(30_000):
        journal.metrics(step, 0, 0.0, [loss, float(step)])
        if step % 10 == 0:
            journal.fact("event", {**WHERE, "event": "paused", "data": {}})
    (tmp_path / "enough").touch()
    counts = [int(process.communicate()[0]) for process in processes]
    rest = project(store, session)
    records, _ = read(store.journal_path(session))
    assert sum(counts) + rest == len(records)
    assert len(queries.events(store)) == 3000
    assert np.array_equal(queries.series(store, "baseline", "loss").steps, np.arange(30_000))
    with store.read() as connection:
        assert connection.scalar(select(func.sum(schema.metric_chunk.c["count"]))) == 30_000
