"""What the experiments share: the data, the models, a training that OnTheFly steers, and intervals."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import onthefly

BATCH, CLASSES = 32, 10


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits: 1797 real images [N, 64], and what they show."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)


def flipped(labels: Tensor, share: float, draw: np.random.Generator) -> tuple[Tensor, np.ndarray]:
    """Labels of which a share became another class, each other one equally likely; and which ones did, bool [N]."""
    chosen = draw.choice(len(labels), round(share * len(labels)), replace=False)
    changed = labels.clone()
    changed[chosen] = (changed[chosen] + torch.tensor(draw.integers(1, CLASSES, len(chosen)))) % CLASSES
    where = np.zeros(len(labels), bool)
    where[chosen] = True
    assert bool((changed != labels).numpy()[where].all())
    return changed, where


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, CLASSES))


def cnn() -> nn.Module:
    def convolution(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *convolution(1, 16),
        nn.MaxPool2d(2),
        *convolution(16, 32),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(512, CLASSES),
    )


MODELS = {"MLP": mlp, "CNN": cnn}


class Training:
    """A model that is trained by AdamW on labelled images under a session, with the dynamics of every sample recorded."""

    def __init__(self, kind: str, seed: int, images: Tensor, labels: Tensor, store: Path) -> None:
        torch.manual_seed(seed)
        self.model = MODELS[kind]()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        loader = DataLoader(TensorDataset(images, labels), batch_size=BATCH, shuffle=True)
        config = onthefly.SessionConfig(
            store=store, ckpt_every_minutes=None, ckpt_every_epoch=False, handle_signals=False, undo=False
        )
        self.session = onthefly.attach(
            self.model, self.optimizer, train_loader=loader, loss_fn=nn.CrossEntropyLoss(), config=config
        )

    def step(self, batch: Any) -> None:
        inputs, targets = batch
        self.model.train()
        outputs = self.model(inputs)
        losses = F.cross_entropy(outputs, targets, reduction="none")
        with torch.no_grad():
            own = outputs.gather(1, targets[:, None])
            others = outputs.scatter(1, targets[:, None], -torch.inf).amax(1, keepdim=True)
            self.session.log_samples(losses, correct=own[:, 0] > others[:, 0], margins=(own - others)[:, 0])
        losses.mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def logits(self, images: Tensor) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            return self.model(images)


def ask(session: onthefly.Session, client: Any, kind: str, **arguments: Any) -> str:
    """Give the session of this process a command for its next boundary; gives the command's id."""
    command: str = client.command(kind, wait=False, **arguments)["id"]
    while not session._gate.raised:
        time.sleep(0.001)
    return command


@contextmanager
def one_thread() -> Iterator[None]:
    """Models this small are not faster on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- what comes out ---------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the 95 % t interval of the mean, over seeds."""
    numbers = np.asarray(values, float)
    half = stats.t.ppf(0.975, len(numbers) - 1) * numbers.std(ddof=1) / np.sqrt(len(numbers))
    return float(numbers.mean()), float(numbers.mean() - half), float(numbers.mean() + half)


def shown(values: Sequence[float], *, sign: bool = False, digits: int = 3) -> str:
    """`0.912 [0.905, 0.919]`; with `sign`, as a difference."""
    form = f"{'+' if sign else ''}.{digits}f"
    mean, low, high = interval(values)
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(path: Path, found: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
