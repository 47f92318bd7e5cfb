"""What nothing needs goes, with its reason; what may be needed stays, with its reason."""

import os
import shutil
import subprocess
import sys

import pytest
from checkpoint_stores import again, begin, end, save, trained

from onthefly import fsck, garbage, sample_values
from onthefly.checkpoints import sidecar
from onthefly.store import catalog, queries
from onthefly.store.store import Store


@pytest.fixture
def store(tmp_path):
    made = Store.open(tmp_path / "store", create=True)
    yield made
    made.close()


def steps(store):
    return [row.step for row in queries.checkpoints(store)]


def went(collection):
    return [(one.kind, one.step) for one in collection.removed]


def unrecorded(row, name="baseline-step00000015.safetensors", age=3600):
    """A whole checkpoint beside another one, that is in no list."""
    path = row.path.with_name(name)
    shutil.copyfile(row.path, path)
    then = path.stat().st_mtime - age
    os.utime(path, (then, then))
    return path


def test_a_store_that_is_tidy_stays_as_it_is(store):
    rows = trained(store)
    assert garbage.collect(store) == garbage.Collection((), (), 0, False)
    assert queries.checkpoints(store) == rows


def test_retention_is_applied_again_and_leaves_tombstones(store):
    rows = trained(store, steps=(0, 10, 20, 30, 40), ckpt_keep=2)
    would = garbage.collect(store, dry_run=True)
    assert (went(would), would.dry_run, steps(store)) == (
        [("retention", 10), ("retention", 20)],
        True,
        [0, 10, 20, 30, 40],
    )
    found = garbage.collect(store)
    assert (found.removed, found.freed) == (would.removed, would.freed)
    assert found.freed > sum(row.size for row in rows[1:3])  # their sidecars, too
    assert [row.path.exists() for row in rows] == [True, False, False, True, True]
    assert not sidecar.path_of(rows[1].path).exists()
    gone = [row for row in queries.checkpoints(store, evicted=True) if row.evicted is not None]
    assert [(row.step, row.evicted_reason) for row in gone] == [(10, "retention"), (20, "retention")]
    assert [event.step for event in queries.events(store, kinds=["checkpointEvicted"])] == [10, 20]
    assert fsck.check(store).findings == ()


def test_what_somebody_needs_always_stays(store):
    run, session = begin(store, config={"ckpt_keep": 3, "best_metric": "val_loss"})
    for step, more in {
        0: {"reason": "origin"},
        10: {"loss": 0.1},
        20: {"pinned": True},
        30: {},
        40: {},
        50: {},
    }.items():
        row = save(store, session, run, step, **more)
        if step == 30:
            store.create_run("fork", project="p", kind="fork", parents=[(run, row.hash)])
    end(store, session, run)
    assert went(garbage.collect(store, keep=1)) == [("retention", 40)]
    assert steps(store) == [0, 10, 20, 30, 50]
    with pytest.raises(ValueError, match="at least 1"):
        garbage.collect(store, keep=0)


def test_a_rhythm_of_steps_stays(store):
    trained(store, steps=(0, 10, 20, 30, 40), ckpt_keep=1, ckpt_keep_every=20)
    garbage.collect(store)
    assert steps(store) == [0, 20, 40]


def test_a_run_that_lost_a_checkpoint_loses_no_more(store):
    rows = trained(store, steps=(0, 10, 20, 30), ckpt_keep=1)
    rows[-1].path.unlink()
    found = garbage.collect(store)
    assert (found.removed, [one.what for one in found.left]) == ((), ["baseline"])
    assert "onthefly fsck" in found.left[0].reason
    assert steps(store) == [0, 10, 20, 30]


def test_a_run_that_is_being_trained_is_left_to_its_session(store):
    rows = trained(store, steps=(0, 10, 20, 30), ckpt_keep=1)
    extra = unrecorded(rows[1])
    alone = sidecar.path_of(rows[1].path.with_name("baseline-step00000016.safetensors"))
    alone.touch()
    session = again(store, "baseline", {"ckpt_keep": 1})
    found = garbage.collect(store)
    assert found.removed == ()
    assert all(f"session {session}" in one.reason for one in found.left)
    assert [one.what for one in found.left] == [str(extra), str(alone), "baseline"]


def test_leftovers_litter_and_strays_go(store):
    first, second, third = trained(store)
    catalog.bury(store, second, "removed")
    shutil.copy(sidecar.path_of(third.path), sidecar.path_of(third.path.with_name("baseline-step00000021.safetensors")))
    stray = third.path.with_name(".x.0123abcd.onthefly.tmp")
    stray.write_bytes(b"1234567")
    os.utime(stray, (1, 1))
    found = garbage.collect(store)
    assert {one.kind for one in found.removed} == {"leftover", "litter", "stray"}
    assert found.freed == sum(one.size for one in found.removed) > second.size + 7
    assert sorted(path.name for path in store.checkpoints_dir.iterdir()) == sorted(
        name for row in (first, third) for name in (row.path.name, sidecar.path_of(row.path).name)
    )


