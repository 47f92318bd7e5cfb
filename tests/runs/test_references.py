"""REF: what it reads, and what it finds among rows."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onthefly.errors import AmbiguousError, UnknownReferenceError
from onthefly.runs import references
from onthefly.runs.references import Reference, parse, resolve


@dataclass(frozen=True)
class Run:
    name: str
    generation: int = 0
    base: dict | None = None


@dataclass(frozen=True)
class Row:
    run: str
    step: int
    hash: str
    captured: int
    generation: int = 0
    epoch: int = 0
    session: int = 1
    metrics: dict[str, float] = field(default_factory=dict)
    evicted: float | None = None
    evicted_reason: str | None = None
    reason: str = "interval"

    @property
    def path(self):
        return Path(f"/store/{self.run}-{self.captured}.safetensors")


RUNS = [Run("baseline"), Run("fork1"), Run("deadbeef")]
AT_50 = Row("baseline", 50, "aaaaaa" + "0" * 58, 5, metrics={"val_loss": 0.5})
AT_100 = Row("baseline", 100, "aaaaaa" + "1" * 58, 10, metrics={"val_loss": 0.9, "acc": 0.1})
AT_150 = Row("baseline", 150, "bbbbbb" + "0" * 58, 15, metrics={"val_loss": float("nan")})
OF_FORK = Row("fork1", 50, "cccccc" + "0" * 58, 20)
ROWS = [AT_150, AT_50, OF_FORK, AT_100]


def find(text, rows=ROWS, **how):
    return resolve(parse(text), RUNS, rows, **how)


def test_the_best_is_one_of_the_line_that_stands():
    run = Run("baseline", generation=1, base={"step": 60})
    newer = Row("baseline", 80, "dddddd" + "0" * 58, 30, generation=1, metrics={"val_loss": 0.7})
    left = replace(AT_100, metrics={"val_loss": 0.1})
    assert resolve(parse("baseline@best"), [run], [AT_50, left, newer]) == AT_50
    assert resolve(parse("baseline@best"), [run], [left, newer]) == newer
    assert resolve(parse("baseline@100"), [run], [left, newer]) == left


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("baseline", Reference("baseline", name="baseline")),
        ("baseline@120", Reference("baseline@120", name="baseline", at=120)),
        ("baseline@latest", Reference("baseline@latest", name="baseline", at="latest")),
        ("baseline@best", Reference("baseline@best", name="baseline", at="best")),
        ("3F9a2c", Reference("3F9a2c", name="3F9a2c")),
        ("x.safetensors", Reference("x.safetensors", path=Path("x.safetensors"))),
        ("./baseline@2", Reference("./baseline@2", path=Path("baseline@2"))),
        ("/a/b@best", Reference("/a/b@best", path=Path("/a/b@best"))),
    ],
)
def test_the_notation_is_read(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize("text", ["", " baseline", "@5", "baseline@", "baseline@-1", "baseline@1.5", "baseline@worst"])
def test_what_is_no_ref_is_refused(text):
    with pytest.raises(UnknownReferenceError):
        parse(text)


@given(st.text())
def test_any_text_is_read_or_refused(text):
    try:
        reference = parse(text)
    except UnknownReferenceError:
        return
    assert reference.text == text
    assert (reference.name is None) != (reference.path is None)


def test_a_run_is_its_latest_checkpoint_by_the_order_of_facts():
    assert find("baseline") is find("baseline@latest") is AT_150
    went_back = Row("baseline", 60, "d" * 64, 3, generation=1, session=2)
    assert find("baseline", [*ROWS, went_back]) is went_back


def test_best_is_the_lowest_finite_value_of_the_metric():
    assert find("baseline@best") is AT_50
    assert find("baseline@best", best_by="acc") is AT_100
    with pytest.raises(UnknownReferenceError, match="val_loss"):
        find("fork1@best")


def test_a_step_names_the_newest_generation_that_was_there():
    again = replace(AT_50, generation=1, captured=30, hash="e" * 64)
    assert find("baseline@50", [again, *ROWS]) is again
    assert find("baseline@100", [again, *ROWS]) is AT_100


def test_a_step_without_a_checkpoint_lists_those_there_are():
    with pytest.raises(UnknownReferenceError, match="150, 100, 50"):
        find("baseline@70")


def test_an_unknown_run_lists_those_there_are():
    with pytest.raises(UnknownReferenceError, match="baseline, fork1"):
        find("basline")
    with pytest.raises(UnknownReferenceError, match="has no checkpoint yet"):
        find("deadbeef@latest")


def test_a_hash_may_be_cut_short_until_it_is_ambiguous():
    assert find("bbbbbb") is AT_150
    assert find("BBBBBB00") is AT_150
    assert find("aaaaaa1") is AT_100
    with pytest.raises(AmbiguousError, match=r"baseline@50 .*baseline@100"):
        find("aaaaaa")
    with pytest.raises(UnknownReferenceError, match=r"neither a run .* nor the start of a hash \(there are: cccccc"):
        find("ffffff")


def test_equal_content_under_one_hash_is_not_ambiguous():
    copy = replace(AT_150, captured=40, run="fork1")
    assert find("bbbbbb", [*ROWS, copy]) is copy


def test_a_run_whose_name_begins_a_hash_is_ambiguous():
    row = Row("fork1", 1, "deadbeef" + "0" * 56, 50)
    assert find("deadbeef@latest", [Row("deadbeef", 7, "1" * 64, 60)]).step == 7
    with pytest.raises(AmbiguousError, match="deadbeef@latest"):
        find("deadbeef", [row])


def test_an_evicted_checkpoint_is_not_found_and_the_error_says_why():
    gone = replace(AT_150, evicted=1.0, evicted_reason="retention")
    rows = [AT_50, AT_100, gone]
    assert find("baseline", rows) is AT_100
    for text in ("baseline@150", "bbbbbb"):
        with pytest.raises(UnknownReferenceError, match=r"removed \(retention\)"):
            find(text, rows)


def test_a_path_is_its_row_or_itself():
    assert find(str(AT_50.path)) is AT_50
    assert find("/elsewhere/x.safetensors") == Path("/elsewhere/x.safetensors")


def test_a_long_list_is_cut():
    assert references.listed(map(str, range(20))).endswith("11, and 8 more")
