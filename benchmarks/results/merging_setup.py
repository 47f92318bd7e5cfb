"""What the experiments on merging share: a split, plain trainings, what a strategy needs of a parent, and scores."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import BATCH, digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from onthefly.merging import merge_state_dicts
from onthefly.merging.fisher import diagonal_fisher
from onthefly.merging.grams import gram_matrices
from onthefly.merging.preview import Score
from onthefly.merging.recalibrate import recalibrate
from onthefly.merging.registry import STRATEGIES
from onthefly.samples.scan import per_sample_loss

Augment = Callable[[Tensor, torch.Generator], Tensor]

LOSS = nn.CrossEntropyLoss()
WITHOUT_ADAPTERS = [strategy for strategy in STRATEGIES if strategy.name not in ("adapter", "lora")]
"""The strategies for models without adapters, which ours are."""


@dataclass(frozen=True)
class Data:
    """The digits, and which of them are to train, to choose by (validation), and to be judged by alone (test)."""

    images: Tensor
    labels: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor

    @classmethod
    def split(cls, seed: int) -> Data:
        """Half, a fifth and three tenths, by class."""
        images, labels = digits()
        train, rest = train_test_split(np.arange(len(labels)), test_size=0.5, stratify=labels, random_state=seed)
        validation, test = train_test_split(rest, test_size=0.6, stratify=labels[rest], random_state=seed)
        return cls(images, labels, *(torch.tensor(rows) for rows in (train, validation, test)))

    def of_classes(self, classes: Sequence[int], among: Tensor | None = None) -> Tensor:
        """The rows that show these, of those to train on or of others."""
        rows = self.train if among is None else among
        return rows[torch.isin(self.labels[rows], torch.tensor(classes))]

    def batches(self, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(self.images[part], self.labels[part]) for part in rows.split(128)]


def trained(
    start: nn.Module,
    images: Tensor,
    labels: Tensor,
    steps: int,
    seed: int,
    *,
    lr: float = 1e-3,
    weight_decay: float = 1e-2,
    falls: bool = False,
    augment: Augment | None = None,
    on_step: Callable[[int, nn.Module], object] = lambda step, model: None,
) -> nn.Module:
    """A copy of a model after so many steps of AdamW, batches drawn epoch by epoch; `falls`: the rate does, to zero, evenly."""
    model = copy.deepcopy(start).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout
    for step, rows in enumerate(itertools.islice(_drawn(len(labels), draw), steps), 1):
        if falls:
            optimizer.param_groups[0]["lr"] = lr * (1 - (step - 1) / steps)
        inputs = images[rows] if augment is None else augment(images[rows], draw)
        LOSS(model(inputs), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        on_step(step, model)
    return model.eval()


def _drawn(count: int, draw: torch.Generator) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(count, generator=draw).split(BATCH):
            if len(rows) > 1 or count == 1:  # a batch norm refuses one sample
                yield rows


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(images)


def scored(logits: Tensor, labels: Tensor) -> Score:
    losses = F.cross_entropy(logits.double(), labels)
    return Score(float(losses), float((logits.argmax(1) == labels).double().mean()), len(labels))


def accuracy(logits: Tensor, labels: Tensor) -> float:
    found = scored(logits, labels).accuracy
    assert found is not None
    return found


KINDS = ("empirical", "true", "grams")
"""What can be measured of a parent: two kinds of Fisher information, and Gram matrices."""


def statistics_of(
    model: nn.Module, data: Data, rows: Tensor, kinds: Sequence[str] = KINDS
) -> dict[str, Mapping[str, Tensor]]:
    """Measured on 256 of a parent's own samples, or on all where there are fewer."""
    own = data.batches(rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))])
    measure: dict[str, Callable[[], Mapping[str, Tensor]]] = {
        "empirical": lambda: diagonal_fisher(model, own, per_sample_loss(LOSS)).diagonal,
        "true": lambda: diagonal_fisher(model, own, kind="true").diagonal,
        "grams": lambda: gram_matrices(model, own).matrices,
    }
    return {kind: measure[kind]() for kind in kinds}


@dataclass(frozen=True)
class Family:
    """Parents, what they came from, and what the strategies need of each."""

    parents: Sequence[nn.Module]
    base: nn.Module
    statistics: Sequence[Mapping[str, Mapping[str, Tensor]]]
    data: Data

    def merged(self, strategy: str, measured: str | None = None, **options: Any) -> nn.Module:
        """A model of the merged weights; batch-norm statistics are estimated anew on all train images."""
        weights = options.pop("weights", None)
        chosen = next(one for one in STRATEGIES if one.name == strategy)
        merged = merge_state_dicts(
            self.parents,
            strategy,
            options,
            weights=weights,
            base=self.base if "base" in chosen.needs else None,
            statistics=None if measured is None else [one[measured] for one in self.statistics],
        )
        return self.loaded(merged)

    def loaded(self, state: Mapping[str, Tensor]) -> nn.Module:
        model = copy.deepcopy(self.base)
        model.load_state_dict(state)
        recalibrate(model, self.data.batches(self.data.train))
        return model.eval()

    def mean(self, members: Sequence[int]) -> nn.Module:
        """The average of some; one alone is itself."""
        chosen = [self.parents[member] for member in members]
        return chosen[0] if len(chosen) == 1 else self.loaded(merge_state_dicts(chosen, "swa"))
