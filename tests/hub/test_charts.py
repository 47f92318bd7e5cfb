"""Few points of many: nothing that stands out is lost, gaps stay, and what is asked for is what comes."""

import asyncio
import sqlite3
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onthefly
from onthefly.hub import charts, columns, epochs, live
from onthefly.hub.charts import Charts, Question
from onthefly.runs.lineage import START, Segment
from onthefly.store import projection
from onthefly.store.charts import EpochBegin
from onthefly.store.journal import Journal
from onthefly.store.store import Store


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """50,000 points of `loss` with one spike, one run with a reset, and a fork of the first at step 30,000."""
    folder = tmp_path_factory.mktemp("many") / "store"
    store = Store.open(folder, create=True)
    nothing = {"launch": None, "environment": {}, "inexact": [], "config": {}}
    store.create_run("baseline", project="p")
    session = store.create_session(project="p", run="baseline", pid=1, host="here", time=1.0, **nothing)
    journal = Journal(store.journal_path(session))
    series = journal.series("baseline", 0, "loss")
    for step in range(1, 50_001):
        journal.metrics(step, 0, 1000.0 + step / 100, [series, 99.0 if step == 31_007 else 1 / step])
    store.create_run("fork1", project="p", kind="fork", parents=[("baseline", "aa" * 32)])
    base = {"path": "checkpoints/x", "hash": "aa" * 32, "step": 30_000, "epoch": 0}
    journal.fact("run", {"run": "fork1", "base": base})
    fork = journal.series("fork1", 0, "loss")
    for step in range(30_001, 40_001):
        journal.metrics(step, 0, 2000.0 + step / 100, [fork, 5.0])
    projection.project(store, session)
    journal.close()
    store.close()
    with onthefly.connect(folder) as client:
        yield Charts(client)


def test_a_spike_survives_any_reduction(many):
    for grid in (True, False):
        for points in (16, 100, 2000):
            drawn = many.draw(Question((("baseline", "loss"),), points, grid=grid))
            y = drawn.columns["0" if grid else "0.y"]
            assert len(y) <= points
            assert np.nanmax(y) == 99.0
            assert np.nanmin(y) == 1 / 50_000


def test_coarse_data_is_read_for_the_whole_and_fine_data_for_a_zoom(many):
    whole = many.draw(Question((("baseline", "loss"),), 200))
    assert whole.series[0]["resolution"] == 256
    zoomed = many.draw(Question((("baseline", "loss"),), 200, low=31_000, high=31_050))
    assert zoomed.series[0]["resolution"] == 1
    x = zoomed.columns["x"]
    assert x[0] in (30_999.0, 31_000.0)
    assert 31_007.0 in x
    assert x[-1] in (31_050.0, 31_051.0)


def test_a_zoom_by_time_reads_fine_data_too(many):
    drawn = many.draw(Question((("baseline", "loss"),), 200, x="time", low=1310.0, high=1310.5))
    assert drawn.series[0]["resolution"] == 1
    x = drawn.columns["x"]
    assert len(x) >= 50
    assert x[0] == pytest.approx(1310.0, abs=0.011)
    assert np.nanmax(drawn.columns["0"]) == 99.0


def test_curves_of_unequal_length_share_one_grid_with_gaps(many):
    drawn = many.draw(Question((("baseline", "loss"), ("fork1", "loss")), 100))
    x, one, other = drawn.columns["x"], drawn.columns["0"], drawn.columns["1"]
    assert len(x) == len(one) == len(other) == 100
    assert np.all(np.diff(x) > 0)
    assert not np.isnan(one).any()
    assert np.isnan(other[x < 29_000]).all()
    assert np.isnan(other[x > 41_000]).all()
    assert (other[(x > 30_600) & (x < 39_400)] == 5.0).all()


