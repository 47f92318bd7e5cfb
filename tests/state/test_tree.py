"""Values come back as they were: type, bits, order, aliasing."""

import json
import math
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onthefly.errors import CorruptCheckpointError, UnsupportedValueError
from onthefly.state.tree import flatten, unflatten


def round_trip(value):
    tree, tensors = flatten(value)
    text = json.dumps(tree, allow_nan=False)
    return unflatten(json.loads(text), {name: tensor.clone() for name, tensor in tensors.items()})


def assert_same(a, b, path="value"):
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.requires_grad) == (b.dtype, b.shape, b.requires_grad), path
        assert a.detach().resolve_conj().contiguous().numpy().tobytes() == b.detach().contiguous().numpy().tobytes(), (
            path
        )
    elif isinstance(a, np.ndarray | np.generic):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), path
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    elif isinstance(a, float) and math.isnan(a):
        assert math.isnan(b), path
    else:
        assert a == b, path
        assert repr(a) == repr(b) or isinstance(a, set | frozenset), path  # -0.0 is not 0.0


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(allow_nan=False), st.binary(),
    st.text(st.characters()), st.sampled_from([torch.bfloat16, torch.device("cpu"), torch.Size([2, 3])]),
    st.sampled_from([np.float32(1.5), np.int64(-3), np.bool_(True), np.array([[1, 2]], dtype=">i2")]),
)  # fmt: skip
keys = st.one_of(st.text(), st.integers(), st.booleans(), st.tuples(st.integers(), st.text()))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner), st.tuples(inner, inner), st.dictionaries(keys, inner),
        st.dictionaries(st.sampled_from(["$tensor", "$x", "a"]), inner),
        st.dictionaries(st.text(), inner).map(OrderedDict), st.sets(st.integers()), st.frozensets(st.text()),
    ),
    max_leaves=20,
)  # fmt: skip


@given(values)
def test_every_supported_value_comes_back_equal_in_type_and_bits(value):
    assert_same(value, round_trip(value))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.zeros(0, 4),
        torch.arange(6.0).reshape(2, 3).t(),
        torch.arange(10)[::2],
        torch.ones(1).expand(4),
        torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.randn(3, dtype=torch.complex128),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.randn(2, 3, dtype=torch.complex64).t().conj(),
        torch.tensor([True, False]),
        torch.randn(3, requires_grad=True),
        torch.nn.Parameter(torch.randn(3), requires_grad=False),
    ],
)
def test_every_kind_of_dense_tensor_comes_back(tensor):
    back = round_trip({"t": tensor})["t"]
    assert_same(tensor, back)
    if tensor.dim() == 4:
        assert back.stride() == tensor.stride()


def test_bfloat16_keeps_its_bits():
    tensor = torch.randn(7).bfloat16()
    assert torch.equal(round_trip(tensor).view(torch.int16), tensor.view(torch.int16))


def test_a_tied_tensor_is_stored_once_and_comes_back_tied():
    weight = torch.nn.Parameter(torch.randn(3))
    assert len(flatten({"a": weight, "b": weight})[1]) == 1
    back = round_trip({"a": weight, "b": weight})
    assert back["a"] is back["b"]


def test_long_lists_of_numbers_travel_as_tensors():
    state = (3, tuple(range(625)), None)
    tree, tensors = flatten(state)
    assert len(tensors) == 1
    assert len(json.dumps(tree)) < 200
    assert_same(state, round_trip(state))


def test_special_mappings_keep_their_type():
    module_state = torch.nn.BatchNorm1d(3).state_dict()
    back = round_trip(module_state)
    assert type(back) is OrderedDict
    assert back._metadata == module_state._metadata
    for value in (Counter({5: 2}), defaultdict(dict, {1: {}})):
        assert_same(value, round_trip(value))
    assert round_trip(defaultdict(list)).default_factory is list


@pytest.mark.parametrize(
    "value", [lambda: 0, object(), np.array([object()]), torch.eye(2).to_sparse(), defaultdict(Counter)]
)
def test_what_cannot_be_stored_is_refused_with_its_path(value):
    with pytest.raises(UnsupportedValueError, match="a/b/1"):
        flatten({"a": {"b": [0, value]}})


def test_a_value_that_contains_itself_is_refused():
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(UnsupportedValueError, match="contain itself"):
        flatten(loop)


@pytest.mark.parametrize(
    "tree",
    [
        {"$tensor": "gone"},
        {"$nonsense": 1},
        {"$dict": [1]},
        {"$npscalar": ["O", "00"]},
        {"$size": "x"},
        {"$float": "00"},
    ],
)
def test_a_malformed_tree_is_a_typed_error(tree):
    with pytest.raises(CorruptCheckpointError):
        unflatten(tree, {})
