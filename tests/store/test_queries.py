"""What is asked of a store is answered in order, whole, and as it now stands."""

import numpy as np
import pytest

from onthefly.store import queries
from onthefly.store.journal import Journal
from onthefly.store.projection import FULL, project
from onthefly.store.store import Store


@pytest.fixture
def told(store, new_session):
    """Two sessions of two runs; the first run was taken back to step 6, and then to step 4."""
    store.create_run(None, project="p")
    store.create_run(None, project="p", kind="fork", parents=[("baseline", "ab")])
    for session, run in ((new_session("baseline"), "baseline"), (new_session("fork1"), "fork1")):
        journal = Journal(store.journal_path(session))
        for generation, first, last in [(0, 0, 10), (1, 6, 8), (2, 4, 6)] if run == "baseline" else [(0, 0, 3)]:
            where = {"run": run, "generation": generation, "step": first, "epoch": 0, "time": 1.0}
            if generation:
                journal.fact("event", {**where, "event": "generation", "data": {"from": first, "reason": "reset"}})
            loss = journal.series(run, generation, "loss")
            for step in range(first + (generation > 0), last):  # a step logs before its boundary
                journal.metrics(step, 0, step / 2, [loss, step + generation / 10])
            about = {"size": 1, "reason": "manual", "pinned": False, "metrics": {}, "captured": journal.seq}
            path = store.checkpoints_dir / f"{run}-{generation}"
            journal.fact("checkpoint", {**where, **about, "path": str(path), "hash": f"{run}{generation}"})
        journal.close()
        project(store, session)
    return store


def test_newer_generations_hide_what_they_began_anew(told):
    series = queries.series(told, "baseline", "loss")
    assert series.steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert series.values.tolist() == [0, 1, 2, 3, 4, 5.2]
    assert series.times.tolist() == [0, 0.5, 1, 1.5, 2, 2.5]


def test_each_generation_can_be_seen(told):
    steps = [queries.series(told, "baseline", "loss", generation).steps.tolist() for generation in range(4)]
    assert steps == [list(range(10)), [7], [5], []]


def test_what_was_recorded_after_a_step(told):
    series = queries.recorded(told, "baseline", 0, "loss", 7)
    assert (series.steps.tolist(), series.values.tolist()) == ([8, 9], [8.0, 9.0])
    assert queries.recorded(told, "baseline", 0, "none", 0).steps.tolist() == []


def test_a_series_that_is_not_there_is_empty(told):
    series = queries.series(told, "none", "loss", resolution=16)
    assert [(len(part), part.dtype) for part in (series.steps, series.values)] == [(0, np.int64), (0, np.float64)]


def test_only_some_resolutions_are_kept(told):
    with pytest.raises(ValueError, match=r"resolution is one of \(1, 16, 256, 4096\)"):
        queries.series(told, "baseline", "loss", resolution=2)


@pytest.mark.parametrize("resolution", [16, 256, 4096])
def test_a_lower_resolution_keeps_the_extremes_of_what_is_shown(store, new_session, resolution):
    session = new_session(store.create_run(None, project="p"))
    journal = Journal(store.journal_path(session))
    ids = [journal.series("baseline", generation, "loss") for generation in (0, 1)]
    values = np.random.default_rng(1).normal(size=2 * FULL + 100)
    for step, value in enumerate(values):
        journal.metrics(step, 0, 0.0, [ids[0], value])
    cut = FULL + 1000
    where = {"run": "baseline", "generation": 1, "step": cut, "epoch": 0, "time": 1.0}
    journal.fact("event", {**where, "event": "generation", "data": {"from": cut}})
    journal.metrics(cut + 1, 0, 0.0, [ids[1], 99.0])
    journal.close()
    project(store, session)
    shown = np.append(values[: cut + 1], 99.0)
    assert np.array_equal(queries.series(store, "baseline", "loss").values, shown)
    coarse = queries.series(store, "baseline", "loss", resolution=resolution)
    assert len(coarse.steps) <= 2 * (len(shown) / resolution + 2)
    assert np.array_equal(coarse.values, shown[coarse.steps])
    for start in range(0, cut + 1, resolution):
        # Buckets begin anew with each chunk and each generation; of 8192 points they are aligned.
        bucket = coarse.values[(coarse.steps >= start) & (coarse.steps < min(start + resolution, cut + 1))]
        whole = shown[start : min(start + resolution, cut + 1)]
        assert (bucket.min(), bucket.max()) == (whole.min(), whole.max())


def test_checkpoints_are_in_the_order_of_their_capture(told):
    hashes = [row.hash for row in queries.checkpoints(told)]
    assert hashes == ["baseline0", "baseline1", "baseline2", "fork10"]
    assert [row.hash for row in queries.checkpoints(told, "fork1")] == ["fork10"]
    assert queries.newest_checkpoint(told, "baseline").hash == "baseline2"
    assert queries.newest_checkpoint(told, "none") is None
    assert all(row.path.is_absolute() for row in queries.checkpoints(told))


def test_events_are_in_the_order_of_all_facts(told):
    all_of_them = queries.events(told)
    places = [(event.session, event.seq) for event in all_of_them]
    assert places == sorted(places)
    assert [event.session for event in all_of_them] == [1] * 5 + [2]
    for i, place in enumerate(places):
        assert queries.events(told, after=place) == all_of_them[i + 1 :]
    assert queries.events(told, limit=2) == all_of_them[:2]
    assert queries.events(told, session=2) == all_of_them[5:] == queries.events(told, "fork1")
    begun = queries.events(told, "baseline", kinds=["generation", "paused"])
    assert [(event.generation, event.data["from"]) for event in begun] == [(1, 6), (2, 4)]
    assert [event.kind for event in queries.events(told, generation=1)] == ["generation", "checkpointSaved"]
    assert queries.events(told, kinds=[]) == []


def test_a_store_that_was_moved_tells_the_new_paths(told, tmp_path):
    before = [row.path.name for row in queries.checkpoints(told)]
    told.close()
    told.root.rename(tmp_path / "moved")
    moved = Store.open(tmp_path / "moved")
    assert [row.path for row in queries.checkpoints(moved)] == [tmp_path / "moved" / "checkpoints" / n for n in before]
    moved.close()