WORKING = """
import sys
from pathlib import Path
from onthefly.runs import replay
with replay.workroom(Path(sys.argv[1]), ".scan-") as folder:
    (folder / "start.safetensors").write_bytes(b"12345678")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_the_workroom_of_a_scan_goes_when_its_process_was_killed(store):
    row = trained(store)[0]
    words = [sys.executable, "-c", WORKING, str(row.path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        room = store.checkpoints_dir / os.path.basename(process.stdout.readline().strip())
        os.utime(room, (1, 1))
        assert garbage.collect(store).removed == ()  # it is in use, however old
        process.kill()
    assert room.exists()
    theirs = store.checkpoints_dir / ".scan-results_"  # called alike, and nobody's workroom
    theirs.mkdir()
    (theirs / "thesis.csv").write_text("1")
    os.utime(theirs, (1, 1))
    (found,) = garbage.collect(store).removed
    assert (found.kind, found.path.name) == ("stray", room.name)
    assert found.size > 8
    assert not room.exists()
    assert (theirs / "thesis.csv").exists()


def test_statistics_go_with_the_checkpoint_that_they_are_of(store):
    first, second, _ = trained(store)
    store.statistics_dir.mkdir()
    paths = [store.statistics_dir / f"{row.hash[:16]}-grams-01234567.safetensors" for row in (first, second)]
    for path in paths:
        path.write_bytes(b"123")
        os.utime(path, (1, 1))
    catalog.bury(store, second, "removed")
    second.path.unlink()
    sidecar.path_of(second.path).unlink()
    found = garbage.collect(store)
    assert [(one.kind, one.path) for one in found.removed] == [("statistics", paths[1])]
    assert [path.exists() for path in paths] == [True, False]


def test_what_samples_look_like_is_not_kept_for_ever(store):
    trained(store)
    kept = store.scans_dir / "selection-0123456789abcdef.arrow"
    kept.touch()
    for number in range(5):
        path = sample_values.shown_path(store, f"{number:032x}")
        path.write_bytes(b"12345")
        os.utime(path, (number, number))
    recent = sample_values.map_path(store, "a" * 64, "umap")
    recent.touch()
    sample_values.forget_shown(store, keep=2)
    left = [sample_values.shown_path(store, f"{number:032x}") for number in (3, 4)]
    assert set(store.scans_dir.iterdir()) == {kept, recent, *left}
    assert [one.path for one in garbage.collect(store, dry_run=True).removed] == left
    found = garbage.collect(store)
    assert [(one.kind, one.size) for one in found.removed] == [("cache", 5)] * 2
    assert set(store.scans_dir.iterdir()) == {kept, recent}


def test_what_is_in_no_list_goes_from_the_own_folder(store):
    row = trained(store)[1]
    path = unrecorded(row)
    shutil.copy(sidecar.path_of(row.path), sidecar.path_of(path))
    found = garbage.collect(store)
    assert went(found) == [("unrecorded", 15)]
    assert not path.exists()
    assert not sidecar.path_of(path).exists()


def test_what_is_in_no_list_stays_when_it_may_be_wanted(store, tmp_path):
    run, session = begin(store)
    save(store, session, run, 10, path=tmp_path / "mine.safetensors", pinned=True)
    row = save(store, session, run, 20)
    end(store, session, run)
    reasons = {
        unrecorded(row, "mine.safetensors"): "its name is not one that OnTheFly gives",
        unrecorded(row, "baseline-step00000015.safetensors", age=0): "younger than a minute",
    }
    outside = tmp_path / "baseline-step00000015.safetensors"
    shutil.copy(row.path, outside)
    os.utime(outside, (1, 1))
    reasons[outside] = "not in the store's own folder"
    foreign = row.path.with_name("baseline-step00000016.safetensors")
    foreign.write_text("not one of ours")
    found = garbage.collect(store)
    assert found.removed == ()
    assert {one.what for one in found.left} == {str(path) for path in reasons}
    for one in found.left:
        assert next(reason for path, reason in reasons.items() if str(path) == one.what) in one.reason
    assert foreign.exists()


def test_a_damaged_journal_may_have_told_of_it(store):
    path = unrecorded(trained(store)[1])
    with open(store.journal_path(1), "ab") as file:
        file.write(b"torn")
    found = garbage.collect(store)
    assert ([one.what for one in found.left], path.exists()) == ([str(path)], True)


def test_the_only_copy_of_what_a_run_stands_on_stays(store):
    row = trained(store)[1]
    store.create_run("fork", project="p", kind="fork", parents=[("baseline", row.hash)])
    path = unrecorded(row)
    catalog.bury(store, row, "lost")
    row.path.unlink()
    found = garbage.collect(store)
    assert (path.exists(), "a run stands on this content" in found.left[0].reason) == (True, True)
