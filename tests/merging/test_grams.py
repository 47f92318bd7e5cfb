"""Gram matrices of layers' inputs are those of an explicit product, and what a layer computes follows from them."""

import pytest
import torch
from merging_models import (
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
from torch.nn.utils import parametrizations

from onthefly.errors import CommandError, MissingPartError
from onthefly.merging import grams
from onthefly.merging.grams import gram_matrices

TARGETS = torch.zeros(12, dtype=torch.long)


def test_of_a_linear_layer_it_is_the_mean_product_of_its_inputs():
    model = mlp().eval()
    inputs, targets = data_for(model)
    found = gram_matrices(model, in_batches(inputs, targets))
    hidden = torch.relu(model[0](inputs)).detach()
    torch.testing.assert_close(found.matrices["0.weight"], inputs.T @ inputs / 21)
    torch.testing.assert_close(found.matrices["3.weight"], hidden.T @ hidden / 21)
    assert found.rows == {"0.weight": 21, "3.weight": 21}
    assert found.matrices["0.weight"].dtype == torch.float32
    assert (found.samples, found.left_out) == (21, {})


def test_only_the_first_samples_count():
    model = mlp()
    inputs, targets = data_for(model)
    found = gram_matrices(model, in_batches(inputs, targets), samples=11)
    torch.testing.assert_close(found.matrices["0.weight"], inputs[:11].T @ inputs[:11] / 11)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(3, 4, 3, stride=2, padding=2, dilation=2), (12, 3, 17)),
        (nn.Conv1d(3, 4, 4, padding="same", dilation=3, padding_mode="reflect"), (12, 3, 17)),
        (nn.Conv2d(2, 5, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 3)), (12, 2, 9, 11)),
        (nn.Conv2d(2, 5, (4, 3), padding="same", padding_mode="circular"), (12, 2, 9, 8)),
        (nn.Conv2d(2, 5, 3, padding="valid", padding_mode="replicate"), (12, 2, 9, 8)),
        (nn.Conv3d(2, 3, (1, 3, 2), stride=(1, 2, 2), padding=(1, 0, 1)), (12, 2, 4, 7, 6)),
    ],
)
def test_what_a_convolution_computes_follows_from_its_gram_matrix(layer, shape, monkeypatch):
    """The sum of squares of X W^T is that of trace(W G W^T) times the rows; and so for the product of two outputs."""
    layer.bias = None
    model = nn.Sequential(layer)
    inputs = torch.randn(shape)
    found = gram_matrices(model, in_batches(inputs, TARGETS, 5))
    gram = found.matrices["0.weight"].double()
    outputs = layer(inputs).detach().transpose(0, 1).flatten(1).double()
    weight = layer.weight.detach().flatten(1).double()
    assert found.rows["0.weight"] == outputs.shape[1]
    torch.testing.assert_close(
        weight @ gram @ weight.T * found.rows["0.weight"], outputs @ outputs.T, rtol=1e-4, atol=1e-3
    )
    monkeypatch.setattr(grams, "_SLICE", 1)
    sliced = gram_matrices(model, [(inputs, TARGETS)]).matrices["0.weight"].double()
    torch.testing.assert_close(sliced, gram, rtol=1e-5, atol=1e-6)


def test_layers_that_run_again_or_share_a_weight_add_up():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second = nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, inputs):
            return self.second(self.first(self.first(inputs)))

    model = Twice()
    inputs, _ = data_for(mlp())
    inputs = inputs.reshape(7, 3, 6)  # three tokens a sample
    found = gram_matrices(model, [(inputs, TARGETS[:7])])
    once = model.first(inputs)
    fed = torch.cat([inputs, once, model.first(once)]).flatten(0, 1).detach()
    assert found.rows == {"first.weight": 63}
    torch.testing.assert_close(found.matrices["first.weight"], fed.T @ fed / 63)


class Assorted(nn.Module):
    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.transposed = nn.ConvTranspose1d(4, 4, 1)
        self.computed = parametrizations.weight_norm(nn.Linear(6, 6))
        self.idle = nn.Linear(3, 3)
        self.served = nn.Linear(6, 4)

    def forward(self, inputs):
        return self.served(self.computed(self.transposed(self.grouped(inputs)))).mean(1)


def test_what_is_left_out_is_listed():
    found = gram_matrices(Assorted(), [(torch.randn(12, 4, 6), TARGETS)])
    assert list(found.matrices) == ["served.weight"]
    reasons = {
        "grouped": "groups",
        "transposed": "ConvTranspose1d",
        "computed": "parametrized",
        "idle": "did not run",
    }
    assert found.left_out.keys() == reasons.keys()
    assert all(word in found.left_out[name] for name, word in reasons.items())


def test_a_head_tied_to_an_embedding_and_attention_are_left_out():
    model = Transformer()
    inputs, targets = data_for(model)
    found = gram_matrices(torch.compile(model, backend="eager"), in_batches(inputs, targets))
    assert found.matrices.keys() == {"layer.linear1.weight", "layer.linear2.weight"}
    assert found.rows["layer.linear1.weight"] == inputs.numel()
    assert found.left_out.keys() == {"head", "layer.self_attn", "layer.self_attn.out_proj"}
    assert "embedding (Embedding)" in found.left_out["head"]


@pytest.mark.parametrize("make", [mlp, cnn, Transformer])
def test_nothing_is_changed(make):
    model = in_the_middle_of_training(make())
    before = trace_of(model)
    gram_matrices(model, in_batches(*data_for(model)))
    assert_same(before, trace_of(model))
    with pytest.raises((RuntimeError, IndexError, TypeError, ValueError)):
        gram_matrices(model, [(torch.full((3, 1), 1e9), TARGETS[:3])])
    assert_same(before, trace_of(model))


def test_low_precision_inputs_are_multiplied_in_float32():
    model = mlp().bfloat16()
    inputs = torch.randn(12, 6).bfloat16()
    found = gram_matrices(model, [(inputs, TARGETS)])
    torch.testing.assert_close(found.matrices["0.weight"], inputs.float().T @ inputs.float() / 12)
    found = gram_matrices(mlp(), [(inputs.float(), TARGETS)], autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    torch.testing.assert_close(found.matrices["0.weight"], inputs.float().T @ inputs.float() / 12)


def test_bad_input_is_said():
    model = mlp()
    with pytest.raises(CommandError, match=r"0\.weight .* not finite"):
        gram_matrices(model, [(torch.full((12, 6), torch.nan), TARGETS)])
    with pytest.raises(MissingPartError, match="no batch"):
        gram_matrices(model, [])
