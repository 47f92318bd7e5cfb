"""Selectors: pure functions from per-sample values to the indices of chosen samples, sorted unique int64.

A value that is NaN or infinite is never chosen, and never shifts a quantile. Ties are broken by index, so equal values
give equal indices. All raise `InvalidCommandError` for wrong arguments, and when no value is finite.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from onthefly.errors import InvalidCommandError, MissingPartError

RECORDINGS = 3
"""How often a sample must have been recorded before its dynamics say anything."""


def quantile(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Samples whose value lies in [q_low, q_high] of the finite values; 0 <= low < high <= 1."""
    if not 0 <= low < high <= 1:
        raise InvalidCommandError(f"quantiles are 0 <= low < high <= 1, not low = {low} and high = {high}")
    numbers, finite = _numbers(values)
    first, last = np.quantile(numbers[finite], [low, high])
    return _where(finite & (numbers >= first) & (numbers <= last))


def value_range(values: np.ndarray, low: float | None, high: float | None) -> np.ndarray:
    """Samples whose value lies in [low, high]; None leaves an end open."""
    if low is not None and high is not None and not low <= high:
        raise InvalidCommandError(f"a range is low <= high, not low = {low} and high = {high}")
    numbers, chosen = _numbers(values)
    if low is not None:
        chosen &= numbers >= low
    if high is not None:
        chosen &= numbers <= high
    return _where(chosen)


def top(values: np.ndarray, k: int) -> np.ndarray:
    """The k samples with the largest values."""
    numbers, finite = _numbers(values)
    count = int(np.count_nonzero(finite))
    if not 1 <= k <= count:
        raise InvalidCommandError(f"k must be 1 to {count}, the number of samples with a finite value, not {k}")
    return _largest(numbers, finite, k)


