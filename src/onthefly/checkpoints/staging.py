"""Staging: memory in which a state stands as it will in its file, so that training goes on while it is written.

Fresh memory is slow (its pages are made when they are first touched), and after loader workers were forked a copy into
ordinary memory is slower still (every page is copied once more). So a slot is kept and reused, touched before it is
needed, and left out of forked children.

Most of a state need not be copied at the boundary. Parameters and optimizer state change only in `optimizer.step()`, so
their copy may go on during the next forward and backward, if that step waits for it.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from onthefly.checkpoints.format import Layout
from onthefly.checkpoints.writer import Worker

_HUGE = 2 * 2**20
_TOUCHED = 64 * 2**20  # bytes touched in one call; in between, others may map memory
_RESERVE = 256 * 2**20  # bytes of memory that are left to everybody else
_SAMPLES = 16  # of each tensor that is copied late, to see whether it was still the same


class Slot:
    """One staging buffer. Owns its memory; `Staging` says who may use it."""

    def __init__(self) -> None:
        self.capacity = 0
        self._memory: torch.Tensor | None = None
        self._views: dict[tuple[int, torch.dtype, tuple[int, ...]], torch.Tensor] = {}
        self._pinned = False

    def fit(self, nbytes: int) -> None:
        """Have room for so many bytes. Raises `MemoryError` when there is not enough memory for it."""
        if nbytes <= self.capacity:
            return
        wanted = -(-nbytes // _HUGE) * _HUGE
        self._release()
        if (available := _available_memory()) is not None and wanted + _RESERVE > available:
            raise MemoryError(f"a staging buffer takes {wanted:,} bytes, and {available:,} are available")
        try:
            memory = mmap.mmap(-1, wanted, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError) as e:
            raise MemoryError(f"a staging buffer takes {wanted:,} bytes, which cannot be had: {e}") from e
        for advice in ("MADV_DONTFORK", "MADV_HUGEPAGE"):  # what Linux has, and macOS does not
            if (number := getattr(mmap, advice, None)) is not None:
                with suppress(OSError):  # a kernel without huge pages refuses; the copy is only slower then
                    memory.madvise(number)
        self._memory = torch.frombuffer(memory, dtype=torch.uint8)
        self.capacity = wanted

    def touch(self) -> None:
        """Have every page made, without the interpreter's lock."""
        if self._memory is not None:
            begin = self._memory.data_ptr()
            for offset in range(0, self.capacity, _TOUCHED):
                ctypes.memset(begin + offset, 0, min(_TOUCHED, self.capacity - offset))

    def image(self) -> memoryview:
        """The memory, as `format.write_image` takes it. It is in use for as long as somebody refers to it."""
        return memoryview(b"") if self._memory is None else memoryview(self._memory.numpy())  # type: ignore[arg-type]

    def views(self, layout: Layout) -> list[torch.Tensor]:
        """Where the layout's tensors go, in its order."""
        views = []
        for entry, tensor in zip(layout.entries, layout.tensors, strict=True):
            key = (entry.begin, tensor.dtype, entry.shape)
            view = self._views.get(key)
            if view is None:
                view = self._view(entry.begin, entry.end, tensor)
                self._views[key] = view
            views.append(view)
        return views

    def pin(self) -> None:
        """Make the memory one that a CUDA device can write to while the host goes on."""
        if not self._pinned and self._memory is not None:
            _checked(_runtime().cudaHostRegister(self._memory.data_ptr(), self.capacity, 0))
            self._pinned = True

    def _view(self, begin: int, end: int, like: torch.Tensor) -> torch.Tensor:
        if self._memory is None or begin == end:
            return torch.empty(like.shape, dtype=like.dtype)
        return self._memory[begin:end].view(like.dtype).view(like.shape)

    def _release(self) -> None:
        if self._pinned and self._memory is not None:
            _checked(_runtime().cudaHostUnregister(self._memory.data_ptr()))
            self._pinned = False
        self._views.clear()
        self._memory = None
        self.capacity = 0


