"""A session around loops of every kind: what it counts, records, saves, and says when it ends."""

import math
import os
import signal
import sys
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import nn

import onthefly
from onthefly.control import actions, commands
from onthefly.errors import MissingPartError, UnsupportedValueError
from onthefly.store import queries


@pytest.fixture
def start(tmp_path):
    """Attach to a tiny training in a store of its own."""
    opened = []

    def attach(batches=5, *, model=None, optimizer=None, parts=None, **options):
        options = {"ckpt_every_minutes": None, "handle_signals": False, "max_epochs": 9} | options
        model = model or nn.Linear(2, 2)
        optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
        loader = None if batches is None else [torch.full((1, 2), float(i)) for i in range(batches)]
        config = onthefly.SessionConfig(store=tmp_path / "store", **options)
        session = onthefly.attach(model, optimizer, train_loader=loader, config=config, **(parts or {}))
        session.example = (model, optimizer)
        opened.append(session)
        return session

    yield attach
    for session in opened:
        session.close()


@pytest.fixture
def client(tmp_path):
    def connect():
        return onthefly.connect(tmp_path / "store")

    return connect


def train(session, batch=None):
    model, optimizer = session.example
    optimizer.zero_grad()
    model(torch.ones(1, 2) if batch is None else batch).sum().backward()
    optimizer.step()


def test_epochs_hand_out_every_batch_and_count(start):
    seen = []
    with start() as session:
        for epoch in session.epochs(2):
            for batch in session:
                seen.append((epoch, session.step, session.iteration, batch[0, 0].item()))
    assert seen == [(e, 5 * e + i + 1, i + 1, float(i)) for e in range(2) for i in range(5)]
    assert (session.step, session.epoch) == (10, 2)


def test_a_flat_loop_goes_through_all_epochs(start):
    with start(max_epochs=3) as session:
        assert [b[0, 0].item() for b in session] == [0.0, 1.0, 2.0, 3.0, 4.0] * 3
    assert (session.step, session.epoch) == (15, 3)


def test_a_flat_loop_must_know_where_it_ends(start):
    with start(max_epochs=None) as session, pytest.raises(MissingPartError, match="would never end"):
        next(iter(session))


def test_a_second_loop_goes_on_where_the_first_ended(start):
    before = signal.getsignal(signal.SIGTERM)
    with start(handle_signals=True) as session:
        for n in (1, 3):
            for _ in session.epochs(n):
                for _ in session:
                    assert signal.getsignal(signal.SIGTERM) != before
            assert (session.step, session.epoch) == (5 * n, n)


def test_a_checkpoint_that_is_to_stay_is_not_overwritten_by_another_of_its_step(start, client):
    with start() as session:
        batches = iter(session)
        next(batches)
        pinned = session.save("manual", pin=True).result()
        session.set({"lr": 0.05})
        other = session.save("manual").result()
        assert other.path != pinned.path
        assert other.hash != pinned.hash
    with client() as c:
        assert c.resolve(pinned.hash[:12]).path == pinned.path
        assert c.resolve(other.hash[:12]).path == other.path


def test_steps_serve_a_loop_without_a_loader(start):
    with start(None) as session:
        assert list(session.steps(4)) == [0, 1, 2, 3]
        with pytest.raises(MissingPartError, match=r"session\.steps"):
            next(iter(session))


@pytest.mark.parametrize("loop", [lambda s: s, lambda s: (b for _ in s.epochs(9) for b in s), lambda s: s.steps(99)])
def test_max_steps_ends_any_loop(start, loop):
    with start(max_steps=7) as session:
        assert len(list(loop(session))) == 7
    assert session.step == 7


def test_a_run_cut_by_max_steps_is_saved_before_the_code_that_a_resume_runs_again(start, client):
    with start(max_steps=7) as session:
        for _ in session.epochs(9):
            for batch in session:
                train(session, batch)
            session.log(val_loss=1.0)
    with client() as c:
        last = c.checkpoints("baseline")[-1]
    assert (last.step, last.epoch, last.reason, last.metrics) == (7, 1, "end", {})


