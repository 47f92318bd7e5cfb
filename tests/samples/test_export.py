"""Chosen samples as a file of another tool: what is read back is what was chosen, or there is no file."""

import csv
import json
import math
import os
import resource
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from onthefly.errors import InvalidCommandError, StoreError
from onthefly.samples.export import export

KINDS = ["parquet", "csv", "json"]


def some(length):
    draw = np.random.default_rng(length)
    return {
        "seen": draw.integers(0, 9, length),
        "loss": draw.random(length, np.float32),
        "known": draw.random(length) < 0.5,
        "embedding": draw.random((length, 3), np.float32),
        "label": draw.integers(-1, 10, length),
        "name": np.array([f"train/{n}.png" for n in range(length)]),
    }


def read(path):
    """The rows of a file, as any tool would read them."""
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()
    if path.suffix == ".json":
        return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("kind", KINDS)
def test_the_chosen_samples_are_there_with_what_is_known_of_them(tmp_path, kind):
    columns = some(20)
    done = export(columns, np.array([3, 7, 19]), tmp_path / f"hard.{kind}")
    assert (done.path, done.rows, done.format) == (tmp_path / f"hard.{kind}", 3, kind)
    rows = read(done.path)
    assert list(rows[0]) == ["index", "name", "label", "loss", "seen", "known"] + ["embedding"] * (kind == "parquet")
    assert [int(row["index"]) for row in rows] == [3, 7, 19]
    assert [row["name"] for row in rows] == ["train/3.png", "train/7.png", "train/19.png"]
    assert [np.float32(row["loss"]) for row in rows] == columns["loss"][[3, 7, 19]].tolist()
    assert [str(row["known"]).lower() for row in rows] == [str(k).lower() for k in columns["known"][[3, 7, 19]]]
    if kind == "parquet":
        assert [row["embedding"] for row in rows] == columns["embedding"][[3, 7, 19]].tolist()
    assert os.listdir(tmp_path) == [f"hard.{kind}"]


texts = st.none() | st.text(max_size=5) | st.sampled_from(['"', "a,b", "\n", "=1+1", "caf\u00e9", "\x00"])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(width=32), st.floats(), texts, st.integers(-(2**63), 2**63 - 1)), max_size=9))
def test_json_is_what_a_parser_of_json_says(tmp_path_factory, values):
    single, double, text, whole = ([value[place] for value in values] for place in range(4))
    columns = {
        "loss": np.array(single, np.float32),
        "margin": np.array(double, np.float64),
        "name": np.array(text, object),
        "label": np.array(whole, np.int64),
    }
    rows = read(export(columns, np.arange(len(values)), tmp_path_factory.mktemp("json") / "all.json").path)
    assert [row["label"] for row in rows] == whole
    assert [row["name"] for row in rows] == text
    for name, wanted, exact in (("loss", single, np.float32), ("margin", double, np.float64)):
        found = [row[name] for row in rows]
        assert [math.isfinite(value) for value in wanted] == [value is not None for value in found]
        assert [exact(v) for v in found if v is not None] == [v for v in wanted if math.isfinite(v)]


def test_a_value_that_there_is_not_is_empty_in_csv_null_in_json_and_nan_in_parquet(tmp_path):
    columns = {"loss": np.array([np.nan, 0.1, np.inf], np.float32)}
    paths = {kind: export(columns, np.arange(3), tmp_path / f"x.{kind}").path for kind in KINDS}
    assert [row["loss"] for row in read(paths["csv"])] == ["", "0.1", "inf"]
    assert [row["loss"] for row in read(paths["json"])] == [None, 0.1, None]
    assert str([row["loss"] for row in read(paths["parquet"])][::2]) == "[nan, inf]"


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_come_in_their_order(tmp_path, kind):
    length = 150_000  # several batches
    indices = np.random.default_rng(0).permutation(length)[: length - 7]
    columns = {"loss": np.arange(length, dtype=np.float64)}
    rows = read(export(columns, indices, tmp_path / f"all.{kind}").path)
    assert [int(row["index"]) for row in rows] == indices.tolist()
    assert [float(row["loss"]) for row in rows] == indices.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_no_samples_are_a_file_of_no_rows(tmp_path, kind):
    done = export(some(3), np.array([], np.int64), tmp_path / f"none.{kind}")
    assert read(done.path) == []
    assert done.rows == 0


def test_only_the_columns_that_are_wanted_are_there_in_that_order(tmp_path):
    done = export(some(4), np.array([1]), tmp_path / "a.json", columns_wanted=["seen", "index", "label", "seen"])
    assert list(read(done.path)[0]) == ["index", "seen", "label"]


def test_names_that_are_no_unicode_are_written_so_that_they_can_be_read(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    columns = {"name": np.array([name, "b"], object)}
    for kind in KINDS:
        assert read(export(columns, np.arange(2), tmp_path / f"n.{kind}").path)[0]["name"] == r"caf\udce9.png"


def test_the_suffix_may_be_in_capitals(tmp_path):
    assert export(some(2), np.array([0]), str(tmp_path / "A.CSV")).format == "csv"


REFUSED = {
    "a suffix of another kind": ("a.xlsx", [0], None, "parquet, .csv or .json"),
    "no suffix": ("json", [0], None, "parquet, .csv or .json"),
    "an index beyond the data set": ("a.csv", [0, 4], None, "there are 4"),
    "a negative index": ("a.csv", [-1], None, "-1"),
    "float indices": ("a.csv", [0.0], None, "whole numbers"),
    "indices in two dimensions": ("a.csv", [[0]], None, "one dimension"),
    "a column that there is not": ("a.csv", [0], ["los"], "'los'; there are: name, label, loss, seen"),
    "embeddings in csv": ("a.csv", [0], ["embedding"], "only a .parquet"),
    "embeddings in json": ("a.json", [0], ["loss", "embedding"], "only a .parquet"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, case):
    name, indices, wanted, words = case
    with pytest.raises(InvalidCommandError, match=words):
        export(some(4), np.array(indices), tmp_path / name, columns_wanted=wanted)
    assert os.listdir(tmp_path) == []


def test_a_file_that_is_there_already_stays_as_it_is(tmp_path):
    (tmp_path / "a.csv").write_text("mine")
    with pytest.raises(InvalidCommandError, match="already"):
        export(some(4), np.array([0]), tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text() == "mine"


def test_a_folder_that_there_is_not_is_told(tmp_path):
    with pytest.raises(StoreError, match="No such file"):
        export(some(4), np.array([0]), tmp_path / "none" / "a.csv")


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fills_up_leaves_nothing_half_written(tmp_path, kind):
    columns = {"loss": np.random.default_rng(0).random(100_000)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # python ignores the signal: writes fail
    try:
        with pytest.raises(StoreError, match=r"File too large"):
            export(columns, np.arange(100_000), tmp_path / f"a.{kind}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_a_million_rows_need_little_memory_beside_the_columns(tmp_path):
    columns = {name: np.random.default_rng(0).random(1_000_000) for name in ("loss", "margin", "el2n")}
    tracemalloc.start()
    try:
        export(columns, np.arange(1_000_000), tmp_path / "all.csv")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < sum(column.nbytes for column in columns.values())


def test_it_loads_no_torch():
    script = "import sys, onthefly.samples.export; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
