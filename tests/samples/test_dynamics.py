"""Training dynamics: what they say of each sample is what a plain loop over its losses says, whatever came in between."""

import functools
import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.utils import backend_registration

from onthefly.checkpoints import load_checkpoint, save_checkpoint
from onthefly.errors import InvalidCommandError, StateMismatchError
from onthefly.samples.dynamics import Dynamics
from onthefly.samples.dynamics_columns import read_columns

unhurried = settings(deadline=None)  # the machine may be busy
LENGTH = 9
NAMES = {
    "seen", "last_loss", "mean_loss", "variability", "max_loss", "forgotten", "known", "mean_confidence",
    "confidence_variability", "mean_margin",
}  # fmt: skip

losses = st.floats(-4, 20, width=32) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 0.25])
margins = st.floats(-9, 9, width=32) | st.just(math.nan)


@st.composite
def batches(draw):
    """Several batches of (indices, losses, correct or None, margins or None); samples come more than once in one."""
    several = []
    for _ in range(draw(st.integers(0, 8))):
        indices = draw(st.lists(st.integers(0, LENGTH - 1), max_size=12))
        one_each = functools.partial(st.lists, min_size=len(indices), max_size=len(indices))
        correct, margin = st.none() | one_each(st.booleans()), st.none() | one_each(margins)
        several.append((indices, draw(one_each(losses)), draw(correct), draw(margin)))
    return several


def recorded(several, *, length=LENGTH, into=None):
    dynamics = Dynamics(length) if into is None else into
    for indices, loss, correct, margin in several:
        dynamics.record(indices, torch.tensor(loss), correct, None if margin is None else torch.tensor(margin))
    return dynamics


class Plain:
    """One sample's recordings, kept one and all."""

    def __init__(self):
        self.losses, self.margins, self.right = [], [], []

    def row(self):
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        confidence = [math.exp(-max(loss, 0)) for loss in finite]
        margin = [m for m, loss in zip(self.margins, self.losses, strict=True) if math.isfinite(loss)]
        return {
            "seen": len(self.losses),
            "last_loss": self.losses[-1] if self.losses else math.nan,
            "mean_loss": np.mean(finite) if finite else math.nan,
            "variability": np.std(finite) if finite else math.nan,
            "max_loss": max(finite, default=math.nan),
            "forgotten": sum(a and not b for a, b in zip(self.right, self.right[1:], strict=False)),
            "known": bool(self.right and self.right[-1]),
            "mean_confidence": np.mean(confidence) if finite else math.nan,
            "confidence_variability": np.std(confidence) if finite else math.nan,
            "mean_margin": np.mean(margin) if finite else math.nan,
        }


def plainly(several):
    samples = [Plain() for _ in range(LENGTH)]
    for indices, loss, correct, margin in several:
        for place, index in enumerate(indices):
            sample = samples[index]
            sample.losses.append(loss[place])
            sample.margins.append(math.nan if margin is None else margin[place])
            sample.right.append(loss[place] < math.log(2) if correct is None else correct[place])
    return [sample.row() for sample in samples]


def bits(state):
    return None if state["values"] is None else state["values"].numpy().tobytes()


def the_same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n], equal_nan=a[n].dtype.kind == "f") for n in a)


@unhurried
@given(batches())
def test_the_columns_are_what_a_plain_loop_over_each_samples_recordings_gives(several):
    columns = recorded(several).columns()
    rows = plainly(several)
    assert columns.keys() == NAMES
    for name in NAMES:
        wanted = np.array([row[name] for row in rows])
        assert columns[name].dtype == {"i": np.int64, "b": np.bool_, "f": np.float32}[wanted.dtype.kind]
        # Statistics are kept in float32. A deviation that is rounded away is as small as the square root of that.
        np.testing.assert_allclose(columns[name], wanted, rtol=1e-4, atol=2e-3 if "variability" in name else 1e-5)


