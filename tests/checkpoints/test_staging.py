"""Staging: what is in the slot is the state of the boundary, or the copy is known to be torn."""

import ctypes
import faulthandler
import mmap
import os
import signal
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onthefly.checkpoints import staging
from onthefly.checkpoints.format import Layout, digest, open_checkpoint, write_image
from onthefly.checkpoints.staging import Slot, Staged, Staging
from onthefly.checkpoints.writer import Worker


@pytest.fixture
def copier():
    return Worker("copier")


@pytest.fixture
def held(copier):
    """Keeps the copier from its work until it is set."""
    begin = threading.Event()
    copier.submit(begin.wait)
    yield begin
    begin.set()
    copier.drain()


def slot_for(layout):
    slot = Slot()
    slot.fit(layout.data_size)
    return slot


def saved(staged, path):
    written = write_image(path, staged.layout, staged.slot.image(), set())
    return written, open_checkpoint(path).tensors


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 5000), st.booleans()), max_size=8), st.integers(0, 2**30)
)
def test_a_staged_state_becomes_the_file_that_a_direct_write_gives(tmp_path_factory, kinds, seed):
    torch.manual_seed(seed)
    tensors = {f"t{i}": torch.randint(0, 2, (size,)).to(dtype) for i, (dtype, size, _) in enumerate(kinds)}
    wanted = digest({"seed": seed}, tensors)
    layout = Layout({"seed": seed}, tensors)
    late = {i for i, e in enumerate(layout.entries) if kinds[int(e.name[1:])][2] and layout.tensors[i].numel()}
    staged = Staged(slot_for(layout), layout, late, Worker("copier"))
    staged.before_step()
    for tensor in tensors.values():
        tensor.zero_()
    torn = staged.torn()
    written, _ = saved(staged, tmp_path_factory.mktemp("staged") / "a")
    assert not torn
    assert written.hash == wanted


def test_a_slot_is_used_again_for_another_state(tmp_path, copier):
    slot = Slot()
    for size in (1000, 10, 3_000_000, 5):
        layout = Layout(size, {"x": torch.arange(size), "y": torch.ones(size, dtype=torch.uint8)})
        slot.fit(layout.data_size)
        written, tensors = saved(Staged(slot, layout, set(), copier), tmp_path / "a")
        assert written.hash == digest(size, {"x": torch.arange(size), "y": torch.ones(size, dtype=torch.uint8)})
        assert tensors["x"].tolist()[-3:] == list(range(size))[-3:]


def test_what_is_not_late_is_in_the_slot_at_once(tmp_path, copier, held):
    tensors = {"now": torch.ones(1000), "late": torch.ones(1000)}
    layout = Layout({}, tensors)
    late = {next(i for i, e in enumerate(layout.entries) if e.name == "late")}
    staged = Staged(slot_for(layout), layout, late, copier)
    tensors["now"].zero_()  # the copier has not begun
    held.set()
    assert not staged.torn()
    _, stored = saved(staged, tmp_path / "a")
    assert stored["now"].eq(1).all()
    assert stored["late"].eq(1).all()


def test_a_step_waits_until_what_it_changes_is_copied(copier, held):
    layout = Layout({}, {"x": torch.ones(1000)})
    staged = Staged(slot_for(layout), layout, {0}, copier)
    stepped = threading.Event()

    def step():
        staged.before_step()
        stepped.set()

    thread = threading.Thread(target=step)
    thread.start()
    assert not stepped.wait(0.05)
    held.set()
    thread.join()
    assert stepped.is_set()


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.add_(1),
        lambda x: x[-1:].add_(1),
        lambda x: x.data.mul_(2),
        lambda x: x.numpy().__imul__(2),
        lambda x: torch._fused_sgd_(
            [x], [torch.ones_like(x)], [], weight_decay=0, momentum=0, lr=1, dampening=0, nesterov=False, maximize=False,
            is_first_step=True,
        ),
    ],
    ids=["in place", "one element", ".data", "numpy", "fused kernel"],
)  # fmt: skip
def test_a_change_before_the_copy_ended_is_found(copier, held, change):
    x = torch.full((100_000,), 3.0)
    layout = Layout({}, {"a": torch.zeros(5), "x": x})
    late = {next(i for i, e in enumerate(layout.entries) if e.name == "x")}
    staged = Staged(slot_for(layout), layout, late, copier)
    change(x)
    held.set()
    assert staged.torn() == ["x"]


