"""What was recorded is in the file, in order, whatever happens to its process or its disk."""

import math
import struct
import threading
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onthefly.store.journal import FactRecord, Journal, MetricsRecord, read

floats = st.floats(width=64)
numbers = st.tuples(
    st.just("metrics"),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    floats,
    st.lists(st.tuples(st.integers(0, 2**32 - 1), floats), max_size=4),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
names = st.text(max_size=5).filter(lambda name: name != "kind")
facts = st.tuples(st.just("fact"), st.text(max_size=8), st.dictionaries(names, json_values, max_size=3))


def write(path, records):
    journal = Journal(path)
    for name, *arguments in records:
        if name == "metrics":
            step, epoch, time, values = arguments
            journal.metrics(step, epoch, time, list(chain.from_iterable(values)))
        else:
            journal.fact(*arguments)
    journal.close()


def bits(value):
    return struct.pack("<d", value)


@given(st.lists(numbers | facts, max_size=8))
def test_what_is_read_is_what_was_written(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("journal") / "1.journal"
    write(path, written)
    found, end = read(path)
    assert end == path.stat().st_size
    assert [record.seq for record in found] == list(range(1, len(written) + 1))
    for record, (name, *arguments) in zip(found, written, strict=True):
        if name == "fact":
            assert [record.kind, record.data] == arguments
        else:
            step, epoch, time, values = arguments
            assert (record.step, record.epoch, bits(record.time)) == (step, epoch, bits(time))
            assert [(i, bits(v)) for i, v in record.values] == [(i, bits(v)) for i, v in values]


@pytest.fixture
def some(tmp_path):
    """A journal of facts and metrics, and all of its records."""
    path = tmp_path / "1.journal"
    journal = Journal(path)
    loss, accuracy = journal.series("baseline", 0, "loss"), journal.series("baseline", 0, "accuracy")
    for step in range(4):
        journal.metrics(step, 0, step / 2, [loss, math.nan, accuracy, math.inf][: 2 * (step % 3)])
        journal.fact("event", {"event": "é", "step": step})
    journal.close()
    return path, read(path)[0]


def test_a_cut_at_any_byte_leaves_a_prefix_that_can_be_gone_on_from(some, tmp_path):
    path, records = some
    content = path.read_bytes()
    before = 0
    for cut in range(len(content) + 1):
        torn = tmp_path / "torn.journal"
        torn.write_bytes(content[:cut])
        found, end = read(torn)
        assert repr(found) == repr(records[: len(found)])
        assert before <= len(found) <= before + 1
        before = len(found)
        journal = Journal(torn)
        assert torn.stat().st_size == end
        assert journal.fact("event", {}) == len(found) + 1
        journal.close()
        assert repr(read(torn)[0]) == repr([*found, FactRecord(len(found) + 1, "event", {})])
    assert before == len(records)


def test_a_damaged_byte_ends_what_can_be_read(some):
    path, records = some
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :])
        found, end = read(path)
        assert end <= position
        assert repr(found) == repr(records[: len(found)])


def test_it_can_be_read_in_pieces(some):
    path, records = some
    found, offset = [], 0
    while piece := read(path, offset, 3):
        more, offset = piece
        if not more:
            break
        assert len(more) <= 3
        found += more
    assert repr(found) == repr(records)


def test_series_are_named_once_also_after_it_was_opened_again(tmp_path):
    path = tmp_path / "1.journal"
    journal = Journal(path)
    first = [journal.series("baseline", generation, "loss") for generation in (0, 1, 0)]
    journal.close()
    journal = Journal(path)
    assert [journal.series("baseline", generation, "loss") for generation in (0, 1, 0, 2)] == [*first, 2]
    journal.close()
    assert [record.data["generation"] for record in read(path)[0]] == [0, 1, 2]


def test_threads_may_share_it(tmp_path):
    journal = Journal(tmp_path / "1.journal")

    def work(number):
        for step in range(500):
            journal.metrics(step, number, 0.0, [number, float(step)])
            journal.fact("event", {"of": number, "step": step})

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    records, _ = read(tmp_path / "1.journal")
    assert [record.seq for record in records] == list(range(1, 4001))
    for number in range(4):
        own = [r.step for r in records if isinstance(r, MetricsRecord) and r.epoch == number]
        assert own == list(range(500))


KILLED = """
import sys, time
from pathlib import Path
from onthefly.store.journal import Journal
journal = Journal(Path(sys.argv[1]))
loss = journal.series("baseline", 0, "loss")
for step in range(1000):
    journal.metrics(step, 0, 0.0, [loss, float(step)])
print("written", flush=True)
time.sleep(1000)
"""


def test_nothing_is_missing_after_a_kill(tmp_path, python):
    process = python(KILLED, tmp_path / "1.journal")
    assert process.stdout.readline() == "written\n"
    process.kill()
    process.wait()
    records, _ = read(tmp_path / "1.journal")
    assert [record.step for record in records[1:]] == list(range(1000))


FULL = """
import resource, sys
from pathlib import Path
from onthefly.store.journal import HELD_LIMIT, Journal, read

path = Path(sys.argv[1])
journal = Journal(path)
values = [item for number in range(1000) for item in (number, 1.0)]
journal.metrics(0, 0, 0.0, values)

# The file may grow by half a record more: the write in the middle of which the disk is full is a short one.
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 6000, most))
attempts = HELD_LIMIT // 12000 + 100
for step in range(1, attempts):
    journal.metrics(step, 0, 0.0, values)
    assert journal.failing
fact = journal.fact("event", {"event": "never dropped"})
journal.sync()
assert journal.failing and 0 < journal.lost < 200, journal.lost
records, _ = read(path)
assert [record.seq for record in records] == [1]

resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
journal.sync()
assert not journal.failing
journal.metrics(attempts, 0, 0.0, values)
journal.close()
records, end = read(path)
assert end == path.stat().st_size
assert [record.seq for record in records] == list(range(1, fact + 2))
assert [record.step for record in records[:-2]] == list(range(attempts - journal.lost))
assert records[-2].data == {"event": "never dropped"} and records[-1].step == attempts
"""


def test_a_full_disk_costs_nothing_but_the_metrics_beyond_the_limit(tmp_path, python):
    process = python(FULL, tmp_path / "1.journal")
    process.communicate()
    assert process.returncode == 0


def test_nothing_is_raised_after_it_was_closed(tmp_path):
    journal = Journal(tmp_path / "1.journal")
    journal.close()
    journal.metrics(0, 0, 0.0, [0, 1.0])
    assert journal.fact("event", {}) == 2
    journal.sync()
    journal.close()
    assert journal.failing
    assert read(tmp_path / "1.journal") == ([], 0)
