"""The ready Trainer: handwritten digits, a small CNN with dropout and batch norm, augmentation in loader workers.

python examples/digits.py --epochs 8            then, in a second terminal:  onthefly watch
"""

import argparse
import random
import time
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import onthefly


def load() -> list[tuple[Tensor, Tensor]]:
    """1797 images of 8x8 pixels as train, validation and test (70, 15, 15 %): each digit has its share in each of them."""
    images, labels = load_digits(return_X_y=True)
    train_x, rest_x, train_y, rest_y = train_test_split(images, labels, test_size=0.3, stratify=labels, random_state=0)
    val_x, test_x, val_y, test_y = train_test_split(rest_x, rest_y, test_size=0.5, stratify=rest_y, random_state=0)
    return [
        (torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(y))
        for x, y in ((train_x, train_y), (val_x, val_y), (test_x, test_y))
    ]


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Images that are turned, shifted and blurred a little, each time anew. Draw as you like: it can be repeated."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        angle = torch.tensor(random.uniform(-0.2, 0.2))
        shift_x, shift_y = torch.empty(2).uniform_(-0.15, 0.15).tolist()
        turn = torch.tensor([[angle.cos(), -angle.sin(), shift_x], [angle.sin(), angle.cos(), shift_y]])
        grid = F.affine_grid(turn[None], [1, 1, 8, 8], align_corners=False)
        image = F.grid_sample(self.images[index][None], grid, align_corners=False)[0]
        return image + 0.05 * torch.randn_like(image), self.labels[index]


def convolution(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def build_model() -> nn.Module:
    return nn.Sequential(
        *convolution(1, 16),
        *convolution(16, 32),
        nn.MaxPool2d(2),
        *convolution(32, 64),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(256, 10),
    )


def accuracy(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs.argmax(1) == labels).float().mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    parser.add_argument("--slow", type=float, default=0.0, metavar="SECONDS", help="wait so long after each step")
    options = parser.parse_args()

    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # kernels this small are not faster on more, and the loader workers want a core, too
    train, val, test = load()
    workers: dict[str, Any] = {"num_workers": options.workers, "persistent_workers": options.workers > 0}
    train_loader = DataLoader(Augmented(*train), batch_size=32, shuffle=True, **workers)
    val_loader = DataLoader(TensorDataset(*val), batch_size=256)
    test_loader = DataLoader(TensorDataset(*test), batch_size=256)

    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
    total = options.epochs * len(train_loader)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=total)

    # 40 steps are an epoch, so that one of the checkpoints that stay is always in the middle of one.
    config = onthefly.SessionConfig(project="digits", run="digits", ckpt_every_steps=25)
    trainer = onthefly.Trainer(config, schedule="step", metrics={"accuracy": accuracy})
    result = trainer.fit(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        train_loader,
        val_loader,
        test_loader=test_loader,
        model_factory=build_model,
        epochs=options.epochs,
        scheduler=scheduler,
        after_step=lambda: time.sleep(options.slow),
    )
    print(f"{result.run}: test accuracy {result.test['accuracy']:.1%} after {result.step} steps")


if __name__ == "__main__":
    main()
