"""`onthefly gc`, as a user meets it."""

import json
import os
import shutil

import pytest
from checkpoint_stores import trained

from onthefly import cli
from onthefly.store.store import Store


@pytest.fixture
def rows(own_store):
    """Three checkpoints of a run that nobody trains."""
    store = Store.open(own_store, create=True)
    found = trained(store)
    store.close()
    return found


@pytest.fixture
def run(capsys):
    """Runs a command line in this process; gives exit code and what it printed."""

    def run(*words):
        code = cli.main(list(words))
        return code, capsys.readouterr().out

    return run


def test_gc_says_what_goes_and_how_much(rows, run):
    assert run("gc") == (0, "nothing to remove\n")
    stray = rows[0].path.with_name(".x.0123abcd.onthefly.tmp")
    stray.write_bytes(b"x" * 2000)
    os.utime(stray, (1, 1))
    mine = rows[0].path.with_name("mine.safetensors")
    shutil.copy(rows[0].path, mine)
    code, output = run("gc", "--keep", "1", "--dry-run")
    lines = output.splitlines()
    assert (code, lines[0].split()) == (0, ["WOULD", "GO", "SIZE", "FILE", "WHAT"])
    assert lines[1].split()[:4] == ["stray", "2.0", "kB", "checkpoints/.x.0123abcd.onthefly.tmp"]
    assert lines[2].split()[0] == "retention"
    assert "baseline@10" in lines[2]
    assert lines[3].startswith("left  checkpoints/mine.safetensors: its name is not one that OnTheFly gives")
    assert lines[4].endswith("would be freed, 2 files")
    found = json.loads(run("gc", "--keep", "1", "--json")[1])
    assert ([one["kind"] for one in found["removed"]], found["dry_run"]) == (["stray", "retention"], False)
    assert found["freed"] == sum(one["size"] for one in found["removed"])
    assert not stray.exists()
    assert not rows[1].path.exists()
    assert [row["step"] for row in json.loads(run("checkpoints", "--json")[1])] == [0, 20]
    assert run("gc", "--keep", "0") == (2, "")
