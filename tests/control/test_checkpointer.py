"""Saves behind a training that goes on: exact, bounded, and every one that comes to nothing is told."""

import errno
import os
import sys
import threading
import time

import pytest
import torch
from torch import nn

import onthefly
from onthefly.checkpoints import staging
from onthefly.checkpoints.format import open_checkpoint
from onthefly.control import checkpointer
from onthefly.errors import InvalidCommandError
from onthefly.store import queries


@pytest.fixture
def attach(tmp_path):
    """A training of some steps under a session; gives the session, and what its body calls at each step."""
    opened = []

    def start(store="store", *, width=64, optimizers=1, **options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.Linear(width, 1))
        halves = [model.parameters()] if optimizers == 1 else [model[0].parameters(), model[3].parameters()]
        made = {f"o{i}": torch.optim.AdamW(half, lr=0.01) for i, half in enumerate(halves)}
        options = {"ckpt_every_minutes": None, "handle_signals": False, "ckpt_keep": 99} | options
        config = onthefly.SessionConfig(store=tmp_path / store, **options)
        session = onthefly.attach(model, made["o0"] if optimizers == 1 else made, config=config)
        opened.append(session)

        def step():
            for optimizer in made.values():
                optimizer.zero_grad()
            model(torch.randn(16, width)).square().mean().backward()
            for optimizer in made.values():
                optimizer.step()

        session.model_itself = model
        return session, step

    yield start
    for session in opened:
        session.close()


def rows(tmp_path, store="store"):
    with onthefly.connect(tmp_path / store) as client:
        return client.checkpoints()


def events(tmp_path, kind, store="store"):
    with onthefly.connect(tmp_path / store) as client:
        return client.events(kinds=[kind])


@pytest.mark.parametrize("optimizers", [1, 2])
@pytest.mark.parametrize("slots", [1, 2])
def test_overlapped_saves_hold_the_same_states_as_saves_at_the_boundary(attach, tmp_path, optimizers, slots):
    for staged in ("boundary", "overlap"):
        session, step = attach(staged, optimizers=optimizers, ckpt_staging=staged, ckpt_slots=slots, ckpt_every_steps=1)
        for _ in session.steps(12):
            step()
        session.close()
    boundary, overlap = rows(tmp_path, "boundary"), rows(tmp_path, "overlap")
    assert [row.step for row in boundary] == list(range(13))
    assert [(row.step, row.hash) for row in boundary] == [(row.step, row.hash) for row in overlap]
    for row in overlap:
        assert open_checkpoint(row.path).hash == row.hash


def test_gradients_that_pend_are_saved_while_the_next_ones_come(attach, tmp_path):
    """With accumulation several boundaries pass before the step that the copies wait for."""
    for staged in ("boundary", "overlap"):
        session, _ = attach(staged, ckpt_staging=staged, ckpt_slots=2, ckpt_every_steps=1)
        model = session.model_itself
        optimizer = session._state.optimizers["optimizer"]
        for i in session.steps(40):
            model(torch.randn(16, 64)).square().mean().backward()
            if i % 20 == 19:
                optimizer.step()
                optimizer.zero_grad()
        session.close()
    assert [(r.step, r.hash) for r in rows(tmp_path, "boundary")] == [
        (r.step, r.hash) for r in rows(tmp_path, "overlap")
    ]


def test_a_state_that_changes_while_it_is_copied_is_taken_again_at_the_next_boundary(attach, tmp_path):
    """The copier is held back until the body has written to a parameter behind PyTorch's back."""
    session, step = attach(ckpt_staging="overlap", ckpt_every_steps=4)
    wanted = {}
    for i in session.steps(10):
        weight = session.model_itself[0].weight
        wanted[session.step - 1] = weight.detach().clone()
        if i == 3:
            session._checkpointer.settle()
            begin = threading.Event()
            session._checkpointer._copier.submit(begin.wait)
        if i == 4:
            assert session._checkpointer._staged
            weight.data.mul_(1.5)
            begin.set()
        step()
        while i == 4 and not session._checkpointer._torn:  # the writer notices it, in its own time
            time.sleep(0.001)
    session.close()
    (torn,) = events(tmp_path, "checkpointTorn")
    assert torn.data["tensors"][0] == "model/0.weight"
    saved = {row.step: row for row in rows(tmp_path)}
    assert 5 in saved, "taken again, under the next step's number"
    assert 4 not in saved
    for at in (5, 8):
        assert torch.equal(open_checkpoint(saved[at].path).tensors["model/0.weight"], wanted[at])


