"""One planted fault each: the report names it, its place, and the first bad step. Healthy runs are left in peace."""

import math
import time

import numpy as np
import pytest
import torch
from digit_runs import BATCH, MODELS, Digits, digits, mlp
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

import onthefly
from onthefly.health.findings import Severity

PER_EPOCH = 320 // BATCH


def found(report, severity, where):
    """The findings of that severity at that place."""
    assert not isinstance(report, Exception), report
    return [f for f in report.findings if f.severity == severity and f.where == where]


def only(report, severity, where):
    (finding,) = found(report, severity, where)
    return finding


class At(nn.Module):
    """Cross-entropy that does something once, in its n-th step, behind the forward pass."""

    def __init__(self, step, action):
        super().__init__()
        self.left, self.action = step, action

    def forward(self, outputs, targets):
        self.left -= 1
        if self.left == 0:
            self.action()
        return F.cross_entropy(outputs, targets)


@pytest.mark.parametrize("model", MODELS)
def test_a_healthy_run_has_no_finding_above_a_note(train, model):
    run = train(Digits(model), asks={0: ("health", {}), 22: ("health", {"steps": 5})})
    for report in run.reports.values():
        assert report.worst in (None, Severity.NOTE), report.findings
        assert report.missing == ()
    assert (run.reports[0].first_step, run.reports[0].last_step) == (1, 20)
    assert (run.reports[22].first_step, run.reports[22].last_step) == (23, 27)


def test_dead_relus_are_found_with_their_layer_and_since_when(train):
    model = mlp()

    def kill():
        with torch.no_grad():
            model[3].bias.fill_(-1e3)

    digits_run = Digits(model, loss=At(6, kill))
    for kind, store in (("activations", "a"), ("health", "b")):
        digits_run.loss.left = 6
        model[3].bias.data.zero_()
        run = train(digits_run, asks={0: (kind, {})}, store=store)
        finding = only(run.reports[0], "error", "4")
        assert (finding.report, finding.since, finding.before) == ("activations", 7, False)
        assert finding.evidence["dead"] == "32 of 32"
    assert len(found(run.reports[0], "warning", "3.weight")) == 0  # in the first steps there were gradients


def test_dead_units_behind_a_functional_relu_are_seen_by_their_gradients(train):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(64, 24), nn.Linear(24, 10)
            nn.init.constant_(self.one.bias[:20], -1e3)

        def forward(self, images):
            return self.two(F.relu(self.one(images.flatten(1))))

    torch.manual_seed(0)
    finding = only(train(Digits(Functional()), asks={0: ("activations", {})}).reports[0], "warning", "one.weight")
    assert finding.evidence["units"].endswith("of 24")


def test_a_saturated_tanh_is_found(train):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    with torch.no_grad():
        model[1].weight.mul_(100)
    assert only(train(Digits(model), asks={0: ("activations", {})}).reports[0], "warning", "2").evidence["share"] > 0.5


def test_a_layer_with_another_learning_rate_is_named_with_it(train):
    def optimizer(model):
        others = [p for name, p in model.named_parameters() if not name.startswith("3.")]
        return torch.optim.AdamW([{"params": others, "lr": 1e-3}, {"params": model[3].parameters(), "lr": 1e3}])

    run = train(Digits(optimizer=optimizer), asks={0: ("numerics", {}), 22: ("health", {"steps": 5})})
    finding = only(run.reports[0], "error", "3.weight")
    assert (finding.since, finding.before) == (1, True)
    assert finding.evidence["update / weight"] > 1000
    assert "1e+06 times the others'" in finding.evidence["lr"]
    assert "parameter groups" in finding.advice


def test_a_nan_in_one_pixel_is_traced_to_its_sample_and_step(train):
    images, targets = digits()
    images[17, 0, 3, 4] = math.nan
    run = train(Digits(dataset=TensorDataset(images, targets)), asks={0: ("health", {})})
    first = 1 + next(i for i, loss in enumerate(run.losses) if math.isnan(loss))
    finding = only(run.reports[0], "error", "batch[0]")
    assert (finding.report, finding.since) == ("numerics", first)
    assert (finding.evidence["sample"], finding.evidence["at"]) == ("17", "[0, 3, 4]")
    assert only(run.reports[0], "error", "loss").since == first
    with onthefly.connect(run.store) as client:  # the run has ended
        again = client.report("health")
        assert only(again, "error", "loss").since == first
        assert only(client.report("numerics"), "error", "loss").since == first
    assert not again.live
    assert only(again, "error", "batch[0]") == finding  # what the last live report saw


