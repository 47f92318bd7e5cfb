"""Distances, cosines, signs and barriers are those of the flat vectors."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from onthefly.errors import InvalidCommandError, StateMismatchError
from onthefly.merging import explain
from onthefly.merging.explain import compare, linear_path


def state(seed, scale=1.0):
    draw = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (5, 4), "a.bias": (5,), "b.weight": (3, 5)}
    made = {name: scale * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return {**made, "tracked": torch.tensor(seed), "scalar": torch.tensor(float(seed))}


def flat(weights, names=("a.weight", "a.bias", "b.weight", "scalar")):
    return torch.cat([weights[name].double().flatten() for name in names])


@pytest.mark.parametrize("piece", [3, 1 << 22])
def test_relations_are_those_of_flat_vectors(piece, monkeypatch):
    monkeypatch.setattr(explain, "_PIECE", piece)
    parents, base = [state(1), state(2), state(3)], state(4)
    found = compare(parents, base)
    assert [(c.first, c.second) for c in found] == [(0, 1), (0, 2), (1, 2)]
    for c in found:
        a, b, origin = flat(parents[c.first]), flat(parents[c.second]), flat(base)
        assert c.overall.distance == pytest.approx(((a - b).norm() * 2 / (a.norm() + b.norm())).item())
        assert c.overall.cosine == pytest.approx(F.cosine_similarity(a - origin, b - origin, dim=0).item())
        assert c.overall.agreement == pytest.approx(((a - origin) * (b - origin) > 0).double().mean().item())
    without = compare(parents)[0].overall
    assert without.cosine == pytest.approx(F.cosine_similarity(flat(parents[0]), flat(parents[1]), dim=0).item())
    assert without.agreement is None


def test_the_worst_tensors_come_first():
    first, second = state(1), state(1)
    second["b.weight"] = -second["b.weight"]
    second["a.bias"] = second["a.bias"] * 1.1
    layers = compare([first, second], worst=2)[0].layers
    assert list(layers) == ["b.weight", "a.bias"]
    assert layers["b.weight"].distance == pytest.approx(2)
    assert layers["b.weight"].cosine == pytest.approx(-1)


def test_equal_and_unchanged_parents_have_no_angle():
    found = compare([state(1), state(1)], state(1))[0].overall
    assert (found.distance, found.cosine, found.agreement) == (0, None, None)
    zero = {"a": torch.zeros(3)}
    assert compare([zero, zero])[0].overall.distance == 0


def test_changes_too_small_to_multiply_have_signs():
    tiny = {"a": torch.tensor([1e-200, -1e-200], dtype=torch.float64)}
    other = {"a": torch.tensor([1e-200, 1e-200], dtype=torch.float64)}
    assert compare([tiny, other], {"a": torch.zeros(2, dtype=torch.float64)})[0].overall.agreement == 0.5


def test_parents_that_do_not_fit_are_refused():
    with pytest.raises(InvalidCommandError, match="two parents"):
        compare([state(1)])
    with pytest.raises(StateMismatchError, match=r"a\.bias"):
        compare([state(1), {k: v for k, v in state(1).items() if k != "a.bias"}])
    with pytest.raises(StateMismatchError, match=r"b\.weight has shape \[3, 5\] in one parent and \[2\]"):
        compare([state(1), {**state(1), "b.weight": torch.zeros(2)}])


def test_a_path_goes_straight_and_its_ends_are_the_parents():
    first, second = state(1), state(2)
    seen = []
    linear_path(lambda weights: seen.append(weights) or 0.0, first, second)
    assert len(seen) == 5
    for position, weights in zip((0, 0.25, 0.5, 0.75, 1), seen, strict=True):
        torch.testing.assert_close(flat(weights), (1 - position) * flat(first) + position * flat(second))
    assert [int(weights["tracked"]) for weights in seen] == [1, 1, 1, 2, 2]
    for end, parent in ((seen[0], first), (seen[-1], second)):
        assert all(torch.equal(end[name], value) for name, value in parent.items())
        assert all(end[name].data_ptr() != value.data_ptr() for name, value in parent.items())


def test_half_precision_stays_and_is_rounded_once():
    seen = []
    first, second = {"a": torch.full((2,), 1.0).bfloat16()}, {"a": torch.full((2,), 2.0).bfloat16()}
    linear_path(lambda weights: seen.append(weights["a"]) or 0.0, first, second, points=3)
    assert seen[1].dtype == torch.bfloat16
    assert seen[1].tolist() == [1.5, 1.5]


@pytest.mark.parametrize(
    ("losses", "barrier"),
    [
        ([1.0, 2.0, 3.0], 0.0),
        ([1.0, 4.0, 3.0], 2.0),
        ([1.0, 0.0, 3.0], 0.0),
        ([1.0, math.nan, 3.0], math.inf),
        ([1.0, math.inf, 3.0], math.inf),
        ([math.nan, 1.0, 1.0], math.nan),
    ],
)
def test_a_barrier_is_what_rises_above_the_line(losses, barrier):
    given = iter(losses)
    found = linear_path(lambda weights: next(given), state(1), state(2), points=3)
    assert found.positions == [0.0, 0.5, 1.0]
    assert found.barrier == pytest.approx(barrier, nan_ok=True)


def test_a_permuted_network_is_behind_a_barrier():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
    inputs = torch.randn(200, 2)
    targets = inputs.prod(1, keepdim=True)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        F.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    order = torch.randperm(16)
    first = model.state_dict()
    permuted = {"0.weight": first["0.weight"][order], "0.bias": first["0.bias"][order]}
    second = {**permuted, "2.weight": first["2.weight"][:, order], "2.bias": first["2.bias"]}

    def evaluate(weights):
        with torch.no_grad():
            return F.mse_loss(torch.func.functional_call(model, weights, (inputs,)), targets).item()

    found = linear_path(evaluate, first, second)
    assert found.losses[0] == pytest.approx(found.losses[-1], rel=1e-3)
    assert found.barrier > 2 * found.losses[0]
    assert linear_path(evaluate, first, first).barrier == pytest.approx(0, abs=1e-6)


def test_a_path_needs_two_points_and_parents_that_fit():
    with pytest.raises(InvalidCommandError, match="two points"):
        linear_path(lambda weights: 0.0, state(1), state(2), points=1)
    with pytest.raises(StateMismatchError):
        linear_path(lambda weights: 0.0, state(1), {"a": torch.zeros(1)})