def test_a_torn_save_that_no_boundary_follows_has_failed(attach, tmp_path):
    session, step = attach(ckpt_staging="overlap", ckpt_every_steps=3)
    begin = threading.Event()
    for i in session.steps(10):
        if i == 2:
            session._checkpointer._copier.submit(begin.wait)
        if i == 3:
            session.model_itself[0].weight.data.mul_(1.5)
            begin.set()
            break
        step()
    session.close()
    (failed,) = events(tmp_path, "checkpointFailed")
    assert failed.step == 3
    assert "changed while it was being copied" in failed.data["message"]
    assert [row.step for row in rows(tmp_path)] == [0]


def set_once_waited_for(busy, thread):
    """Set it when the thread stands in the middle of taking a slot, and long enough for that to be worth telling."""
    names = ()
    while "_slot" not in names:
        time.sleep(0.005)
        frame, names = sys._current_frames()[thread], []
        while frame is not None:
            names.append(frame.f_code.co_name)
            frame = frame.f_back
    time.sleep(0.2)
    busy.set()


@pytest.mark.parametrize(("policy", "kind"), [("wait", "checkpointWaited"), ("skip", "checkpointSkipped")])
def test_a_save_that_finds_all_slots_in_use_waits_or_is_passed_over_and_says_so(attach, tmp_path, policy, kind):
    session, step = attach(ckpt_when_busy=policy, ckpt_every_steps=2)
    busy = threading.Event()
    for i in session.steps(6):
        if i == 1:
            session._checkpointer.settle()
            session._checkpointer._writer.submit(busy.wait)
        if i == 3 and policy == "wait":
            threading.Thread(target=set_once_waited_for, args=(busy, threading.get_ident())).start()
        if i == 5:
            busy.set()
        step()
    session.close()
    found = events(tmp_path, kind)
    assert found, "it is an event either way"
    assert found[0].step == 4
    steps = [row.step for row in rows(tmp_path)]
    assert steps == ([0, 2, 4, 6] if policy == "wait" else [0, 2, 6])


def test_without_memory_to_stage_in_a_save_is_written_while_training_waits(attach, tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "_available_memory", lambda: 0)
    session, step = attach(ckpt_every_steps=2)
    for _ in session.steps(4):
        step()
    session.close()
    assert [row.step for row in rows(tmp_path)] == [0, 2, 4]
    assert "available" in events(tmp_path, "stagingRefused")[0].data["reason"]
    assert all(open_checkpoint(row.path).hash == row.hash for row in rows(tmp_path))


def test_the_first_step_does_not_wait_for_the_origin(attach, tmp_path):
    session, step = attach()
    written = threading.Event()
    session._checkpointer._writer.submit(written.wait)
    steps = session.steps(3)
    for _ in range(3):
        next(steps)
        step()
    assert rows(tmp_path) == [], "three steps are done, and the origin is not written yet"
    written.set()
    session.close()
    assert rows(tmp_path)[0].reason == "origin"


def test_auto_overlaps_only_when_a_core_is_free_and_it_is_worth_it(attach, monkeypatch):
    session, step = attach(ckpt_staging="auto")
    steps = session.steps(3)
    next(steps)
    step()
    tensors = session._state.capture()
    layout = checkpointer.format.Layout(*checkpointer.flatten(tensors))
    late = session._checkpointer._late
    threads = torch.get_num_threads()
    monkeypatch.setattr(checkpointer, "_cores", lambda: threads + 1)
    assert late(layout) == set(), "too small"
    monkeypatch.setattr(checkpointer, "_WORTH_OVERLAPPING", 0)
    names = {layout.entries[i].name for i in late(layout)}
    assert "model/0.weight" in names
    assert any(name.startswith("optimizer/state/0/exp_avg") for name in names)
    assert not any("running_mean" in name or name.startswith("rng") for name in names)
    monkeypatch.setattr(checkpointer, "_cores", lambda: threads)
    assert late(layout) == set(), "every core is busy"


def test_a_checkpoint_is_pinned_unpinned_and_removed_under_a_live_session(attach, tmp_path):
    session, step = attach(ckpt_every_steps=1, ckpt_keep=2)
    for i in session.steps(6):
        if i == 2:
            kept = session.save("manual").result()
            session.pin(kept.path, True)
        step()
    assert session.pin(kept.path, True).pinned
    with pytest.raises(InvalidCommandError, match="keeps no such checkpoint"):
        session.pin(tmp_path / "nothing.safetensors", True)
    origin = next(row for row in rows(tmp_path) if row.reason == "origin") if rows(tmp_path) else None
    session.remove(kept.path)
    assert not kept.path.exists()
    session.close()
    with onthefly.connect(tmp_path / "store") as client:
        gone = {row.path: row.evicted_reason for row in client.checkpoints(evicted=True) if row.evicted}
    assert gone[kept.path] == "removed"
    assert origin is None or origin.path.exists()