@pytest.mark.parametrize("steps", [False, True])
def test_an_operation_that_is_counted_after_the_copy_ended_is_found_in_time(copier, steps):
    """PyTorch counts an in-place operation at its end: one that was under way meanwhile shows up late."""
    x = torch.ones(1000)
    layout = Layout({}, {"x": x})
    staged = Staged(slot_for(layout), layout, {0}, copier)
    copier.drain()
    assert staged.torn() == []
    x.add_(1)
    if steps:
        staged.before_step()
        x.add_(1)  # the step itself
    assert staged.torn() == ["x"]


def test_what_a_step_changes_after_the_copy_is_no_tear(copier):
    x = torch.ones(1000)
    layout = Layout({}, {"x": x})
    staged = Staged(slot_for(layout), layout, {0}, copier)
    staged.before_step()
    x.add_(1)
    assert staged.torn() == []


def test_memory_is_prepared_without_waiting_for_a_slot_that_is_in_use(copier):
    """The one who uses it may be waiting for the copier."""
    slots = Staging(1, copier, lambda reason: None)
    slot = slots.take(1000)
    slots.expect(3_000_000)
    copier.drain()
    slots.give(slot)
    assert slots.take(10) is slot


def test_a_second_slot_is_refused_when_memory_is_short_and_saves_share_one(copier, monkeypatch):
    refused = []
    slots = Staging(2, copier, refused.append)
    first = slots.take(1000)
    assert not slots.busy
    monkeypatch.setattr(staging, "_available_memory", lambda: staging._RESERVE)
    taken = []
    thread = threading.Thread(target=lambda: taken.append(slots.take(1000)))
    thread.start()
    thread.join(0.1)
    assert not taken
    assert slots.busy
    slots.give(first)
    thread.join()
    assert taken == [first]
    assert len(refused) == 1
    assert "second staging buffer" in refused[0]


def test_a_first_slot_that_does_not_fit_is_a_memory_error_and_no_slot_is_lost(copier, monkeypatch):
    slots = Staging(1, copier, lambda reason: None)
    with monkeypatch.context() as short:
        short.setattr(staging, "_available_memory", lambda: 0)
        with pytest.raises(MemoryError, match="available"):
            slots.take(1000)
    assert slots.take(1000).capacity >= 1000


def test_memory_that_is_expected_is_there_before_it_is_asked_for(copier):
    slots = Staging(1, copier, lambda reason: None)
    slots.expect(3_000_000)
    copier.drain()
    slot = slots.take(10)
    assert slot.capacity >= 3_000_000


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTFORK"), reason="only Linux can leave memory out of children")
def test_a_slot_is_left_out_of_forked_children():
    slot = Slot()
    slot.fit(10_000_000)
    slot.touch()
    address = slot.image().obj.ctypes.data
    if (pid := os.fork()) == 0:
        faulthandler.disable()
        ctypes.string_at(address, 1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGSEGV


def test_a_forked_child_closes_the_files_that_a_worker_is_writing(tmp_path):
    worker = Worker("writer")
    handle = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    worker.handles.add(handle)
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.fstat(handle)
            os.write(write, b"open")
        except OSError:
            os.write(write, b"closed")
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 10) == b"closed"
    for each in (read, write, handle):
        os.close(each)


def test_a_worker_does_its_tasks_in_order_and_drain_waits_for_them():
    worker, done = Worker("w"), []
    for number in range(100):
        worker.submit(lambda number=number: done.append(number))
    worker.drain()
    assert done == list(range(100))


def test_a_task_that_fails_is_logged_and_the_next_ones_are_done(caplog):
    worker, done = Worker("w"), []
    worker.submit(lambda: 1 / 0)
    worker.submit(lambda: done.append(1))
    worker.drain()
    worker.close()
    assert done == [1]
    assert "ZeroDivisionError" in caplog.text


def test_a_worker_that_is_closed_has_no_thread():
    before = threading.active_count()
    worker = Worker("w")
    worker.submit(lambda: None)
    worker.close()
    assert threading.active_count() == before