@unhurried
@given(batches(), batches())
def test_after_a_state_round_trip_recording_goes_on_bit_for_bit(before, after):
    straight = recorded(before)
    resumed = recorded(after)  # it had a life of its own
    resumed.load_state_dict(straight.state_dict())
    assert bits(resumed.state_dict()) == bits(straight.state_dict())
    assert resumed.recorded == straight.recorded
    recorded(after, into=straight)
    recorded(after, into=resumed)
    assert bits(resumed.state_dict()) == bits(straight.state_dict())
    assert the_same(resumed.columns(), straight.columns())


@settings(deadline=None, max_examples=10)
@given(batches(), batches())
def test_a_checkpoint_brings_them_back_bit_for_bit(tmp_path_factory, before, after):
    path = tmp_path_factory.mktemp("checkpoint") / "last.safetensors"
    dynamics = recorded(before)
    save_checkpoint(path, {"dynamics": dynamics})
    saved = bits(dynamics.state_dict())
    recorded(after, into=dynamics)  # what was loaded is a copy: this changes nothing of it
    again = Dynamics(LENGTH)
    load_checkpoint(path, {"dynamics": again})
    assert bits(again.state_dict()) == saved
    recorded(after, into=again)
    assert bits(again.state_dict()) == bits(dynamics.state_dict())


@unhurried
@given(batches())
def test_the_same_numbers_in_whatever_container_are_the_same_recordings(several):
    wanted = recorded(several)
    arrays = Dynamics(LENGTH)
    for indices, loss, correct, margin in several:
        arrays.record(
            torch.tensor(indices, dtype=torch.int32),
            np.array(loss, np.float64),
            None if correct is None else np.array(correct, bool),
            None if margin is None else list(margin),
        )
    assert the_same(arrays.columns(), wanted.columns())
    assert bits(arrays.state_dict()) == bits(wanted.state_dict())


@unhurried
@given(batches(), st.sets(st.integers(0, 7)))
def test_when_batches_are_applied_makes_no_difference(several, looked):
    at_once = recorded(several * 5)
    bit_by_bit = Dynamics(LENGTH)
    for number, batch in enumerate(several * 5):
        recorded([batch], into=bit_by_bit)
        if number % 8 in looked:
            bit_by_bit.columns()
    assert bits(bit_by_bit.state_dict()) == bits(at_once.state_dict())


def test_a_sample_that_is_twice_in_a_batch_counts_twice_in_order():
    dynamics = Dynamics(3)
    dynamics.record([1, 1, 0, 1], torch.tensor([0.1, 5.0, 2.0, 0.2]))
    columns = dynamics.columns()
    assert columns["seen"].tolist() == [1, 3, 0]
    assert columns["last_loss"][:2].tolist() == [2.0, np.float32(0.2)]
    assert columns["forgotten"].tolist() == [0, 1, 0]
    assert columns["known"].tolist() == [False, True, False]


def test_samples_that_were_never_recorded_have_no_values():
    for dynamics in (Dynamics(4), recorded([([0], [1.0], None, None)], length=4)):
        columns = dynamics.columns()
        assert {name: column.shape for name, column in columns.items()} == dict.fromkeys(NAMES, (4,))
        for name, column in columns.items():
            assert np.isnan(column[1:]).all() if column.dtype.kind == "f" else not column[1:].any(), name


def test_a_loss_that_is_no_number_is_seen_and_spoils_nothing():
    dynamics = Dynamics(1)
    for loss in (math.nan, 1.0, math.inf, 3.0, -math.inf, math.nan):
        dynamics.record([0], [loss])
    columns = {name: column[0] for name, column in dynamics.columns().items()}
    assert columns["seen"] == 6
    assert math.isnan(columns["last_loss"])
    assert (columns["mean_loss"], columns["variability"], columns["max_loss"]) == (2, 1, 3)


def test_the_mean_margin_is_there_only_if_every_recording_had_one():
    dynamics = Dynamics(2)
    dynamics.record([0, 1], [1.0, 1.0], margins=[2.0, 4.0])
    dynamics.record([0, 1], [1.0, math.nan], margins=[6.0, math.nan])
    assert dynamics.columns()["mean_margin"].tolist() == [4.0, 4.0]
    dynamics.record([0], [1.0])
    dynamics.record([0], [1.0], margins=[1.0])
    assert np.isnan(dynamics.columns()["mean_margin"]).tolist() == [True, False]


