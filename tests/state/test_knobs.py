"""Live values: what a step sees changes, what a scheduler sees does not."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from onthefly.errors import InvalidCommandError, StateMismatchError, UnsupportedValueError
from onthefly.state.knobs import Knobs
from onthefly.state.tree import flatten, unflatten


class Training:
    """An SGD whose every step subtracts exactly its learning rate, so that a weight tells what the step saw."""

    def __init__(self, schedule=None, lr=0.5, groups=1, **options):
        self.weights = [nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(groups)]
        self.optimizer = torch.optim.SGD([{"params": [w]} for w in self.weights], lr=lr, **options)
        self.scheduler = schedule(self.optimizer) if schedule else None
        self.knobs = Knobs({"optimizer": self.optimizer}, {"scheduler": self.scheduler})

    def step(self):
        """The learning rate that each group's step used."""
        before = [w.item() for w in self.weights]
        for w in self.weights:
            w.grad = torch.ones_like(w)
        self.optimizer.step()
        if self.scheduler:
            self.scheduler.step()
        return [b - w.item() for b, w in zip(before, self.weights, strict=True)]


def cosine(optimizer):
    return CosineAnnealingLR(optimizer, 10)


def test_without_a_scheduler_the_group_value_itself_changes():
    training = Training()
    changes = training.knobs.set({"lr": 0.25})
    assert [(c.name, c.before, c.after) for c in changes] == [("optimizer.0.lr", 0.5, 0.25)]
    assert training.step() == [0.25]
    assert training.optimizer.param_groups[0]["lr"] == 0.25


def test_under_a_scheduler_the_step_sees_a_factor_and_the_scheduler_its_own_values():
    plain, steered = Training(cosine), Training(cosine)
    steered.knobs.set({"lr": 0.25})
    for _ in range(5):
        (expected,) = plain.step()
        assert steered.step() == pytest.approx([expected / 2], abs=1e-15)
        assert steered.optimizer.param_groups[0]["lr"] == plain.optimizer.param_groups[0]["lr"]
        assert steered.scheduler.state_dict() == plain.scheduler.state_dict()


def test_hold_fixes_the_value_and_release_gives_it_back():
    plain, steered = Training(cosine), Training(cosine)
    steered.knobs.set({"lr": 0.125}, hold=True)
    for _ in range(3):
        plain.step()
        assert steered.step() == [0.125]
    steered.knobs.set({"lr": None}, release=True)
    assert steered.step()[0] == pytest.approx(plain.step()[0], abs=1e-15)


def test_setting_a_value_that_it_has_changes_nothing():
    training = Training(cosine)
    before = flatten(training.knobs.state_dict())
    assert training.knobs.set({"lr": 0.5}) == []
    assert flatten(training.knobs.state_dict()) == before
    training.knobs.set({"lr": 0.3})
    assert training.knobs.set({"lr": training.knobs.values()["optimizer.0.lr"]}) == []


def test_a_text_multiplies_what_the_step_sees():
    training = Training(cosine)
    training.knobs.set({"lr": "*0.5"})
    training.knobs.set({"lr": "*0.5"})
    assert training.knobs.values()["optimizer.0.lr"] == 0.125


def test_one_group_is_named_by_its_number():
    training = Training(groups=2)
    training.knobs.set({"optimizer.1.lr": 0.125})
    assert training.step() == [0.5, 0.125]


def test_momentum_and_betas_keep_their_kind():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight])
    knobs = Knobs({"optimizer": optimizer}, {})
    knobs.set({"betas": [0.8, 0.9]})
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_a_scheduler_that_drives_momentum_too_finds_its_own():
    training = Training(lambda o: OneCycleLR(o, 0.5, total_steps=10), momentum=0.9)
    base = training.optimizer.param_groups[0]["momentum"]
    training.knobs.set({"momentum": base / 2})
    training.optimizer.register_step_pre_hook(lambda *_: seen.append(training.optimizer.param_groups[0]["momentum"]))
    seen = []
    training.step()
    assert seen == [base / 2]
    assert training.optimizer.param_groups[0]["momentum"] != base / 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lr": -1.0}, "at least 0"),
        ({"lr": float("nan")}, "finite"),
        ({"lr": "fast"}, "not of that kind"),
        ({"lr": "*much"}, "cannot be multiplied"),
        ({"nesterov": 1.5}, "not of that kind"),
        ({"speed": 1}, "there is nothing named 'speed' to set; there are: .*lr"),
        ({"lr": 0.1, "speed": 1}, "nothing named 'speed'"),
        ({"grad_clip": "tight"}, "not of that kind"),
    ],
)
def test_a_refused_value_changes_nothing(values, words):
    training = Training(cosine)
    with pytest.raises(InvalidCommandError, match=words):
        training.knobs.set(values)
    assert training.knobs.values()["optimizer.0.lr"] == 0.5
    assert training.knobs.state_dict()["overrides"] == {}


