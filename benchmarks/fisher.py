"""A diagonal Fisher of 256 samples next to a loop of single-sample backward passes written by hand.

The hand-written loop squares the gradients of each sample and adds them up, and nothing else. Both take turns in one process, over the
same batches. The path without vmap is shown as well: what a model that does not allow it pays.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from harness import Report, ratio, seconds
from torch import nn

from onthefly.merging.fisher import diagonal_fisher
from onthefly.samples.scan import per_sample_loss

SAMPLES, BATCH, CLASSES, TOKENS, LENGTH = 256, 64, 10, 64, 32
Batches = list[tuple[torch.Tensor, torch.Tensor]]


def by_hand(model: nn.Module, batches: Batches) -> dict[str, torch.Tensor]:
    criterion = nn.CrossEntropyLoss()
    totals = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    model.eval()
    for inputs, targets in batches:
        for place in range(len(targets)):
            model.zero_grad()
            criterion(model(inputs[place : place + 1]), targets[place : place + 1]).backward()
            for name, p in model.named_parameters():
                assert p.grad is not None
                totals[name].addcmul_(p.grad, p.grad)
    return {name: total / SAMPLES for name, total in totals.items()}


def mlp() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    layers = (nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    return nn.Sequential(*layers), torch.randn(SAMPLES, 64), torch.randint(CLASSES, (SAMPLES,))


def cnn() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    first = (nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
    second = (nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
    model = nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(64, CLASSES))
    return model, torch.randn(SAMPLES, 1, 14, 14), torch.randint(CLASSES, (SAMPLES,))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 64)
        self.layers = nn.Sequential(*(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True) for _ in range(2)))
        self.head = nn.Linear(64, TOKENS)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.layers(self.embedding(inputs)))
        return logits.transpose(1, 2)


def transformer() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    inputs, targets = (torch.randint(TOKENS, (SAMPLES, LENGTH)) for _ in range(2))
    return Transformer(), inputs, targets


def measure(
    report: Report, name: str, make: Callable[[], tuple[nn.Module, torch.Tensor, torch.Tensor]], rounds: int
) -> None:
    model, inputs, targets = make()
    batches = list(zip(inputs.split(BATCH), targets.split(BATCH), strict=True))
    loss = per_sample_loss(nn.CrossEntropyLoss())
    found = diagonal_fisher(model, batches, loss)
    assert found.path == "vmap", found.reason
    for key, value in by_hand(model, batches).items():
        torch.testing.assert_close(found.diagonal[key], value, rtol=1e-3, atol=1e-3 * value.abs().max().item())
    hand, ours, single, again = [], [], [], []
    for _ in range(rounds):
        hand.append(seconds(lambda: by_hand(model, batches)))
        ours.append(seconds(lambda: diagonal_fisher(model, batches, loss)))
        single.append(seconds(lambda: diagonal_fisher(model, batches, loss, budget=1)))
        again.append(seconds(lambda: by_hand(model, batches)))
    report.note(f"{name}: by hand, median", statistics.median(hand), "s")
    report.note(f"{name}: speed with vmap to by hand", ratio(hand, ours))
    report.judge(f"{name}: time with vmap to by hand, median", ratio(ours, hand).median, 1)
    report.note(f"{name}: time without vmap to by hand", ratio(single, hand))
    report.note(f"{name}: A/A ratio of by hand", ratio(again, hand))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = Report("fisher")
    for name, make in (("small MLP", mlp), ("small CNN", cnn), ("small transformer", transformer)):
        torch.manual_seed(0)
        measure(report, name, make, options.rounds)
    report.end()


if __name__ == "__main__":
    main()
