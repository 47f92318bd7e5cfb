"""What an optimizer is after a merge."""

import pytest
import torch
from torch import nn

from onthefly.errors import StateMismatchError
from onthefly.merging import optimizers
from onthefly.state.train_state import TrainState


def trained(steps, optimizer=torch.optim.AdamW, lr=0.1):
    """A model and its optimizer's stored form."""
    torch.manual_seed(steps)
    model = nn.Linear(3, 2)
    made = optimizer(model.parameters(), lr=lr)
    for _ in range(steps):
        model(torch.randn(4, 3)).square().mean().backward()
        made.step()
        made.zero_grad()
    state = TrainState.of({"model": model, "optimizer": made})
    return state, state.capture()


def test_reset_is_an_optimizer_without_a_past():
    state, value = trained(3, lr=0.02)
    value["optimizer"] = optimizers.merged(value["optimizer"], [], "reset")
    state.restore(value)
    made = state.optimizers["optimizer"]
    assert len(made.state) == 0
    assert made.param_groups[0]["lr"] == 0.02


def test_average_is_that_of_the_moments_and_the_largest_count():
    (live, value), (_, one), (_, two) = trained(1), trained(3), trained(5)
    value["optimizer"] = optimizers.merged(value["optimizer"], [one["optimizer"], two["optimizer"]], "average")
    live.restore(value)
    for index, entry in enumerate(live.optimizers["optimizer"].state.values()):
        assert float(entry["step"]) == 5
        for key in ("exp_avg", "exp_avg_sq"):
            parts = [stored["optimizer"]["state"][index][key].double() for stored in (one, two)]
            torch.testing.assert_close(entry[key].double(), sum(parts) / 2)


def test_first_is_the_first_and_the_groups_stay_live():
    (live, value), (_, one), (_, two) = trained(1, lr=0.5), trained(3), trained(5)
    value["optimizer"] = optimizers.merged(value["optimizer"], [one["optimizer"], two["optimizer"]], "first")
    live.restore(value)
    made = live.optimizers["optimizer"]
    assert made.param_groups[0]["lr"] == 0.5
    assert [float(entry["step"]) for entry in made.state.values()] == [3, 3]


def test_what_does_not_fit_is_told():
    (_, value), (_, other) = trained(1), trained(1, torch.optim.SGD)
    with pytest.raises(StateMismatchError, match="policy `reset`"):
        optimizers.merged(value["optimizer"], [other["optimizer"]], "first")
    (_, one), (_, none) = trained(2), trained(0)
    with pytest.raises(StateMismatchError, match="entries"):
        optimizers.merged(value["optimizer"], [one["optimizer"], none["optimizer"]], "average")
