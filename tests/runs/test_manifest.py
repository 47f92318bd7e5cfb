"""Manifests: equal ones are equal bytes, what was altered is found out, and git is asked without being waited for."""

import json
import math
import os
import random
import select
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onthefly.errors import InvalidCommandError, SchemaVersionError, StoreError, UnsupportedValueError
from onthefly.runs.manifest import Manifest, Parent, canonical, code_version, read

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy

finite = st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | st.integers() | st.integers(-(2**200), 2**200) | finite | st.text()
values = st.recursive(scalars, lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(), part, max_size=4))
objects = st.dictionaries(st.text(), values, max_size=3)
parents = st.builds(Parent, st.text(), st.integers(0), st.integers(0), st.text("0123456789abcdef", min_size=1))
MERGE = {
    "strategy": "fisher",
    "part": "model",
    "options": {"floor": 1e-6},
    "weights": None,
    "base": None,
    "members": ["ab" * 32, "cd" * 32],
    "statistics": [{"file": "abab-fisher.safetensors", "hash": "ef" * 32}],
    "recalibrated": {"buffers": ["1.running_mean"], "samples": 8},
}
manifests = st.builds(
    Manifest,
    run=st.text(),
    kind=st.sampled_from(["root", "fork", "rewind", "merge"]),
    created=finite,
    seed=st.integers(-(2**63), 2**64),
    argv=st.lists(st.text()),
    code=objects,
    environment=objects,
    parents=st.lists(parents, max_size=3),
    selection=st.none() | objects,
    changes=objects,
    merge=st.none() | st.just(MERGE),
)

FORK = Manifest(
    run="fork1",
    kind="fork",
    created=1766666666.25,
    seed=2**64 - 1,
    argv=("python", "train.py", "--lr=0.1"),
    code={"commit": "3f9a", "dirty": False, "script": "train.py"},
    environment={"torch": "2.13.0", "threads": 2},
    parents=(Parent("baseline", 120, 3, "ab" * 32),),
    selection={"recipe": "loss 0.9:1.0", "count": 100},
    changes={"lr": 0.1},
)


def typed(value):
    """The value with the types and bits of its parts, which `==` does not look at."""
    if isinstance(value, dict):
        return {key: typed(part) for key, part in value.items()}
    if isinstance(value, list):
        return [typed(part) for part in value]
    return type(value).__name__, struct.pack("<d", value) if isinstance(value, float) else value


# -- canonical -------------------------------------------------------------------------------------------------


def test_the_bytes_of_a_value():
    value = {"é": [1, 2.0, -0.0, 1e22, 0.1, 5e-324, True, None, 10**30], "a": 'x\n"\\\x00', "B": {}, "z": ()}
    assert canonical(value) == (
        b'{"B":{},"a":"x\\n\\"\\\\\\u0000","z":[],'
        b'"\xc3\xa9":[1,2.0,-0.0,1e+22,0.1,5e-324,true,null,1000000000000000000000000000000]}'
    )


@unhurried
@given(values)
def test_what_is_read_back_is_the_same_bit_for_bit_and_has_the_same_bytes(value):
    text = canonical(value)
    back = json.loads(text)
    assert typed(back) == typed(value)
    assert canonical(back) == text


@unhurried
@given(st.dictionaries(st.text(), values), st.randoms())
def test_the_order_of_keys_does_not_matter(value, shuffler: random.Random):
    items = list(value.items())
    shuffler.shuffle(items)
    assert canonical(dict(items)) == canonical(value)


@unhurried
@given(st.integers(0, 2**64 - 1), st.integers(-3, 3))
def test_a_float_has_one_text_and_a_text_one_float(bits, distance):
    """Of any bits, and next to their neighbours, which differ in the last digit that there is."""
    other = max(0, min(bits + distance, 2**64 - 1))
    one, neighbour = struct.unpack("<2d", struct.pack("<2Q", bits, other))
    if math.isfinite(one) and math.isfinite(neighbour):
        assert struct.pack("<d", float(canonical(one))) == struct.pack("<Q", bits)
        assert (canonical(one) == canonical(neighbour)) == (bits == other)


def test_python_writes_floats_in_the_shortest_way_that_is_read_back_equal():
    assert sys.float_repr_style == "short"
    assert canonical(np.float64(0.1)) == b"0.1"


