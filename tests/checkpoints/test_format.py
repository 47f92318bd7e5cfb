"""The checkpoint file: whole or not there; what comes out is what went in, or a typed error."""

import errno
import json
import math
import os
import pickle
import random
import resource
import subprocess
import sys
import threading
import zipfile

import pytest
import torch
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from onthefly.checkpoints import durable, header
from onthefly.checkpoints.durable import remove_stray
from onthefly.checkpoints.format import digest, open_checkpoint, write
from onthefly.checkpoints.header import recorded_hash
from onthefly.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointWriteError,
    CorruptCheckpointError,
    UnsupportedValueError,
)

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64,
]  # fmt: skip
CHUNK = 16 * 2**20


def random_bytes(count, dtype=torch.uint8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(dtype)


def bits(tensor):
    return tensor.dtype, tensor.shape, tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert bits(a[name]) == bits(b[name]), name


@pytest.fixture(scope="module")
def tensors():
    every = {f"d/{dtype}": random_bytes(5, dtype, seed).clone() for seed, dtype in enumerate(DTYPES)}
    every["d/torch.bool"] = torch.tensor([True, False, True])
    return {
        **every,
        "nan": torch.tensor([math.nan, -0.0, math.inf]),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "matrix": torch.arange(12).view(3, 4),
        'na/me with ünicode "quotes" and \'': torch.ones(1),
    }


TREE = {"step": 3, "text": "ünï\U0001f600\n", "list": [1.5, None, True, {"$tensor": "nan"}]}


@pytest.fixture(scope="module")
def small(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    write(path, TREE, tensors)
    return path.read_bytes()


# -- round trip ------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    written = write(path, TREE, tensors)
    file = open_checkpoint(path)
    assert file.tree == TREE
    assert_same(file.tensors, tensors)
    assert (file.hash, file.size) == (written.hash, written.size) == (file.hash, path.stat().st_size)
    assert file.path == path
    assert recorded_hash(path) == written.hash
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("chunks", "count"),
    [*((chunks, count) for chunks in (0, 1) for count in (0, 1, 4095, 4096, 4097)), (4, 1)],
)
def test_sizes_around_the_ends_of_blocks_and_chunks(tmp_path, chunks, count):
    tensors = {"a": random_bytes(max(0, chunks * CHUNK - 2)), "b": random_bytes(count, seed=1), "c": random_bytes(1)}
    path = tmp_path / "a.safetensors"
    written = write(path, None, tensors)
    assert written.size == path.stat().st_size
    assert_same(open_checkpoint(path).tensors, tensors)
    assert written.hash == digest(None, tensors)


@pytest.mark.parametrize("sizes", [[CHUNK - 1, 2, CHUNK], [CHUNK // 8 + 1] * 9, [2 * CHUNK - 4097, 4096, 1]])
def test_tensors_that_cross_chunks(tmp_path, sizes):
    tensors = {f"{i}": random_bytes(size, seed=i) for i, size in enumerate(sizes)}
    write(tmp_path / "a", {}, tensors)
    assert_same(open_checkpoint(tmp_path / "a").tensors, tensors)


def test_no_tensors_at_all(tmp_path):
    written = write(tmp_path / "a", {"step": 1}, {})
    assert written.size == 4096
    assert open_checkpoint(tmp_path / "a").tree == {"step": 1}


def test_tensors_need_not_be_contiguous_nor_without_gradient(tmp_path):
    wide = torch.arange(12.0).view(3, 4)
    write(tmp_path / "a", {}, {"t": wide.t(), "g": wide.clone().requires_grad_(), "expanded": torch.ones(1).expand(3)})
    tensors = open_checkpoint(tmp_path / "a").tensors
    assert_same(tensors, {"t": wide.t(), "g": wide, "expanded": torch.ones(3)})


def test_the_file_is_as_documented(small, tensors):
    length = int.from_bytes(small[:8], "little")
    entries = json.loads(small[8 : 8 + length])
    assert (8 + length) % 4096 == 0
    assert next(iter(entries)) == "__metadata__"
    assert list(entries["__metadata__"]) == ["blake3", "onthefly"]
    recorded = entries["__metadata__"]["blake3"]
    assert small.count(recorded.encode()) == 1
    assert blake3(small.replace(recorded.encode(), b"0" * 64)).hexdigest() == recorded
    assert json.loads(entries["__metadata__"]["onthefly"]) == {"format": header.FORMAT_VERSION, "state": TREE}
    del entries["__metadata__"]
    assert list(entries) == sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    offsets = [info["data_offsets"] for info in entries.values()]
    assert [begin for begin, _ in offsets] == [0, *(end for _, end in offsets[:-1])]
    assert 8 + length + offsets[-1][1] == len(small)


def test_equal_state_gives_equal_bytes_and_the_digest_that_is_foretold(tmp_path, tensors, small):
    again = {name: tensor.clone() for name, tensor in reversed(tensors.items())}
    written = write(tmp_path / "b", TREE, again)
    assert (tmp_path / "b").read_bytes() == small
    assert written.hash == digest(TREE, again) == digest(TREE, tensors)


@pytest.mark.parametrize("change", ["tree", "data", "shape", "dtype", "name", "one more"])
def test_other_state_gives_another_hash(tensors, change):
    other = dict(tensors)
    if change == "data":
        other["matrix"] = other["matrix"] + 1
    elif change == "shape":
        other["matrix"] = other["matrix"].view(4, 3)
    elif change == "dtype":
        other["matrix"] = other["matrix"].view(torch.float64)
    elif change == "name":
        other["Matrix"] = other.pop("matrix")
    elif change == "one more":
        other["z"] = torch.empty(0)
    assert digest({**TREE, "step": 4} if change == "tree" else TREE, other) != digest(TREE, tensors)


def test_the_stock_safetensors_library_opens_it(tmp_path, tensors, small):
    (tmp_path / "a.safetensors").write_bytes(small)
    assert_same(load_file(tmp_path / "a.safetensors"), tensors)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["blake3"] == recorded_hash(tmp_path / "a.safetensors")


def test_a_header_may_be_as_long_as_the_stock_library_reads(tmp_path):
    path = tmp_path / "a.safetensors"
    for length, word in (
        (header.MAX_HEADER, "InvalidHeaderLength|[Ii]nvalid header length"),
        (header.MAX_HEADER + 1, "[Ll]arge"),
    ):
        path.write_bytes(length.to_bytes(8, "little") + b" " * 64)
        with pytest.raises(SafetensorError, match=word):
            load_file(path)


def test_views_are_writable_without_a_trace_in_the_file_and_outlive_it(tmp_path, tensors, small):
    path = tmp_path / "a"
    path.write_bytes(small)
    file = open_checkpoint(path)
    file.tensors["matrix"].zero_()
    assert path.read_bytes() == small
    path.unlink()
    assert torch.equal(file.tensors["scalar"], tensors["scalar"])
    assert file.tensors["matrix"].sum() == 0


def test_a_file_larger_than_the_memory_can_be_opened(tmp_path):
    size = 2**42
    path = tmp_path / "huge"
    start = forge({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    path.write_bytes(start)
    try:
        os.truncate(path, len(start) + size)
    except OSError as e:
        pytest.skip(f"no file of {size} bytes here: {e}")
    tensor = open_checkpoint(path, verify="header").tensors["x"]
    assert tensor[0] == tensor[size // 2] == 0


# -- not written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensors",
    [{"x": torch.ones(2, dtype=torch.complex64)}, {"__metadata__": torch.ones(1)}],
    ids=["a dtype without a place", "a reserved name"],
)
def test_what_has_no_place_in_the_format_is_refused_before_anything_is_written(tmp_path, tensors):
    with pytest.raises(UnsupportedValueError, match=next(iter(tensors))):
        write(tmp_path / "a", {}, tensors)
    with pytest.raises(UnsupportedValueError):
        digest({}, tensors)
    assert not list(tmp_path.iterdir())


def test_a_tree_beyond_the_header_is_refused(tmp_path):
    with pytest.raises(UnsupportedValueError, match="header"):
        write(tmp_path / "a", "x" * header.MAX_HEADER, {})
    assert not list(tmp_path.iterdir())


def test_no_such_folder_and_a_folder_in_the_way(tmp_path):
    with pytest.raises(CheckpointWriteError, match="nowhere") as caught:
        write(tmp_path / "nowhere" / "a", {}, {})
    assert caught.value.errno == errno.ENOENT
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointWriteError, match="folder"):
        write(tmp_path / "folder", {}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_an_interrupted_write_leaves_the_older_file(tmp_path):
    path = tmp_path / "a"
    write(path, 1, {})

    class Late(torch.Tensor):
        def detach(self):
            raise KeyboardInterrupt

    late = torch.ones(3).as_subclass(Late)
    with pytest.raises(KeyboardInterrupt):
        write(path, 2, {"x": random_bytes(2 * CHUNK), "y": late})
    assert open_checkpoint(path).tree == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 24 MiB. That it really fills up is proven here, by a plain write."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    try:
        with pytest.raises(OSError, match="No space left") as caught, open(folder / "plain", "wb") as file:
            file.write(bytes(40 * 2**20))
        assert caught.value.errno == errno.ENOSPC
        (folder / "plain").unlink()
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_a_typed_error_and_leaves_the_older_file_alone(tiny_disk):
    path = tiny_disk / "a.safetensors"
    older = {"x": random_bytes(3 * 2**20)}
    written = write(path, "older", older)
    for size in (22, 40, 200):
        with pytest.raises(CheckpointWriteError, match="No space left") as caught:
            write(path, "newer", {"x": torch.zeros(size * 2**20, dtype=torch.uint8)})
        assert caught.value.errno == errno.ENOSPC
        assert list(tiny_disk.iterdir()) == [path]
        assert open_checkpoint(path).hash == written.hash
    assert write(path, "smaller", {"x": random_bytes(2**20)}).hash == open_checkpoint(path).hash


def test_a_disk_that_fills_up_while_writing(tiny_disk):
    """As on a file system where space cannot be reserved."""
    (tiny_disk / "a").write_bytes(b"older")
    with pytest.raises(CheckpointWriteError, match="No space left"):
        durable.replace_durably(tiny_disk / "a", bytes(40 * 2**20))
    assert [p.name for p in tiny_disk.iterdir()] == ["a"]
    assert (tiny_disk / "a").read_bytes() == b"older"


@pytest.fixture
def file_limit():
    """No file of this process may grow beyond 1 MiB. Python ignores the signal that comes with it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("file_limit")
def test_a_file_size_limit_is_a_typed_error_too(tmp_path):
    path = tmp_path / "a"
    write(path, "older", {})
    with pytest.raises(CheckpointWriteError, match="too large"):
        write(path, "newer", {"x": torch.zeros(2**22)})
    assert open_checkpoint(path).tree == "older"
    assert list(tmp_path.iterdir()) == [path]


# -- several writers, killed writers ---------------------------------------------------------------------------

SAVES_AT_EXIT = """
import atexit, sys, torch
from onthefly.checkpoints.format import write
atexit.register(lambda: print(write(sys.argv[1], "late", {"x": torch.ones(5_000_000)}).hash))
"""


def test_a_checkpoint_can_be_saved_while_the_interpreter_exits(tmp_path):
    path = tmp_path / "a"
    done = subprocess.run([sys.executable, "-c", SAVES_AT_EXIT, str(path)], capture_output=True, text=True)
    assert done.stderr == ""
    assert open_checkpoint(path).hash == done.stdout.strip()


def test_threads_that_write_the_same_file_leave_one_whole_file(tmp_path):
    path = tmp_path / "a"
    failures = []

    def save(number):
        try:
            for _ in range(5):
                write(path, number, {"x": torch.full((1_000_003,), number)})
        except BaseException as e:  # noqa: BLE001  reported by the test
            failures.append(e)

    threads = [threading.Thread(target=save, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    file = open_checkpoint(path)
    assert file.tensors["x"].unique().tolist() == [file.tree]
    assert list(tmp_path.iterdir()) == [path]


def test_only_strays_that_nobody_writes_are_removed(tmp_path):
    others = [tmp_path / name for name in (".a.123.tmp", "a.tmp", ".x.onthefly.tmp", "a.0123abcd.onthefly.tmp")]
    for other in others:
        other.write_text("mine")
    stray = tmp_path / ".a.safetensors.0123abcd.onthefly.tmp"
    stray.write_bytes(b"half")
    (tmp_path / ".d.0123abcd.onthefly.tmp").mkdir()
    with durable.replacing(tmp_path / "b") as handle:
        assert remove_stray(tmp_path) == [stray]
        os.write(handle, b"whole")
    assert (tmp_path / "b").read_bytes() == b"whole"
    assert remove_stray(tmp_path) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [*(o.name for o in others), "b", ".d.0123abcd.onthefly.tmp"]
    )


KILLED_MANY_TIMES = """
import os, random, signal, sys, time, torch
from onthefly.checkpoints.format import write
folder, kills = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
for child in range(kills):
    log = os.open(f"{folder}/log{child}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    pid = os.fork()
    if pid == 0:
        for n in range(10**6):
            name = f"{child}-{n % 3}.safetensors"
            write(f"{folder}/{name}", n, {"x": torch.full((300_000,), n), "y": torch.arange(n)})
            os.write(log, f"{name} {n}\\n".encode())
    while os.fstat(log).st_size < 20:
        time.sleep(0.001)
    time.sleep(random.random() * 0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""


def test_processes_killed_while_saving_leave_whole_files_and_strays_that_can_be_removed(tmp_path):
    kills = 8
    subprocess.run([sys.executable, "-c", KILLED_MANY_TIMES, str(tmp_path), str(kills)], check=True)
    strays = [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert strays, "no kill met a save in the middle"
    assert sorted(remove_stray(tmp_path)) == sorted(strays)
    reported = {}
    for child in range(kills):
        log = tmp_path / f"log{child}"
        reported.update(line.split() for line in log.read_text().splitlines())
        log.unlink()
    assert {p.name for p in tmp_path.iterdir()} >= reported.keys()
    for path in tmp_path.iterdir():
        file = open_checkpoint(path)
        assert file.tensors["x"].unique().tolist() == [file.tree]
        assert file.tree >= int(reported.get(path.name, 0)), "what was reported saved is saved"


# -- damage ----------------------------------------------------------------------------------------------------


def assert_corrupt(path, data=None, words="."):
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match=words) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_a_file_truncated_anywhere_is_corrupt(tmp_path, small):
    path = tmp_path / "a"
    path.write_bytes(small)
    lengths = {*range(200), *range(4000, 4200), *range(0, len(small), 7), len(small) - 1}
    for length in sorted(lengths, reverse=True):
        os.truncate(path, length)
        with pytest.raises(CorruptCheckpointError):
            open_checkpoint(path)


def test_a_file_with_something_behind_it_is_corrupt(tmp_path, small):
    assert_corrupt(tmp_path / "a", small + b"\0", "has")
    assert_corrupt(tmp_path / "a", small + small, "has")


def test_one_bit_of_every_byte(tmp_path, small):
    path = tmp_path / "a"
    path.write_bytes(small)
    with open(path, "r+b", buffering=0) as file:
        for position, byte in enumerate(small):
            os.pwrite(file.fileno(), bytes([byte ^ 1 << position * 5 % 8]), position)
            with pytest.raises(CorruptCheckpointError):
                open_checkpoint(path)
            os.pwrite(file.fileno(), bytes([byte]), position)
    assert open_checkpoint(path).tree == TREE


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_any_bytes_is_corrupt(tmp_path, small, data):
    """In the header most of the time, where a change has the most to break."""
    length = int.from_bytes(small[:8], "little")
    used = len(small[8 : 8 + length].rstrip()) + 8
    position = data.draw(st.integers(0, used - 1) | st.integers(0, len(small) - 1))
    replacement = data.draw(
        st.binary(min_size=1, max_size=8) | st.sampled_from([b'"', b"{", b"}", b",", b"[", b"9", b"\\u0000", b"null"])
    )
    insert = data.draw(st.booleans())
    changed = small[:position] + replacement + small[position + (0 if insert else len(replacement)) :]
    if changed != small:
        assert_corrupt(tmp_path / "a", changed)


def test_checking_only_the_header_trusts_the_data(tmp_path, small):
    path = tmp_path / "a"
    path.write_bytes(small[:-1] + bytes([small[-1] ^ 1]))
    assert_corrupt(path, words="altered or damaged")
    assert open_checkpoint(path, verify="header").tree == TREE
    with pytest.raises(ValueError, match="verify"):
        open_checkpoint(path, verify="no")


# -- foreign files ---------------------------------------------------------------------------------------------


class Payload:
    """Unpickled, it would make a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("make", [lambda p, f: pickle.dump(p, f), lambda p, f: torch.save({"model": p}, f)])
def test_a_pickle_is_refused_and_not_executed(tmp_path, make):
    marker = tmp_path / "marker"
    with open(tmp_path / "a.safetensors", "wb") as file:
        make(Payload(marker), file)
    with open(tmp_path / "a.safetensors", "ab") as file:
        file.write(b" " * 10_000)
    marker.unlink(missing_ok=True)
    assert_corrupt(tmp_path / "a.safetensors")
    assert not marker.exists()


def test_foreign_files_are_corrupt(tmp_path):
    path = tmp_path / "a"
    assert_corrupt(path, b"", "0 bytes")
    assert_corrupt(path, b"1234567")
    assert_corrupt(path, bytes(8))
    assert_corrupt(path, bytes(100_000))
    assert_corrupt(path, random.Random(1).randbytes(100_000))
    assert_corrupt(path, b"{" * 100_000)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b" * 10_000)
    assert_corrupt(path)
    save_file({"x": torch.ones(3)}, path)
    assert_corrupt(path)
    save_file({"x": torch.ones(3)}, path, metadata={"onthefly": "{}", "blake3": "0" * 64})
    assert_corrupt(path)


def test_what_is_no_file(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="nothing"):
        open_checkpoint(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "file" / "below")
    assert_corrupt(tmp_path, words="not a file")
    os.mkfifo(tmp_path / "pipe")
    assert_corrupt(tmp_path / "pipe", words="not a file")
    (tmp_path / "loop").symlink_to("loop")
    for reader in (open_checkpoint, recorded_hash):
        with pytest.raises(CheckpointError, match="cannot be read"):
            reader(tmp_path / "loop")


@pytest.mark.parametrize("data", [b"", b"x" * 40, b"x" * 4096, bytes(8) + b'{"__metadata__":{"blake3":"' + b"G" * 64])
def test_a_recorded_hash_that_is_none(tmp_path, data):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(CorruptCheckpointError):
        recorded_hash(tmp_path / "a")


# -- malicious headers -----------------------------------------------------------------------------------------


def forge(entries, data=b"", *, state='{"format":1,"state":{}}', text=None, metadata=None, align=4096):
    """A file with a hash that is right, so that nothing but the check of its header stands in the way."""
    metadata = {"blake3": "0" * 64, "onthefly": state} if metadata is None else metadata
    text = text or json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":"))
    raw = text.encode()
    length = -(8 + len(raw)) % align + len(raw)
    file = length.to_bytes(8, "little") + raw.ljust(length) + data
    return file.replace(b"0" * 64, blake3(file).hexdigest().encode(), 1)


def entry(shape=(2,), offsets=(0, 8), dtype="F32", **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def test_a_forged_file_that_is_well_formed_opens(tmp_path):
    (tmp_path / "a").write_bytes(forge({"x": entry()}, bytes(8)))
    assert torch.equal(open_checkpoint(tmp_path / "a").tensors["x"], torch.zeros(2))


HEAD = '{"__metadata__":{"blake3":"' + "0" * 64 + '","onthefly":"{\\"format\\":1,\\"state\\":{}}"}'
FORGED = {
    "overlap": forge({"x": entry(), "y": entry((2,), (4, 12))}, bytes(12)),
    "the same place twice": forge({"x": entry(), "y": entry()}, bytes(8)),
    "a gap": forge({"x": entry(), "y": entry((2,), (12, 20))}, bytes(20)),
    "a gap before all": forge({"x": entry((2,), (4, 12))}, bytes(12)),
    "data of nobody": forge({"x": entry()}, bytes(12)),
    "not enough data": forge({"x": entry()}, bytes(4)),
    "backwards": forge({"x": entry((2,), (8, 0))}, bytes(8)),
    "negative place": forge({"x": entry((2,), (-8, 0))}, bytes(8)),
    "negative shape": forge({"x": entry((-2,))}, bytes(8)),
    "two negatives": forge({"x": entry((-2, -1))}, bytes(8)),
    "a shape that is too large": forge({"x": entry((3,))}, bytes(8)),
    "overflow to the right size": forge({"x": entry((2**62, 4, 2**1))}, bytes(8)),
    "overflow to nothing": forge({"x": entry((2**32, 2**32), (0, 0))}),
    "strides that overflow": forge({"x": entry((0, 2**62, 2**62), (0, 0))}),
    "beyond 64 bits": forge({"x": entry((2**64,), (0, 2**66))}),
    "places beyond 64 bits": forge({"x": entry((0,), (2**64, 2**64))}),
    "shape of floats": forge({"x": entry((2.0,))}, bytes(8)),
    "shape of booleans": forge({"x": entry((True, 2))}, bytes(8)),
    "shape of text": forge({"x": entry("2")}, bytes(8)),
    "shape is a number": forge({"x": {**entry(), "shape": 2}}, bytes(8)),
    "65 dimensions": forge({"x": entry((1,) * 64 + (2,))}, bytes(8)),
    "three places": forge({"x": entry((2,), (0, 8, 8))}, bytes(8)),
    "one place": forge({"x": entry((2,), (8,))}, bytes(8)),
    "no shape": forge({"x": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "something more": forge({"x": entry(run="rm")}, bytes(8)),
    "an entry of text": forge({"x": "y"}),
    "an entry of nothing": forge({"x": None}),
    "a dtype of nobody": forge({"x": entry(dtype="F33")}, bytes(8)),
    "a dtype that is a list": forge({"x": entry(dtype=["F32"])}, bytes(8)),
    "a dtype that cannot be viewed here": forge({"x": entry(dtype="C64")}, bytes(8)),
    "not aligned": forge({"x": entry()}, bytes(8), align=1),
    "misaligned by 8": forge({"x": entry()}, bytes(8), align=8),
    "an item that is not aligned": forge({"x": entry((1,), (0, 1), "U8"), "y": entry((1,), (1, 5))}, bytes(5)),
    "a name twice": forge({}, bytes(8), text=HEAD + ',"x":%s,"x":%s}' % ((json.dumps(entry()),) * 2)),
    "metadata twice": forge({}, text=HEAD + "," + HEAD[1:] + "}"),
    "a key twice in an entry": forge({}, bytes(8), text=HEAD + ',"x":{"dtype":"U8","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
    "deep lists": forge({}, text=HEAD + ',"x":' + "[" * 50_000 + "]" * 50_000 + "}"),
    "deep objects": forge({}, text=HEAD + ',"x":' + '{"a":' * 50_000 + "1" + "}" * 50_000 + "}"),
    "a number of a million digits": forge({}, text=HEAD + ',"x":' + "1" * 1_000_000 + "}"),
    "a list": forge({}, text='["__metadata__"]'),
    "text behind": forge({}, text=HEAD + "}{}"),
    "not UTF-8": forge({}, text=HEAD + "}").replace(b"  ", b"\xff\xff", 1),
    "no metadata": forge({}, text="{}"),
    "metadata is a list": forge({}, metadata=["0" * 64]),
    "no state": forge({}, metadata={"blake3": "0" * 64}),
    "state is an object": forge({}, metadata={"blake3": "0" * 64, "onthefly": {}}),
    "no hash": forge({}, metadata={"onthefly": '{"format":1,"state":{}}'}),
    "a hash that is a number": forge({}, metadata={"blake3": 0, "onthefly": '{"format":1,"state":{}}'}),
    "an empty hash": forge({}, metadata={"blake3": "", "onthefly": '{"format":1,"state":{}}'}),
    "a hash in another place": forge({}, metadata={"onthefly": '{"format":1,"state":{}}', "blake3": "0" * 64}),
    "spaces before the hash": forge({}, text=" " + HEAD + "}"),
    "state is no JSON": forge({}, state="{"),
    "state is empty": forge({}, state=""),
    "state without a format": forge({}, state="{}"),
    "state of another format": forge({}, state='{"format":2,"state":{}}'),
    "state is a list": forge({}, state="[]"),
    "state with a key twice": forge({}, state='{"format":1,"state":{"a":1,"a":2}}'),
    "state too deep": forge({}, state='{"format":1,"state":' + "[" * 50_000 + "]" * 50_000 + "}"),
    "a length of 2^64": b"\xff" * 8 + forge({})[8:],
    "a length of 2^63": (2**63).to_bytes(8, "little") + forge({})[8:],
    "a length beyond the file": (4089).to_bytes(8, "little") + forge({})[8:],
    "no length": bytes(8) + forge({})[8:],
}  # fmt: skip


@pytest.mark.parametrize("kind", FORGED)
def test_a_malicious_header_is_refused_although_its_hash_is_right(tmp_path, kind):
    assert_corrupt(tmp_path / "a", FORGED[kind])