class Staging:
    """The slots: who may use one, and how many there may be.

    Raises nothing by itself when memory is short for a second slot: `on_refusal` is told why, once, and everybody shares
    the first.
    """

    def __init__(self, limit: int, copier: Worker, on_refusal: Callable[[str], None]) -> None:
        self._limit = limit
        self._copier = copier
        self._on_refusal = on_refusal
        self._slots: list[Slot] = []
        self._idle: list[Slot] = []
        self._preparing = False
        self._changed = threading.Condition()

    @property
    def busy(self) -> bool:
        """Whether `take` would wait for a save."""
        with self._changed:
            return not self._idle and len(self._slots) >= self._limit and not self._preparing

    def take(self, nbytes: int) -> Slot:
        """A slot with room for so many bytes; waits while all are in use. Raises `MemoryError` when there is no room."""
        slot = self._next(nbytes)
        try:
            slot.fit(nbytes)
        except BaseException:
            self.give(slot)
            raise
        return slot

    def give(self, slot: Slot) -> None:
        """The slot's content is no longer needed."""
        with self._changed:
            self._idle.append(slot)
            self._changed.notify()

    def expect(self, nbytes: int) -> None:
        """A state of so many bytes will come: have a slot ready for it, in the background."""
        self._copier.submit(lambda: self._prepare(nbytes))

    def _prepare(self, nbytes: int) -> None:
        with self._changed:
            if self._slots and not self._idle:
                return  # in use: whoever comes next makes it larger. Waiting here, the copier would wait for itself
            if not self._slots:
                self._slots.append(Slot())
                self._idle.append(self._slots[0])
            slot = self._idle.pop()
            self._preparing = True
        try:
            if nbytes > slot.capacity:
                slot.fit(nbytes)
                slot.touch()
        except MemoryError:
            return  # `take` says so, to somebody who can do without
        finally:
            self._preparing = False
            self.give(slot)

    def _next(self, nbytes: int) -> Slot:
        with self._changed:
            while True:
                if self._idle:
                    return self._idle.pop()
                if len(self._slots) < self._limit and self._may_grow(nbytes):
                    self._slots.append(Slot())
                    return self._slots[-1]
                self._changed.wait()

    def _may_grow(self, nbytes: int) -> bool:
        available = _available_memory()
        if not self._slots or available is None or nbytes + _RESERVE <= available:
            return True
        self._limit = len(self._slots)
        self._on_refusal(
            f"a second staging buffer of {nbytes:,} bytes would leave too little of the {available:,} bytes of memory "
            "that are available; saves share one"
        )
        return False