def test_an_epoch_end_checkpoint_comes_after_the_code_that_follows_the_batches(start, client):
    with start() as session:
        for epoch in session.epochs(2):
            for batch in session:
                train(session, batch)
            session.log(val_loss=1.0 - epoch)
    with client() as c:
        saved = {(row.step, row.epoch): row for row in c.checkpoints("baseline")}
    assert sorted(saved) == [(0, 0), (5, 1), (10, 2)]
    assert saved[0, 0].reason == "origin"
    assert saved[5, 1].metrics == {"val_loss": 1.0}
    assert saved[10, 2].metrics == {"val_loss": 0.0}


def test_a_loop_left_by_break_after_an_epoch_is_saved_as_that_epochs_end(start, client):
    with start() as session:
        for _ in session.epochs(9):
            for batch in session:
                train(session, batch)
            break
    with client() as c:
        last = c.checkpoints("baseline")[-1]
        assert (last.step, last.epoch, last.reason) == (5, 1, "end")
        assert c.run("baseline").status == "finished"


def test_a_loop_left_by_break_after_a_step_is_saved_there_and_before_it_is_not(start, client):
    for trained in (True, False):
        with start() as session:
            for batch in session:
                if session.step == 3 and not trained:
                    break
                train(session, batch)
                if session.step == 3:
                    break
        with client() as c:
            last = c.checkpoints(session.run)[-1]
            assert (last.step, last.reason) == ((3, "end") if trained else (0, "origin"))


def test_an_exception_leaves_the_run_unfinished_and_comes_through(start, client):
    def fail():
        with start() as session:
            for _ in session:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with client() as c:
        assert c.run("baseline").status == "unfinished"
        assert c.sessions()[-1].outcome == "failed"


@pytest.mark.parametrize(("code", "status"), [(1, "unfinished"), ("nan", "unfinished"), (0, "finished")])
def test_a_process_that_ends_itself_in_the_middle_says_by_its_code_whether_it_was_done(start, client, code, status):
    def leave():
        with start() as session:
            for _ in session:
                raise SystemExit(code)

    with pytest.raises(SystemExit):
        leave()
    with client() as c:
        assert c.run("baseline").status == status


def test_a_scheduler_that_was_not_given_is_announced(start, client):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    start(model=model, optimizer=optimizer).close()
    with client() as c:
        assert any("scheduler drives optimizer" in reason for reason in c.sessions()[0].inexact)


def test_a_test_counts_samples_whatever_their_targets_are_wrapped_in(start):
    model = nn.Linear(2, 2)
    loader = [(torch.zeros(n, 2), {"a": torch.full((n,), float(n)), "b": torch.zeros(n)}) for n in (1, 3)]
    loss = lambda outputs, targets: targets["a"].mean()  # noqa: E731
    session = start(model=model, parts={"test_loader": loader, "loss_fn": loss})
    next(iter(session))
    result = actions.perform(session, commands.TestRun(save=False))
    assert (result["samples"], result["loss"]) == (4, (1 + 3 * 3) / 4)


def test_numbers_of_many_kinds_are_logged_as_they_are(start, client):
    with start(None) as session:
        for _ in session.steps(2):
            session.log(
                a=1, b=np.float32(0.5), c=torch.tensor(2.0), d=torch.tensor([[3]]), e=math.nan, f=-math.inf, g=True
            )
    with client() as c:
        found = {name: c.series("baseline", name) for name in "abcdefg"}
    assert all(series.steps.tolist() == [1, 2] for series in found.values())
    assert [found[n].values[0] for n in "abcdfg"] == [1.0, 0.5, 2.0, 3.0, -math.inf, 1.0]
    assert math.isnan(found["e"].values[0])