def test_without_being_told_a_sample_is_known_when_the_true_class_has_more_than_half():
    logits = torch.tensor([[1.0, 0.9, -9.0], [0.9, 1.0, -9.0]])
    dynamics = Dynamics(2)
    dynamics.record([0, 1], cross_entropy(logits, torch.tensor([0, 0]), reduction="none"))
    assert dynamics.columns()["known"].tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_losses_of_any_dtype_and_in_a_graph_are_taken(dtype):
    dynamics = Dynamics(3)
    losses = torch.tensor([0.0, 1.0, 2.0]).to(dtype)
    dynamics.record(np.array([2, 0, 1]), losses.requires_grad_() * 1 if losses.is_floating_point() else losses)
    assert dynamics.columns()["last_loss"].tolist() == [1.0, 2.0, 0.0]


def test_numbers_beyond_float32_and_a_strict_caller_raise_nothing():
    dynamics = Dynamics(3)
    with np.errstate(all="raise"):
        for loss in (1e30, -1e30, 3e38):
            dynamics.record([0, 1], np.array([loss, 1e300]))
        columns = dynamics.columns()
    assert columns["seen"].tolist() == [3, 3, 0]
    assert columns["max_loss"][0] == np.float32(3e38)
    assert columns["mean_loss"][0] == np.float32(1e38)
    assert np.isinf(columns["variability"][0])  # larger than a float32 can be
    assert np.isinf(columns["last_loss"][1])
    assert np.isnan(columns["mean_loss"][1])


def test_what_the_caller_does_with_its_arrays_afterwards_does_not_matter():
    dynamics = Dynamics(2)
    indices, losses, correct, margins = np.array([0, 1]), torch.tensor([1.0, 2.0]), np.ones(2, bool), np.ones(2)
    dynamics.record(indices, losses, correct, margins)
    for array in (indices, losses, correct, margins):
        array[:] = 0
    for column in dynamics.columns().values():
        column[:] = 0
    columns = dynamics.columns()
    assert columns["last_loss"].tolist() == [1.0, 2.0]
    assert columns["known"].tolist() == [True, True]
    assert columns["mean_margin"].tolist() == [1.0, 1.0]


A_DEVICE = """
    import torch
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
    from onthefly.samples.dynamics import Dynamics

    _setup_privateuseone_for_python_backend("elsewhere")

    class Far(torch.Tensor):
        @staticmethod
        def __new__(cls, near):
            far = torch._C._acc.create_empty_tensor(near.shape, near.dtype)
            far.__class__ = cls
            return far

        def __init__(self, near):
            self.near = near

    def implements(name):
        return torch.library.impl(f"aten::{name}", "privateuseone")

    implements("detach")(lambda far: Far(far.near))
    implements("clone")(lambda far, memory_format=None: Far(far.near.clone()))
    implements("cat")(lambda fars, dim=0: Far(torch.cat([far.near for far in fars], dim)))
    implements("empty.memory_format")(lambda size, dtype=None, **more: Far(torch.empty(size, dtype=dtype)))
    implements("empty_strided")(lambda size, stride, dtype=None, **more: Far(torch.empty(size, dtype=dtype)))
    reads = []

    @implements("_copy_from")
    def copy(source, target, non_blocking=False):
        reads.extend([source] * (not isinstance(target, Far)))
        getattr(target, "near", target).copy_(getattr(source, "near", source))
        return target

    near, far = Dynamics(4), Dynamics(4)
    for step in range(9):
        losses = torch.rand(3)
        on_device = losses.to("elsewhere")
        near.record([0, 1, 3], losses, losses < 0.5, -losses)
        far.record([0, 1, 3], on_device, (losses < 0.5).to("elsewhere"), -losses)
        on_device.near.fill_(7)  # the next step overwrites it
    assert not reads
    assert torch.equal(far.state_dict()["values"], near.state_dict()["values"])
    assert len(reads) == 2
"""


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot play a device",
)
def test_losses_on_a_device_are_the_same_recordings_and_are_not_waited_for():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(A_DEVICE)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_nothing_is_allocated_before_the_first_recording_and_40_bytes_a_sample_then():
    dynamics = Dynamics(1000)
    dynamics.record([], [])
    assert not dynamics.recorded
    assert dynamics.state_dict() == {"length": 1000, "values": None}
    dynamics.record([5], [1.0])
    assert dynamics.recorded
    assert dynamics.state_dict()["values"].nbytes == 40 * 1000


