"""What recorded history tells of a run: pure functions of losses, times and events; and the doors to it."""

import json
import math
from dataclasses import replace

import pytest
import torch
from digit_runs import Digits, digits
from torch.utils.data import TensorDataset

import onthefly
from onthefly.cli import main
from onthefly.errors import InvalidCommandError, UnknownReferenceError
from onthefly.health import gradients, health, numerics, throughput
from onthefly.health.findings import Column, Finding, Report, Severity, Table, text


def whats(findings):
    return {f.what: f for f in findings}


def curve(*stretches):
    """Points of a loss: (steps, value) after another, hardly varying."""
    values = [value * (1 + 0.01 * (i % 3)) for steps, value in stretches for i in range(steps)]
    return list(enumerate(values, 1))


def course(points, **more):
    return whats(health.judge(health.Numbers(losses={"loss": points}, **more)))


def test_a_falling_loss_is_well():
    assert course([(i, 2.0 / i) for i in range(1, 400)]) == {}


def test_a_loss_that_broke_says_when():
    points = [*curve((40, 1.0)), (41, math.nan), (42, math.inf)]
    found = course(points)["loss is NaN or inf"]
    assert (found.severity, found.since, found.evidence["bad"]) == ("error", 41, "2 of 42")


def test_a_loss_that_diverges_says_since_when():
    found = course(curve((64, 2.0), (64, 1.0), (64, 5.0)))["loss diverges"]
    assert (found.severity, found.since) == ("error", 129)


def test_a_flat_loss_and_a_spike_are_notes():
    assert course(curve((160, 1.0), (160, 0.999)))["loss has stopped falling"].severity == "note"
    points = curve((100, 1.0))
    points[70] = (71, 9.0)
    found = course(points)["loss has spikes"]
    assert (found.severity, found.since, found.evidence["spikes"]) == ("note", 71, 1)


def test_a_rising_validation_loss_is_a_note():
    training = [(i, 3.0 / i) for i in range(1, 200)]
    numbers = health.Numbers(
        losses={"loss": training, "val_loss": [(i * 20, v) for i, v in enumerate((2, 1, 1.2, 1.4))]}
    )
    (found,) = health.judge(numbers)
    assert (found.where, found.severity, found.since) == ("val_loss", "note", 20)


def test_saves_that_failed_are_worse_when_none_came_after():
    for saved, severity in ((True, "warning"), (False, "error")):
        (found,) = health.judge(health.Numbers(failed_saves=[(5, "disk full")], saved_since=saved))
        assert (found.severity, found.since) == (severity, 5)


def test_lost_records_are_a_warning():
    (found,) = health.judge(health.Numbers(lost=3))
    assert (found.severity, found.evidence["records"]) == ("warning", 3)


def norms(*values):
    steps = list(range(1, len(values) + 1))
    return gradients.Numbers(1, len(values), steps, list(values), [gradients.Weight("w", 4, 2, list(values))])


def test_gradients_that_explode_and_one_that_jumps():
    found = whats(gradients.judge(norms(*[1.0] * 8, *[10.0] * 4, *[1000.0] * 8)))["gradients explode"]
    assert (found.severity, found.where, found.since) == ("error", "w", 9)
    found = whats(gradients.judge(norms(*[1.0] * 10, 50.0, *[1.0] * 9)))["a gradient far larger than the others"]
    assert (found.severity, found.since) == ("warning", 11)
    assert gradients.judge(norms(*[1.0, 2.0, 3.0] * 7)) == []


def test_a_layer_whose_gradient_vanishes_is_named():
    numbers = norms(*[1.0, 2.0] * 5)
    numbers.weights.append(gradients.Weight("first", 4, 2, [1e-9] * 10))
    numbers.weights.append(gradients.Weight("other", 4, 2, [2.0] * 10))
    (found,) = gradients.judge(numbers)
    assert (found.severity, found.where) == ("warning", "first")


def test_the_noise_scale_is_that_of_the_distribution():
    """Gradients drawn about a known mean with a known covariance: B_simple = tr(S) / |G|^2."""
    torch.manual_seed(0)
    batch, steps, size = 16, 400, 1000
    mean, spread = 0.05, 2.0
    drawn = mean + spread / math.sqrt(batch) * torch.randn(steps, size, dtype=torch.float64)
    square = drawn.square().sum(1).mean().item()
    noise = gradients.Noise(steps, batch, square, drawn.mean(0).square().sum().item())
    assert noise.scale == pytest.approx(spread**2 / mean**2, rel=0.1)
    assert gradients.Noise(1, batch, 1.0, 1.0).scale is None


def test_workers_are_counted_by_what_a_batch_takes_to_make():
    step = {"data": 0.03, "forward": 0.004, "backward": 0.004, "optimizer": 0.002}
    numbers = throughput.Numbers(1, 10, steps=[step] * 10, workers=0, cores=8)
    (found,) = throughput.judge(numbers)
    assert found.advice == "num_workers=3 (now 0)"
    numbers.cores = 2
    assert "2 cores" in throughput.judge(numbers)[0].advice
    numbers.steps = [{**step, "data": 0.001}] * 10  # a wait that no worker would shorten
    assert throughput.judge(numbers) == []


