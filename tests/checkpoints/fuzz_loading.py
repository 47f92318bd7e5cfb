"""A process that loads mutated checkpoints, under a limit on its memory and with an eye on everything that it runs.

    python fuzz_loading.py FOLDER SEED COUNT [INDEX]

Mutant number i of a seed is always the same; with INDEX that one only is loaded. What it prints is a line of JSON: how many of
each kind came to which end. It fails at the first mutant that was not met as `load_checkpoint` promises.
"""

import copy
import json
import os
import random
import resource
import sys
import threading
from collections import Counter, OrderedDict, defaultdict
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3
from torch import nn

from onthefly.checkpoints import load_checkpoint, save_checkpoint
from onthefly.checkpoints.format import digest, open_checkpoint
from onthefly.checkpoints.header import ALIGNMENT, DIGITS, ITEM_SIZES
from onthefly.errors import OnTheFlyError
from onthefly.state import rng
from onthefly.state.train_state import TrainState
from onthefly.state.tree import flatten, unflatten

ROOM = 8 * 2**20
"""Bytes that a load may take, a thread of its own included. A file here has 40 KiB at most."""


# -- what is loaded into ---------------------------------------------------------------------------------------


class Anything:
    """Takes whatever it is given."""

    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


class Odd(nn.Module):
    """Tensors of every kind that is stored in a way of its own."""

    def __init__(self):
        super().__init__()
        self.brain = nn.Parameter(torch.randn(3, dtype=torch.bfloat16))
        self.turned = nn.Parameter(torch.randn(2, 3).t())
        self.tied = self.turned
        self.wave = nn.Parameter(torch.randn(2, dtype=torch.complex64))
        self.register_buffer("count", torch.tensor(5))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("empty", torch.empty(0, 2))
        self.register_buffer("unsaved", torch.randn(2), persistent=False)


def bare():
    return {"model": nn.Linear(2, 2), "step": 3}


def training():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    scheduler.step()
    order = np.random.default_rng(1)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "order": order, "step": 1, "loss": 0.5}


def odd():
    model = Odd()
    optimizer = torch.optim.SGD([model.brain, model.turned], momentum=0.9)
    (model.brain.sum() + model.turned.sum()).backward()
    optimizer.step()
    values = [
        (1, [2.5]), {3: "x", "$y": None}, OrderedDict(a=1), Counter("aab"), defaultdict(list, b=[1]), {1, 2}, frozenset("c"),
        2**70, float("inf"), 1 + 2j, "\ud800", b"bytes", bytearray(b"more"), torch.float16, torch.device("cpu"),
        torch.Size([2, 3]), np.float32(1.5), np.arange(4.0).reshape(2, 2), list(range(70)), [0.5] * 70, torch.ones(2),
    ]  # fmt: skip
    return {"model": model, "optimizer": optimizer, "scaler": torch.amp.GradScaler("cpu"), "values": Anything(values)}


BUILDERS = (bare, training, odd)


def seed():
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


class Original:
    """Live objects, and the checkpoint that they were saved in."""

    def __init__(self, build, folder):
        self._build = build
        self.path = folder / f"{build.__name__}.safetensors"
        self.live = build()
        self._state = TrainState.of(self.live)
        seed()  # the random state is the same in all of them: that of a refused one is to be as it was
        save_checkpoint(self.path, self.live)
        self.raw = self.path.read_bytes()
        self.length = int.from_bytes(self.raw[:8], "little")
        self.text = self.raw[8 : 8 + self.length].rstrip()
        self.data = self.raw[8 + self.length :]
        self._content = self._content_now()

    def is_as_saved(self):
        """Whether the live objects are bit for bit what was saved, random generators included."""
        return self._content_now() == self._content

    def renew(self):
        """Live objects as they were, for those that took over another state."""
        self.live = self._build()
        self._state = TrainState.of(self.live)
        load_checkpoint(self.path, self.live)
        assert self.is_as_saved()

    def _content_now(self):
        return digest(*flatten(self._state.capture()))

    def parsed(self):
        entries = json.loads(self.text)
        state = json.loads(entries.pop("__metadata__")["onthefly"])
        return entries, state

    def assembled(self, entries, state, data=None):
        if not isinstance(state, str):
            state = json.dumps(state, separators=(",", ":"))
        whole = {"__metadata__": {"blake3": "0" * 64, "onthefly": state}, **entries}
        return framed(json.dumps(whole, separators=(",", ":")).encode(), self.data if data is None else data)


