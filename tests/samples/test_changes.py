import numpy as np
import pytest

from onthefly.errors import UnknownReferenceError
from onthefly.samples.changes import changes


def test_a_classifier_has_learned_what_is_right_now_and_was_wrong():
    before = {"loss": np.float32([2, 1, 0.1, 0.1]), "correct": np.array([False, False, True, True])}
    after = {"loss": np.float32([0.5, 3, 4, 0.1]), "correct": np.array([True, False, False, True])}

    found = changes(before, after)

    assert found.by == "correct"
    assert found.learned.tolist() == [True, False, False, False]
    assert found.forgotten.tolist() == [False, False, True, False]
    assert found.moved() == pytest.approx([1.5, 2, 3.9, 0])


def test_otherwise_a_loss_is_halved_or_doubled():
    found = changes({"loss": np.array([1.0, 1, 1, np.nan])}, {"loss": np.array([0.4, 2.1, 0.6, 1])})

    assert found.by == "loss"
    assert found.learned.tolist() == [True, False, False, False]
    assert found.forgotten.tolist() == [False, True, False, False]
    assert found.moved()[3] == 0


def test_scans_of_different_data_are_refused():
    with pytest.raises(UnknownReferenceError, match="3 and 2"):
        changes({"loss": np.zeros(3)}, {"loss": np.zeros(2)})