def test_updates_that_are_lost_to_rounding_are_found():
    p = numerics.Parameter("w", "bfloat16", 2, [1, 2], [1e-4, 1e-4], [1.0, 1.0], unchanged=0.9, rates=[1e-5, 1e-5])
    (found,) = numerics.judge(numerics.Numbers(1, 2, parameters=[p]))
    assert "rounding of bfloat16" in found.what


def test_a_weight_that_begins_at_zero_may_take_large_steps():
    p = numerics.Parameter("lora", "float32", 2, [2, 3], [1.0, 0.5], [0.0, 0.01, 0.02], rates=[1e-3] * 3)
    assert numerics.judge(numerics.Numbers(1, 3, parameters=[p])) == []


def test_a_report_comes_back_from_json_as_it_was():
    finding = Finding("numerics", Severity.ERROR, "broken", "layer", 3, True, {"value": math.nan, "n": 2}, "mend it")
    report = Report(
        "numerics", "baseline", 0, 5, 1, True, 1, 5, "ab" * 32, 0, (finding,), ("a",), ("b",), {"loss": ((5, 1.5),)}
    )
    rows = (("first", 1.0, 2), ("middle", math.inf, 3), ("last", None, 4))
    table = Table("Sizes", (Column("layer"), Column("size", "s"), Column("n")), rows, "log")
    assert Report.from_json(replace(report, tables=(table.at_most(3),)).to_json()).tables[0].rows[1] == (
        "middle",
        "Infinity",
        3,
    )
    assert [row[0] for row in table.at_most(2).rows] == ["first", "last"]
    assert table.at_most(2).left_out == 1
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    again = Report.from_json(document)
    assert document["worst"] == "error"
    assert again.findings[0].evidence == {"value": "NaN", "n": 2}
    assert text(again) == text(report).replace("nan", "NaN")
    page = text(report)
    assert "error: layer: broken, at or before step 3" in page
    assert "newest checkpoint of step 0: abababababab" in page


def test_the_command_line_says_it_in_words_and_in_json(train, capsys, monkeypatch):
    images, targets = digits()
    images[17, 0, 3, 4] = math.nan
    run = train(Digits(dataset=TensorDataset(images, targets), epochs=1), asks={0: ("health", {"steps": 10})})
    monkeypatch.setenv("ONTHEFLY_STORE", str(run.store))
    capsys.readouterr()
    assert main(["report"]) == 0
    said = capsys.readouterr().out
    assert "health: baseline, as recorded up to step 10, epoch 1" in said
    assert "error: loss: loss is NaN or inf, since step" in said
    assert "error: batch[0]: the data is not finite" in said
    assert main(["report", "gradients", "baseline", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["missing"] == ["gradients: seen only while a session trains, and none is on this run"]
    assert main(["log"]) == 0
    assert "report on health: " in capsys.readouterr().out
    assert main(["report", "moods"]) == 2
    assert main(["report", "health", "nobody"]) == 2


def test_reports_are_kept_and_judged_by_what_was_recorded_then(train):
    images, targets = digits()
    images[17, 0, 3, 4] = math.nan
    asks = {0: ("throughput", {"steps": 4}), 10: ("health", {"steps": 10})}
    run = train(Digits(dataset=TensorDataset(images, targets), epochs=3), asks=asks)
    with onthefly.connect(run.store) as client:
        health, throughput = client.reports("baseline")
        assert client.reports(kind="throughput") == [throughput]
        assert client.reports("nobody") == []
        recorded = client.recorded_report("health")
    assert (health.report.kind, health.door, health.report.last_step) == ("health", "python", 20)
    assert health.report.latest["loss"][-1][0] == 20
    assert throughput.report.latest["loss"][-1][0] == 4
    assert [f.what for f in run.reports[10].findings] == [f.what for f in health.report.findings]
    broken = {finding.what for finding in health.report.findings if finding.severity == Severity.ERROR}
    assert {"loss is NaN or inf", "the data is not finite: a batch holds NaN or inf"} <= broken
    assert not any("NaN" in finding.what for finding in throughput.report.findings)
    parts = throughput.report.tables[0]
    assert (parts.drawn, parts.columns[2]) == ("parts", Column("share", "share"))
    assert sum(row[2] for row in parts.rows) == pytest.approx(1)
    titles = {"Gradient norms", "Range of outputs", parts.title}
    assert titles <= {table.title for table in health.report.tables} == {table.title for table in recorded.tables}


def test_what_there_is_no_report_on_is_said(train):
    run = train(Digits(epochs=1))
    with onthefly.connect(run.store) as client:
        with pytest.raises(InvalidCommandError, match="numerics"):
            client.report("moods")
        with pytest.raises(UnknownReferenceError, match="baseline"):
            client.report("health", "nobody")
        report = client.report()
    assert (report.run, report.step, report.live) == ("baseline", 10, False)
    assert [step for step, _ in report.latest["loss"]] == [6, 7, 8, 9, 10]
