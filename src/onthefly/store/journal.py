"""The journal: one append-only file per session, and the only thing that its training process writes as it trains.

A record is `<IIQ`: payload length, CRC-32 of what follows, record number; then the payload. A payload begins with
`M`, numbers of one step (step u64, epoch u32, time f64, then a series' u32 id and f64 value each), or with `F`, a fact
as JSON. A record is complete in the file when its `os.write` has returned, so it outlives a killed process.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

METRICS, FACT = b"M", b"F"
HELD_LIMIT = 16 << 20
"""Bytes of metrics held in memory while the file cannot be written: hours of ten numbers, ten times a second."""

_FRAME = struct.Struct("<II")
_SEQ = struct.Struct("<Q")
_STEP = struct.Struct("<QId")
_POINT = struct.Struct("<Id")
_SEQ_SIZE = _SEQ.size
_PREFIX = _FRAME.size + _SEQ_SIZE


@dataclass(frozen=True, slots=True)
class MetricsRecord:
    """Numbers of one step, by the ids that `series` facts gave them."""

    seq: int
    step: int
    epoch: int
    time: float
    values: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class FactRecord:
    """Something that happened."""

    seq: int
    kind: str
    data: dict[str, Any]


Record = MetricsRecord | FactRecord


class Journal:
    """Appends records to one file. Threads may share it; a process that was forked, and signal handlers, may not use it.

    No method raises because of the disk: what cannot be written is held in memory and written, in order, at the
    next call. Facts are held without limit, metrics up to `HELD_LIMIT`.
    """

    seq: int
    """Number of the last record accepted."""
    lost: int
    """Metric records dropped because nothing could be written for long."""
    failing: bool
    """The last write failed; records are held in memory, and tried again at the next call."""

    def __init__(self, path: Path) -> None:
        """Open `path`, or create it, and go on after its last valid record; what is torn behind that is cut off.

        Raises `OSError` if it cannot be opened.
        """
        self.lost = 0
        self.failing = False
        self._lock = threading.Lock()
        self._held = bytearray()
        self._packers: dict[int, struct.Struct] = {}
        self._series: dict[tuple[str, int, str], int] = {}
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        records, end = read(path)
        os.ftruncate(self._fd, end)
        self.seq = records[-1].seq if records else 0
        for record in records:
            if isinstance(record, FactRecord) and record.kind == "series":
                data = record.data
                self._series[data["run"], data["generation"], data["name"]] = data["id"]

    def series(self, run: str, generation: int, name: str) -> int:
        """The id that `metrics` takes for this series; the first call for it writes it down as a fact."""
        key = (run, generation, name)
        with self._lock:
            if key not in self._series:
                # The fact goes first: numbers of a series that the file does not name would be unreadable.
                number = len(self._series)
                self._fact("series", {"id": number, "run": run, "generation": generation, "name": name})
                self._series[key] = number
            return self._series[key]

    def metrics(self, step: int, epoch: int, time: float, values: Sequence[float]) -> None:
        """Record the numbers of one step, non-finite ones too: `values` are a series' id, its number, the next id, ...

        `time` is in Unix seconds. This is what a logging step costs, so the way to the file is written out here.
        """
        packer = self._packers.get(len(values)) or self._packer(len(values))
        with self._lock:
            if self._held:
                if len(self._held) > HELD_LIMIT and not self._write():
                    self.lost += 1
                    return
                self._append(packer.pack(self.seq + 1, METRICS, step, epoch, time, *values))
                return
            # Taken before the write, so that an exception in between (Ctrl-C) leaves a gap, never a number used twice.
            self.seq = seq = self.seq + 1
            body = packer.pack(seq, METRICS, step, epoch, time, *values)
            self._put(_FRAME.pack(len(body) - _SEQ_SIZE, crc32(body)) + body)

    def fact(self, kind: str, data: Mapping[str, Any]) -> int:
        """Record a fact; gives its record's number. Raises `TypeError` if `data` is not JSON."""
        with self._lock:
            return self._fact(kind, data)

    def sync(self) -> None:
        """Write what is held, and wait until all is on the disk. See `failing` for how that went."""
        with self._lock:
            if self._write():
                try:
                    os.fsync(self._fd)
                except OSError:
                    self.failing = True

    def close(self) -> None:
        """Write what is held, and close the file. What is recorded after it stays in memory."""
        with self._lock:
            self._write()
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _packer(self, count: int) -> struct.Struct:
        self._packers[count] = packer = struct.Struct("<QcQId" + count // 2 * "Id")
        return packer

    def _fact(self, kind: str, data: Mapping[str, Any]) -> int:
        text = json.dumps({**data, "kind": kind}, separators=(",", ":"))
        self._append(_SEQ.pack(self.seq + 1) + FACT + text.encode())
        return self.seq

    def _append(self, body: bytes) -> None:
        record = _FRAME.pack(len(body) - _SEQ_SIZE, crc32(body)) + body
        self.seq += 1
        if self._held:
            self._held += record
            self._write()
        else:
            self._put(record)

    def _put(self, record: bytes) -> None:
        try:
            written = os.write(self._fd, record)
        except OSError:
            written = 0
        if written != len(record):
            self.failing = True
            self._held += record[written:]

    def _write(self) -> bool:
        """Write what is held, beginning with the rest of a record that was cut short. Whether nothing is left."""
        try:
            while self._held:
                del self._held[: os.write(self._fd, self._held)]
        except OSError:
            self.failing = True
        else:
            self.failing = False
        return not self.failing


def read(path: Path, offset: int = 0, limit: int | None = None) -> tuple[list[Record], int]:
    """The complete, valid records from a byte offset on, at most `limit` of them, and the offset after the last one.

    It stops before a torn or damaged record. Raises `OSError` if the file cannot be read.
    """
    records: list[Record] = []
    with open(path, "rb") as file:
        file.seek(offset)
        for body in _bodies(file, os.fstat(file.fileno()).st_size - offset):
            if limit is not None and len(records) >= limit:
                break
            records.append(_parse(body))
            offset += _FRAME.size + len(body)
    return records, offset


def _bodies(file: BinaryIO, left: int) -> Iterator[bytes]:
    """Number and payload of each valid record in the next `left` bytes."""
    while left >= _PREFIX:
        length, checksum = _FRAME.unpack(file.read(_FRAME.size))
        left -= _PREFIX + length
        if left < 0:
            return
        body = file.read(_SEQ_SIZE + length)
        if crc32(body) != checksum:
            return
        yield body


def _parse(body: bytes) -> Record:
    (seq,) = _SEQ.unpack_from(body)
    start = _SEQ_SIZE + 1
    if body[_SEQ.size : start] == METRICS:
        step, epoch, time = _STEP.unpack_from(body, start)
        return MetricsRecord(seq, step, epoch, time, tuple(_POINT.iter_unpack(body[start + _STEP.size :])))
    data = json.loads(body[start:])
    return FactRecord(seq, data.pop("kind"), data)
