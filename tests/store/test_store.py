"""Opening a store, writing requests to it, and telling the living from the dead."""

import os
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from onthefly.errors import NoLiveSessionError, SchemaVersionError, StoreBusyError, StoreError
from onthefly.store import liveness, queries
from onthefly.store.journal import Journal
from onthefly.store.liveness import SessionLock
from onthefly.store.store import DATABASE, CommandWatch, Store

# -- opening -----------------------------------------------------------------------------------------------------------


def test_a_missing_store_is_refused_and_not_made(tmp_path):
    with pytest.raises(StoreError, match="there is no store in"):
        Store.open(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_the_environment_or_the_working_directory_says_where(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ONTHEFLY_STORE", raising=False)
    Store.open(create=True).close()
    assert (tmp_path / ".onthefly" / DATABASE).is_file()
    monkeypatch.setenv("ONTHEFLY_STORE", str(tmp_path / "elsewhere"))
    Store.open(create=True).close()
    again = Store.open()
    assert again.root == tmp_path / "elsewhere"
    again.close()


def test_a_place_where_nothing_can_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot make a store"):
        Store.open(tmp_path / "file", create=True)


def test_another_version_is_refused(store):
    with store.begin() as connection:
        connection.exec_driver_sql("PRAGMA user_version=99")
    with pytest.raises(SchemaVersionError, match="schema version 99"):
        Store.open(store.root)


def test_a_store_of_the_version_before_is_upgraded_with_all_that_it_holds(store, new_session):
    id = new_session()
    store.insert_command(id, "old", "pause", {}, 1.0)
    with store.begin() as connection:
        for column in ("door", "asker", "run"):
            connection.exec_driver_sql(f"ALTER TABLE command DROP COLUMN {column}")
        for column in ("rollup_16", "rollup_256"):
            connection.exec_driver_sql(f"ALTER TABLE metric_chunk DROP COLUMN {column}")
        connection.exec_driver_sql("DROP TABLE sample_tag")
        connection.exec_driver_sql("PRAGMA user_version=2")
    with closing(Store.open(store.root)) as again:
        again.insert_command(id, "new", "pause", {}, 2.0, door="cli", asker="ada@lab")
        rows = again.queued_commands(id)
    assert [(row.id, row.door, row.asker, row.run) for row in rows] == [
        ("old", None, None, None),
        ("new", "cli", "ada@lab", None),
    ]


def test_a_foreign_database_is_refused_and_stays_as_it_is(tmp_path):
    foreign = sqlite3.connect(tmp_path / DATABASE)
    foreign.execute("CREATE TABLE theirs (x)")
    foreign.close()
    with pytest.raises(SchemaVersionError):
        Store.open(tmp_path, create=True)


def test_something_that_is_no_database_is_an_error(tmp_path):
    (tmp_path / DATABASE).write_bytes(b"not a database" * 1000)
    with pytest.raises(StoreError, match="cannot be used"):
        Store.open(tmp_path)


def test_a_session_never_gets_the_journal_of_a_deleted_database(store, new_session):
    for _ in range(3):
        last = new_session()
    Journal(store.journal_path(last)).close()
    store.close()
    for file in store.root.glob(f"{DATABASE}*"):
        file.unlink()
    again = Store.open(store.root, create=True)
    nothing = {"launch": None, "environment": {}, "inexact": [], "config": {}}
    made = again.create_session(project="p", run="r", pid=1, host="here", time=1.0, **nothing)
    assert made == last + 1
    again.close()


# -- transactions ------------------------------------------------------------------------------------------------------

HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.readline()
"""


def test_a_store_that_another_process_holds_is_busy_but_can_be_read(store, python):
    name = store.create_run(None, project="p")
    process = python(HOLD, store.root / DATABASE)
    assert process.stdout.readline() == "held\n"
    impatient = Store.open(store.root, busy_timeout=0.05)
    with pytest.raises(StoreBusyError, match="another process"):
        impatient.create_run(None, project="p")
    assert [run.name for run in queries.runs(impatient)] == [name]
    process.communicate("let go\n")
    assert impatient.create_run(None, project="p") == "baseline2"
    impatient.close()


def test_an_exception_takes_a_transaction_back(store):
    def half():
        with store.begin() as connection:
            connection.exec_driver_sql("INSERT INTO run_parent VALUES ('a', 0, 'b', 'c')")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    with store.read() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM run_parent").scalar() == 0


def test_nothing_is_left_open_between_calls(store, new_session):
    session = new_session(store.create_run(None, project="p"))
    store.heartbeat(session, status="running", step=1, epoch=0, time=2.0)
    queries.sessions(store)
    queries.series(store, "baseline", "loss")
    other = sqlite3.connect(store.root / DATABASE)
    # It can empty the WAL only while nobody reads or writes.
    assert other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
    other.close()


# -- runs, sessions, commands ------------------------------------------------------------------------------------------

CREATE = """
import sys
from contextlib import closing
from onthefly.store.store import Store
sys.stdin.readline()
store = Store.open(sys.argv[1], create=True, busy_timeout=60)
for _ in range(5):
    print(store.create_run(None, project="p", kind="fork"), store.create_run("mine", project="p"))
store.close()
"""


def test_processes_that_make_a_store_and_runs_at_once_get_names_of_their_own(tmp_path, python):
    processes = [python(CREATE, tmp_path / "store") for _ in range(6)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    names = [name for process in processes for name in process.communicate()[0].split()]
    assert [process.returncode for process in processes] == [0] * 6
    mine = ["mine", *(f"mine-{i}" for i in range(2, 31))]
    assert sorted(names) == sorted([*(f"fork{i}" for i in range(1, 31)), *mine])


def test_a_run_and_its_parents(store):
    store.create_run(None, project="p")
    store.create_run("other", project="p")
    made = store.create_run(None, project="p", kind="merge", parents=[("other", "ab"), ("baseline", "cd")])
    run = queries.run(store, made)
    assert (run.name, run.kind, run.status, run.generation, run.base) == ("merge1", "merge", "running", 0, None)
    assert run.parents == (("other", "ab"), ("baseline", "cd"))
    assert [run.name for run in queries.runs(store)] == ["baseline", "other", "merge1"]
    assert queries.run(store, "none") is None


def test_a_name_outside_the_store_is_refused(store):
    with pytest.raises(ValueError, match="cannot name a run"):
        store.create_run("../up", project="p")


def test_a_heartbeat_shows_where_a_session_is(store, new_session):
    id = new_session()
    store.heartbeat(id, status="paused", step=7, epoch=2, time=5.0, loss=0.5)
    row = queries.session(store, id)
    assert (row.status, row.step, row.epoch, row.heartbeat, row.loss) == ("paused", 7, 2, 5.0, 0.5)
    assert (row.launch, row.environment, row.inexact, row.ended) == (None, {}, [], None)
    assert queries.session(store, id + 1) is None


def test_commands_wait_in_the_order_in_which_they_came(store, new_session):
    id, other = new_session(), new_session()
    store.insert_command(id, "b", "set", {"values": {"lr": 0.1}}, 9.0)
    store.insert_command(id, "a", "pause", {}, 3.0)
    store.insert_command(other, "c", "pause", {}, 3.0)
    store.insert_command(id, "b", "stop", {}, 4.0)  # the same id: asked again, not a second command
    queued = store.queued_commands(id)
    assert [(row.id, row.kind, row.arguments) for row in queued] == [
        ("b", "set", {"values": {"lr": 0.1}}),
        ("a", "pause", {}),
    ]
    assert store.queued_commands(id, after=queued[0].number) == queued[1:]
    assert queries.command(store, "a") == queued[1]
    assert queries.command(store, "z") is None


def test_a_command_for_no_session_is_refused(store):
    with pytest.raises(NoLiveSessionError):
        store.insert_command(5, "a", "pause", {}, 1.0)


def test_the_watch_sees_commands_and_nothing_else(store, new_session):
    watch = CommandWatch(store)
    assert [watch.changed(), watch.changed()] == [True, False]
    id = new_session()
    assert [watch.changed(), watch.changed()] == [False, False]
    store.insert_command(id, "a", "pause", {}, 1.0)
    store.queued_commands(id)
    assert [watch.changed(), watch.changed()] == [True, False]
    watch.close()


def test_paths_inside_the_store_move_with_it(store, tmp_path):
    inside, outside = store.checkpoints_dir / "a.safetensors", tmp_path / "b.safetensors"
    assert store.stored_path(inside) == "checkpoints/a.safetensors"
    assert [store.full_path(store.stored_path(path)) for path in (inside, outside)] == [inside, outside]
    (tmp_path / "link").symlink_to(store.root)
    assert store.stored_path(tmp_path / "link" / "checkpoints" / "a.safetensors") == "checkpoints/a.safetensors"


# -- life and death ----------------------------------------------------------------------------------------------------

LIVE = """
import os, socket, sys
from onthefly.store.journal import Journal
from onthefly.store.liveness import SessionLock
from onthefly.store.store import Store
store = Store.open(sys.argv[1])
run = store.create_run(None, project="p")
id = store.create_session(project="p", run=run, pid=os.getpid(), host=socket.gethostname(), launch=None,
                          environment={}, inexact=[], config={}, time=1.0)
lock = SessionLock(store.lock_path(id))
lock.acquire()
journal = Journal(store.journal_path(id))
loss = journal.series(run, 0, "loss")
for step in range(1000):
    journal.metrics(step, 0, 0.0, [loss, float(step)])
journal.fact("event", {"event": "paused", "run": run, "generation": 0, "step": 9, "epoch": 0, "time": 2.0, "data": {}})
print(id, flush=True)
if sys.stdin.readline() == "end\\n":
    journal.fact("session", {"status": "ended", "outcome": "finished", "ended": 3.0})
    journal.fact("run", {"run": run, "status": "finished"})
"""
RECOVER = """
import sys
from contextlib import closing
from onthefly.store.store import Store
store = Store.open(sys.argv[1], busy_timeout=60)
print("ready", flush=True)
sys.stdin.readline()
print(*store.recover(7.0))
"""


def start(python, store):
    process = python(LIVE, store.root)
    return process, int(process.stdout.readline())


def test_a_session_lives_as_long_as_its_process(store, python):
    process, id = start(python, store)
    row = queries.session(store, id)
    assert store.is_alive(row)
    assert queries.sessions(store, alive=True) == queries.sessions(store) == [row]
    assert store.recover(5.0) == []
    process.kill()
    process.wait()
    assert not store.is_alive(row)
    assert queries.sessions(store, alive=True) == []


def test_a_killed_session_is_ended_and_all_that_it_wrote_is_there(store, python):
    process, id = start(python, store)
    store.insert_command(id, "late", "pause", {}, 2.0)
    process.kill()
    process.wait()
    assert store.recover(5.0) == [id]
    row = queries.session(store, id)
    assert (row.status, row.outcome, row.ended) == ("killed", "killed", 5.0)
    assert queries.run(store, "baseline").status == "unfinished"
    assert queries.series(store, "baseline", "loss").steps.tolist() == list(range(1000))
    command = queries.command(store, "late")
    assert (command.status, command.finished, command.error["exit_code"]) == ("failed", 5.0, 6)
    assert command.error["type"] == "NoLiveSessionError"
    with pytest.raises(NoLiveSessionError):
        store.insert_command(id, "later", "pause", {}, 6.0)
    assert store.recover(6.0) == []
    assert queries.session(store, id) == row


def test_the_last_words_of_a_session_count(store, python):
    process, id = start(python, store)
    process.communicate("end\n")
    assert store.recover(5.0) == []
    row = queries.session(store, id)
    assert (row.status, row.outcome, row.ended) == ("ended", "finished", 3.0)
    assert queries.run(store, "baseline").status == "finished"


def test_several_processes_may_recover_at_once(store, python):
    lives = [start(python, store) for _ in range(4)]
    for process, _ in lives:
        process.kill()
        process.wait()
    processes = [python(RECOVER, store.root) for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    ended = [int(id) for process in processes for id in process.communicate()[0].split()]
    assert [process.returncode for process in processes] == [0] * 4
    assert sorted(ended) == sorted(id for _, id in lives)
    assert len(queries.events(store)) == 4
    for run in queries.runs(store):
        assert queries.series(store, run.name, "loss").steps.tolist() == list(range(1000))


def test_a_run_that_a_later_session_has_is_not_its_dead_one_s_to_end(store, new_session, python):
    process, id = start(python, store)
    process.kill()
    process.wait()
    new_session("baseline", host=socket.gethostname())
    assert store.recover(5.0) == [id]
    assert queries.run(store, "baseline").status == "running"


def test_before_its_lock_is_taken_a_session_lives_with_its_process(store, new_session, python):
    host = socket.gethostname()
    process = python("")
    process.communicate()
    new_session(host=host)
    dead = new_session(pid=process.pid, host=host)
    assert store.recover(5.0) == [dead]


ASK = """
import sys
from contextlib import closing
from pathlib import Path
from onthefly.store.liveness import is_held
print(is_held(Path(sys.argv[1])))
"""


def test_asking_for_the_own_lock_does_not_lose_it(tmp_path, python):
    path = tmp_path / "1.lock"
    with pytest.raises(FileNotFoundError):
        liveness.is_held(path)
    lock = SessionLock(path)
    lock.acquire()
    assert liveness.is_held(path)
    assert python(ASK, path).communicate()[0] == "True\n"
    lock.release()
    lock.release()
    assert not liveness.is_held(path)
    assert python(ASK, path).communicate()[0] == "False\n"
    assert [file.name for file in tmp_path.iterdir()] == ["1.lock"]


def test_a_forked_child_does_not_hold_the_lock(tmp_path, python):
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom onthefly.store.liveness import SessionLock\n"
        "lock = SessionLock(Path(sys.argv[1]))\nlock.acquire()\n"
        "child = os.fork()\nif child == 0: time.sleep(1000)\nprint(child, flush=True)\ntime.sleep(1000)\n"
    )
    process = python(code, tmp_path / "1.lock")
    child = int(process.stdout.readline())
    try:
        assert liveness.is_held(tmp_path / "1.lock")
        process.kill()
        process.wait()
        assert not liveness.is_held(tmp_path / "1.lock")
    finally:
        os.kill(child, 9)


def test_a_journal_that_makes_no_sense_keeps_nobody_out_of_the_store(store, new_session, caplog):
    store.create_run(None, project="p")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    session = new_session(pid=ended.pid, host=socket.gethostname())
    journal = Journal(store.journal_path(session))
    journal.fact("checkpoint", {"nonsense": True})
    journal.close()
    assert store.recover(5.0) == [session]
    assert "makes no sense" in caplog.text
    assert queries.session(store, session).status == "killed"
    assert store.recover(6.0) == []
