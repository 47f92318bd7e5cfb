"""Small real models, and what must be the same before and after something looked at one."""

import random

import numpy as np
import torch
from torch import nn

from onthefly.state import rng

CLASSES = 4


def mlp(classes=CLASSES):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Dropout(), nn.Linear(9, classes))


def cnn():
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2, bias=False))
    model = nn.Sequential(*layers, nn.BatchNorm2d(5), nn.Tanh(), nn.Flatten(), nn.Linear(45, CLASSES))
    model(torch.randn(16, 1, 8, 8) + 1)  # so that its statistics are not those of a new one
    return model


class Transformer(nn.Module):
    """Predicts every token from all; its head is tied to its embedding."""

    def __init__(self, tokens=7, *, sparse=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(tokens, 8, sparse=sparse)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, tokens, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, inputs):
        return self.head(self.layer(self.embedding(inputs))).transpose(1, 2)


def data_for(model, samples=21):
    draw = torch.Generator().manual_seed(1)
    if isinstance(model, Transformer):
        return tuple(torch.randint(7, (samples, 5), generator=draw) for _ in range(2))
    shape = (1, 8, 8) if isinstance(model[0], nn.Conv2d) else (6,)
    return torch.randn(samples, *shape, generator=draw), torch.randint(CLASSES, (samples,), generator=draw)


def in_batches(inputs, targets, size=8):
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def trace_of(model):
    """Everything that looking at a model may not change, as comparable values."""
    state = rng.capture()
    return {
        "tensors": {name: t.detach().clone() for name, t in model.state_dict().items()},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "frozen": [n for n, p in model.named_parameters() if not p.requires_grad],
        "modes": [module.training for module in model.modules()],
        "momenta": [getattr(module, "momentum", None) for module in model.modules()],
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
        "own": [sorted(vars(module)) for module in model.modules()],
        "random": [state["python"], state["numpy"], state["torch"]],
    }


def in_the_middle_of_training(model):
    """A model with gradients in flight, a frozen parameter and a submodule in evaluation mode; generators anywhere."""
    model.train()
    next(model.modules()).training = True
    list(model.children())[-1].eval()
    parameters = list(model.parameters())
    parameters[-1].requires_grad_(False)
    for parameter in parameters[:2]:
        parameter.grad = torch.randn_like(parameter)
    random.seed(3)
    np.random.seed(4)
    torch.manual_seed(5)
    return model


def assert_same(before, after):
    np.testing.assert_equal(_plain(after), _plain(before))


def _plain(value):
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
