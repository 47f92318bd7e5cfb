"""Every kind of fault in a store is named, repaired where that is promised, and gone afterwards."""

import json
import os
import shutil
import time

import pytest
from checkpoint_stores import again, begin, end, save, tell, trained
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import update

from onthefly import fsck, repairs
from onthefly.checkpoints import sidecar
from onthefly.checkpoints.durable import replacing
from onthefly.store import queries, schema
from onthefly.store.store import Store


@pytest.fixture
def store(tmp_path):
    made = Store.open(tmp_path / "store", create=True)
    yield made
    made.close()


def found(store, **how):
    """Kind, step and whether there is a remedy, of every finding."""
    return [(one.kind, one.step, one.remedy is not None) for one in fsck.check(store, **how).findings]


def only(store, **how):
    (finding,) = fsck.check(store, **how).findings
    return finding


def repaired(store):
    """Repair everything; gives what came of each."""
    return [(one.finding.kind, one.done) for one in repairs.repair(store, fsck.check(store))]


def old(path):
    """As if nobody had written to it for long."""
    os.utime(path, (1, 1))
    return path


def test_a_sound_store_has_nothing_to_say(store):
    rows = trained(store)
    told = []
    report = fsck.check(store, progress=lambda *words: told.append(words))
    size = sum(row.size for row in rows)
    assert report == fsck.Report(store.root, 3, size, True, ())
    assert [(path, total) for path, _, total in told] == [(row.path, size) for row in rows]
    assert [done for _, done, _ in told] == [0, rows[0].size, rows[0].size + rows[1].size]


# -- checkpoints that were recorded ----------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 2), place=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255))
def test_any_changed_byte_of_any_checkpoint_is_found(store, which, place, change):
    rows = queries.checkpoints(store) or trained(store)
    row = rows[which]
    content = row.path.read_bytes()
    at = int(place * len(content))
    row.path.write_bytes(content[:at] + bytes([content[at] ^ change]) + content[at + 1 :])
    damaged = only(store)
    assert (damaged.kind, damaged.severity, damaged.step, damaged.remedy) == ("damaged", "error", row.step, None)
    assert (damaged.path, damaged.run, damaged.hash) == (row.path, "baseline", row.hash)
    row.path.write_bytes(content)
    assert found(store) == []


@pytest.mark.parametrize("length", [0, 7, 100, 5000])
def test_a_cut_off_checkpoint_is_found_by_its_header_alone(store, length):
    row = trained(store)[1]
    os.truncate(row.path, length)
    assert only(store, full=False).kind == "damaged"