def test_a_run_does_not_lose_what_it_stands_on(attach, tmp_path):
    session, step = attach()
    for _ in session.steps(2):
        step()
    session._checkpointer.settle()
    origin = session._checkpointer.ring.origin()
    with pytest.raises(InvalidCommandError, match="stands on"):
        session.remove(origin.path)
    assert origin.path.exists()


def test_every_so_many_steps_a_checkpoint_stays(attach, tmp_path):
    session, step = attach(ckpt_every_steps=1, ckpt_keep=1, ckpt_keep_every=3)
    for _ in session.steps(8):
        step()
    session.close()
    assert [row.step for row in rows(tmp_path)] == [0, 3, 6, 8]


class Counting(torch.optim.SGD):
    """Keeps something beside what it keeps for each parameter."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        self.state["steps"] = torch.tensor([0])
        self.state["word"] = 3

    def step(self, closure=None):
        self.state["steps"] += 1
        return super().step(closure)


def test_an_optimizer_may_keep_what_is_no_entry_of_a_parameter(tmp_path):
    model = nn.Linear(2, 1)
    optimizer = Counting(model.parameters())
    config = onthefly.SessionConfig(
        store=tmp_path / "store", ckpt_staging="overlap", ckpt_every_steps=1, ckpt_keep=9, handle_signals=False
    )
    with onthefly.attach(model, optimizer, config=config) as session:
        for _ in session.steps(3):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    found = [open_checkpoint(row.path).tensors["optimizer/state/steps"].item() for row in rows(tmp_path)]
    assert found == [0, 1, 2, 3]


def test_an_interrupted_copy_fails_its_save_and_the_next_one_finds_a_slot(attach, tmp_path, monkeypatch):
    session, step = attach()
    for i in session.steps(4):
        if i == 1:
            with monkeypatch.context() as broken:
                broken.setattr(checkpointer, "Staged", _interrupt)
                with pytest.raises(KeyboardInterrupt):
                    session.save("manual")
        if i == 2:
            kept = session.save("manual").result()
        step()
    session.close()
    assert [(e.step, e.data["reason"]) for e in events(tmp_path, "checkpointFailed")] == [(2, "manual")]
    assert kept.path in {row.path for row in rows(tmp_path)}


def _interrupt(*arguments):
    raise KeyboardInterrupt


def test_a_load_that_the_disk_ends_in_the_middle_ends_the_session_without_saving(attach, tmp_path, monkeypatch):
    """Another disk cannot be had here: the read itself is made to fail as one that does."""
    session, step = attach(width=400, max_steps=9)
    steps = session.steps(9)
    for _ in range(3):
        next(steps)
        step()
    kept = session.save("manual").result()
    step()
    with onthefly.connect(tmp_path / "store") as client:
        monkeypatch.setattr(checkpointer.format._Source, "_read", _fail_as_a_disk_does)
        order = client.command("loadCheckpoint", wait=False, path=str(kept.path))
        while not session._gate.raised:
            time.sleep(0.01)
        with pytest.raises(SystemExit) as left:
            next(steps)
        assert left.value.code == 4
        assert queries.command(client.store, order["id"]).error["type"] == "HalfRestoredError"
        assert [c.reason for c in client.checkpoints()] == ["origin", "manual"]
        (ended,) = client.sessions()
        assert ended.outcome == "failed"


def _fail_as_a_disk_does(source, view, offset):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_the_last_checkpoint_is_durable_when_the_loop_has_ended(attach, tmp_path):
    session, step = attach()
    for _ in session.steps(2):
        step()
    assert session._checkpointer.ring.find(session.save("end").result().path).step == 2
    assert session._checkpointer.save("end").done()


def test_a_child_that_trains_does_not_wait_for_a_copy_that_nobody_makes_there(attach):
    session, step = attach(ckpt_staging="overlap")
    steps = session.steps(5)
    next(steps)
    step()
    session._checkpointer.settle()
    held = threading.Event()
    session._checkpointer._copier.submit(held.wait)
    session.save("manual")
    if (pid := os.fork()) == 0:
        session._checkpointer._before_step()
        os._exit(7)
    _, status = os.waitpid(pid, 0)
    held.set()
    assert os.waitstatus_to_exitcode(status) == 7