def test_a_run_is_joined_to_its_ancestor_where_it_branched(many):
    drawn = many.draw(Question((("fork1", "loss"),), 20_000, joined=True, low=29_990, high=30_010))
    x, y = drawn.columns["x"], drawn.columns["0"]
    assert x.tolist() == list(range(29_989, 30_012)) or x.tolist() == list(range(29_990, 30_011))
    assert y[x == 30_000] == 1 / 30_000
    assert y[x == 30_001] == 5.0


def test_what_is_drawn_once_is_kept_until_it_changes(many):
    question = Question((("baseline", "loss"),), 500)
    assert many.draw(question) is many.draw(question)


def test_what_there_is_not_is_a_gap(many):
    drawn = many.draw(Question((("nobody", "loss"), ("baseline", "nothing")), 100))
    assert len(drawn.columns["x"]) == 0
    for grid in (True, False):
        assert all(len(c) == 0 for c in many.draw(Question((("nobody", "x"),), 100, grid=grid)).columns.values())


def trained(store, **config):
    """The name of a run of three epochs of five batches."""
    import torch

    model = torch.nn.Linear(2, 1)
    data = torch.utils.data.TensorDataset(torch.zeros(10, 2), torch.zeros(10, 1))
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    config = onthefly.SessionConfig(store=store, **config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with onthefly.attach(model, optimizer, train_loader=loader, config=config) as session:
        for _ in session.epochs(3):
            for inputs, targets in session:
                loss = (model(inputs) - targets).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                session.log(loss=loss)
            session.log(val_loss=0.5)
    return session.run


def test_epochs_are_an_axis_of_a_real_session(own_store):
    run = trained(own_store, ckpt_every_epoch=False)
    with onthefly.connect(own_store) as client:
        drawn = Charts(client)
        x = drawn.draw(Question(((run, "loss"),), 100, x="epoch")).columns["x"]
        np.testing.assert_allclose(x, np.arange(1, 16) / 5)
        ends = drawn.draw(Question(((run, "val_loss"),), 100, x="epoch")).columns["x"]
        assert ends.tolist() == [1.0, 2.0, 3.0]
        zoomed = drawn.draw(Question(((run, "loss"),), 100, x="epoch", low=1.0, high=2.0)).columns["x"]
        np.testing.assert_allclose(zoomed, np.arange(4, 12) / 5)
        assert [row.data for row in client.events(kinds=["epochLength"])] == [{"batches": 5}]


def test_a_run_from_before_lengths_were_recorded_has_the_epochs_of_its_checkpoints(own_store):
    run = trained(own_store)
    with closing(sqlite3.connect(own_store / "onthefly.db")) as connection, connection:
        connection.execute("DELETE FROM event WHERE kind = 'epochLength'")
    with onthefly.connect(own_store) as client:
        x = Charts(client).draw(Question(((run, "loss"),), 100, x="epoch")).columns["x"]
    np.testing.assert_allclose(x, np.arange(1, 16) / 5)


def test_a_run_without_epochs_has_no_place_on_their_axis(many):
    drawn = many.draw(Question((("baseline", "loss"),), 100, x="epoch"))
    assert len(drawn.columns["x"]) == 0
    assert drawn.series[0]["points"] == 50_000


lengths = st.lists(st.integers(1, 50), min_size=1, max_size=8)


def recorded(first, epoch, of, told):
    """What a session records of epochs of these lengths, and where each began. One is told only if it was not to be expected."""
    bounds = first + np.cumsum([0, *of])
    every = [EpochBegin(int(s), epoch + n, length) for n, (s, length) in enumerate(zip(bounds, of, strict=False))]
    if not told:
        return [EpochBegin(b.step, b.epoch, None) for b in every], bounds
    return [b for n, b in enumerate(every) if n == 0 or b.batches != every[n - 1].batches], bounds


@settings(max_examples=60, deadline=None)
@given(lengths, lengths, st.data(), st.booleans())
def test_a_fork_counts_epochs_on_from_where_it_left_its_parent(parent, rest, data, told):
    """The parent's epochs have these lengths, and the fork's other ones, from the middle of an epoch or its end on."""
    begins, bounds = recorded(0, 0, parent, told)
    ends = [int(bound) for bound in (bounds[1:] if told else bounds[1:-1])]  # those that the records tell
    at_end = bool(ends) and data.draw(st.booleans())
    branch = data.draw(st.sampled_from(ends) if at_end else st.integers(0, int(bounds[-1]) - 1))
    under_way = int(np.searchsorted(bounds, branch, "right")) - 1
    first, behind = (under_way, 0) if at_end else (under_way + 1, data.draw(st.integers(1, 50)))
    own, later = recorded(branch + behind, first, rest, told)
    found = {"parent": begins, "fork": own}
    root = epochs.along([Segment("parent", START, None)], found)
    fork = epochs.along([Segment("parent", START, branch), Segment("fork", branch, None)], found)

    if told or len(parent) > 1:
        np.testing.assert_allclose(root.at(bounds[: len(parent)]), np.arange(len(parent)))
        before = np.arange(branch + 1)
        np.testing.assert_allclose(fork.at(before), root.at(before))
    if told or len(parent) + len(rest) > 2:
        np.testing.assert_allclose(fork.at(later[: len(rest)]), first + np.arange(len(rest)))
    if told:
        np.testing.assert_allclose(fork.at(later[-1:]), first + len(rest))
    for line in (root, fork):
        every = line.at(np.arange(300))
        assert not line.knots or np.all(np.diff(every) >= 0)
        at = data.draw(st.integers(0, 299))
        low, high = line.steps(every[at], every[at])
        assert low is None or low <= at + 1e-6
        assert high is None or high >= at - 1e-6
        assert not told or every[at] == 0 or (low == pytest.approx(at) and high == pytest.approx(at))


@pytest.mark.parametrize(("length", "epoch"), [(75, 7), (75, 14), (49, 1)])
def test_a_fork_at_the_end_of_an_epoch_has_its_own_length(length, epoch):
    """Some of these ends come out a bit above the whole number when they are interpolated."""
    branch = length * epoch
    found = {"parent": [EpochBegin(0, 0, length)], "fork": [EpochBegin(branch, epoch, 10)]}
    line = epochs.along([Segment("parent", START, branch), Segment("fork", branch, None)], found)
    assert line.at(np.array([branch, branch + 10])).tolist() == [epoch, epoch + 1]


def test_steps_before_the_first_record_are_spread_over_the_epochs_before_it():
    """An older version began the run."""
    line = epochs.along([Segment("run", START, None)], {"run": [EpochBegin(600, 6, 50)]})
    assert line.at(np.array([0, 150, 300, 600, 650])).tolist() == [0.0, 1.5, 3.0, 6.0, 7.0]


@pytest.mark.parametrize("grid", [True, False])
@pytest.mark.parametrize("x", [np.full(5000, 51.0), np.r_[1.0, np.full(4998, 51.0), 60.0]])
def test_many_points_at_one_place_can_be_drawn(x, grid):
    line = (x, np.arange(5000.0))
    drawn = charts.gridded([line], Question((("r", "m"),), 100)) if grid else charts.apart([line], 100)
    y = drawn["0" if grid else "0.y"]
    assert (np.nanmin(y), np.nanmax(y)) == (0.0, 4999.0)


@pytest.mark.parametrize("failing", ["draw", "look"])
def test_a_chart_that_fails_is_said_and_the_tab_goes_on(many, caplog, failing):
    class Broken:
        def look(self, questions):
            return many.look(questions) if failing != "look" else 1 / 0

        def draw(self, question, about):
            return many.draw(question, about) if question.points != 100 else 1 / 0

    async def snapshot():
        return live.Snapshot(1, [], 0, {})

    feed = SimpleNamespace(version=1, snapshot=snapshot, store=SimpleNamespace(charts=Broken()))
    good, bad = (Question((("baseline", "loss"),), points) for points in (50, 100))
    followed, frames = live._Followed(feed, charts={"bad": bad, "good": good}), []

    async def three_frames():
        tab = live.Tab(None, None)
        frames.append(await tab._of("s", followed, live._Frame()))
        followed.drawn.pop("bad", None)
        frames.append(await tab._of("s", followed, live._Frame()))
        feed.store.charts, feed.version = many, 2
        followed.drawn.clear()
        frames.append(await tab._of("s", followed, live._Frame()))

    asyncio.run(three_frames())
    assert "ZeroDivisionError" in frames[0]["error"]["message"]
    assert list(frames[0].get("charts", {})) == (["good"] if failing == "draw" else [])
    assert frames[1] == {}
    assert (frames[2]["error"], sorted(frames[2]["charts"])) == (None, ["bad", "good"])
    assert [bool(record.exc_info) for record in caplog.records if record.name == "onthefly"] == [True]


def test_an_epoch_that_was_left_early_is_short_and_no_other_is():
    begins = [EpochBegin(0, 0, 10), EpochBegin(34, 4, 10)]
    line = epochs.along([Segment("run", START, None)], {"run": begins})
    assert line.at(np.array([5, 10, 30, 32, 34, 44])).tolist() == [0.5, 1.0, 3.0, 3.5, 4.0, 5.0]


def test_without_a_length_an_epoch_is_known_when_it_has_ended():
    of = [Segment("run", START, None)]
    assert epochs.along(of, {"run": [EpochBegin(0, 0, None)]}).knots == ()
    assert np.isnan(epochs.Epochs().at(np.arange(3))).all()
    line = epochs.along(of, {"run": [EpochBegin(0, 0, None), EpochBegin(8, 1, None)]})
    assert line.at(np.array([4, 8, 12])).tolist() == [0.5, 1.0, 1.5]


values = st.floats(width=32) | st.just(float("nan"))


@settings(max_examples=100, deadline=None)
@given(st.lists(values, min_size=1, max_size=300), st.integers(1, 20))
def test_every_bucket_has_its_lowest_and_highest_in_their_order(numbers, count):
    y = np.array(numbers, np.float64)
    x = np.arange(len(y), dtype=np.float64)
    found = charts.bucketed(x, y, 0.0, max(1.0, x[-1]), count)
    bucket = np.minimum((x * (count / max(1.0, x[-1]))).astype(int), count - 1)
    for n in range(count):
        here = y[(bucket == n) & ~np.isnan(y)]
        pair = found[2 * n : 2 * n + 2]
        if not len(here):
            assert np.isnan(pair).all()
            continue
        assert {here.min(), here.max()} == set(pair.tolist())
        assert (here.argmin() < here.argmax()) <= (pair[0] <= pair[1])


def test_columns_come_back_as_they_were():
    given = {
        "f8": np.array([1.5, np.nan, -np.inf]),
        "f4": np.arange(6, dtype=np.float32).reshape(3, 2),
        "half": np.array([0.5], np.float16),
        "small": np.array([1, -2], np.int64),
        "large": np.array([2**40, 1]),
        "yes": np.array([True, False, True]),
        "text": np.array(["<b>", "π", ""], object),
        "none": np.empty(0),
    }
    packed = columns.pack(given, {"nan": float("nan"), "deep": [{"a": (1, 2)}]})
    found, meta = columns.unpack(packed)
    assert meta == {"nan": None, "deep": [{"a": [1, 2]}]}
    for name, column in given.items():
        np.testing.assert_array_equal(np.asarray(found[name], column.dtype), column)
    assert found["large"].dtype == np.float64
    assert found["small"].dtype == np.int32
    head = int.from_bytes(packed[4:8], "little")
    assert head % 8 == 0