def test_no_factor_turns_zero_into_something():
    training = Training(lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda _: 0.0))
    with pytest.raises(InvalidCommandError, match="use hold"):
        training.knobs.set({"lr": 0.1})
    training.knobs.set({"lr": 0.1}, hold=True)
    assert training.step() == pytest.approx([0.1])


def test_clip_bounds_the_norm_that_the_step_sees():
    training = Training(lr=1.0)
    training.knobs.set({"grad_clip": 0.25})
    assert training.step() == pytest.approx([0.25], rel=1e-5)
    training.knobs.set({"grad_clip": None})
    assert training.step() == [1.0]


def test_a_step_that_raises_leaves_no_factor_behind():
    training = Training(cosine)
    training.knobs.set({"lr": 0.25})
    training.weights[0].grad = torch.zeros(1, dtype=torch.float64)
    boom = training.optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        training.optimizer.step()
    boom.remove()
    assert training.step() == [0.25]
    assert training.knobs.values()["optimizer.0.lr"] == pytest.approx(
        0.5 * training.optimizer.param_groups[0]["lr"], abs=1e-15
    )


def test_a_knob_keeps_its_stored_value_when_it_is_registered_later():
    first = Knobs({}, {})
    first.register("mixup", 0.2)
    first.set({"mixup": 0.7})
    second = Knobs({}, {})
    second.load_state_dict(unflatten(*flatten(first.state_dict())))
    assert second.unclaimed == ["mixup"]
    assert second.register("mixup", 0.2).value == 0.7
    assert second.unclaimed == []


def test_everything_comes_back_from_a_stored_state():
    first = Training(cosine, groups=2)
    first.knobs.set({"optimizer.0.lr": 0.25, "grad_clip": 0.5})
    first.knobs.set({"optimizer.1.lr": 0.1}, hold=True)
    second = Training(cosine, groups=2)
    second.knobs.load_state_dict(unflatten(*flatten(first.knobs.state_dict())))
    for _ in range(3):
        assert second.step() == first.step()


def test_an_override_of_a_group_that_is_not_there_is_refused():
    first = Training(cosine, groups=2)
    first.knobs.set({"optimizer.1.lr": 0.25})
    second = Training(cosine)
    with pytest.raises(StateMismatchError, match=r"optimizer\.1\.lr"):
        second.knobs.load_state_dict(first.knobs.state_dict())
    assert second.step() == [0.5]


def test_a_warm_up_raises_what_the_step_sees_and_leaves_the_scheduler_alone():
    plain, training = Training(cosine), Training(cosine)
    training.knobs.set({"lr": "*0.5"})
    training.knobs.load_state_dict(training.knobs.warmed_up(training.knobs.state_dict(), 3))
    for part in (0.25, 0.5, 0.75, 1.0, 1.0):
        assert training.optimizer.param_groups[0]["lr"] == plain.optimizer.param_groups[0]["lr"]
        assert training.step() == [pytest.approx(part * 0.5 * rate) for rate in plain.step()]
    assert "ramps" not in training.knobs.state_dict()


def test_a_warm_up_goes_on_where_it_was_stored():
    training, other = Training(), Training()
    training.knobs.load_state_dict(training.knobs.warmed_up(training.knobs.state_dict(), 4))
    training.step()
    other.knobs.load_state_dict(unflatten(*flatten(training.knobs.state_dict())))
    steps = [training.step() for _ in range(5)]
    assert steps == [pytest.approx([rate]) for rate in (0.2, 0.3, 0.4, 0.5, 0.5)]
    assert [other.step() for _ in range(5)] == [pytest.approx(step) for step in steps]
    assert other.knobs.state_dict() == Training().knobs.state_dict()


@pytest.mark.parametrize("name", ["grad_clip", "two words", "mixup"])
def test_a_name_that_is_taken_or_not_plain_is_refused(name):
    knobs = Knobs({}, {})
    knobs.register("mixup", 0.2)
    with pytest.raises(UnsupportedValueError, match="cannot name a knob"):
        knobs.register(name, 1)


def test_after_close_the_optimizer_is_left_alone():
    training = Training(cosine)
    training.knobs.set({"lr": 0.25})
    training.knobs.close()
    assert training.step() == [0.5]
