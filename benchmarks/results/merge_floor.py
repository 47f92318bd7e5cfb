"""Does the floor hold? Random pairs of parents, sound and broken, merged by every strategy. Real digits.

A merge is committed only if it is no worse than its best parent on the slice that decides. Here 100 pairs are merged, among them
parents whose hidden units are permuted, that were trained from another start, not trained at all, or broken (NaN). What the floor
says is held against accuracies that are computed apart from it, and what was committed is judged on images that decided nothing.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import mlp as make
from common import one_thread, shown, table, write
from merging_setup import LOSS, WITHOUT_ADAPTERS, Data, Family, logits_of, scored, statistics_of, trained
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from onthefly.errors import CommandError
from onthefly.merging.preview import Metric, Preview, Score, Scores, score
from onthefly.merging.strategies import greedy
from onthefly.samples.scan import per_sample_loss, scan
from onthefly.state.undisturbed import undisturbed

BASE, FORK, PAIRS = 56, 140, 10
"""Steps of the base and of each parent, and pairs of one seed."""
SOUND = ("all images", "a larger learning rate", "half of the classes", "a tenth of the images")
STRANGE = ("permuted", "another start")
KINDS = (*SOUND, *STRANGE, "untrained", "NaN")
METRICS: tuple[Metric, ...] = ("accuracy", "loss")
SOUP, ANY = "greedy, by ", "the best of all"


@dataclass(frozen=True)
class Parent:
    model: nn.Module
    rows: Tensor
    """What it was trained on, and is measured on."""


def pool(data: Data, base: nn.Module, seed: int) -> dict[str, Parent]:
    """A parent of each kind."""
    draw = np.random.default_rng(seed)

    def fork(rows: Tensor, number: int, start: nn.Module = base, steps: int = FORK, lr: float = 1e-3) -> nn.Module:
        return trained(start, data.images[rows], data.labels[rows], steps, 1000 * (seed + 1) + number, lr=lr)

    every = data.train
    some = data.of_classes(draw.choice(10, 5, replace=False).tolist())
    few = every[torch.tensor(draw.choice(len(every), len(every) // 10, replace=False))]
    models = {
        "all images": (fork(every, 0), every),
        "a larger learning rate": (fork(every, 1, lr=1e-2), every),
        "half of the classes": (fork(some, 2), some),
        "a tenth of the images": (fork(few, 3), few),
        "permuted": (permuted(fork(every, 4), draw), every),
        "another start": (fork(every, 5, make(), BASE + FORK), every),
        "untrained": (make().eval(), every),
        "NaN": (broken(fork(every, 6), draw), every),
    }
    assert tuple(models) == KINDS
    return {kind: Parent(model, rows) for kind, (model, rows) in models.items()}


def permuted(model: nn.Module, draw: np.random.Generator) -> nn.Module:
    """The same function, with its hidden units in another order."""
    other = copy.deepcopy(model)
    first, last = (layer for layer in other if isinstance(layer, nn.Linear))  # type: ignore[union-attr]
    order = torch.tensor(draw.permutation(len(first.bias)))
    with torch.no_grad():
        first.weight.copy_(first.weight[order])
        first.bias.copy_(first.bias[order])
        last.weight.copy_(last.weight[:, order])
    images = torch.rand(8, 64)
    torch.testing.assert_close(other(images), model(images))
    return other


def broken(model: nn.Module, draw: np.random.Generator) -> nn.Module:
    """One of its numbers is NaN."""
    other = copy.deepcopy(model)
    parameters = list(other.parameters())
    chosen = parameters[draw.integers(len(parameters))]
    with torch.no_grad():
        chosen.view(-1)[draw.integers(chosen.numel())] = torch.nan
    return other


@dataclass(frozen=True)
class Bench:
    """Scores as a preview has them, of scans, on the slice that decides and on the one that does not."""

    data: Data

    def scores(self, model: nn.Module) -> Scores:
        held = torch.cat([self.data.validation, self.data.test])
        loader = DataLoader(TensorDataset(self.data.images[held], self.data.labels[held]), batch_size=1024)
        with undisturbed(model, loader):
            columns = scan(model, loader, per_sample_loss(LOSS))
        first = len(self.data.validation)
        rows = {"selection": np.arange(first), "test": np.arange(first, len(held))}
        return {name: score(columns, chosen) for name, chosen in rows.items()}


def candidates(family: Family, bench: Bench, seed: int, weight: float) -> dict[str, nn.Module]:
    """What every strategy makes by its default options. `weighted` has weights as somebody may give them."""
    made = {}
    for strategy in WITHOUT_ADAPTERS:
        options: dict[str, Any] = {"seed": seed} if strategy.name.startswith("dare") else {}
        if strategy.name == "weighted":
            options = {"weights": (weight, 1 - weight)}
        kinds = ("empirical", "true") if "fishers" in strategy.needs else ("grams",)
        for measured in kinds if strategy.needs & {"fishers", "grams"} else (None,):
            name = f"{strategy.name}, {measured}" if len(kinds) > 1 else strategy.name
            made[name] = family.merged(strategy.name, measured, **options)
    return made | {f"{SOUP}{metric}": soup(family, bench, metric) for metric in METRICS}


def soup(family: Family, bench: Bench, metric: Metric) -> nn.Module:
    def goodness(model: nn.Module) -> float:
        return -bench.scores(model)["selection"].badness(metric)[0]

    alone = [goodness(parent) for parent in family.parents]
    return family.mean(greedy(alone, lambda members: goodness(family.mean(members))))


def refusals(kinds: tuple[str, str], parents: Mapping[str, Parent], family: Family, bench: Bench) -> dict[str, str]:
    """With a NaN parent, what each strategy says; one that says nothing fails."""
    said = {}

    def refused(name: str, attempt: Any) -> None:
        try:
            attempt()
        except CommandError as e:
            said[name] = f"{type(e).__name__}: {e}"
        else:
            raise AssertionError(f"{name} merged {' and '.join(kinds)}")

    for strategy in WITHOUT_ADAPTERS:
        weights = {"weights": (0.5, 0.5)} if strategy.name == "weighted" else {}
        if strategy.needs & {"fishers", "grams"}:
            measured = "grams" if "grams" in strategy.needs else "true"

            def attempt(name: str = strategy.name, measured: str = measured) -> None:
                statistics = [statistics_of(parents[k].model, family.data, parents[k].rows, [measured]) for k in kinds]
                Family(family.parents, family.base, statistics, family.data).merged(name, measured)

            refused(strategy.name, attempt)
        else:
            refused(strategy.name, lambda name=strategy.name, weights=weights: family.merged(name, None, **weights))
    for metric in METRICS:
        refused(f"{SOUP}{metric}", lambda metric=metric: soup(family, bench, metric))
    return said


def one(seed: int) -> list[dict[str, Any]]:
    """One seed: what comes of each of its pairs."""
    data, bench = Data.split(seed), Bench(Data.split(seed))
    torch.manual_seed(seed)
    base = trained(make(), data.images[data.train], data.labels[data.train], BASE, seed)
    parents = pool(data, base, seed)
    sound = {kind: parent for kind, parent in parents.items() if kind != "NaN"}
    statistics = {kind: statistics_of(parent.model, data, parent.rows) for kind, parent in sound.items()}
    scores = {kind: bench.scores(parent.model) for kind, parent in parents.items()}
    draw = np.random.default_rng(100 + seed)
    pairs = list(combinations(KINDS, 2))
    found = []
    for number in draw.choice(len(pairs), PAIRS, replace=False):
        kinds = pairs[number] if draw.random() < 0.5 else pairs[number][::-1]
        models = [parents[kind].model for kind in kinds]
        if "NaN" in kinds:
            said = refusals(kinds, parents, Family(models, base, [], data), bench)
            found.append({"kinds": kinds, "refused": said})
            continue
        family = Family(models, base, [statistics[kind] for kind in kinds], data)
        made = candidates(family, bench, seed, float(draw.uniform(0.1, 0.9)))
        found.append({"kinds": kinds, **judged(kinds, made, scores, bench, {k: p.model for k, p in parents.items()})})
    return found


def judged(
    kinds: tuple[str, str],
    made: Mapping[str, nn.Module],
    scores: Mapping[str, Scores],
    bench: Bench,
    models: Mapping[str, nn.Module],
) -> dict[str, Any]:
    columns = {kind: scores[kind] for kind in kinds} | {name: bench.scores(model) for name, model in made.items()}
    apart = {name: plainly({**models, **made}[name], bench.data) for name in columns}
    found: dict[str, Any] = {}
    for metric in METRICS:
        preview = Preview(
            kinds,
            tuple(name for name in made if not name.startswith(SOUP) or name == f"{SOUP}{metric}"),
            columns,
            "selection",
            metric,
        )
        best, bound = preview.best_parent, min(apart[kind].badness(metric)[0] for kind in kinds)
        of_best, tested = on_test(columns, best), {}
        for name in [*preview.candidates, ANY]:
            candidate = preview.best(preview.candidates) if name == ANY else name
            short = preview.falls_short(candidate)
            worse = apart[candidate].badness(metric)[0] > bound
            assert short == worse, f"the floor is wrong about {candidate} of {kinds}, by {metric}"
            tested[name] = {
                "candidate": candidate,
                "short": short,
                "regret without": of_best - on_test(columns, candidate),
                "regret": 0.0 if short else of_best - on_test(columns, candidate),
            }
        found[metric] = {"best": best, "candidates": tested}
    return found


def plainly(model: nn.Module, data: Data) -> Score:
    """On the selection slice, without a scan."""
    return scored(logits_of(model, data.images[data.validation]), data.labels[data.validation])


def on_test(columns: Mapping[str, Scores], name: str) -> float:
    found = columns[name]["test"].accuracy
    assert found is not None
    return found


# -- what comes out ---------------------------------------------------------------------------------------------------


def group_of(kinds: tuple[str, str]) -> str:
    if "untrained" in kinds:
        return "one untrained"
    return "both sound" if set(kinds) <= set(SOUND) else "one or both permuted, or of another start"


def tables(seeds: list[list[dict[str, Any]]]) -> str:
    whole = [[pair for pair in seed if "refused" not in pair] for seed in seeds]
    pairs = [pair for seed in whole for pair in seed]
    groups = {
        name: [p for p in pairs if group_of(p["kinds"]) == name] for name in map(group_of, combinations(KINDS, 2))
    }
    refused = [pair["refused"] for seed in seeds for pair in seed if "refused" in pair]
    kinds = sorted({text.partition(":")[0] for one in refused for text in one.values()})
    parts = [
        f"{sum(map(len, seeds))} pairs, {len(refused)} of them with a NaN parent: all {sum(map(len, refused))} merges of these "
        f"were refused, by {' or '.join(kinds)}.\n"
    ]
    for metric in METRICS:
        rows = []
        for name in pairs[0][metric]["candidates"]:
            each = [[pair[metric]["candidates"][name] for pair in seed] for seed in whole]
            row = [name]
            for members in groups.values():
                if members:
                    short = sum(pair[metric]["candidates"][name]["short"] for pair in members)
                    row.append(f"{short} of {len(members)}")
            row.append(shown([float(np.mean([c["short"] for c in seed])) for seed in each]))
            for figure in ("regret without", "regret"):
                row.append(shown([float(np.mean([c[figure] for c in seed])) for seed in each], sign=True))
            everyone = [c for seed in each for c in seed]
            row.append(f"{max(c['regret'] for c in everyone):+.3f}")
            committed = [c for c in everyone if not c["short"]]
            row.append(f"{sum(c['regret'] > 0 for c in committed)} of {len(committed)}")
            rows.append(row)
        head = ["", *(f"short, {name}" for name, members in groups.items() if members), "short, share of all"]
        head += ["regret without the floor", "regret with it", "at worst", "committed and worse on test"]
        parts.append(f"### Judged by {metric}\n\n{table(head, rows)}\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--json", type=Path, default=Path("results/merge-floor.json"))
    options = parser.parse_args()
    began = time.perf_counter()
    with one_thread():
        found = [one(seed) for seed in range(options.first, options.first + options.seeds)]
    print(tables(found))
    write(options.json, {"base": BASE, "fork": FORK, "seeds": options.seeds, "found": found})
    print(f"{options.seeds} seeds, {time.perf_counter() - began:.0f} s; every figure is in {options.json}")


if __name__ == "__main__":
    main()
