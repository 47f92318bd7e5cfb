"""Which per-sample values find label errors? Real digits, a tenth of the labels flipped, next to cleanlab.

Every value is the product's own: the dynamics that training recorded, and scans through the store, at several moments. cleanlab
is given the probabilities of the very same weights. They are in-sample: of the images that the weights were trained on,
as those of a running training are. cleanlab asks for out-of-sample ones; so it is also run as it wants to be, on the
probabilities of a 5-fold cross-validation, which takes five more trainings.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import BATCH, CLASSES, MODELS, Training, ask, digits, flipped, one_thread, shown, table, write
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

import onthefly
from onthefly.samples import selectors
from onthefly.samples.table import SampleTable

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

SHARE = 0.1
MOMENTS = {"MLP": (5, 40, 200), "CNN": (5, 40)}
"""Epochs after which each model is judged: early, in between, and when it has begun to learn the flips by heart."""
OUTSIDE = 40
"""Epochs of each training of the cross-validation."""
CLEANLAB = "cleanlab, self-confidence"
Found = dict[str, dict[str, float]]


def scores(scan: Mapping[str, np.ndarray], dynamics: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Ours: the higher, the likelier an error."""
    return {
        "loss (scan)": scan["loss"],
        "margin (scan)": -scan["margin"],
        "EL2N (scan)": scan["el2n"],
        "mean loss": dynamics["mean_loss"],
        "max loss": dynamics["max_loss"],
        "variability of the loss": dynamics["variability"],
        "variability of the confidence": dynamics["confidence_variability"],
        "mean confidence": -dynamics["mean_confidence"],
        "mean margin (AUM)": -dynamics["mean_margin"],
        "times forgotten": dynamics["forgotten"].astype(float),
        "random": np.random.default_rng(1000 + seed).random(len(scan["loss"])),
    }


