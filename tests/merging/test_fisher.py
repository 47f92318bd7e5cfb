"""A diagonal Fisher is what a plain loop of single-sample backward passes gives, and takes nothing from the training."""

import numpy as np
import pytest
import torch
from merging_models import (
    CLASSES,
    Transformer,
    assert_same,
    cnn,
    data_for,
    in_batches,
    in_the_middle_of_training,
    mlp,
    trace_of,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from onthefly.errors import CommandError, InvalidCommandError, MissingPartError
from onthefly.merging.fisher import diagonal_fisher
from onthefly.samples.loading import batches
from onthefly.samples.scan import per_sample_loss

cross_entropy = per_sample_loss(nn.CrossEntropyLoss())
MODELS = pytest.mark.parametrize("make", [mlp, cnn, Transformer])


def by_hand(model, inputs, targets):
    """The plain way: one sample after the other, through the live parameters."""
    model.eval()
    totals = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for x, y in zip(inputs, targets, strict=True):
        model.zero_grad()
        F.cross_entropy(model(x.unsqueeze(0)), y.unsqueeze(0)).backward()
        for name, p in model.named_parameters():
            totals[name] += p.grad.double().square()
    model.zero_grad()
    return {name: (total / len(inputs)).float() for name, total in totals.items()}


def assert_close(found, expected, rtol=2e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=rtol * value.abs().max().item(), msg=name)


@MODELS
@pytest.mark.parametrize("budget", [1 << 30, 1])
def test_it_is_what_single_samples_give(make, budget):
    model = make()
    inputs, targets = data_for(model)
    found = diagonal_fisher(model, in_batches(inputs, targets), cross_entropy, budget=budget)
    assert (found.path, found.samples, found.kind) == ("vmap" if budget > 1 else "loop", 21, "empirical")
    assert_close(found.diagonal, by_hand(model, inputs, targets))


def test_chunks_do_not_matter():
    model = mlp(40)
    inputs, targets = data_for(model)
    for kind in ("empirical", "true"):
        whole = diagonal_fisher(model, [(inputs, targets)], cross_entropy, kind=kind)
        for size, budget in [(8, 1 << 30), (21, 60_000), (5, 1), (1, 1 << 30)]:
            found = diagonal_fisher(model, in_batches(inputs, targets, size), cross_entropy, kind=kind, budget=budget)
            assert_close(found.diagonal, whole.diagonal, rtol=1e-6)


def test_a_true_fisher_is_its_closed_form():
    """Of softmax(W x + b): the mean over x of p (1 - p) x^2, and of p (1 - p)."""
    model = nn.Sequential(nn.Linear(6, CLASSES))
    inputs, targets = data_for(mlp())
    p = model(inputs).softmax(1).double()
    spread = (p * (1 - p)).detach()
    found = diagonal_fisher(model, in_batches(inputs, targets), kind="true")
    expected = {"0.weight": spread.T @ inputs.double().square() / 21, "0.bias": spread.mean(0)}
    assert_close(found.diagonal, {name: value.float() for name, value in expected.items()})


@pytest.mark.parametrize("budget", [1 << 30, 1])
def test_a_class_that_cannot_be_counts_for_nothing(budget):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, CLASSES)

        def forward(self, inputs):
            return self.layer(inputs).masked_fill(torch.arange(CLASSES) == 0, -torch.inf)

    found = diagonal_fisher(Masked(), [data_for(mlp())], kind="true", budget=budget)
    assert found.samples == 21
    assert not found.diagonal["layer.bias"][0]
    assert found.diagonal["layer.bias"][1:].all()


def test_with_many_classes_labels_are_drawn_and_right_in_the_mean():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 33))
    inputs, targets = torch.randn(1, 2).expand(20_000, 2), torch.zeros(20_000, dtype=torch.long)
    found = diagonal_fisher(model, [(inputs, targets)], kind="true", samples=20_000, seed=7)
    again = diagonal_fisher(model, [(inputs, targets)], kind="true", samples=20_000, seed=7)
    other = diagonal_fisher(model, [(inputs, targets)], kind="true", samples=20_000, seed=8)
    p = model(inputs[:1]).softmax(1)[0].detach()
    np.testing.assert_allclose(found.diagonal["0.bias"], p * (1 - p), rtol=0.2)
    assert torch.equal(found.diagonal["0.bias"], again.diagonal["0.bias"])
    assert not torch.equal(found.diagonal["0.bias"], other.diagonal["0.bias"])


@MODELS
@pytest.mark.parametrize("budget", [1 << 30, 1])
def test_nothing_is_changed(make, budget):
    model = in_the_middle_of_training(make())
    pairs = in_batches(*data_for(model))
    before = trace_of(model)
    for kind in ("empirical",) if make is Transformer else ("empirical", "true"):
        diagonal_fisher(model, pairs, cross_entropy, kind=kind, budget=budget)
        assert_same(before, trace_of(model))


def test_nothing_is_changed_by_a_failure():
    model = in_the_middle_of_training(cnn())
    before = trace_of(model)
    with pytest.raises(RuntimeError):
        diagonal_fisher(model, [(torch.zeros(3, 2, 8, 8), torch.zeros(3, dtype=torch.long))], cross_entropy)
    assert_same(before, trace_of(model))


def test_gradients_in_flight_stay_what_they_are():
    model = mlp()
    inputs, targets = data_for(model)
    model.eval()
    loss = F.cross_entropy(model(inputs), targets)
    diagonal_fisher(model, [(inputs, targets)], cross_entropy)
    loss.backward()  # raises if a parameter was written to
    assert all(p.grad is not None for p in model.parameters())


