"""Maps of embeddings."""

from importlib.util import find_spec

import numpy as np
import pytest

from onthefly.errors import InvalidCommandError, MissingPartError
from onthefly.samples import layout


def test_principal_components_lie_along_the_widest_spread():
    random = np.random.default_rng(0)
    values = random.normal(size=(300, 5)) * [1, 9, 1, 3, 1]
    values[7, 2] = np.nan
    x, y = layout.places(values, "pca")
    good = np.arange(300) != 7
    assert abs(np.corrcoef(x[good], values[good, 1])[0, 1]) > 0.95
    assert abs(np.corrcoef(y[good], values[good, 3])[0, 1]) > 0.9
    assert np.isnan([x[7], y[7]]).all()
    assert (x.dtype, layout.places(values[:, :1], "pca")[1][0]) == (np.float32, 0)


def test_a_map_by_umap_is_made_or_says_what_it_needs(monkeypatch):
    values = np.repeat(np.eye(3), 40, axis=0) * 5 + np.random.default_rng(0).normal(size=(120, 3))
    values[5] = np.inf
    if find_spec("umap") is None:
        assert layout.methods() == ["pca"]
        with pytest.raises(MissingPartError, match="pip install"):
            layout.places(values, "umap")
        return
    assert layout.methods() == ["pca", "umap"]
    monkeypatch.setattr(layout, "FITTED", 60)  # half of them are put where they belong
    x, y = layout.places(values, "umap")
    assert np.flatnonzero(~np.isfinite(x + y)).tolist() == [5]
    groups = np.stack([x, y], 1).reshape(3, 40, 2)
    centres = np.nanmean(groups, axis=1)
    assert np.nanmean(np.linalg.norm(groups - centres[:, None], axis=2)) < np.linalg.norm(centres[0] - centres[1])


def test_what_is_no_map_is_refused():
    with pytest.raises(InvalidCommandError, match="pca"):
        layout.places(np.zeros((9, 2)), "tsne")
