"""Names carry the step; sidecars tell the truth or nothing."""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onthefly.checkpoints.format import write
from onthefly.checkpoints.header import FORMAT_VERSION
from onthefly.checkpoints.sidecar import (
    Sidecar,
    describe,
    name_for,
    newest,
    parse_name,
    path_of,
    read_sidecar,
    write_sidecar,
)
from onthefly.errors import CheckpointWriteError

runs = st.text(min_size=1).filter(lambda run: not run.startswith(".") and not set("/\0") & set(run))
awkward = st.from_regex(r"[ab](-g[0-9]{1,2}|-step[0-9]{7,9}|\.safetensors|-){0,4}", fullmatch=True)
numbers = st.integers(0, 10**10)
unhurried = settings(deadline=None)  # the machine may be busy


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "baseline-step00000007.safetensors"
    return path, write(path, {"step": 7}, {})


def about(path, written, **change):
    fields = {"path": path, "run": "baseline", "generation": 0, "step": 7, "epoch": 1, "time": 1e9, "size": written.size,
              "hash": written.hash, "reason": "manual", "counters": {"step": 7, "val_loss": 0.5, "on": True, "none": None}}  # fmt: skip
    return Sidecar(**{**fields, **change})


# -- names -----------------------------------------------------------------------------------------------------


def test_names_are_as_documented():
    assert name_for("baseline", 1200) == "baseline-step00001200.safetensors"
    assert name_for("baseline", 1200, 2) == "baseline-g2-step00001200.safetensors"
    assert name_for("baseline", 123456789) == "baseline-step123456789.safetensors"
    assert name_for("x-g2", 5) == "x-g2-g0-step00000005.safetensors"


@unhurried
@given(run=runs | awkward, generation=st.integers(0, 3) | numbers, step=st.integers(0, 10) | numbers)
def test_a_name_is_parsed_to_what_it_was_made_from(run, generation, step):
    assert parse_name(name_for(run, step, generation)) == (run, generation, step)


@unhurried
@given(st.text() | st.tuples(runs | awkward, numbers).map(lambda p: f"{p[0]}-step{p[1]:08d}.safetensors"))
def test_whatever_is_parsed_is_the_name_of_that(filename):
    parsed = parse_name(filename)
    if parsed is not None:
        run, generation, step = parsed
        assert name_for(run, step, generation) == filename


@unhurried
@given(a=st.tuples(runs | awkward, numbers, numbers), b=st.tuples(runs | awkward, numbers, numbers))
def test_two_checkpoints_never_share_a_name(a, b):
    assume(a != b)
    assert name_for(a[0], a[1], a[2]) != name_for(b[0], b[1], b[2])


@pytest.mark.parametrize(
    "filename",
    ["", "model.safetensors", "a-step0000120.safetensors", "a-step000001200.safetensors", "-step00000001.safetensors",
     "a-step00000001.safetensors.meta.json", "a-g02-step00000001.safetensors", "a-g0-step00000001.safetensors",
     ".a-step00000001.safetensors", "a-step0000000\u0661.safetensors", "a-step-0000001.safetensors", "a/b-step00000001.safetensors",
     "a-step00000001.safetensors\n"],
)  # fmt: skip
def test_other_names_are_nobodys(filename):
    assert parse_name(filename) is None


@pytest.mark.parametrize("arguments", [("", 1), ("a/b", 1), (".a", 1), ("a\0", 1), ("a", -1), ("a", 1, -1)])
def test_what_cannot_be_a_file_name_is_refused(arguments):
    with pytest.raises(ValueError, match="no file name"):
        name_for(*arguments)


def test_the_newest_is_found_by_name_alone(tmp_path):
    for name in (
        *(name_for("a", step) for step in (3, 900, 20)),
        *(name_for("a", step, 2) for step in (5, 7)),
        name_for("a", 999, 1),
        name_for("a-b", 10**9, 9),
        name_for("a-g7", 10**9),
        name_for("b", 123456789),
        name_for("b", 99999999),
        name_for("a", 8, 2) + ".meta.json",
    ):
        (tmp_path / name).touch()
    (tmp_path / name_for("a", 9, 2)).mkdir()
    assert newest(tmp_path, "a") == tmp_path / "a-g2-step00000007.safetensors"
    assert newest(str(tmp_path), "b") == tmp_path / "b-step123456789.safetensors"
    assert newest(tmp_path, "a-g7") == tmp_path / "a-g7-g0-step1000000000.safetensors"
    assert newest(tmp_path, "c") is None
    assert newest(tmp_path / "nowhere", "a") is None