class Staged:
    """A state on its way into a slot.

    What `late` does not name is in the slot when the constructor returns. The rest is copied by the copier's thread (on CUDA:
    by a stream of its own), and `before_step` is to be called before anything changes it.
    """

    def __init__(self, slot: Slot, layout: Layout, late: Collection[int], copier: Worker) -> None:
        """`late` are the indices, in the layout, of tensors that only an optimizer's step changes."""
        self.slot = slot
        self.layout = layout
        self.over = False
        """Whether it is written, or has failed: nobody looks at it any more."""
        self._torn: set[str] = set()
        self._copied = threading.Event()  # of what is in the processor's memory
        self._done = threading.Event()
        self._checking = threading.Lock()
        self._stepped = False
        self._event: Any = None
        targets = slot.views(layout)
        now = [i for i in range(len(targets)) if i not in late]
        on_device = any(tensor.is_cuda for tensor in layout.tensors)
        if on_device:
            self._stream_out(targets, now, sorted(late))
        else:
            with torch.no_grad():
                _copy(targets, layout.tensors, now)
        moves = [(targets[i], layout.tensors[i]) for i in sorted(late) if not layout.tensors[i].is_cuda]
        self._watched = [(layout.entries[i].name, layout.tensors[i], layout.tensors[i]._version) for i in sorted(late)]
        layout.tensors = []  # pending gradients, say, need not live until the file is durable
        self._samples = _Samples([tensor for _, tensor in moves], [target for target, _ in moves])
        self._sampled = [name for name, tensor, _ in self._watched if not tensor.is_cuda]
        if late:
            copier.submit(lambda: self._finish(moves))
        else:
            self._copied.set()
            self._done.set()

    def before_step(self) -> None:
        """Called before a tensor that is copied late may change: waits until it may."""
        self._copied.wait()
        with self._checking:
            # Once more: an operation that was under way when the copier looked is counted only at its end.
            self._look()
            self._stepped = True
        if self._event is not None:
            for device, event in self._event.items():
                torch.cuda.current_stream(device).wait_event(event)

    def torn(self) -> list[str]:
        """Wait until everything is in the slot. Gives the names of tensors that changed before their copy ended.

        With such a name, what is in the slot is no state that ever was. Ask again when the slot has been written: an
        in-place operation is counted at its end, and its end may be later than the copy's.
        """
        self._done.wait()
        with self._checking:
            if not self._stepped:
                self._look()
            return sorted(self._torn)

    def _finish(self, moves: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        try:
            for target, tensor in moves:
                ctypes.memmove(target.data_ptr(), tensor.data_ptr(), tensor.nbytes)  # without the interpreter's lock
            self._torn.update(self._sampled[i] for i in self._samples.changed())
            self._samples.forget()
            with self._checking:
                self._look()
            self._copied.set()
            for event in (self._event or {}).values():
                event.synchronize()
        except BaseException:
            self._torn.update(name for name, _, _ in self._watched)
            raise
        finally:
            self._copied.set()
            self._done.set()

    def _look(self) -> None:
        """Whether a tensor was written to since the boundary. PyTorch counts its in-place operations."""
        if not self._stepped:
            self._torn.update(name for name, tensor, version in self._watched if tensor._version != version)

    def _stream_out(self, targets: list[torch.Tensor], now: list[int], late: list[int]) -> None:
        """Copy from CUDA devices beside their current streams. (No machine of this project has run this yet.)"""
        self.slot.pin()
        tensors = self.layout.tensors
        self._event = {}
        with torch.no_grad():
            _copy(targets, tensors, [i for i in now if not tensors[i].is_cuda])
            for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
                stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                stream.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(stream):
                    _copy(targets, tensors, [i for i in now if tensors[i].device == device], non_blocking=True)
                    torch.cuda.current_stream(device).wait_event(stream.record_event())
                    _copy(targets, tensors, [i for i in late if tensors[i].device == device], non_blocking=True)
                    self._event[device] = stream.record_event()
        if not late:
            for event in self._event.values():
                event.synchronize()


class _Samples:
    """A few elements of each tensor: as they were, to be held against what was copied.

    The counter of in-place operations does not move for `.data`, NumPy views and fused kernels. What writes a whole
    tensor in one of these ways is found here.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], copies: Sequence[torch.Tensor]) -> None:
        self._before = [_sample(tensor).clone() for tensor in tensors]
        self._after = [_sample(copy) for copy in copies]

    def forget(self) -> None:
        self._before, self._after = [], []

    def changed(self) -> list[int]:
        pairs = zip(self._before, self._after, strict=True)
        return [i for i, (a, b) in enumerate(pairs) if a.numpy().tobytes() != b.numpy().tobytes()]


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1).view(torch.uint8)
    return flat[:: max(1, len(flat) // _SAMPLES) | 1]  # an odd step meets every byte of an element


def _copy(
    targets: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], indices: Sequence[int], non_blocking: bool = False
) -> None:
    chosen = [i for i in indices if tensors[i].numel()]
    if chosen:
        torch._foreach_copy_([targets[i] for i in chosen], [tensors[i] for i in chosen], non_blocking)


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _checked(error: Any) -> None:
    """Raises `RuntimeError` for a failed call of CUDA's runtime."""
    torch.cuda.check_error(int(error))


def _available_memory() -> int | None:
    """Bytes that this process may still take, going by the machine and its cgroup; None where nobody says."""
    limits = [limit for limit in (_machines_memory(), _cgroups_memory()) if limit is not None]
    return min(limits, default=None)


def _machines_memory() -> int | None:
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return None


def _cgroups_memory() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        most = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # Cached files count as used, but give way.
        return int(most) - used + int(fields.get("inactive_file", 0)) if most.isdigit() else None
    except (OSError, ValueError):  # no cgroup of one's own
        return None
