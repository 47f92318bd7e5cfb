"""Law 2: a run that was reported on ends bit-equal to one that was not, and no hook is left, however the report ended."""

import functools

import pytest
import torch
from digit_runs import Digits, hooks

import onthefly
from onthefly.errors import CommandError
from onthefly.health.findings import KINDS, PARTS

STEPS = 30


def equal(one, other, path="state"):
    """The first place that differs, or None."""
    if type(one) is not type(other):
        return f"{path}: {type(one)} and {type(other)}"
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.view(-1), other.view(-1))
        return None if same else path
    if isinstance(one, dict):
        if list(one) != list(other):
            return path
        return next((d for key in one if (d := equal(one[key], other[key], f"{path}.{key}"))), None)
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return f"{path}: {len(one)} and {len(other)}"
        pairs = enumerate(zip(one, other, strict=True))
        return next((d for i, (a, b) in pairs if (d := equal(a, b, f"{path}[{i}]"))), None)
    return None if one == other else f"{path}: {one!r} and {other!r}"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Each kind of training, left alone."""
    from digit_runs import Run

    @functools.cache
    def left_alone(model, accumulate):
        return Run(Digits(model, accumulate=accumulate), tmp_path_factory.mktemp("alone") / "store")

    return left_alone


# A transformer's encoder has another path in evaluation, which a hook on it would close: its validation is compared, too.
@pytest.mark.parametrize(
    ("kind", "model", "accumulate"),
    [*((kind, "cnn", 2) for kind in PARTS), ("health", "cnn", 1), ("health", "transformer", 1)],
)
def test_a_run_that_was_reported_on_is_the_run_that_was_not(train, alone, kind, model, accumulate):
    asks = {0: (kind, {"steps": 6, "double_run": False}), 13: (kind, {"steps": 12, "double_run": False})}
    run = train(Digits(model, accumulate=accumulate), asks=asks)
    assert [report.kind for report in run.reports.values()] == [kind, kind]
    assert equal(run.state, alone(model, accumulate).state) is None
    assert run.hooks == alone(model, accumulate).hooks
    assert set(run.left.values()) <= {0, -1}  # one of ours that waits for the first forward pass is gone
    assert not run.events("inexact")


PAUSED = ("pause", lambda client: (client.pause(save=False), client.resume()))


CANCELLED = ("cancelReport", lambda client: client.cancel_report())


@pytest.mark.parametrize(("does", "why"), [(PAUSED, "the session was paused"), (CANCELLED, "it was cancelled")])
def test_a_report_that_is_cut_short_is_of_what_was_seen_and_leaves_no_trace(train, alone, does, why):
    run = train(Digits("cnn"), asks={0: ("health", {"steps": 20})}, does={7: does})
    assert run.reports[0].last_step == 7
    assert run.reports[0].missing == (f"all after 7 of 20 steps: {why}",)
    assert [(e.step, e.data) for e in run.events("reportBegun")] == [(0, {"kind": "health", "steps": 20})]
    assert equal(run.state, alone("cnn", 1).state) is None
    assert run.hooks == alone("cnn", 1).hooks


def test_while_training_stands_a_report_says_what_it_cannot_see(train):
    def look(client):
        client.pause(save=False)
        found = [client.report(kind, double_run=False) for kind in KINDS]
        client.resume()
        return found

    run = train(Digits(), does={7: ("pause", look)})
    by_kind = {report.kind: report for report in run.answers[7]}
    assert list(by_kind) == list(KINDS)
    for kind, report in by_kind.items():
        assert (report.step, report.last_step) == (7, None)
        assert (report.missing != ()) == (kind != "distribution")
    assert "hash seed" in by_kind["determinism"].facts[0]


def test_another_state_ends_a_report(train):
    back = ("loadCheckpoint", lambda client: client.load("baseline@0"))
    run = train(Digits("cnn", epochs=1), asks={3: ("numerics", {"steps": 50})}, does={6: back})
    assert run.reports[3].last_step == 6
    assert "another state was loaded" in run.reports[3].missing[0]
    assert set(run.hooks.values()) == {0}


def test_the_end_of_the_loop_ends_a_report(train):
    run = train(Digits("cnn", epochs=1), asks={6: ("gradients", {"steps": 50})})
    assert run.reports[6].last_step == 10
    assert "the loop ended" in run.reports[6].missing[0]
    assert set(run.hooks.values()) == {0}


def test_an_exception_in_the_loop_ends_a_report(train):
    run = train(Digits("cnn"), asks={6: ("health", {"steps": 50})}, fails=9)
    assert isinstance(run.error, ZeroDivisionError)
    assert run.reports[6].last_step == 8  # the ninth was never over
    assert "the session ended" in run.reports[6].missing[0]
    assert set(run.hooks.values()) == {0}


def test_a_collector_that_fails_is_said_and_training_goes_on(train, alone):
    """A loss scale that cannot be read stands for whatever a user's objects may do."""

    class Scaler(torch.amp.GradScaler):
        def get_scale(self):
            self.reads = getattr(self, "reads", 0) + 1
            if self.reads == 5:
                raise OverflowError("no number")
            return super().get_scale()

    scaler = Scaler("cpu", init_scale=1.0)
    run = train(Digits("cnn", scaler=scaler), asks={0: ("numerics", {"steps": 20})})
    assert "collecting failed (OverflowError: no number)" in run.reports[0].missing[0]
    assert run.session.step == STEPS
    assert equal(run.state["model"], alone("cnn", 1).state["model"]) is None  # a scale of 1 changes nothing


def test_one_report_at_a_time(train):
    refused = ("report", lambda client: client.report("gradients"))
    run = train(Digits(), asks={0: ("numerics", {"steps": 20})}, does={5: refused})
    assert isinstance(run.answers[5], CommandError)
    assert "up to step 20" in str(run.answers[5])
    assert run.reports[0].last_step == 20


def test_metrics_of_collectors_are_ordinary_and_a_report_is_an_event(train):
    run = train(Digits(), asks={0: ("health", {"steps": 12})})
    with onthefly.connect(run.store) as client:
        names = client.metric_names("baseline")
        norms = client.series("baseline", "health/gradient_norm")
    assert norms.steps.tolist() == list(range(1, 13))
    assert {"health/update_ratio/3.weight", "health/dead/4", "health/noise_scale", "health/step_seconds"} <= set(names)
    (event,) = run.events("report")
    assert event.step == 12
    assert event.data["findings"] == [
        one for one in run.reports[0].to_json()["findings"] if one in event.data["findings"]
    ]


def test_a_loop_without_a_loader_is_reported_on(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = onthefly.SessionConfig(store=tmp_path / "store", handle_signals=False)
    from onthefly.control.commands import ReportRun

    with onthefly.attach(model, optimizer, config=config) as session:
        answers = []
        for step in session.steps(8):
            if step == 2:
                answers.append(session.reporting.begin(ReportRun(report="gradients", steps=3)))
                session.reporting.watch.begin_step(session.step)
            model(torch.randn(16, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert answers[0].result()["last_step"] >= 5
    assert any(fact.startswith("noise scale") for fact in answers[0].result()["facts"])
    assert set(hooks(model, optimizer).values()) == {0}
