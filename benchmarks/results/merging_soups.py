"""Averages of weights from one training, and soups of several fine-tunings of one model. Real digits.

First, one trajectory: is the average of its last checkpoints better than the last one? Beside it stands a training of the same
length whose learning rate falls to zero. Second, a soup: one base is fine-tuned eight times with other learning rates, weight decays and
augmentations. The average of all, and the greedy soup that validation images choose, are set beside the single one that they choose.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import BATCH, MODELS, flipped, one_thread, shown, table, write
from merging_setup import Augment, Data, Family, accuracy, logits_of, scored, trained
from torch import Tensor, nn

from onthefly.merging import stochastic_weight_averaging
from onthefly.merging.preview import Score
from onthefly.merging.strategies import greedy

EPOCHS, LAST = 20, (3, 5, 10)
"""Of a trajectory, and how many checkpoints at the ends of its last epochs are averaged."""
START, TUNING, TUNINGS = 5, 8, 8
"""Epochs of a soup's base and of each fine-tuning, and how many there are."""


@dataclass(frozen=True)
class Setting:
    lr: float
    noise: float

    def __str__(self) -> str:
        return f"learning rate {self.lr:g}, {self.noise:.0%} of the train labels flipped"


SETTINGS = (Setting(1e-3, 0.0), Setting(1e-3, 0.1), Setting(1e-2, 0.0))