# -- sidecars --------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(checkpoint):
    path, written = checkpoint
    sidecar = about(path, written)
    write_sidecar(path, sidecar)
    assert read_sidecar(path) == sidecar
    assert sidecar.format == FORMAT_VERSION
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, path.name + ".meta.json"]
    write_sidecar(str(path), dataclasses.replace(sidecar, reason="again"))
    assert read_sidecar(str(path)).reason == "again"


def test_it_is_plain_json_beside_the_checkpoint(checkpoint):
    path, written = checkpoint
    counters = {"loss": math.nan, "best": -math.inf, "step": np.int64(7), "f": np.float32(0.5), "b": np.bool_(True)}
    write_sidecar(path, about(path, written, run="ünï", counters=counters))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads(Path(f"{path}.meta.json").read_text("ascii"), parse_constant=refuse)
    assert record["path"] == str(path)
    assert (record["run"], record["step"], record["size"]) == ("ünï", 7, path.stat().st_size)
    assert record["counters"] == {"loss": None, "best": None, "step": 7, "f": 0.5, "b": True}


def test_describe_fills_in_path_time_size_and_hash(checkpoint, tmp_path, monkeypatch):
    path, written = checkpoint
    monkeypatch.chdir(tmp_path)
    describe(
        path.name, written.hash, written.size, {"step": 7}, run="r", generation=1, step=7, epoch=0, reason="cadence"
    )
    sidecar = read_sidecar(path)
    assert (sidecar.path, sidecar.hash, sidecar.size, sidecar.reason) == (path, written.hash, written.size, "cadence")
    assert json.loads(path_of(path).read_text())["path"] == str(path)
    assert sidecar.time > 1.7e9


def test_a_sidecar_that_cannot_be_written_is_only_logged(checkpoint, caplog):
    path, written = checkpoint
    path_of(path).mkdir()
    with pytest.raises(CheckpointWriteError):
        write_sidecar(path, about(path, written))
    describe(path, written.hash, written.size, {}, run=None, generation=0, step=None, epoch=None, reason="manual")
    assert "its sidecar is not" in caplog.text
    assert read_sidecar(path) is None


def test_a_moved_checkpoint_is_where_it_was_found(checkpoint, tmp_path):
    path, written = checkpoint
    write_sidecar(path, about(path, written))
    (tmp_path / "moved").mkdir()
    for file in (path, path_of(path)):
        shutil.move(file, tmp_path / "moved")
    moved = tmp_path / "moved" / path.name
    assert read_sidecar(moved) == about(moved, written)


def test_a_sidecar_of_another_content_is_not_believed(checkpoint):
    """A process killed between the two leaves the new checkpoint with the old sidecar."""
    path, written = checkpoint
    write_sidecar(path, about(path, written))
    assert write(path, {"step": 8}, {}).size == written.size
    assert read_sidecar(path) is None
    path.unlink()
    assert read_sidecar(path) is None


def test_missing_is_none(checkpoint):
    assert read_sidecar(checkpoint[0]) is None


@pytest.mark.parametrize("cut", [0, 1, 40, -1])
def test_truncated_is_none(checkpoint, cut):
    path, written = checkpoint
    write_sidecar(path, about(path, written))
    os.truncate(path_of(path), len(path_of(path).read_bytes()) + cut if cut < 0 else cut)
    assert read_sidecar(path) is None


@pytest.mark.parametrize("data", [b"\xff", b"[]", b"3", b"{}", b"[" * 100_000, b'{"a":' * 100_000])
def test_nonsense_is_none(checkpoint, data):
    path_of(checkpoint[0]).write_bytes(data)
    assert read_sidecar(checkpoint[0]) is None


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Sidecar) if f.name != "path"])
@pytest.mark.parametrize("value", [[], {"a": []}, True])
def test_a_field_of_another_type_or_none_is_none(checkpoint, field, value):
    path, written = checkpoint
    write_sidecar(path, about(path, written))
    record = json.loads(path_of(path).read_text())
    path_of(path).write_text(json.dumps({**record, field: value}))
    assert read_sidecar(path) is None
    del record[field]
    path_of(path).write_text(json.dumps(record))
    assert read_sidecar(path) is None


def test_fields_of_a_later_version_are_passed_over(checkpoint):
    path, written = checkpoint
    write_sidecar(path, about(path, written))
    record = json.loads(path_of(path).read_text())
    path_of(path).write_text(json.dumps({**record, "later": 1}))
    assert read_sidecar(path) == about(path, written)