def test_numbers_that_python_takes_for_equal_are_told_apart():
    assert len({canonical(value) for value in (1, 1.0, True, "1")}) == 4
    assert canonical(0.0) != canonical(-0.0)


def test_integers_of_many_digits():
    assert canonical(-(10**4000)) == b"-1" + b"0" * 4000
    with pytest.raises(UnsupportedValueError, match=r"\$\.n\[1\].*digits"):
        canonical({"n": [1, 10**5000]})


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": [0.0, math.nan]}, r"\$\.a\[1\]: nan"),
        ({"a": {"b": math.inf}}, r"\$\.a\.b: inf"),
        (-math.inf, r"\$: -inf"),
        (np.float64("nan"), "nan"),
        ({"a": {1: 2}}, r"\$\.a: the key 1"),
        ({"n": np.int64(1)}, r"\$\.n: a int64"),
        ({"b": b"x"}, r"\$\.b: a bytes"),
        ({"s": {1}}, r"\$\.s: a set"),
        ({"p": Path("x")}, r"\$\.p: a PosixPath"),
        ({"t": ["\ud83d\ude00"]}, r"\$\.t\[0\]: the text"),
        ({"\ud83d": 1}, "the text"),
    ],
)
def test_what_has_no_exact_form_is_refused_with_its_place(value, place):
    with pytest.raises(UnsupportedValueError, match=place):
        canonical(value)


def test_what_contains_itself_is_refused():
    value = []
    value.append(value)
    with pytest.raises(UnsupportedValueError, match="itself"):
        canonical(value)


@unhurried
@given(st.binary())
def test_an_argument_that_is_no_utf8_is_read_back_as_the_same_bytes(word):
    text = canonical([os.fsdecode(word)])
    text.decode("utf-8")
    assert os.fsencode(json.loads(text)[0]) == word


# -- the manifest ----------------------------------------------------------------------------------------------


def test_the_file_is_on_this_very_content(tmp_path):
    path = FORK.write(tmp_path)
    content = (
        '{"argv":["python","train.py","--lr=0.1"],"changes":{"lr":0.1},'
        '"code":{"commit":"3f9a","dirty":false,"script":"train.py"},"created":1766666666.25,'
        '"environment":{"threads":2,"torch":"2.13.0"},"format":1,"kind":"fork",'
        '"parents":[{"epoch":3,"hash":"' + "ab" * 32 + '","run":"baseline","step":120}],'
        '"run":"fork1","seed":18446744073709551615,"selection":{"count":100,"recipe":"loss 0.9:1.0"}}'
    ).encode()
    assert path.read_bytes() == content
    assert FORK.digest == blake3(content).hexdigest()
    assert path == tmp_path / f"{FORK.digest[:16]}.json"


@settings(unhurried, max_examples=40)  # each is made durable
@given(manifest=manifests)
def test_what_was_written_is_read_back_equal(tmp_path_factory, manifest):
    folder = tmp_path_factory.getbasetemp() / "manifests"
    path = manifest.write(folder)
    assert read(path) == manifest
    assert read(path).digest == manifest.digest
    path.unlink()


def test_a_change_of_any_field_is_another_manifest():
    others = [
        replace(FORK, run="fork2"),
        replace(FORK, kind="rewind"),
        replace(FORK, created=1.5),
        replace(FORK, seed=1),
        replace(FORK, argv=("python",)),
        replace(FORK, code={"commit": None, "why": "no git"}),
        replace(FORK, environment={}),
        replace(FORK, parents=(Parent("baseline", 120, 3, "cd" * 32),)),
        replace(FORK, selection=None),
        replace(FORK, changes={}),
        replace(FORK, merge=MERGE),
    ]
    assert len({manifest.digest for manifest in [FORK, *others]}) == 1 + len(others) == len(asdict(FORK))


@pytest.mark.parametrize(
    "wrong",
    [
        {"statistics": [1]},
        {"statistics": [{"file": "../../passwd", "hash": "ef"}]},
        {"statistics": [{"file": "/etc/passwd", "hash": "ef"}]},
        {"members": None},
        {"part": 3},
    ],
)
def test_a_merge_that_could_not_be_computed_again_is_no_manifest(wrong):
    with pytest.raises(InvalidCommandError, match="merge"):
        replace(FORK, merge={**MERGE, **wrong})