def trajectory(kind: str, setting: Setting, seed: int) -> dict[str, dict[str, float]]:
    """One seed: the last checkpoint, averages of the last ones, and a training with a falling rate, on test images."""
    data = Data.split(seed)
    images = data.images[data.train]
    labels, _ = flipped(data.labels[data.train], setting.noise, np.random.default_rng(seed))
    epoch = -(-len(images) // BATCH)
    torch.manual_seed(seed)
    start = MODELS[kind]()
    states: list[dict[str, Tensor]] = []

    def keep(step: int, model: nn.Module) -> None:
        if step % epoch == 0:
            states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    last = trained(start, images, labels, EPOCHS * epoch, seed, lr=setting.lr, on_step=keep)
    falling = trained(start, images, labels, EPOCHS * epoch, seed, lr=setting.lr, falls=True)
    family = Family([], start, [], data)  # its batch norms are estimated on the train images
    found = {"the last": last}
    found |= {f"average of the last {k}": family.loaded(stochastic_weight_averaging(states[-k:])) for k in LAST}
    found["falling learning rate, the last"] = falling
    return {
        name: told(scored(logits_of(m, data.images[data.test]), data.labels[data.test])) for name, m in found.items()
    }


def told(score: Score) -> dict[str, float]:
    assert score.accuracy is not None
    return {"accuracy": score.accuracy, "loss": score.loss}


def shifted(share: float) -> Augment:
    """Moves this share of images by up to one pixel each way."""

    def augment(images: Tensor, draw: torch.Generator) -> Tensor:
        windows = F.pad(images.reshape(-1, 8, 8), (1, 1, 1, 1)).unfold(1, 8, 1).unfold(2, 8, 1)
        places = torch.randint(3, (2, len(images)), generator=draw)
        places = places.where(torch.rand(len(images), generator=draw) < share, 1)
        return windows[torch.arange(len(images)), places[0], places[1]].reshape(-1, 64)

    return augment


def soup(kind: str, seed: int) -> dict[str, Any]:
    """One seed: fine-tunings alone and together, on validation and test images."""
    data = Data.split(seed)
    images, labels = data.images[data.train], data.labels[data.train]
    epoch = -(-len(images) // BATCH)
    draw = np.random.default_rng(seed)
    torch.manual_seed(seed)
    base = trained(MODELS[kind](), images, labels, START * epoch, seed)
    tunings = [
        {
            "lr": 10 ** draw.uniform(-4, -2),
            "weight_decay": 10 ** draw.uniform(-4, -0.5),
            "shifted": draw.choice([0, 0.5, 1]),
        }
        for _ in range(TUNINGS)
    ]
    singles = [
        trained(
            base,
            images,
            labels,
            TUNING * epoch,
            1000 * (seed + 1) + number,
            lr=tuning["lr"],
            weight_decay=tuning["weight_decay"],
            augment=shifted(tuning["shifted"]),
        )
        for number, tuning in enumerate(tunings)
    ]
    family = Family(singles, base, [], data)

    def on_validation(model: nn.Module) -> float:
        return accuracy(logits_of(model, data.images[data.validation]), data.labels[data.validation])

    alone = [on_validation(single) for single in singles]
    members = greedy(alone, lambda members: on_validation(family.mean(members)))
    made = {
        "base": base,
        "best single": singles[int(np.argmax(alone))],
        "uniform soup": family.mean(range(TUNINGS)),
        "greedy soup": family.mean(members),
    }
    found: dict[str, Any] = {name: both(data, lambda i, m=model: logits_of(m, i)) for name, model in made.items()}
    each = [both(data, lambda i, m=single: logits_of(m, i)) for single in singles]
    found["mean of the singles"] = {part: float(np.mean([one[part] for one in each])) for part in each[0]}
    found["best single on test (known to nobody)"] = max(each, key=lambda one: one["test"])
    found["ensemble, mean of probabilities"] = both(
        data, lambda i: torch.stack([logits_of(single, i).softmax(1) for single in singles]).mean(0)
    )
    assert found["greedy soup"]["validation"] >= max(alone), (
        "a greedy soup is below its best single where it was chosen"
    )
    return {"found": found, "members": len(members), "tunings": [{k: float(v) for k, v in t.items()} for t in tunings]}


def both(data: Data, logits: Any) -> dict[str, float]:
    parts = {"validation": data.validation, "test": data.test}
    return {part: accuracy(logits(data.images[rows]), data.labels[rows]) for part, rows in parts.items()}


def less(mine: Sequence[float], theirs: Sequence[float]) -> str:
    return shown([m - t for m, t in zip(mine, theirs, strict=True)], sign=True)


def trajectories_table(title: str, seeds: list[dict[str, dict[str, float]]]) -> str:
    rows = []
    for name in seeds[0]:
        row = [name]
        for figure in ("accuracy", "loss"):
            mine, last = ([seed[n][figure] for seed in seeds] for n in (name, "the last"))
            row += [shown(mine), "" if name == "the last" else less(mine, last)]
        rows.append(row)
    head = ["", "accuracy", "less the last's", "loss", "less the last's"]
    return f"### {title}\n\n{table(head, rows)}\n"


def soups_table(title: str, seeds: list[dict[str, Any]]) -> str:
    order = [
        "base", "mean of the singles", "best single", "uniform soup", "greedy soup", "ensemble, mean of probabilities",
        "best single on test (known to nobody)",
    ]  # fmt: skip
    rows = []
    for name in order:
        row = [name]
        for part in ("validation", "test"):
            mine, best = ([seed["found"][n][part] for seed in seeds] for n in (name, "best single"))
            row += [shown(mine), "" if name == "best single" else less(mine, best)]
        rows.append(row)
    head = ["", "validation accuracy", "less the best single's", "test accuracy", "less the best single's"]
    gained = [
        sum(c(s["found"]["greedy soup"]["test"], s["found"]["best single"]["test"]) for s in seeds)
        for c in (lambda a, b: a > b, lambda a, b: a == b, lambda a, b: a < b)
    ]
    more = (
        f"Members of the greedy soups: {', '.join(str(seed['members']) for seed in seeds)} of {TUNINGS}. On test images they are above "
        f"the best single in {gained[0]} of {len(seeds)} seeds, level in {gained[1]}, below in {gained[2]}."
    )
    return f"### {title}\n\n{table(head, rows)}\n\n{more}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--json", type=Path, default=Path("results/merging-soups.json"))
    options = parser.parse_args()
    began = time.perf_counter()
    seeds = range(options.first, options.first + options.seeds)
    found: dict[str, Any] = {}
    with one_thread():
        for kind in options.models:
            for setting in SETTINGS:
                title = f"One trajectory: {kind}, {setting}"
                found[title] = [trajectory(kind, setting, seed) for seed in seeds]
                print(trajectories_table(title, found[title]), flush=True)
            title = f"Soup: {kind}"
            found[title] = [soup(kind, seed) for seed in seeds]
            print(soups_table(title, found[title]), flush=True)
    write(options.json, {"epochs": EPOCHS, "last": LAST, "seeds": options.seeds, "found": found})
    print(f"{options.seeds} seeds, {time.perf_counter() - began:.0f} s; every figure is in {options.json}")


if __name__ == "__main__":
    main()