def framed(text, data):
    length = -(8 + len(text)) % ALIGNMENT + len(text)
    return length.to_bytes(8, "little") + text.ljust(length) + data


def hashed(raw):
    """With a hash that is right, if there is a place for one."""
    if len(raw) < DIGITS.stop:
        return raw
    raw = raw[: DIGITS.start] + b"0" * 64 + raw[DIGITS.stop :]
    return raw[: DIGITS.start] + blake3(raw).hexdigest().encode() + raw[DIGITS.stop :]


# -- mutations -------------------------------------------------------------------------------------------------


def header_bytes(dice, original):
    """Some bytes of the header's text are others, gone, or new."""
    text = bytearray(original.text)
    for _ in range(dice.choice((1, 1, 2, 4))):
        begin = dice.randrange(len(text))
        end = begin + dice.choice((0, 1, 1, 2, 8))
        word = dice.choice((dice.randbytes(dice.randrange(4)), dice.choice(b'{}[]",:0123456789-.$ex\\').to_bytes()))
        text[begin:end] = word
    return framed(bytes(text), original.data)


def header_length(dice, original):
    length = dice.choice(
        (
            original.length + dice.choice((-4096, -8, -1, 1, 8, 4096)),
            dice.getrandbits(dice.choice((16, 32, 63, 64))),
            dice.randrange(len(original.raw)),
            dice.choice((0, 1, 4088, 2**31, 2**32, 2**63, 2**64 - 1)),
        )
    )
    return (length % 2**64).to_bytes(8, "little") + original.raw[8:]


def cut_off(dice, original):
    return original.raw[: dice.randrange(len(original.raw))]


def appended(dice, original):
    more = dice.choice((b"\0", dice.randbytes(dice.randrange(1, 5000)), original.raw, original.data, b" " * 4096))
    return original.raw + more