def test_it_does_not_change_with_what_it_was_given():
    knobs = {"lr": [0.1]}
    manifest = replace(FORK, changes=knobs)
    before = manifest.digest
    knobs["lr"].append(0.2)
    assert manifest.digest == before
    assert manifest.changes == {"lr": [0.1]}
    with pytest.raises(FrozenInstanceError):
        manifest.run = "other"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"changes": {"lr": math.nan}}, UnsupportedValueError, r"changes\.lr"),
        ({"environment": {"device": Path("x")}}, UnsupportedValueError, r"environment\.device"),
        ({"parents": (Parent("baseline", 120, 3, ""),)}, InvalidCommandError, "no hash yet"),
        ({"parents": (Parent("baseline", 1.5, 3, "aa"),)}, InvalidCommandError, r"1\.5"),
        ({"kind": "spoon"}, InvalidCommandError, "kind"),
        ({"seed": True}, InvalidCommandError, "seed"),
        ({"argv": (1,)}, InvalidCommandError, "argv"),
        ({"selection": ["x"]}, InvalidCommandError, "selection"),
        ({"format": 2}, InvalidCommandError, "format"),
    ],
)
def test_what_is_no_manifest_is_refused_before_it_is_written(change, error, message):
    with pytest.raises(error, match=message):
        replace(FORK, **change)


def test_writing_again_leaves_the_file_alone_and_heals_a_damaged_one(tmp_path):
    path = FORK.write(tmp_path / "new" / "folder")
    before = path.stat()
    assert FORK.write(path.parent) == path
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    path.write_bytes(path.read_bytes()[:-1])
    assert FORK.write(path.parent) == path
    assert read(path) == FORK
    assert os.listdir(path.parent) == [path.name]


def test_many_may_write_the_same_at_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: FORK.write(tmp_path), range(64)))
    assert [read(path) for path in paths] == [FORK]
    assert len(os.listdir(tmp_path)) == 1


def test_where_it_cannot_be_written_nothing_is_left(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot write the manifest of 'fork1'"):
        FORK.write(tmp_path / "file")
    taken = tmp_path / f"{FORK.digest[:16]}.json"
    taken.mkdir()
    with pytest.raises(StoreError, match="cannot write"):
        FORK.write(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(["file", taken.name])


@given(st.data())
@unhurried
def test_every_changed_byte_is_found(tmp_path_factory, data):
    path = FORK.write(tmp_path_factory.getbasetemp() / "altered")
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(StoreError, match="altered"):
        read(path)


def test_a_file_of_another_name_or_none_at_all_is_refused(tmp_path):
    path = FORK.write(tmp_path)
    moved = path.rename(tmp_path / f"{'0' * 16}.json")
    with pytest.raises(StoreError, match=path.name):
        read(moved)
    with pytest.raises(StoreError, match="cannot read"):
        read(path)
    with pytest.raises(StoreError, match="cannot read"):
        read(tmp_path)


def named(folder, content):
    path = folder / f"{blake3(content).hexdigest()[:16]}.json"
    path.write_bytes(content)
    return path


def without(name):
    return {key: value for key, value in asdict(FORK).items() if key != name}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b'"x"',
        b"{}",
        b"[" * 100_000,
        b"9" * 5000,
        json.dumps(asdict(FORK), sort_keys=True).encode(),  # with spaces
        canonical(asdict(FORK)).replace(b'"run":"fork1"', b'"run":"x","run":"fork1"'),
        canonical({**asdict(FORK), "more": 1}),
        canonical(without("run")),
        canonical(without("changes")),
        canonical(without("parents")),
        canonical({**asdict(FORK), "parents": [{"run": "x"}]}),
        canonical({**asdict(FORK), "parents": ["x"]}),
        canonical({**asdict(FORK), "parents": None}),
        canonical({**asdict(FORK), "kind": ["fork"]}),
        canonical({**asdict(FORK), "environment": []}),
        canonical(asdict(FORK)).replace(b"1766666666.25", b"NaN"),
        canonical(asdict(FORK)).replace(b"1766666666.25", b"1e999"),
    ],
)
def test_what_has_the_right_name_and_is_no_manifest_is_refused(tmp_path, content):
    with pytest.raises(StoreError, match="is no manifest"):
        read(named(tmp_path, content))


def test_a_manifest_of_another_version_is_refused_as_that(tmp_path):
    with pytest.raises(SchemaVersionError, match="format 2"):
        read(named(tmp_path, canonical({"format": 2, "whatever": "it has"})))


