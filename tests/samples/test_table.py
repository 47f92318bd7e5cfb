"""A table is there whole or not at all, comes back as it was, and no file is too broken to be refused."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from onthefly.errors import InvalidCommandError, StoreError
from onthefly.samples.table import SampleTable

unhurried = settings(deadline=None, max_examples=60)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
dtypes = st.sampled_from(["?", "i1", "u2", "<i4", ">i4", "i8", "u8", "f2", "f4", ">f4", "f8"])


def sample():
    return SampleTable(
        {
            "loss": np.array([0.5, np.nan, 3.0], np.float32),
            "correct": np.array([True, False, True]),
            "label": np.array([1, -1, 2]),
            "name": np.array(["a.png", "", "π.png"], dtype=object),
            "embedding": np.arange(6, dtype=np.float32).reshape(3, 2),
        },
        {"run": "baseline", "step": 1200, "data": "train"},
    )


@st.composite
def tables(draw):
    length = draw(st.integers(0, 5))
    columns = {}
    for name in draw(st.lists(st.text(), unique=True, max_size=4)):
        kind = draw(st.sampled_from(["numbers", "vectors", "names"]))
        if kind == "names":
            columns[name] = np.array(draw(st.lists(st.text(), min_size=length, max_size=length)), dtype=object)
        else:
            shape = (length,) if kind == "numbers" else (length, draw(st.integers(1, 3)))
            columns[name] = draw(arrays.arrays(draw(dtypes), shape))
    return SampleTable(columns, draw(st.dictionaries(st.text(), json_values, max_size=3)))


def assert_same(found, wanted):
    assert list(found.columns) == list(wanted.columns)
    assert found.about == wanted.about
    for name, column in wanted.columns.items():
        assert found.columns[name].dtype == column.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found.columns[name], column)


@unhurried
@given(tables())
def test_every_table_comes_back_as_it_was(tmp_path_factory, table):
    path = tmp_path_factory.mktemp("table") / "table.arrow"
    assert table.write(path) == blake3(path.read_bytes()).hexdigest()
    found = SampleTable.read(path)
    assert_same(found, table)
    assert len(found) == len(table)


def test_equal_tables_have_equal_hashes_and_others_have_others(tmp_path):
    table = sample()
    first = table.write(tmp_path / "first.arrow")
    assert sample().write(tmp_path / "second.arrow") == first
    assert SampleTable(table.columns, {"data": "val"}).write(tmp_path / "third.arrow") != first
    assert_same(SampleTable.read(tmp_path / "second.arrow", content=first), table)


def test_a_long_table_is_written_and_read_in_pieces(tmp_path):
    length = 200_001
    table = SampleTable(
        {
            "seen": np.arange(length),
            "correct": np.arange(length) % 3 == 0,
            "embedding": np.arange(3 * length, dtype=np.float32).reshape(length, 3),
            "name": np.array([f"{i}.png" for i in range(length)]).astype(object),
        },
        {},
    )
    table.write(tmp_path / "table.arrow")
    with pa.ipc.open_file(tmp_path / "table.arrow") as reader:
        assert reader.num_record_batches > 1
    assert_same(SampleTable.read(tmp_path / "table.arrow"), table)


def test_other_tools_read_the_file_as_it_is(tmp_path):
    sample().write(tmp_path / "table.arrow")
    read = pa.ipc.open_file(tmp_path / "table.arrow").read_all()
    assert read.column("name").to_pylist() == ["a.png", "", "π.png"]
    assert read.column("embedding").to_pylist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    assert json.loads(read.schema.metadata[b"onthefly"])["about"]["run"] == "baseline"


def test_nothing_is_left_beside_a_table(tmp_path):
    sample().write(tmp_path / "table.arrow")
    sample().write(tmp_path / "table.arrow")
    assert os.listdir(tmp_path) == ["table.arrow"]


def test_a_table_that_cannot_be_written_leaves_the_older_one(tmp_path):
    path = tmp_path / "table.arrow"
    digest = sample().write(path)
    with pytest.raises(InvalidCommandError, match="Unicode"):
        SampleTable({"name": np.array(["a", "\udce9"], dtype=object)}, {}).write(path)
    assert_same(SampleTable.read(path, content=digest), sample())
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match=r"folder: cannot write the table"):
        sample().write(tmp_path / "folder")
    with pytest.raises(StoreError, match=r"gone/table\.arrow"):
        sample().write(tmp_path / "gone" / "table.arrow")
    assert sorted(os.listdir(tmp_path)) == ["folder", "table.arrow"]


def test_a_full_disk_is_a_store_error_and_leaves_nothing(tmp_path):
    program = (
        "import resource, signal, sys, numpy as np\n"
        "from onthefly.errors import StoreError\n"
        "from onthefly.samples.table import SampleTable\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: SampleTable({'x': np.zeros(100_000)}, {}).write(sys.argv[1])\n"
        "except StoreError as e: print(e)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "table.arrow")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "cannot write the table" in said
    assert os.listdir(tmp_path) == []


def test_columns_that_make_no_table_are_refused():
    with pytest.raises(InvalidCommandError, match="equally long"):
        SampleTable({"a": np.zeros(2), "b": np.zeros(3)}, {})
    for column in (
        [1, 2],
        np.zeros((2, 2, 2)),
        np.zeros((2, 0)),
        np.zeros(2, complex),
        np.array([1, None]),
        np.array(5),
    ):
        with pytest.raises(InvalidCommandError, match="loss"):
            SampleTable({"loss": column}, {})


@pytest.mark.parametrize("about", [{"x": float("nan")}, {"x": {1, 2}}, {"x": np.float32(1)}])
def test_about_must_be_json(tmp_path, about):
    with pytest.raises(InvalidCommandError, match="JSON"):
        SampleTable({}, about).write(tmp_path / "table.arrow")
    assert os.listdir(tmp_path) == []


def test_a_file_that_is_not_there_or_not_ours_is_named(tmp_path):
    foreign = tmp_path / "foreign.arrow"
    with pa.ipc.new_file(foreign, pa.schema([("loss", pa.float32())])):
        pass
    text = tmp_path / "text.arrow"
    text.write_text("no Arrow at all")
    empty = tmp_path / "empty.arrow"
    empty.touch()
    for path in (foreign, text, empty, tmp_path / "gone.arrow", tmp_path):
        with pytest.raises(StoreError, match=path.name):
            SampleTable.read(path)


@pytest.mark.parametrize(
    ("columns", "rows"),
    [
        ({"x": pa.array([1.0, None])}, 2),
        ({"x": pa.array([[1.0], [2.0, 3.0]])}, 2),
        ({"x": pa.array([1.0, 2.0]).dictionary_encode()}, 2),
        ({"x": pa.nulls(2)}, 2),
        ({"x": pa.array([1.0, 2.0])}, 1),
        ({"x": pa.array([1.0, 2.0])}, 3),
        ({"x": pa.array([1.0, 2.0])}, 2**62),
        ({"x": pa.array([1.0, 2.0])}, -1),
        ({"x": pa.array([1.0, 2.0])}, True),
        ({"x": pa.array([1.0, 2.0])}, None),
    ],
)
def test_a_file_whose_header_lies_is_refused(tmp_path, columns, rows):
    path = tmp_path / "table.arrow"
    note = json.dumps({"format": 1, "rows": rows, "about": {}}).encode()
    batch = pa.record_batch(columns).replace_schema_metadata({b"onthefly": note})
    with pa.ipc.new_file(path, batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(StoreError, match=r"table\.arrow"):
        SampleTable.read(path)


def test_no_memory_is_taken_for_rows_that_a_file_cannot_hold(tmp_path):
    path = tmp_path / "table.arrow"
    sample().write(path)
    with pa.ipc.open_file(path) as reader:
        note = json.dumps({"format": 1, "rows": 10**6, "about": {}}).encode()
        batch = reader.get_batch(0).replace_schema_metadata({b"onthefly": note})
    with pa.ipc.new_file(path, batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(StoreError, match=r"table\.arrow.* 1000000 rows are more than its \d+ bytes can hold"):
        SampleTable.read(path)


def test_every_truncation_is_refused(tmp_path):
    sample().write(tmp_path / "table.arrow")
    whole = (tmp_path / "table.arrow").read_bytes()
    short = tmp_path / "short.arrow"
    for length in range(0, len(whole), 7):
        short.write_bytes(whole[:length])
        with pytest.raises(StoreError, match=r"short\.arrow"):
            SampleTable.read(short)


def test_with_its_hash_a_file_with_any_other_byte_is_refused(tmp_path):
    path = tmp_path / "table.arrow"
    digest = sample().write(path)
    whole = bytearray(path.read_bytes())
    whole[-100] ^= 1
    path.write_bytes(whole)
    with pytest.raises(StoreError, match=r"table\.arrow: the file has changed"):
        SampleTable.read(path, content=digest)


# In a process of its own: a crash there is a failure here, and not the end of the tests.
FUZZ = """
import random, sys
from pathlib import Path
from onthefly.errors import StoreError
from onthefly.samples.table import SampleTable
whole, path = Path(sys.argv[1]).read_bytes(), Path(sys.argv[1] + ".mutant")
draw, refused = random.Random(int(sys.argv[2])), 0
for _ in range(int(sys.argv[3])):
    mutant = bytearray(whole)
    for _ in range(draw.choice([1, 1, 2, 5, 40])):
        at = draw.randrange(len(mutant))
        kind = draw.randrange(4)
        if kind == 0:
            mutant[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            mutant[at] = draw.choice([0, 1, 0x7F, 0x80, 0xFF])
        elif kind == 2:
            mutant[at : at + 8] = draw.choice([0, 2**31 - 1, 2**40, 2**63 - 1, 2**64 - 1]).to_bytes(8, "little")
        else:
            del mutant[at : at + draw.randrange(1, 9)]
    path.write_bytes(mutant)
    try:
        table = SampleTable.read(path)
    except StoreError:
        refused += 1
    else:
        for column in table.columns.values():
            column.tolist()
print(refused)
"""


def test_no_damage_does_more_than_a_store_error(tmp_path):
    sample().write(tmp_path / "table.arrow")
    seed, count = os.environ["ONTHEFLY_SEED"], 800
    command = [sys.executable, "-W", "error", "-c", FUZZ, str(tmp_path / "table.arrow"), seed, str(count)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    assert count / 2 < int(done.stdout) <= count


def test_no_torch_is_loaded_for_a_table():
    program = "import sys, onthefly.samples.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