def test_a_quick_look_takes_the_bytes_on_trust(store):
    row = trained(store)[1]
    with open(row.path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    assert found(store, full=False) == []
    assert found(store) == [("damaged", 10, False)]


def test_another_content_is_named_and_left(store):
    first, second, _ = trained(store)
    shutil.copy(first.path, second.path)
    finding = only(store)
    assert (finding.kind, finding.severity, finding.remedy) == ("replaced", "error", None)
    assert f"that of baseline@0 {first.hash[:12]}" in finding.message
    assert repaired(store) == []
    assert second.path.exists()


def test_an_unreadable_file_is_not_called_damaged(store):
    row = trained(store)[1]
    row.path.unlink()
    row.path.symlink_to(row.path)
    assert only(store).kind == "unreadable"


def test_a_lost_file_becomes_a_tombstone(store):
    row = trained(store)[1]
    row.path.unlink()
    finding = only(store)
    assert (finding.kind, finding.severity, finding.step) == ("lost", "error", 10)
    assert repaired(store) == [("lost", True)]
    (buried,) = [one for one in queries.checkpoints(store, evicted=True) if one.evicted is not None]
    assert (buried.id, buried.evicted_reason) == (row.id, "lost")
    assert queries.events(store)[-1].kind == "checkpointEvicted"
    assert found(store) == []


def test_a_lost_file_that_is_back_is_not_given_up(store):
    row = trained(store)[1]
    aside = row.path.rename(row.path.with_suffix(".aside"))
    report = fsck.check(store)
    aside.rename(row.path)
    (result,) = repairs.repair(store, report)
    assert (result.done, "is back" in result.message) == (False, True)
    assert found(store) == []


def test_a_whole_folder_that_is_gone_may_be_a_disk_that_is_not_there(store, tmp_path):
    (tmp_path / "disk").mkdir()
    run, session = begin(store)
    save(store, session, run, 10, path=tmp_path / "disk" / sidecar.name_for(run, 10))
    end(store, session, run)
    (tmp_path / "disk").rename(tmp_path / "elsewhere")
    finding = only(store)
    assert (finding.kind, finding.remedy, "not mounted" in finding.advice) == ("lost", None, True)
    (tmp_path / "elsewhere").rename(tmp_path / "disk")
    assert found(store) == []


# -- what lies beside them -------------------------------------------------------------------------------------


def test_the_file_of_a_removed_checkpoint_is_a_leftover(store):
    row = trained(store)[1]
    tell_again = again(store, row.run)
    tell(store, tell_again, "evicted", path=str(row.path), hash=row.hash, reason="retention", time=5.0)
    end(store, tell_again, row.run)
    assert found(store) == [("leftover", 10, True)]
    assert repaired(store) == [("leftover", True)]
    assert not row.path.exists()
    assert not sidecar.path_of(row.path).exists()
    assert found(store) == []


def test_a_tombstone_whose_path_has_a_live_row_is_no_leftover(store):
    run, session = begin(store)
    save(store, session, run, 10)
    save(store, session, run, 10, pinned=True)  # as a session pins
    end(store, session, run)
    assert len(queries.checkpoints(store, evicted=True)) == 2
    assert found(store) == []


def test_what_was_given_up_as_lost_and_is_back_is_not_removed(store):
    row = trained(store)[1]
    aside = row.path.rename(row.path.with_suffix(".aside"))
    assert repaired(store) == [("lost", True)]
    aside.rename(row.path)
    finding = only(store)
    assert (finding.kind, finding.remedy, "import" in finding.advice) == ("leftover", None, True)
    assert repaired(store) == []
    assert row.path.exists()


SIDECARS = {
    "missing": lambda path: path.unlink(),
    "damaged": lambda path: path.write_text("{"),
    "of another content": lambda path: path.write_text(path.read_text().replace('"hash": "', '"hash": "0')),
}


@pytest.mark.parametrize("spoil", SIDECARS.values(), ids=SIDECARS)
def test_a_sidecar_is_written_again_from_the_row(store, spoil):
    row = trained(store)[1]
    before = sidecar.read_sidecar(row.path)
    spoil(sidecar.path_of(row.path))
    assert found(store) == [("sidecar", 10, True)]
    assert repaired(store) == [("sidecar", True)]
    after = sidecar.read_sidecar(row.path)
    assert after.time == row.time
    assert json.dumps(vars(after) | {"time": before.time}, default=str) == json.dumps(vars(before), default=str)
    assert found(store) == []


def test_a_sidecar_of_another_checkpoint_is_noticed(store):
    first, second, _ = trained(store)
    shutil.copy(sidecar.path_of(first.path), sidecar.path_of(second.path))
    assert found(store) == [("sidecar", 10, True)]


def test_a_sidecar_alone_is_litter(store):
    row = trained(store)[1]
    alone = row.path.with_name("baseline-step00000011.safetensors.meta.json")
    shutil.copy(sidecar.path_of(row.path), alone)
    assert found(store) == [("litter", None, True)]
    assert repaired(store) == [("litter", True)]
    assert not alone.exists()


def test_an_unfinished_file_is_a_stray_once_nobody_writes_it(store):
    row = trained(store)[1]
    stray = old(_touched(row.path.with_name(".x.safetensors.0123abcd.onthefly.tmp")))
    with replacing(row.path.with_name("other.bin")) as handle:
        os.utime(handle, (1, 1))
        assert [one.path for one in fsck.check(store).findings] == [stray]
        assert repaired(store) == [("stray", True)]
    assert not stray.exists()
    assert row.path.with_name("other.bin").exists()
    assert found(store) == []


def _touched(path):
    path.touch()
    return path


def test_a_whole_checkpoint_without_a_row_is_a_note(store):
    row = trained(store)[1]
    copy = row.path.with_name("baseline-step00000011.safetensors")
    shutil.copy(row.path, copy)
    finding = only(store)
    assert (finding.kind, finding.severity, finding.step, finding.hash) == ("unrecorded", "note", 11, row.hash)
    assert repaired(store) == []
    copy.write_bytes(b"not a checkpoint")
    finding = only(store)
    assert (finding.kind, finding.severity, finding.remedy) == ("foreign", "note", None)
    assert copy.exists()


def test_in_other_folders_only_what_bears_a_name_of_this_store_is_looked_at(store, tmp_path):
    run, session = begin(store)
    mine = save(store, session, run, 10, path=tmp_path / "mine.safetensors", pinned=True)
    end(store, session, run)
    for name in ("theirs.safetensors", "other-step00000001.safetensors", "baseline-step00000001.safetensors"):
        shutil.copy(mine.path, tmp_path / name)
        shutil.copy(sidecar.path_of(mine.path), tmp_path / f"{name[0]}.safetensors.meta.json")
    assert [(one.kind, one.path.name) for one in fsck.check(store).findings] == [
        ("unrecorded", "baseline-step00000001.safetensors")
    ]
    mine.path.unlink()
    assert found(store) == [("lost", 10, True), ("unrecorded", 1, False)]


# -- between runs ----------------------------------------------------------------------------------------------


def test_a_run_that_comes_from_what_is_not_there_is_an_error(store):
    row = trained(store)[1]
    store.create_run("fork", project="p", kind="fork", parents=[("baseline", row.hash)])
    assert found(store) == []
    row.path.unlink()
    assert repaired(store) == [("lost", True)]
    finding = only(store)
    assert (finding.kind, finding.severity, finding.run, finding.step) == ("broken link", "error", "fork", 10)
    assert "(lost)" in finding.message
    assert finding.remedy is None


def test_a_generation_stands_on_its_base(store, tmp_path):
    row = trained(store)[1]
    session = again(store, row.run)
    outside = tmp_path / "outside.safetensors"
    shutil.copy(row.path, outside)
    base = {"path": str(outside), "hash": row.hash, "step": 10, "epoch": 0}
    tell(store, session, "run", run=row.run, generation=1, base=base)
    end(store, session, row.run)
    row.path.unlink()
    assert repaired(store) == [("lost", True)]
    assert found(store) == []  # the file is none of the store's, and is there
    outside.unlink()
    assert found(store) == [("broken link", 10, False)]


# -- journals --------------------------------------------------------------------------------------------------


def test_a_torn_journal_is_a_note(store):
    trained(store)
    path = store.journal_path(1)
    with open(path, "ab") as file:
        file.write(b"half a rec")
    finding = only(store)
    assert (finding.kind, finding.severity, finding.remedy) == ("journal", "note", None)
    assert "last 10 bytes" in finding.message
    content = bytearray(path.read_bytes()[:-10])
    content[40] ^= 1
    path.write_bytes(content)
    assert "can be read to byte 0; the tables have more" in only(store).message
    assert found(store, full=False) == []  # what is in the tables is not read again
    path.unlink()
    assert only(store).message == "it is gone"


# -- what is being trained -------------------------------------------------------------------------------------


def test_a_run_that_a_session_trains_is_left_to_it(store):
    first, second, third = trained(store)
    session = again(store, first.run)
    second.path.unlink()
    sidecar.path_of(third.path).unlink()
    alone = old(_touched(sidecar.path_of(third.path.with_name("baseline-step00000021.safetensors"))))
    report = fsck.check(store)
    assert [(one.kind, one.remedy) for one in report.findings] == [("lost", None), ("sidecar", None), ("litter", None)]
    assert all(f"session {session} " in one.advice for one in report.findings)
    end(store, session, first.run)
    report = fsck.check(store)
    again(store, first.run)  # it begins between the look and the repair
    results = repairs.repair(store, report)
    assert [one.done for one in results] == [False, False, False]
    assert all("owns its checkpoints" in one.message for one in results)
    assert alone.exists()
    assert queries.checkpoints(store) == [first, second, third]
    with store.begin() as connection:
        connection.execute(update(schema.session).values(ended=time.time()))
    assert [done for _, done in repaired(store)] == [True, True, True]
    assert found(store) == []