@pytest.mark.parametrize("value", [torch.zeros(2), torch.zeros(2, device="meta"), "high", None, 1j, torch.tensor(1j)])
def test_what_is_not_one_number_is_refused(start, value):
    with start(None) as session:
        for _ in session.steps(1):
            with pytest.raises(UnsupportedValueError, match="log: wrong"):
                session.log(wrong=value)


def test_tracking_and_knobs_come_before_the_loop(start):
    with start() as session:
        knob = session.knob("mixup", 0.2)
        session.track(average=torch.optim.swa_utils.AveragedModel(nn.Linear(1, 1)))
        assert knob.value == 0.2
        for _ in session:
            with pytest.raises(UnsupportedValueError, match="before the loop"):
                session.track(late=nn.Linear(1, 1))
            with pytest.raises(UnsupportedValueError, match="before the loop"):
                session.knob("late", 1)
            break


def test_a_value_that_cannot_be_stored_is_refused_at_the_first_boundary_naming_its_path(start):
    class Strange:
        def state_dict(self):
            return {"deep": {"inside": [object()]}}

        def load_state_dict(self, state):
            raise AssertionError

    with start() as session:
        session.track(strange=Strange())
        with pytest.raises(UnsupportedValueError, match="strange/deep/inside/0"):
            next(iter(session))


def test_several_models_optimizers_and_schedulers_are_named(start, client):
    models = {"gen": nn.Linear(2, 2), "dis": nn.Linear(2, 2)}
    optimizers = {name: torch.optim.Adam(m.parameters()) for name, m in models.items()}
    schedulers = {name: torch.optim.lr_scheduler.StepLR(o, 1) for name, o in optimizers.items()}
    with start(None, model=models, optimizer=optimizers, parts={"scheduler": schedulers}) as session:
        for _ in session.steps(2):
            session.set({"gen.lr": "*0.5"})
    with client() as c:
        (event,) = c.events("baseline", kinds=["command"])[:1]
        assert [change["name"] for change in event.data["changed"]] == ["optimizer/gen.0.lr"]


def test_each_start_is_a_new_run_and_a_taken_name_gets_a_number(start, client):
    for name in (None, None, "mine", "mine"):
        with start(run=name) as session:
            for _ in session:
                break
    with client() as c:
        assert [run.name for run in c.runs()] == ["baseline", "baseline2", "mine", "mine-2"]


def test_hooks_and_signal_handlers_are_put_back(start):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with start(handle_signals=True) as session:
        assert signal.getsignal(signal.SIGINT) != before[0]
        _, optimizer = session.example
        assert optimizer._optimizer_step_pre_hooks
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_ctrl_c_saves_and_leaves_when_nobody_reads_stderr_any_more(start, client, monkeypatch):
    reader, writer = os.pipe()
    session = start(handle_signals=True)
    os.close(reader)
    nobody = os.fdopen(writer, "w", buffering=1)
    monkeypatch.setattr(sys, "stderr", nobody)
    batches = iter(session)
    train(session, next(batches))
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(SystemExit) as left:
        next(batches)
    monkeypatch.undo()
    with suppress(BrokenPipeError):
        nobody.close()
    assert left.value.code == 130
    with client() as c:
        assert (c.checkpoints("baseline")[-1].step, c.run("baseline").status) == (1, "unfinished")


def test_what_cannot_be_exact_is_recorded_with_the_session(tmp_path):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(torch.zeros(3, 2))

    model = nn.Linear(2, 2)
    session = onthefly.attach(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        train_loader=torch.utils.data.DataLoader(Endless()),
        config=onthefly.SessionConfig(store=tmp_path / "store", handle_signals=False),
    )
    session.close()
    with onthefly.connect(tmp_path / "store") as c:
        assert any("IterableDataset" in reason for reason in queries.sessions(c.store)[0].inexact)


@pytest.mark.parametrize("name", ["ckpt_keep", "ckpt_every_steps", "ckpt_every_minutes", "max_steps", "grad_clip"])
def test_a_setting_that_is_not_positive_is_refused(name):
    with pytest.raises(ValueError, match=name):
        onthefly.SessionConfig(**{name: 0})
