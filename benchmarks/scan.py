"""A scan of 50,000 samples next to a vectorised pass written by hand, and with embeddings next to the loss alone.

The hand-written pass computes the loss of each sample and nothing else: same loader, same batch size, evaluation mode, no
gradients. The scan computes the columns of a classifier as well. They take turns in one process.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from harness import Report, ratio, seconds
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from onthefly.samples.scan import per_sample_loss, scan

SAMPLES, BATCH, CLASSES = 50_000, 256, 10


def by_hand(model: nn.Module, loader: DataLoader[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    criterion = nn.CrossEntropyLoss(reduction="none")
    losses = torch.empty(SAMPLES)
    done = 0
    model.eval()
    with torch.no_grad():
        for inputs, targets in loader:
            batch = criterion(model(inputs), targets)
            losses[done : done + len(batch)] = batch
            done += len(batch)
    return losses


def mlp() -> tuple[nn.Module, tuple[int, ...]]:
    layers = (nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    return nn.Sequential(*layers), (64,)


def cnn() -> tuple[nn.Module, tuple[int, ...]]:
    convolutions = (nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES)), (1, 14, 14)


def measure(report: Report, name: str, model: nn.Module, shape: tuple[int, ...], rounds: int) -> None:
    dataset = TensorDataset(torch.randn(SAMPLES, *shape), torch.randint(CLASSES, (SAMPLES,)))
    loader = DataLoader(dataset, batch_size=BATCH)
    per_sample = per_sample_loss(nn.CrossEntropyLoss())
    columns = scan(model, loader, per_sample, embeddings=True)
    assert torch.equal(torch.from_numpy(columns["loss"]), by_hand(model, loader))
    hand, ours, embedded, again = [], [], [], []
    for _ in range(rounds):
        hand.append(seconds(lambda: by_hand(model, loader)))
        ours.append(seconds(lambda: scan(model, loader, per_sample)))
        embedded.append(seconds(lambda: scan(model, loader, per_sample, embeddings=True)))
        again.append(seconds(lambda: by_hand(model, loader)))
    report.note(f"{name}: by hand, median", statistics.median(hand), "s")
    report.note(f"{name}: speed of a scan to by hand", ratio(hand, ours))
    report.judge(f"{name}: time of a scan to by hand, median", ratio(ours, hand).median, 1 / 0.95)
    report.note(f"{name}: time with embeddings to without", ratio(embedded, ours))
    report.judge(f"{name}: time with embeddings to without, median", ratio(embedded, ours).median, 1.15)
    report.note(f"{name}: A/A ratio of by hand", ratio(again, hand))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = Report("scan")
    for name, make in (("small MLP", mlp), ("small CNN", cnn)):
        torch.manual_seed(0)
        measure(report, name, *make(), options.rounds)
    report.end()


if __name__ == "__main__":
    main()