def sets(scan: Mapping[str, np.ndarray], dynamics: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Ours: which samples are called errors."""
    by_dynamics = ("seen", "mean_confidence", "confidence_variability", "mean_margin")
    by_scan = ("confidence", "margin", "prediction", "label")
    return {
        "suspects by dynamics": selectors.suspects_by_dynamics(*(dynamics[name] for name in by_dynamics)),
        "suspects by scan": selectors.suspects_by_scan(*(scan[name] for name in by_scan)),
    }


def cleanlab_scores(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, np.ndarray]:
    return {
        CLEANLAB: -get_label_quality_scores(labels, probabilities),
        "cleanlab, normalized margin": -get_label_quality_scores(labels, probabilities, method="normalized_margin"),
        "cleanlab, confidence-weighted entropy": -get_label_quality_scores(
            labels, probabilities, method="confidence_weighted_entropy"
        ),
    }


def judged(values: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    """Area under ROC, and precision@k, k the number of flips. Ties count as at random in both."""
    k, order = int(wrong.sum()), np.sort(values)[::-1]
    above, equal = values > order[k - 1], values == order[k - 1]
    hits = wrong[above].sum() + wrong[equal].mean() * (k - above.sum())
    return {"auc": float(roc_auc_score(wrong, values)), "precision": float(hits / k)}


def judged_set(chosen: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    hits = float(wrong[chosen].sum())
    precision, recall = hits / max(len(chosen), 1), hits / float(wrong.sum())
    f1 = 2 * precision * recall / max(precision + recall, 1e-12)
    return {"chosen": float(len(chosen)), "precision": precision, "recall": recall, "f1": f1}


def softmax(logits: Tensor) -> np.ndarray:
    return np.asarray(F.softmax(logits.double(), 1))


def cross_validated(kind: str, seed: int, images: Tensor, labels: Tensor) -> np.ndarray:
    """Probabilities of every image from weights that were not trained on it; plain trainings of the same kind."""
    found = np.zeros((len(labels), CLASSES))
    for fold, (train, held) in enumerate(StratifiedKFold(5, shuffle=True, random_state=seed).split(images, labels)):
        torch.manual_seed(10_000 + 10 * seed + fold)
        model = MODELS[kind]()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(OUTSIDE):
            model.train()
            for rows in torch.tensor(train)[torch.randperm(len(train))].split(BATCH):
                F.cross_entropy(model(images[rows]), labels[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            found[held] = softmax(model(images[held]))
    return found


def one(kind: str, seed: int, store: Path) -> dict[str, Any]:
    """One training: what each value finds, at each moment."""
    images, right = digits()
    labels, wrong = flipped(right, SHARE, np.random.default_rng(seed))
    given, moments = labels.numpy(), MOMENTS[kind]
    training = Training(kind, seed, images, labels, store)
    session = training.session
    logits: dict[int, Tensor] = {}
    recorded: dict[int, Mapping[str, np.ndarray]] = {}
    with onthefly.connect(store) as client:
        with session:
            for epoch in session.epochs(moments[-1]):
                if epoch in moments:  # the scan has just saved a checkpoint: its dynamics
                    recorded[epoch] = client.samples(dynamics=True).columns
                for batch in session:
                    training.step(batch)
                if epoch + 1 in moments:
                    logits[epoch + 1] = training.logits(images)
                    ask(session, client, "scanSamples")
        recorded[moments[-1]] = client.samples(dynamics=True).columns
        scanned = {row.epoch: SampleTable.read(row.path, content=row.hash).columns for row in client.scans()}
    outside = cross_validated(kind, seed, images, labels) if kind == "MLP" else None
    found: dict[str, Any] = {}
    for epochs in moments:
        scan, dynamics = scanned[epochs], recorded[epochs]
        assert set(dynamics["seen"]) == {epochs}
        probabilities = softmax(logits[epochs])
        own = np.take_along_axis(probabilities, given[:, None], 1)[:, 0]
        np.testing.assert_allclose(scan["confidence"], own, rtol=1e-3, atol=1e-6)  # the same logits, indeed
        each = {**scores(scan, dynamics, seed), **cleanlab_scores(given, probabilities)}
        chosen = {**sets(scan, dynamics), "cleanlab issues": np.flatnonzero(find_label_issues(given, probabilities))}
        if outside is not None:
            each[f"{CLEANLAB}, 5-fold"] = cleanlab_scores(given, outside)[CLEANLAB]
            chosen["cleanlab issues, 5-fold"] = np.flatnonzero(find_label_issues(given, outside))
        found[str(epochs)] = {
            "scores": {name: judged(np.asarray(values, float), wrong) for name, values in each.items()},
            "sets": {name: judged_set(indices, wrong) for name, indices in chosen.items()},
            "agrees with the labels": float((probabilities.argmax(1) == given).mean()),
            "agrees with the truth": float((probabilities.argmax(1) == right.numpy()).mean()),
        }
    return found


def tables(kind: str, seeds: list[dict[str, Any]]) -> str:
    parts = []
    for epochs in MOMENTS[kind]:
        found = [seed[str(epochs)] for seed in seeds]
        fit = [shown([f[f"agrees with the {what}"] for f in found]) for what in ("labels", "truth")]
        parts.append(
            f"**{kind}, after {epochs} epochs.** Its predictions agree with the labels as given in {fit[0]}, "
            f"with the true ones in {fit[1]}.\n"
        )
        base = [f["scores"][CLEANLAB] for f in found]
        rows = []
        for name in found[0]["scores"]:
            mine = [f["scores"][name] for f in found]
            row = [name]
            for figure in ("auc", "precision"):
                row.append(shown([m[figure] for m in mine]))
                less = [m[figure] - b[figure] for m, b in zip(mine, base, strict=True)]
                row.append("" if name == CLEANLAB else shown(less, sign=True))
            rows.append(row)
        head = ["score", "area under ROC", "less cleanlab's", "precision@k", "less cleanlab's"]
        parts.append(table(head, rows) + "\n")
        base = [f["sets"]["cleanlab issues"] for f in found]
        rows = []
        for name in found[0]["sets"]:
            mine = [f["sets"][name] for f in found]
            less = [m["f1"] - b["f1"] for m, b in zip(mine, base, strict=True)]
            figures = [shown([m[figure] for m in mine]) for figure in ("precision", "recall", "f1")]
            chosen = shown([m["chosen"] for m in mine], digits=0)
            rows.append([name, chosen, *figures, "" if name == "cleanlab issues" else shown(less, sign=True)])
        parts.append(table(["set", "samples", "precision", "recall", "F1", "F1 less cleanlab's"], rows) + "\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--json", type=Path, default=Path("results/label-errors.json"))
    options = parser.parse_args()
    logging.getLogger("onthefly").setLevel(logging.ERROR)
    began = time.perf_counter()
    found: dict[str, list[dict[str, Any]]] = {}
    with one_thread():
        for kind in options.models:
            found[kind] = []
            for seed in range(options.seeds):
                with tempfile.TemporaryDirectory() as folder:
                    found[kind].append(one(kind, seed, Path(folder) / "store"))
    write(options.json, {"share": SHARE, "epochs": MOMENTS, "seeds": options.seeds, "found": found})
    for kind, seeds in found.items():
        print(tables(kind, seeds))
    print(f"{options.seeds} seeds, {time.perf_counter() - began:.0f} s; every figure is in {options.json}")


if __name__ == "__main__":
    main()