# -- the version of the code -----------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with `sub/train.py` in it, which no setting of the one who runs the tests reaches."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    folder = tmp_path / "repository"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "train.py").write_text("print(1)\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "one")
    return folder


def git(folder, *arguments):
    who = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_the_commit_and_whether_files_differ_from_it(repository):
    commit = git(repository, "rev-parse", "HEAD").strip()
    assert code_version(repository) == {"commit": commit, "dirty": False}
    (repository / "untracked").touch()
    assert code_version(repository / "sub") == {"commit": commit, "dirty": False}
    (repository / "sub" / "train.py").write_text("print(2)\n")
    assert code_version(repository) == {"commit": commit, "dirty": True}
    git(repository, "add", "sub")
    assert code_version(repository) == {"commit": commit, "dirty": True}
    git(repository, "commit", "-q", "-m", "two")
    assert code_version(repository) == {"commit": git(repository, "rev-parse", "HEAD").strip(), "dirty": False}


def test_the_script_is_named_by_its_place_in_the_repository(repository, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(repository)
    for folder, script in [
        (repository, "sub/train.py"),
        (repository / "sub", "train.py"),
        (link / "sub", "train.py"),
        (tmp_path, repository / "sub" / "train.py"),
    ]:
        inside = folder if folder != tmp_path else repository
        assert code_version(inside, script=Path(script))["script"] == "sub/train.py"
    assert "script" not in code_version(repository, script=tmp_path / "elsewhere.py")


def test_asking_takes_no_lock_and_writes_nothing(repository):
    (repository / "sub" / "train.py").touch()  # git would like to note that it is as it was
    index = repository / ".git" / "index"
    before = index.stat()
    (repository / ".git" / "index.lock").touch()
    assert code_version(repository)["dirty"] is False
    (repository / ".git" / "index.lock").unlink()
    assert code_version(repository)["dirty"] is False
    assert (index.stat().st_ino, index.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_hook_of_another_repository_is_not_believed(repository, tmp_path, monkeypatch):
    other = shutil.copytree(repository, tmp_path / "other")
    git(other, "commit", "-q", "--allow-empty", "-m", "another")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
    found = code_version(repository)
    monkeypatch.delenv("GIT_DIR")
    monkeypatch.delenv("GIT_INDEX_FILE")
    assert found == {"commit": git(repository, "rev-parse", "HEAD").strip(), "dirty": False}


def test_where_there_is_no_commit_it_is_said_why_without_a_path(repository, tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "new").mkdir()
    git(tmp_path / "new", "init", "-q")
    (tmp_path / "file").touch()
    for folder, why in [
        ("plain", "there is no git commit"),
        ("new", "there is no git commit"),
        ("missing", "the folder is not there"),
        ("file", "git cannot be asked (NotADirectoryError)"),
        ("nul\0", "git cannot be asked (ValueError)"),
    ]:
        assert code_version(tmp_path / folder) == {"commit": None, "why": why}


def test_without_git_it_is_said(repository, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert code_version(repository) == {"commit": None, "why": "git is not installed"}


def stand_in(folder, monkeypatch, script):
    """A program called git."""
    folder.mkdir()
    (folder / "git").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_git_that_does_not_answer_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "alive")  # open to write in everything that it starts
    stand_in(tmp_path / "bin", monkeypatch, f"exec 9>'{tmp_path / 'alive'}'\nsleep 600 &\nsleep 600")
    alive = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    assert code_version(tmp_path, timeout=0.3) == {"commit": None, "why": "git gave no answer within 0.3 s"}
    os.set_blocking(alive, True)
    assert select.select([alive], [], [], 30)[0], "what it started goes on"
    assert os.read(alive, 1) == b""
    os.close(alive)


def test_a_git_that_answers_nonsense_or_distrusts_does_no_harm(tmp_path, monkeypatch):
    stand_in(tmp_path / "bin", monkeypatch, "echo nonsense")
    assert code_version(tmp_path) == {"commit": None, "why": "git cannot be asked (ValueError)"}
    (tmp_path / "bin" / "git").write_text(
        "#!/bin/sh\necho \"fatal: detected dubious ownership in repository at '/home/x'\" >&2\nexit 128\n"
    )
    assert code_version(tmp_path) == {"commit": None, "why": "git refuses the repository of another user"}


def test_a_manifest_can_be_made_without_torch():
    code = "import sys, onthefly.runs.manifest, onthefly.runs.graph; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
