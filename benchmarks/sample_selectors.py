"""Seconds of every selector on 1M samples, and of k-means on 100k embeddings of 128 numbers.

Not called `selectors`: Python has a module of that name, which every benchmark here that starts a process would then miss.
"""

from __future__ import annotations

import argparse
import statistics

import numpy as np
from harness import Report, ratio, seconds

from onthefly.samples import recipes, selectors

SELECTIONS = [
    "all()",
    "quantile(loss, 0.9)",
    "range(loss, 2)",
    "top(loss, 100000)",
    "class_top(loss, 50)",
    "hard(0.1)",
    "ambiguous(0.1)",
    "forgotten(2)",
    "el2n(0.1)",
    "margin(0.1)",
    "random(100000, 1)",
    "suspects()",
    "noise_aware(0.1)",
]
SCAN = ("loss", "confidence", "margin", "el2n", "prediction", "label")


def values(n: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    confidence = draw.uniform(1e-6, 1, n).astype(np.float32)
    label = draw.integers(0, 1000, n)
    other = draw.uniform(1e-6, 1, n).astype(np.float32) * (1 - confidence) + 1e-6  # of the best of the other classes
    margin = np.log(confidence / other)
    return {
        "loss": -np.log(confidence),
        "confidence": confidence,
        "margin": margin,
        "el2n": 1 - confidence,
        "prediction": np.where(margin > 0, label, (label + 1) % 1000),
        "label": label,
        "seen": np.full(n, 5),
        "mean_loss": -np.log(confidence),
        "forgotten": draw.integers(0, 5, n),
        "mean_confidence": confidence,
        "confidence_variability": draw.uniform(0, 0.3, n).astype(np.float32),
        "mean_margin": draw.normal(size=n).astype(np.float32),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=1_000_000)
    options = parser.parse_args()
    report = Report("sample_selectors")
    n = options.samples
    columns = values(n)
    by_scan = {name: columns[name] for name in SCAN}
    half = np.arange(0, n, 2).tolist()
    work = [(text, recipes.parse(text), columns) for text in SELECTIONS]
    work += [(f"{text}, by a scan", recipes.parse(text), by_scan) for text in ("suspects()", "noise_aware(0.1)")]
    work += [(f"indices of {len(half)}", {"select": "indices", "indices": half}, columns)]
    work += [("hard(0.5) - suspects() | random(1000)", recipes.parse("hard(0.5) - suspects() | random(1000)"), columns)]
    for name, recipe, given in work:
        times = [seconds(lambda r=recipe, c=given: recipes.choose(r, c, n)) for _ in range(options.rounds)]  # type: ignore[misc]
        report.judge(name, statistics.median(times), 1.0, "s")
    chosen = np.arange(0, n, 10)
    times = [seconds(lambda: recipes.likely_label_errors(columns, chosen)) for _ in range(options.rounds)]
    report.judge("likely_label_errors", statistics.median(times), 1.0, "s")
    first, second = [], []
    same = recipes.parse("quantile(loss, 0.9)")
    for _ in range(3 * options.rounds):
        first.append(seconds(lambda: recipes.choose(same, columns, n)))
        second.append(seconds(lambda: recipes.choose(same, columns, n)))
    report.note("A/A ratio of quantile(loss, 0.9)", ratio(first, second))
    embeddings = np.random.default_rng(1).normal(size=(100_000, 128)).astype(np.float32)
    report.judge(
        "k-means, 20 clusters of 100k x 128", seconds(lambda: selectors.cluster_labels(embeddings, 20, 0)), 10.0, "s"
    )
    report.judge("k-means, 100 clusters", seconds(lambda: selectors.cluster_labels(embeddings, 100, 0)), 10.0, "s")
    report.end()


if __name__ == "__main__":
    main()
