"""A selection is made again, equal, from its manifest."""

import numpy as np
import pytest

from onthefly.errors import AmbiguousError, InexactError, InvalidCommandError, StoreError, UnknownReferenceError
from onthefly.samples import recipes
from onthefly.samples.selection import Selection, find, reproduce

N = 400
EVERY_KIND = [
    "all()",
    "indices(3, 1, 2)",
    "quantile(loss, 0.9)",
    "range(margin, high=0)",
    "top(el2n, 7)",
    "class_top(loss, 3)",
    "cluster(5, 0, 2, seed=1)",
    "hard(0.1)",
    "ambiguous(0.1)",
    "forgotten(2)",
    "el2n(0.2)",
    "margin(0.2)",
    "random(9, 4)",
    "suspects()",
    "noise_aware(0.5)",
    "(hard(0.5) | random(20, 1)) & quantile(loss, 0.2) - suspects()",
]


def columns():
    draw = np.random.default_rng(0)
    confidence = draw.uniform(0.01, 1, N).astype(np.float32)
    label = draw.integers(0, 4, N)
    return {
        "loss": -np.log(confidence),
        "correct": confidence > 0.5,
        "confidence": confidence,
        "margin": np.log(confidence / (1.01 - confidence)),
        "el2n": 1 - confidence,
        "prediction": np.where(confidence > 0.5, label, (label + 1) % 4),
        "label": label,
        "embedding": draw.normal(size=(N, 6)).astype(np.float32),
        "seen": np.full(N, 5),
        "mean_loss": -np.log(confidence),
        "forgotten": draw.integers(0, 4, N),
        "mean_confidence": confidence,
        "confidence_variability": draw.uniform(0, 0.1, N).astype(np.float32),
        "mean_margin": np.log(confidence / (1.01 - confidence)),
    }


def made(text, values):
    recipe = recipes.parse(text)
    source = {"kind": "scan", "hash": "ab" * 32}
    return Selection(recipe, recipes.choose(recipe, values, N), N, (source,))


@pytest.mark.parametrize("text", EVERY_KIND)
def test_each_kind_is_made_again_from_what_is_on_disk(text, tmp_path):
    first = made(text, columns())
    path = first.write(tmp_path)
    again = reproduce(Selection.read(path).manifest(), columns())
    assert again == first
    assert np.array_equal(again.indices, first.indices)
    assert find(tmp_path, first.digest[:6]) == find(tmp_path, first.digest) == first


def test_every_selector_is_among_them():
    assert all(any(f"{name}(" in text for text in EVERY_KIND) for name in recipes.SELECTORS)


def test_other_values_are_noticed():
    manifest = made("top(loss, 5)", columns()).manifest()
    with pytest.raises(InexactError):
        reproduce(manifest, columns() | {"loss": columns()["loss"][::-1]})


def test_equal_selections_share_a_file_and_a_damaged_one_is_replaced(tmp_path):
    selection = made("random(50)", columns())
    path = selection.write(tmp_path)
    inode = path.stat().st_ino
    assert selection.write(tmp_path) == path
    assert path.stat().st_ino == inode
    path.write_bytes(path.read_bytes()[:-40])
    assert Selection.read(selection.write(tmp_path)) == selection
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_no_damage_passes_for_a_selection(tmp_path):
    selection = made("random(50)", columns())
    path = selection.write(tmp_path)
    content = path.read_bytes()
    for at in range(0, len(content), 7):
        for damaged in (content[:at], content[:at] + bytes([content[at] ^ 0x41]) + content[at + 1 :]):
            path.write_bytes(damaged)
            try:
                found = Selection.read(path)
            except StoreError:
                continue
            assert found == selection  # the damage was in padding


def test_what_cannot_be_found_is_said(tmp_path):
    with pytest.raises(UnknownReferenceError):
        find(tmp_path, "../../x")
    with pytest.raises(UnknownReferenceError):
        find(tmp_path, "abcdef")
    for end in "12":
        (tmp_path / f"selection-abcdef000000000{end}.arrow").touch()
    with pytest.raises(AmbiguousError):
        find(tmp_path, "abcdef")


@pytest.mark.parametrize("indices", [[], [1, 1], [2, 1], [-1], [0.5], [N]])
def test_wrong_indices_are_refused(indices):
    with pytest.raises(InvalidCommandError):
        Selection({"select": "all"}, np.array(indices), N)