def class_balanced_top(values: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """The k samples with the largest values of each class, or all of a smaller class. A label below 0 is none."""
    if k < 1:
        raise InvalidCommandError(f"k must be 1 or more, not {k}")
    numbers, finite = _numbers(values)
    rows = np.flatnonzero(finite & (labels >= 0))
    if not len(rows):
        raise InvalidCommandError("no sample has both a finite value and a label; scan data that has labels")
    order = rows[np.argsort(-numbers[rows], kind="stable")]  # stable: ties stay in order of their index
    classes = labels[order]
    # NumPy sorts 16-bit numbers by radix: much faster, and few data sets have more classes.
    order = order[np.argsort(classes.astype(np.uint16) if classes.max() < 2**16 else classes, kind="stable")]
    of_class = labels[order]
    starts = np.flatnonzero(np.r_[True, of_class[1:] != of_class[:-1]])
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    return np.sort(order[rank < k])


def cluster_labels(embeddings: np.ndarray, k: int, seed: int) -> np.ndarray:
    """The cluster of every sample, int64 [N], by mini-batch k-means of embeddings [N, D] (Sculley 2010).

    Cluster 0 is the largest. A sample whose embedding is not finite has -1. Raises `MissingPartError` without scikit-learn.
    """
    try:
        from sklearn.cluster import MiniBatchKMeans  # type: ignore[import-untyped]
        from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # scikit-learn brings it
    except ImportError as e:
        raise MissingPartError("clusters need scikit-learn: pip install 'onthefly[cluster]'") from e
    if embeddings.ndim != 2:
        raise InvalidCommandError(f"embeddings are [N, D], not {list(embeddings.shape)}")
    finite = np.isfinite(embeddings).all(1)
    count = int(np.count_nonzero(finite))
    if not 1 <= k <= count:
        raise InvalidCommandError(f"k must be 1 to {count}, the number of samples with a finite embedding, not {k}")
    # One thread: the sums come in the same order on every machine, and several lose five times the time where others compute.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different points than clusters: some are empty
        means = MiniBatchKMeans(k, random_state=seed, n_init=1, batch_size=2048, max_iter=20)
        found = means.fit_predict(embeddings[finite])
    by_size = np.argsort(-np.bincount(found, minlength=k), kind="stable")
    number = np.empty(k, np.int64)
    number[by_size] = np.arange(k)
    labels = np.full(len(embeddings), -1, np.int64)
    labels[finite] = number[found]
    return labels


def clusters(embeddings: np.ndarray, k: int, *, which: Sequence[int], seed: int = 0) -> np.ndarray:
    """The samples of whole clusters, by number. See `cluster_labels`."""
    if not which or not all(0 <= number < k for number in which):
        raise InvalidCommandError(f"clusters are numbered 0 to {k - 1}; which = {list(which)} must name some of them")
    return _where(np.isin(cluster_labels(embeddings, k, seed), list(which)))


def hard(mean_loss: np.ndarray, fraction: float) -> np.ndarray:
    """The fraction of samples with the highest mean loss over training (hard-to-learn; Swayamdipta et al. 2020)."""
    return _share(mean_loss, fraction)


def ambiguous(variability: np.ndarray, fraction: float) -> np.ndarray:
    """The fraction with the highest variability over training (Dataset Cartography; Swayamdipta et al. 2020)."""
    return _share(variability, fraction)


def forgotten(counts: np.ndarray, times: int) -> np.ndarray:
    """Samples that were forgotten at least so many times (Toneva et al. 2019)."""
    if times < 1:
        raise InvalidCommandError(f"times must be 1 or more, not {times}")
    return value_range(counts, times, None)


def el2n(scores: np.ndarray, fraction: float) -> np.ndarray:
    """The fraction with the highest error norm, softmax minus one-hot (Paul et al. 2021)."""
    return _share(scores, fraction)


def margin(margins: np.ndarray, fraction: float) -> np.ndarray:
    """The fraction with the lowest margins: nearest to, or farthest beyond, the decision boundary."""
    return _share(-_numbers(margins)[0], fraction)


def random(n: int, k: int, seed: int) -> np.ndarray:
    """k of n samples at random, each set equally likely: the control for every other selector."""
    if not 1 <= k <= n:
        raise InvalidCommandError(f"k must be 1 to {n}, the number of samples, not {k}")
    # Raw bits: NumPy promises to keep the stream of a bit generator, and not what a `Generator` makes of it.
    keys = np.random.PCG64(seed).random_raw(n)
    return _largest(keys, np.ones(n, bool), k)


def suspects_by_dynamics(
    seen: np.ndarray, mean_confidence: np.ndarray, confidence_variability: np.ndarray, mean_margin: np.ndarray
) -> np.ndarray:
    """Likely label errors, by how training went: the label was consistently thought improbable. May be empty.

    Those recorded 3 times or more whose mean confidence is below half of the mean over all samples, and of which this
    holds, too. Where margins were recorded: another class was ahead over training (a negative area under the margin; Pleiss et al.
    2020), with a probability, confidence * exp(-margin), of at least that mean over all samples: the model was as sure of it as it
    is of labels (Northcutt et al. 2021). Where none were: the confidence was below 0.25 and did not vary; one standard
    deviation above its mean is below 0.5 (Swayamdipta et al. 2020).
    """
    judged = (seen >= RECORDINGS) & np.isfinite(mean_confidence)
    if not judged.any():
        return np.empty(0, np.int64)
    sure = mean_confidence.astype(np.float64)
    typical = float(sure[judged].mean())
    mistaken = (mean_margin < 0) & (_probability_ahead(sure, mean_margin) >= typical)
    stayed = (sure < 0.25) & (sure + confidence_variability < 0.5)
    return _where(judged & (sure < typical / 2) & np.where(np.isnan(mean_margin), stayed, mistaken))


def suspects_by_scan(
    confidence: np.ndarray, margin: np.ndarray, prediction: np.ndarray, label: np.ndarray
) -> np.ndarray:
    """Likely label errors, by one scan: confident learning, pruned by noise rate (Northcutt et al. 2021). May be empty.

    A class's threshold is the mean confidence of the samples labelled with it, and at least 0.5. Another class claims a sample when
    it is predicted with at least its threshold; its probability is confidence * exp(-margin). The claimed are counted
    for each pair of label and claiming class, and scaled up from the samples that any class is sure of to all with that label. So
    many of the pair are suspects: those where the other class leads the most.

    It finds errors in what the model was trained on before the model has learned them by heart, and few after.
    """
    rows = np.flatnonzero(np.isfinite(confidence) & np.isfinite(margin) & (label >= 0) & (prediction >= 0))
    if not len(rows):
        return np.empty(0, np.int64)
    sure, given, said = confidence[rows].astype(np.float64), label[rows], prediction[rows]
    classes = int(max(given.max(), said.max())) + 1
    if classes > len(label) + 2**16:  # numbers far apart: count places, not numbers
        given, said = np.unique(np.concatenate([given, said]), return_inverse=True)[1].reshape(2, -1)
        classes = int(max(given.max(), said.max())) + 1
    count = np.bincount(given, minlength=classes)
    total = np.bincount(given, weights=sure, minlength=classes)
    thresholds = np.where(count > 0, total / np.maximum(count, 1), np.inf)  # a class without labels judges nobody
    thresholds = np.maximum(thresholds, 0.5)  # a model that has learned nothing yet accuses nobody
    other = _probability_ahead(sure, margin[rows])
    differs = given != said
    claimed = differs & (other >= thresholds[said])
    clear = np.bincount(given[claimed | (sure >= thresholds[given])], minlength=classes)
    may = np.flatnonzero(differs)
    pairs, pair = np.unique(given[may] * classes + said[may], return_inverse=True)
    scale = (count / np.maximum(clear, 1))[pairs // classes]
    wanted = np.rint(np.bincount(pair[claimed[may]], minlength=len(pairs)) * scale)
    order = np.lexsort(((sure - other)[may], pair))
    place = np.arange(len(order)) - np.searchsorted(pair[order], np.arange(len(pairs)))[pair[order]]
    return np.sort(rows[may[order[place < wanted[pair[order]]]]])


def noise_aware_hard(values: np.ndarray, fraction: float, suspected: np.ndarray) -> np.ndarray:
    """As many samples as `hard` gives, the hardest of those whose label is not suspected. Fewer when few are left."""
    if not 0 < fraction <= 1:
        raise InvalidCommandError(f"a fraction is above 0 and at most 1, not {fraction}")
    numbers, trusted = _numbers(values)
    wanted = max(1, round(fraction * int(np.count_nonzero(trusted))))
    trusted[suspected] = False
    left = int(np.count_nonzero(trusted))
    return _largest(numbers, trusted, min(wanted, left)) if left else np.empty(0, np.int64)


def union(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Samples in either."""
    both = np.sort(np.concatenate([first, second]), kind="stable")  # merges what is sorted already
    return both[np.r_[True, both[1:] != both[:-1]]] if len(both) else both


def intersection(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Samples in both."""
    return first[np.isin(first, second, kind="table")]


def difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Samples in the first and not in the second."""
    return first[~np.isin(first, second, kind="table")]


def _numbers(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values as float64, and which are finite."""
    if values.ndim != 1:
        raise InvalidCommandError(f"a selector takes one value a sample, not an array {list(values.shape)}")
    numbers = values.astype(np.float64)
    finite = np.isfinite(numbers)
    if not finite.any():
        raise InvalidCommandError("no sample has a finite value here: scan again, or choose by another field")
    return numbers, finite


def _share(values: np.ndarray, fraction: float) -> np.ndarray:
    if not 0 < fraction <= 1:
        raise InvalidCommandError(f"a fraction is above 0 and at most 1, not {fraction}")
    numbers, finite = _numbers(values)
    return _largest(numbers, finite, max(1, round(fraction * int(np.count_nonzero(finite)))))


def _largest(numbers: np.ndarray, among: np.ndarray, k: int) -> np.ndarray:
    """The k largest; of equal ones the first. `among` holds k or more."""
    rows = np.flatnonzero(among)
    found = numbers[rows]
    least = np.partition(found, len(found) - k)[len(found) - k]
    above, equal = rows[found > least], rows[found == least]
    return np.sort(np.concatenate([above, equal[: k - len(above)]])).astype(np.int64)


def _probability_ahead(confidence: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """The probability of the class that leads by -margin: the softmax of two logits differs by the factor exp(margin).

    Where the label's own is 0 in float32, it says nothing but that the leading class has about all of the probability.
    """
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        return np.where(confidence > 0, np.exp(np.minimum(np.log(confidence) - margin, 0.0)), 1.0)


def _where(chosen: np.ndarray) -> np.ndarray:
    return np.flatnonzero(chosen).astype(np.int64)