def test_frozen_and_tied_parameters_count_once_under_their_plain_names():
    model = Transformer()
    expected = diagonal_fisher(model, [data_for(model)], cross_entropy).diagonal
    assert "head.weight" not in expected
    assert "embedding.weight" in expected
    model.requires_grad_(False)
    found = diagonal_fisher(torch.compile(nn.DataParallel(model), backend="eager"), [data_for(model)], cross_entropy)
    assert_close(found.diagonal, expected)


class Drawing(nn.Module):
    """Has dropout also in evaluation."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, CLASSES)

    def forward(self, inputs):
        return F.dropout(self.layer(inputs), 0.5, training=True)


class Branching(Drawing):
    def forward(self, inputs):
        return self.layer(inputs) if inputs.sum() > 0 else self.layer(-inputs)


@pytest.mark.parametrize(
    ("make", "words"),
    [(Drawing, "random operation"), (Branching, "control flow"), (lambda: Transformer(sparse=True), "Sparse")],
)
def test_a_model_that_vmap_cannot_run_goes_sample_by_sample_and_says_so(make, words):
    model = make()
    data = data_for(model if isinstance(model, Transformer) else mlp())
    found = diagonal_fisher(model, in_batches(*data), cross_entropy)
    assert found.path == "loop"
    assert words in found.reason
    again = diagonal_fisher(model, in_batches(*data, 5), cross_entropy)
    for name, value in found.diagonal.items():
        assert torch.equal(value, again.diagonal[name])
    if not isinstance(model, Drawing) or isinstance(model, Branching):
        dense = Transformer() if isinstance(model, Transformer) else model
        assert_close(found.diagonal, by_hand(dense, *data))


def test_bf16_squares_are_not_rounded():
    model = mlp().bfloat16()
    inputs, targets = data_for(mlp())
    inputs = inputs.bfloat16()
    found = diagonal_fisher(model, [(inputs, targets)], cross_entropy)
    assert found.path == "vmap"
    assert_close(found.diagonal, by_hand(model, inputs, targets), rtol=0.02)


def test_under_autocast_it_is_near_what_it_is_without():
    model = mlp()
    data = data_for(model)
    expected = diagonal_fisher(model, [data], cross_entropy)
    found = diagonal_fisher(model, [data], cross_entropy, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert found.path == "vmap"
    assert any(not torch.equal(found.diagonal[name], value) for name, value in expected.diagonal.items())
    assert_close(found.diagonal, expected.diagonal, rtol=0.1)


@pytest.mark.parametrize("budget", [1 << 30, 1])
def test_samples_without_a_target_do_not_count(budget):
    model = mlp()
    inputs, targets = data_for(model)
    expected = by_hand(model, inputs[5:], targets[5:])
    targets[:5] = -100
    found = diagonal_fisher(model, in_batches(inputs, targets), cross_entropy, budget=budget)
    assert found.samples == 16
    assert_close(found.diagonal, expected)
    with pytest.raises(MissingPartError, match="target that counts"):
        diagonal_fisher(model, [(inputs, torch.full_like(targets, -100))], cross_entropy)


def test_it_takes_the_first_samples_of_a_loader_at_its_indices():
    model = mlp()
    inputs, targets = data_for(model)
    chosen = [20, 3, 11, 7, 0, 9]
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=4, shuffle=True)
    found = diagonal_fisher(model, batches(loader, chosen), cross_entropy, samples=5)
    assert found.samples == 5
    assert_close(found.diagonal, by_hand(model, inputs[chosen[:5]], targets[chosen[:5]]))


def test_inputs_may_be_nested():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, inputs):
            return self.inner(inputs["x"] + inputs["more"][0])

    model = Nested()
    inputs, targets = data_for(mlp())
    batch = ({"x": inputs, "more": (inputs, targets)}, targets)
    expected = by_hand(model.inner, 2 * inputs, targets)
    for budget in (1 << 30, 1):
        found = diagonal_fisher(model, [batch], cross_entropy, budget=budget)
        assert_close(found.diagonal, {f"inner.{name}": value for name, value in expected.items()})


def test_wrong_arguments_say_what_to_do():
    model = mlp()
    inputs, targets = data_for(model)
    with pytest.raises(MissingPartError, match="per_sample="):
        diagonal_fisher(model, [(inputs, targets)])
    with pytest.raises(InvalidCommandError, match="use kind='empirical'"):
        diagonal_fisher(model, [(inputs, torch.randn(21, CLASSES))], kind="true")
    with pytest.raises(InvalidCommandError, match="'empirical' or 'true'"):
        diagonal_fisher(model, [(inputs, targets)], kind="exact")
    with pytest.raises(InvalidCommandError, match="1 or more"):
        diagonal_fisher(model, [(inputs, targets)], cross_entropy, samples=0)
    with pytest.raises(InvalidCommandError, match=r'reduction="none"'):
        diagonal_fisher(model, [(inputs, targets)], F.cross_entropy)
    with pytest.raises(MissingPartError, match="no batch"):
        diagonal_fisher(model, [], cross_entropy)
    with pytest.raises(MissingPartError, match="pairs"):
        diagonal_fisher(model, [inputs], cross_entropy)
    with pytest.raises(InvalidCommandError, match="told apart"):
        diagonal_fisher(model, [(["a", "b"], targets[:2])], cross_entropy)
    with torch.no_grad():
        model[0].bias[0] = torch.nan
    with pytest.raises(CommandError, match="not finite"):
        diagonal_fisher(model, [(inputs, targets)], cross_entropy)