WRONG = {
    "an index beyond the data set": (([0, 4], [1.0, 1.0]), "has 4"),
    "a negative index": (([-1, 0], [1.0, 1.0]), "-1"),
    "float indices": (([0.0, 1.0], [1.0, 1.0]), "whole numbers"),
    "boolean indices": (([True, False], [1.0, 1.0]), "whole numbers"),
    "indices in two dimensions": (([[0, 1]], [1.0, 1.0]), "one dimension"),
    "an unsigned index that is no int64": ((np.array([2**63 + 1], np.uint64), [1.0]), "has 4"),
    "too few losses": (([0, 1], [1.0]), "one number for each of the 2"),
    "the mean of the losses": (([0, 1], torch.tensor(1.0)), 'reduction="none"'),
    "losses of several numbers a sample": (([0, 1], torch.ones(2, 3)), 'reduction="none"'),
    "losses in a column": (([0, 1], torch.ones(2, 1)), 'reduction="none"'),
    "complex losses": (([0, 1], torch.ones(2, dtype=torch.complex64)), "complex64"),
    "losses without values": (([0, 1], torch.ones(2, device="meta")), "one number"),
    "words for losses": (([0, 1], ["high", "low"]), "one number"),
    "too many words on correctness": (([0, 1], [1.0, 1.0], [True]), "correct"),
    "predictions for correctness": (([0, 1], [1.0, 1.0], torch.tensor([3, 1])), "boolean"),
    "too few margins": (([0, 1], [1.0, 1.0], None, [1.0]), "margins"),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("fresh", [True, False], ids=["nothing recorded", "something recorded"])
def test_what_makes_no_sense_is_refused_and_changes_nothing(wrong, fresh):
    arguments, words = wrong
    dynamics = Dynamics(4)
    if not fresh:
        dynamics.record([0, 1], [1.0, 2.0])
    before = bits(dynamics.state_dict())
    with pytest.raises(InvalidCommandError, match=words):
        dynamics.record(*arguments)
    assert bits(dynamics.state_dict()) == before


def test_a_length_that_is_none_is_refused():
    with pytest.raises(InvalidCommandError, match="-1"):
        Dynamics(-1)


def strange(length, values):
    return {"length": length, "values": values}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (strange(3, None), "3 samples, this one has 2"),
        (strange(3, torch.zeros(3, 10)), "3 samples, this one has 2"),
        (strange(2, torch.zeros(3, 10)), "float32"),
        (strange(2, torch.zeros(2, 9)), "float32"),
        (strange(2, torch.zeros(2, 10, dtype=torch.float64)), "float32"),
        (strange(2, [0.0]), "float32"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(state, words):
    dynamics = Dynamics(2)
    dynamics.record([0, 1], [1.0, 2.0])
    before = bits(dynamics.state_dict())
    with pytest.raises(StateMismatchError, match=words):
        dynamics.load_state_dict(state)
    assert bits(dynamics.state_dict()) == before


def test_the_state_of_dynamics_that_recorded_nothing_goes_back_to_nothing():
    dynamics = Dynamics(2)
    dynamics.record([0], [1.0])
    dynamics.load_state_dict(Dynamics(2).state_dict())
    assert not dynamics.recorded
    assert not dynamics.columns()["seen"].any()


@pytest.mark.parametrize("values", [np.zeros((2, 9), np.float32), np.zeros((2, 10)), np.zeros(20, np.float32)])
def test_rows_of_another_form_are_refused(values):
    with pytest.raises(StateMismatchError, match="float32"):
        read_columns(values)


def test_rows_of_anything_are_read_without_a_word():
    for anything in (np.nan, np.inf, -1.0, 1e38):
        assert read_columns(np.full((2, 10), anything, np.float32)).keys() == NAMES


def test_stored_rows_are_read_without_torch():
    script = "import sys, onthefly.samples.dynamics_columns; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
