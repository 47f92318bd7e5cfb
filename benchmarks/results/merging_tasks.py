"""Forks that were trained on different classes, merged by every strategy: is one model as good as all of them? Real digits.

A base is trained a little on all classes. Each fork goes on from it with the images of its own classes alone, and forgets the
others. What a merge of the forks makes of all classes is set beside the best fork, the base, the ensemble of the forks, and a training
on all images at once. Published elsewhere is the order average < Fisher < RegMean; here it is looked at, not aimed at.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import CLASSES, MODELS, one_thread, shown, table, write
from merging_setup import WITHOUT_ADAPTERS, Data, Family, accuracy, logits_of, scored, statistics_of, trained
from torch import nn

from onthefly.merging.strategies import greedy

BASE, FORK = 56, 140
"""Steps of the base (two epochs), and of each fork (as many as five epochs of all images)."""
GROUPS = (2, 5)
"""Into how many groups the ten classes are split."""
ORDER = ("swa", "fisher, empirical", "fisher, true", "regmean")
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Way:
    """A strategy with what is measured for it, and the options of which one is chosen on validation images."""

    strategy: str
    measured: str | None = None
    tried: tuple[Options, ...] = ()


def grid(**values: Sequence[Any]) -> tuple[Options, ...]:
    return tuple(dict(zip(values, chosen, strict=True)) for chosen in product(*values.values()))


def ways(groups: int, seed: int) -> dict[str, Way]:
    scales = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
    larger = (0.3, 0.5, 1.0, 1.5, 2.0)
    drops = (0.1, 0.5, 0.9)
    fisher = grid(normalize=(False, True), floor=(1e-8, 1e-6, 1e-4))
    shares = np.random.default_rng(seed).dirichlet(np.ones(groups), 10)
    found = {
        "swa": Way("swa"),
        "weighted": Way("weighted", None, grid(weights=[tuple(share) for share in shares.tolist()])),
        "fisher, empirical": Way("fisher", "empirical", fisher),
        "fisher, true": Way("fisher", "true", fisher),
        "task_arithmetic": Way("task_arithmetic", None, grid(scale=scales)),
        "ties": Way("ties", None, grid(density=(0.1, 0.2, 0.5, 1.0), scale=larger)),
        "dare": Way("dare", None, grid(drop=drops, scale=scales, seed=[seed])),
        "dare_ties": Way("dare_ties", None, grid(drop=drops, scale=larger, seed=[seed])),
        "slerp": Way("slerp", None, grid(t=(0.3, 0.4, 0.5, 0.6, 0.7))),
        "regmean": Way("regmean", "grams", grid(shrink=(0.0, 0.5, 0.7, 0.9, 1.0))),
    }
    assert {way.strategy for way in found.values()} == {strategy.name for strategy in WITHOUT_ADAPTERS}
    fitting = {strategy.name for strategy in WITHOUT_ADAPTERS if strategy.parents in (None, groups)}
    return {name: way for name, way in found.items() if way.strategy in fitting}


def one(kind: str, groups: int, seed: int) -> dict[str, Any]:
    """One seed: the accuracy on test images of everything, by default and with options chosen on validation images."""
    data = Data.split(seed)
    valid, test = data.validation, data.test
    torch.manual_seed(seed)
    start = MODELS[kind]()
    base = trained(start, data.images[data.train], data.labels[data.train], BASE, seed)
    classes = np.random.default_rng(seed).permutation(CLASSES).reshape(groups, -1).tolist()
    rows = [data.of_classes(own) for own in classes]

    def fork(rows: torch.Tensor, steps: int, number: int) -> nn.Module:
        return trained(base, data.images[rows], data.labels[rows], steps, 1000 * (seed + 1) + number)

    parents = [fork(own, FORK, number) for number, own in enumerate(rows)]
    family = Family(parents, base, [statistics_of(p, data, own) for p, own in zip(parents, rows, strict=True)], data)

    def on_test(model: nn.Module) -> float:
        return accuracy(logits_of(model, data.images[test]), data.labels[test])

    def on_validation(model: nn.Module) -> tuple[float, float]:
        """Smaller is better."""
        return scored(logits_of(model, data.images[valid]), data.labels[valid]).badness("accuracy")

    outputs = torch.stack([logits_of(parent, data.images[test]) for parent in parents])
    best = min(parents, key=on_validation)
    own = [data.of_classes(own, data.test) for own in classes]
    found: dict[str, Any] = {
        "base": on_test(base),
        "best parent": on_test(best),
        "ensemble, mean of probabilities": accuracy(outputs.softmax(2).mean(0), data.labels[test]),
        "ensemble, mean of logits": accuracy(outputs.mean(0), data.labels[test]),
        "joint training, steps of one fork": on_test(fork(data.train, FORK, 100)),
        "joint training, steps of all forks": on_test(fork(data.train, groups * FORK, 100)),
        "a parent on its own classes": float(
            np.mean([accuracy(logits_of(p, data.images[r]), data.labels[r]) for p, r in zip(parents, own, strict=True)])
        ),
    }
    given: dict[str, Any] = {"weighted": {"weights": [len(own) for own in rows]}}
    merges: dict[str, Any] = {}
    for name, way in ways(groups, seed).items():
        options = given.get(name, {"seed": seed} if name.startswith("dare") else {})
        default = family.merged(way.strategy, way.measured, **options)
        tried = [(options, default), *((o, family.merged(way.strategy, way.measured, **o)) for o in way.tried)]
        chosen, tuned = min(tried, key=lambda pair: on_validation(pair[1]))
        merges[name] = {"default": on_test(default), "tuned": on_test(tuned), "options": dict(chosen)}
    members = greedy([-on_validation(p)[0] for p in parents], lambda members: -on_validation(family.mean(members))[0])
    merged = on_test(family.mean(members))
    merges["greedy"] = {"default": merged, "tuned": merged, "options": {"members": members}}
    return {"beside": found, "merges": merges}


def tables(title: str, seeds: list[dict[str, Any]]) -> str:
    def beside(name: str) -> list[float]:
        return [seed["beside"][name] for seed in seeds]

    def merges(name: str, how: str) -> list[float]:
        return [seed["merges"][name][how] for seed in seeds]

    def less(mine: list[float], theirs: list[float]) -> str:
        return shown([m - t for m, t in zip(mine, theirs, strict=True)], sign=True)

    rows = []
    for name in seeds[0]["beside"]:
        if name == "a parent on its own classes":
            continue
        difference = "" if name == "best parent" else less(beside(name), beside("best parent"))
        rows.append([name, shown(beside(name)), "", difference, less(beside(name), merges("swa", "tuned"))])
    for name in seeds[0]["merges"]:
        default, tuned = merges(name, "default"), merges(name, "tuned")
        more = "" if name in ("swa", "greedy") else shown(tuned)
        over = "" if name == "swa" else less(tuned, merges("swa", "tuned"))
        rows.append([name, shown(default), more, less(tuned, beside("best parent")), over])
    head = ["", "accuracy, default options", "options chosen", "less the best parent", "less the average"]
    own = f"A parent on its own classes: {shown(beside('a parent on its own classes'))}.\n"
    pairs = [
        [mine, theirs, *(less(merges(mine, how), merges(theirs, how)) for how in ("default", "tuned"))]
        for mine, theirs in (
            ("fisher, empirical", "swa"),
            ("fisher, true", "swa"),
            ("regmean", "fisher, empirical"),
            ("regmean", "fisher, true"),
            ("regmean", "swa"),
        )
    ]
    order = table(["strategy", "less", "default options", "options chosen"], pairs)
    often = "; ".join(
        f"{name} {chosen[0]} ({chosen[1]})" for name in seeds[0]["merges"] if (chosen := chosen_most(name, seeds))
    )
    order += f"\n\nOptions chosen most often (in how many of {len(seeds)} seeds): {often}."
    return f"### {title}\n\n{own}\n{table(head, rows)}\n\nThe published order, as paired differences:\n\n{order}\n"


def chosen_most(name: str, seeds: list[dict[str, Any]]) -> tuple[str, int] | None:
    """None where there was none to choose, or weights that were drawn for each seed."""
    told = [
        " ".join(f"{key}={value}" for key, value in seed["merges"][name]["options"].items() if key != "seed")
        or "by default"
        for seed in seeds
    ]
    if name in ("swa", "weighted", "greedy"):
        return None
    return Counter(told).most_common(1)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--json", type=Path, default=Path("results/merging-tasks.json"))
    options = parser.parse_args()
    began = time.perf_counter()
    found: dict[str, Any] = {}
    with one_thread():
        for kind in options.models:
            for groups in GROUPS:
                title = f"{kind}, {groups} groups of {CLASSES // groups} classes"
                seeds = range(options.first, options.first + options.seeds)
                found[title] = [one(kind, groups, seed) for seed in seeds]
                print(tables(title, found[title]), flush=True)
    write(options.json, {"base": BASE, "fork": FORK, "seeds": options.seeds, "found": found})
    print(f"{options.seeds} seeds, {time.perf_counter() - began:.0f} s; every figure is in {options.json}")


if __name__ == "__main__":
    main()