def blocks_swapped(dice, original):
    size = dice.choice((8, 64, 512, 4096))
    raw = bytearray(original.raw)
    one, other = (dice.randrange(len(raw) // size) * size for _ in range(2))
    raw[one : one + size], raw[other : other + size] = raw[other : other + size], raw[one : one + size]
    return bytes(raw)


def bits_flipped(dice, original):
    raw = bytearray(original.raw)
    for _ in range(dice.choice((1, 1, 2, 16))):
        raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
    return bytes(raw)


def places(dice, original):
    entries, state = original.parsed()
    offsets = dice.choice(list(entries.values()))["data_offsets"]
    offsets[dice.randrange(2)] = dice.choice((*NUMBERS, offsets[0] + dice.choice((-8, -1, 1, 4, 8))))
    if dice.random() < 0.2:
        offsets.reverse()
    return original.assembled(entries, state)


def shapes(dice, original):
    entries, state = original.parsed()
    info = dice.choice(list(entries.values()))
    shape = info["shape"]
    change = dice.randrange(6)
    if change == 0 and shape:
        shape[dice.randrange(len(shape))] = dice.choice(NUMBERS)
    elif change == 1:
        shape.insert(dice.randrange(len(shape) + 1), dice.choice(NUMBERS))
    elif change == 2 and len(shape) > 1:
        shape.reverse()
    elif change == 3:
        info["shape"] = [1] * dice.randrange(66) + shape
    elif change == 4:
        info["shape"] = [size for n in shape for size in ((n, 1) if n % 2 else (n // 2, 2))]
    else:
        info["shape"] = dice.choice((*WRONG, [0, 2**62, 2**62], [2**32, 2**32]))
    return original.assembled(entries, state)


def dtypes(dice, original):
    entries, state = original.parsed()
    info = dice.choice(list(entries.values()))
    size = ITEM_SIZES[info["dtype"]]
    alike = [code for code, other in ITEM_SIZES.items() if other == size]
    info["dtype"] = dice.choice((*alike, *alike, *ITEM_SIZES, "C64", "F33", "", *WRONG))
    return original.assembled(entries, state)


def tensors_swapped(dice, original):
    """Two tensors under each other's names, in the header or in the tree."""
    entries, state = original.parsed()
    one, other = dice.choice(list(entries)), dice.choice(list(entries))
    names = {one: other, other: one}
    if dice.random() < 0.5:
        entries = {names.get(name, name): info for name, info in entries.items()}
        return original.assembled(entries, state)
    tagged = [node for node, key in nodes(state) if key in ("$tensor", "$ndarray", "$numbers")]
    for node in tagged:
        for tag in ("$tensor", "$ndarray", "$numbers"):
            if tag in node:
                node[tag] = names.get(node[tag], node[tag])
    return original.assembled(entries, state)


def keys(dice, original):
    """A key is doubled, renamed, gone, or stands elsewhere."""
    entries, state = original.parsed()
    inside = dice.random() < 0.7
    holder = dice.choice([node for node, key in nodes(state) if isinstance(key, str)]) if inside else entries
    key = dice.choice(list(holder))
    change = dice.randrange(5)
    if change == 0:
        holder[dice.choice(("", key + "'", key.upper(), "__metadata__", "$", "params", "state", "step"))] = holder.pop(
            key
        )
    elif change == 1:
        del holder[key]
    elif change == 2:
        holder[key + "2"] = holder[key]
    elif change == 3:
        holder[key] = holder.pop(key)
    else:
        text = json.dumps(key) + ":" + json.dumps(holder[key], separators=(",", ":"))
        whole = json.dumps(state if inside else entries, separators=(",", ":"))
        whole = whole.replace(text, f"{text},{text}", 1)
        if inside:
            return original.assembled(entries, whole)
        start = original.text[: original.text.index(b"}") + 1]
        return framed(start + b"," + whole[1:].encode(), original.data)
    return original.assembled(entries, state)


def tags(dice, original):
    """A tag becomes another, or what it says of itself does."""
    entries, state = original.parsed()
    tagged = [(node, key) for node, key in nodes(state) if isinstance(key, str) and key.startswith("$")]
    if not tagged:
        return original.assembled(entries, state)
    node, tag = dice.choice(tagged)
    change = dice.randrange(4)
    if change == 0:
        node[dice.choice(TAGS)] = node.pop(tag)
    elif change == 1:
        node[tag] = dice.choice((*WRONG, *FOREIGN.values(), *entries))
    elif change == 2:
        node |= dice.choice(SAID)
    else:
        said = [key for key in node if key != tag]
        if said:
            node[dice.choice(said)] = dice.choice((*WRONG, *STRANGE_DTYPES))
        else:
            node |= dice.choice(list(FOREIGN_TAGS))
    return original.assembled(entries, state)


def nesting(dice, original):
    entries, state = original.parsed()
    node, key = dice.choice(nodes(state))
    depth = dice.choice(
        (1, 2, 50, 150, 199, 201, 300, dice.randrange(300, 500), dice.randrange(440, 490), 599, 605, 3000)
    )
    opening, closing = dice.choice(
        (("[", "]"), ('{"a":', "}"), ('{"$tuple":[', "]}"), ('{"$dict":[["a",', "]]}"), ('{"$set":[', "]}"))
    )
    inner = json.dumps(node[key])
    node[key] = "HERE"
    text = json.dumps(state, separators=(",", ":")).replace('"HERE"', opening * depth + inner + closing * depth, 1)
    return original.assembled(entries, text)


def numbers(dice, original):
    """A number becomes a huge one, or one that JSON does not know."""
    entries, state = original.parsed()
    found = [(node, key) for node, key in nodes(state) if type(node[key]) in (int, float)]
    node, key = dice.choice(found)
    node[key] = "HERE"
    text = json.dumps(state, separators=(",", ":"))
    other = dice.choice(
        (
            "1e999",
            "-1e999",
            "NaN",
            "Infinity",
            "-0.0",
            "9" * 400,
            "9" * 5000,
            "1e-400",
            "-1",
            "18446744073709551616",
            "1.5",
            "0",
        )
    )
    return original.assembled(entries, text.replace('"HERE"', other, 1))


def types(dice, original):
    """Something in the tree becomes something else."""
    entries, state = original.parsed()
    node, key = dice.choice(nodes(state))
    node[key] = dice.choice((*WRONG, *FOREIGN_TAGS))
    return original.assembled(entries, state)


def trees(dice, original):
    """A part of the tree stands in place of another."""
    entries, state = original.parsed()
    (node, key), (other, place) = dice.choice(nodes(state)), dice.choice(nodes(state))
    node[key] = copy.deepcopy(other[place])
    return original.assembled(entries, state)


def values(dice, original):
    """Bytes of the data, which all are legal ones; but not for every generator."""
    entries, state = original.parsed()
    data = bytearray(original.data)
    info = dice.choice(list(entries.values()))
    begin, end = info["data_offsets"]
    data[begin:end] = dice.choice((dice.randbytes(end - begin), b"\xff" * (end - begin), bytes(end - begin)))
    return original.assembled(entries, state, bytes(data))


def nodes(tree):
    """Every place in a tree, as (container, key or index)."""
    found, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict | list):
            found += [(node, key) for key in (node if isinstance(node, dict) else range(len(node)))]
            waiting += node.values() if isinstance(node, dict) else node
    return found


KINDS = (
    header_bytes, header_length, cut_off, appended, blocks_swapped, bits_flipped, places, shapes, dtypes, tensors_swapped,
    keys, tags, nesting, numbers, types, trees, values,
)  # fmt: skip
NUMBERS = (0, 1, 2, 3, -1, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64, 10**30, 1.0, True, None, "1")
WRONG = (
    None,
    True,
    False,
    0,
    -1,
    1,
    7,
    2**63,
    10**400,
    0.5,
    1e308,
    "",
    "x",
    "../x",
    "\ud800",
    [],
    {},
    [[]],
    [None],
    [1, 2],
    {"a": 1},
)
STRANGE_DTYPES = (
    "O",
    "|O",
    "V8",
    "<M8[ns]",
    "S0",
    "U4",
    "<f8",
    ">i2",
    "i4,f4",
    "(2,3)f8",
    "float999",
    "V1000000000",
    "F",
    "C",
    "dict",
)
FOREIGN = {
    "$tensor": "rng/torch", "$ndarray": "rng/torch", "$numbers": "rng/torch", "$tuple": [1, 2], "$dict": [["a", 1]],
    "$ordereddict": [["a", 1]], "$counter": [["a", 1]], "$defaultdict": [["a", []]], "$set": [1], "$frozenset": [1],
    "$int": "0x" + "f" * 5000, "$float": "000000000000f87f", "$complex": "00" * 16, "$str": "eda080", "$bytes": "00ff",
    "$bytearray": "00", "$dtype": "float64", "$device": "cuda:99", "$size": [2**62, 2**62], "$npscalar": ["<f8", "00" * 8],
    "$import": "os", "$py": "__import__('os').system('false')", "$class": "subprocess.Popen", "$": None,
}  # fmt: skip
TAGS = tuple(FOREIGN)
FOREIGN_TAGS = (
    *({tag: body} for tag, body in FOREIGN.items()),
    {"$ndarray": "rng/torch", "dtype": "O", "shape": [2], "order": "C"},
    {"$ndarray": "rng/torch", "dtype": "<u1", "shape": [-1], "order": "F"},
    {"$ndarray": "rng/torch", "dtype": "V1000000000", "shape": [0], "order": "C"},
    {"$npscalar": ["O", "00" * 8]},
    {"$npscalar": ["i4,f4", "00" * 8]},
    {"$defaultdict": [], "factory": "eval"},
    {"$tensor": "rng/torch", "shape": [2**40], "stride": [0]},
    {"$tensor": "rng/torch", "shape": [5056], "stride": [1], "complex": True},
    {"$tensor": "rng/torch", "parameter": True, "requires_grad": True},
    {"$ordereddict": [], "metadata": {"$tensor": "rng/torch"}},
)
SAID = (
    {"shape": [2, 2], "stride": [2**62, 1]}, {"shape": [0], "stride": [1]}, {"shape": [1], "stride": [-1]}, {"complex": True},
    {"parameter": True}, {"requires_grad": True}, {"stride": []}, {"stride": [1]}, {"shape": [], "stride": []}, {"metadata": 1},
    {"factory": "int"}, {"order": "F"}, {"of": "float"}, {"dtype": "O"}, {"dtype": "V1000000000"}, {"$tuple": []},
)  # fmt: skip


# -- loading ---------------------------------------------------------------------------------------------------


class Watch:
    """Sees whether, in its block, anything is imported, compiled, run, or opened to be written."""

    FORBIDDEN = (
        "import",
        "exec",
        "compile",
        "marshal.",
        "pickle.",
        "subprocess.",
        "os.",
        "shutil.",
        "socket.",
        "ctypes.dlopen",
    )
    HARMLESS = ("os.listdir", "os.scandir")

    def __init__(self):
        self.seen = []
        self._armed = False
        sys.addaudithook(self._hook)

    def __enter__(self):
        self.seen.clear()
        self._armed = True

    def __exit__(self, *error):
        self._armed = False

    def _hook(self, event, arguments):
        if not self._armed:
            return
        written = event == "open" and (not isinstance(arguments[2], int) or arguments[2] & (os.O_ACCMODE | os.O_CREAT))
        if written or (event.startswith(self.FORBIDDEN) and event not in self.HARMLESS):
            self.seen.append((event, *map(repr, arguments)))


def end_of(original, path, watch=None):
    """Load a file into the live objects. Which end that came to; what `load_checkpoint` does not promise is an error."""
    counters, end, words = None, "loaded", ""
    try:
        with watch or nullcontext():
            counters = load_checkpoint(path, original.live)
    except OnTheFlyError as e:
        end, words = layer(e), str(e)
    assert watch is None or not watch.seen, f"it ran something: {watch.seen}"
    assert "allocate" not in words, words  # torch's way to say that there is no memory
    if end == "loaded":
        assert_taken_over(path, original.live, counters)
        original.renew()
    else:
        assert original.is_as_saved(), f"it was refused, but the live objects have changed: {words}"
    return end


def layer(e):
    """Who refused it: the header, the tree, or the live objects."""
    if e.__cause__ is None:
        return "header"
    return {"unflatten": "tree", "restore": "state"}[e.__cause__.__traceback__.tb_next.tb_frame.f_code.co_name]


def assert_taken_over(path, live, counters):
    """What the file says, the live objects are now."""
    file = open_checkpoint(path)
    stored = unflatten(file.tree, file.tensors)
    assert same(counters, stored["counters"])
    state = TrainState.of({name: part for name, part in live.items() if not isinstance(part, Anything)})
    captured = state.capture()
    for name in state.modules:
        assert same(captured[name], stored[name]), name
    for name in state.optimizers:
        assert same(captured[name]["state"], stored[name]["state"]), name
    rng.restore(stored["rng"])  # torch and Python do not keep every bit that they are given
    assert same(captured["rng"], rng.capture())


def same(one, other):
    """Whether both are equal, bit for bit. A stored dict or tensor may be of another class than the live one."""
    pairs = [(one, other)]
    while pairs:  # they may be nested deeper than calls can be
        one, other = pairs.pop()
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            equal = one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)
        elif isinstance(one, dict) and isinstance(other, dict):
            one, other = ({"nan" if key != key else key: item for key, item in each.items()} for each in (one, other))
            equal = one.keys() == other.keys()
            pairs += [(one[key], other[key]) for key in one] if equal else []
        elif type(one) is not type(other):
            equal = False
        elif isinstance(one, list | tuple):
            equal = len(one) == len(other)
            pairs += zip(one, other, strict=False)
        elif isinstance(one, set | frozenset):
            equal = len(one) == len(other)  # a tensor in it equals itself only
        elif isinstance(one, np.ndarray | np.generic):
            equal = one.dtype == other.dtype and one.tobytes() == other.tobytes()
        else:
            equal = one == other or (one != one and other != other)
        if not equal:
            return False
    return True


def bits(tensor):
    if tensor.dtype == torch.bool:
        tensor = tensor.view(torch.uint8) != 0  # a file may hold other bytes than 0 and 1
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def mutant(seed, index, originals):
    """(kind, original, bytes, whether its hash was put right)."""
    dice = random.Random(f"{seed}/{index}")
    kind = KINDS[index % len(KINDS)]
    original = dice.choice(originals)
    raw = kind(dice, original)
    right = index // len(KINDS) % 2 == 1
    return kind.__name__, original, hashed(raw) if right else raw, right


def main(folder, chosen, count, index=None):
    torch.set_num_threads(1)
    folder = Path(folder)
    originals = [Original(build, folder) for build in BUILDERS]
    path = folder / "mutant.safetensors"
    current = os.open(folder / "index", os.O_WRONLY | os.O_CREAT)
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    watch = Watch()
    warm_up(originals, path)
    threading.stack_size(2**20)
    limit = memory() + ROOM
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    ends = {}
    for i in range(int(count)) if index is None else [int(index)]:
        os.pwrite(current, f"{i:9}".encode(), 0)
        kind, original, raw, right = mutant(chosen, i, originals)
        os.pwrite(file, raw, 0)
        os.ftruncate(file, len(raw))
        end = end_of(original, path, watch)
        assert right or end == "header" or raw == original.raw, "its hash is wrong, and it was believed"
        if end == "loaded" and raw == original.raw:
            end = "equal"
        found = ends.setdefault(kind, Counter())
        found[f"{'hashed' if right else 'plain'} {end}"] += 1
    print(json.dumps(ends))


def warm_up(originals, path):
    """What is done for the first time may import and allocate. No mutant of the run is used for it."""
    repr(torch.ones(1))  # as in an error's message
    for i in range(4 * len(KINDS)):
        _, original, raw, _ = mutant("warm", i, originals)
        path.write_bytes(raw)
        end_of(original, path)


def memory():
    """Bytes of this process that count for RLIMIT_DATA."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))


if __name__ == "__main__":
    main(*sys.argv[1:])