def test_weights_that_are_broken_already_are_said_to_be(train):
    run = train(
        Digits(change=lambda model: model[3].weight.data.view(-1)[5].fill_(math.inf)), asks={4: ("numerics", {})}
    )
    finding = only(run.reports[4], "error", "1.weight")
    assert (finding.since, finding.before, finding.evidence["parameters"]) == (5, True, 6)


def test_the_first_layer_that_gives_out_nan_is_named(train):
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += self.training
            return x / (x - x) if self.calls >= 9 and self.training else x

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), Root(), nn.ReLU(), nn.Linear(16, 10))
    finding = only(train(Digits(model), asks={0: ("numerics", {})}).reports[0], "error", "2")
    assert (finding.since, finding.before) == (9, False)


def test_a_starved_loader_is_found_and_how_many_workers_would_do(train):
    class Slow(TensorDataset):
        def __getitem__(self, index):
            time.sleep(0.0005)
            return super().__getitem__(index)

    run = train(Digits(dataset=Slow(*digits())), asks={0: ("throughput", {"steps": 12})})
    finding = only(run.reports[0], "warning", "train_loader")
    assert finding.evidence["share of a step"] > 0.4
    assert finding.advice.startswith("num_workers=")


class Unseeded(Dataset):
    def __init__(self):
        self.images, self.targets = digits()
        self.noise = np.random.default_rng()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index] + float(self.noise.normal(0, 0.01)), self.targets[index]


def test_an_unseeded_worker_generator_is_named(train):
    run = train(
        Digits(dataset=Unseeded(), loader={"num_workers": 1}, epochs=1),
        asks={0: ("determinism", {"double_run": False})},
    )
    assert "of its own" in only(run.reports[0], "warning", "dataset.noise").what
    with onthefly.connect(run.store) as client:
        assert only(client.report("determinism"), "warning", "dataset.noise")


def test_an_fp16_overflow_is_found_in_the_layer_that_gives_it_out(train):
    """Simulated by CPU autocast to float16 and weights that are far too large."""
    run = train(
        Digits(autocast=torch.float16, change=lambda model: model[3].weight.data.mul_(5e5)),
        asks={0: ("numerics", {"steps": 2})},
        max_steps=3,
    )
    finding = only(run.reports[0], "error", "3")
    assert "float16 overflow" in finding.what
    assert (finding.since, finding.before) == (1, True)


def test_gradients_that_overflow_in_fp16_are_seen_though_the_scaler_passes_their_steps_over(train):
    """Simulated by CPU autocast to float16 and a gradient scaler with an absurd scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    run = train(Digits(autocast=torch.float16, scaler=scaler, epochs=1), asks={2: ("numerics", {"steps": 6})})
    (finding,) = [f for f in run.reports[2].findings if "scaler passes steps over" in f.what]
    assert (finding.severity, finding.since, finding.before) == ("error", 3, True)
    assert finding.evidence["passed over"] == "6 of 6"
    assert finding.where in dict(run.model.named_parameters())
    with onthefly.connect(run.store) as client:  # the run has ended; its scale was recorded
        assert any("scaler passes steps over" in f.what for f in client.report("numerics").findings)


def test_a_scheduler_that_was_never_stepped_is_found_once_it_should_have_been(train):
    run = train(
        Digits(scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1)),
        asks={0: ("health", {"steps": 5}), PER_EPOCH + 2: ("health", {"steps": 5})},
    )
    assert not found(run.reports[0], "warning", "scheduler")
    assert only(run.reports[PER_EPOCH + 2], "warning", "scheduler").since == PER_EPOCH


def test_clipping_by_the_script_or_the_session_is_told_by_the_norms(train):
    for where, run in (
        ("script", train(Digits(clip=0.1), asks={0: ("gradients", {})}, store="script")),
        ("session", train(Digits(), asks={0: ("gradients", {})}, store="session", grad_clip=0.1)),
    ):
        assert "clipped in 100% of the steps" in run.reports[0].facts, where
        assert [f.what for f in run.reports[0].findings if f.severity != "note"] == []
