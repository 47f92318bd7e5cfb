"""Embeddings in two dimensions: where each sample lies on a map. Loads no torch, and umap-learn only when it is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec

import numpy as np

from onthefly.errors import InvalidCommandError, MissingPartError

FITTED = 20_000
"""Samples that a map is made from at most; the others are put where they belong on it."""

_NEIGHBOURS = 15
_FEWEST = 5  # what fewer samples there are to learn from, UMAP makes nothing of

Places = tuple[np.ndarray, np.ndarray]
"""x and y of each sample, float32 [N] each; NaN for an embedding that is not finite."""


def methods() -> list[str]:
    """What a map can be made by here: pca, and umap if umap-learn is installed."""
    return [name for name in METHODS if name != "umap" or find_spec("umap") is not None]


def places(embeddings: np.ndarray, method: str) -> Places:
    """Where each row of [N, D] lies. Raises `InvalidCommandError` for another method, `MissingPartError` for umap without umap-learn."""
    if method not in METHODS:
        raise InvalidCommandError(f"there is no map by {method!r}; there are: {', '.join(METHODS)}")
    return METHODS[method](embeddings)


def principal(embeddings: np.ndarray) -> Places:
    """The first two principal components of rows [N, D]."""
    values, good, fitted = _sound(embeddings)
    found = np.full((len(values), 2), np.nan, np.float32)
    if len(fitted):
        mean = fitted.mean(axis=0)
        centred = (fitted - mean).astype(np.float64)
        _, axes = np.linalg.eigh(centred.T @ centred)
        best = axes[:, ::-1][:, :2].astype(np.float32)
        # The sign of an axis is arbitrary: the same embeddings must give the same picture.
        best *= np.where(best[np.abs(best).argmax(axis=0), np.arange(best.shape[1])] < 0, -1, 1).astype(np.float32)
        found[good, : best.shape[1]] = (values[good] - mean) @ best
        found[good, best.shape[1] :] = 0
    return found[:, 0], found[:, 1]


def umap(embeddings: np.ndarray) -> Places:
    """UMAP (McInnes et al. 2018) of rows [N, D]: learnt from at most `FITTED`, evenly taken, where it lays the others then.

    The seed is fixed: the same embeddings give the same picture. It takes seconds for a thousand samples, and minutes for a hundred
    thousand. Raises `MissingPartError` when umap-learn is not installed, and `InvalidCommandError` for fewer than five samples.
    """
    if find_spec("umap") is None:
        raise MissingPartError("a map by umap needs umap-learn: pip install 'onthefly[umap]'")
    values, good, fitted = _sound(embeddings)
    if len(fitted) < _FEWEST:
        raise InvalidCommandError(f"a map by umap needs {_FEWEST} samples or more, and {len(fitted)} have an embedding")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImportWarning)  # it tells of a part of its own that lacks another library
        from umap import UMAP  # type: ignore[import-not-found]

    neighbours = min(_NEIGHBOURS, len(fitted) - 1)
    start = "spectral" if len(fitted) > 3 * _NEIGHBOURS else "random"  # few samples have no spectrum to begin with
    learnt = UMAP(n_components=2, n_neighbors=neighbours, init=start, random_state=0, n_jobs=1).fit(fitted)
    found = np.full((len(values), 2), np.nan, np.float32)
    found[good] = learnt.embedding_ if len(fitted) == good.sum() else learnt.transform(values[good])
    return found[:, 0], found[:, 1]


METHODS: Mapping[str, Callable[[np.ndarray], Places]] = {"pca": principal, "umap": umap}


def _sound(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows as float32, which of them are finite, and those that a map is made from."""
    values = embeddings.astype(np.float32)
    good: np.ndarray = np.asarray(np.isfinite(values).all(axis=1))
    return values, good, values[good][:: max(1, -(-int(good.sum()) // FITTED))]
