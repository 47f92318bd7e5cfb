"""Killed and resumed equals never stopped, attached equals not attached: over all kinds of training, bit for bit.

The cells are chosen so that every two values of different factors meet in one, and a few more at random. Those with the
marker `long` are all random: `ONTHEFLY_CELLS=1000 ONTHEFLY_SEED=7 pytest -m long tests/exactness`.
"""

import os
import random

import exactness_law as law
import pytest
from exactness_cells import FACTORS, STEPS, Cell
from exactness_law import SEED, Case
from exactness_pairs import all_pairs, pairs

LONG = int(os.environ.get("ONTHEFLY_CELLS") or 200)
ALL = {**FACTORS, "stop": (*law.STOPS["all"], "any")}


def is_possible(row):
    return row.get("loop") != "steps" or (row.get("workers", "0") == "0" and row.get("samples", "all") == "all")


def pairwise_cases():
    rng = random.Random(0)
    for row in all_pairs(ALL, is_possible):
        stop = row.pop("stop")
        yield law.case_of(Cell(**row), stop, rng)


@pytest.mark.parametrize("case", list(pairwise_cases()), ids=str)
def test_every_two_values_of_the_matrix_meet(case, tmp_path):
    law.check(case, tmp_path)


@pytest.mark.parametrize("case", list(law.random_cases(random.Random(SEED), 6)), ids=str)
def test_random_cells(case, tmp_path):
    law.check(case, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("case", list(law.random_cases(random.Random(f"long {SEED}"), LONG)), ids=str)
def test_many_random_cells(case, tmp_path):
    law.check(case, tmp_path)


@pytest.mark.parametrize("workers", ["2", "2p"])
@pytest.mark.parametrize("loop", ["epochs", "flat", "trainer"])
def test_without_exact_augmentation_loader_workers_are_those_of_the_plain_loop(loop, workers, tmp_path):
    augmentation = {"epochs": "augmented", "flat": "collate", "trainer": "own"}[loop]
    law.check_plain(
        Cell(loop, workers, "shuffle", augmentation, "sgd", "overlap", "all"), tmp_path, exact_augmentation=False
    )


@pytest.mark.parametrize(
    "text",
    [
        "epochs/2/shuffle/augmented/onecycle/overlap/all/every=0/kills=3",  # nothing but the origin
        "flat/2p/generator/augmented/ema/boundary/all/every=0/kills=3",
        "trainer/0/batches/own/fused/overlap/all/every=0/kills=1",
        "steps/0/batches/own/plateau/boundary/all/every=0/kills=18",
        "epochs/2p/generator/getitems/adamw/overlap/all/every=5/kills=7,8",  # again, before a new checkpoint
        "flat/2/weighted/collate/accumulate/boundary/all/every=4/kills=9,14",  # again, after one
        "trainer/2p/shuffle/augmented/onecycle/overlap/all/every=3/kills=1,2,8,8,14",
        "steps/0/generator/augmented/bf16/boundary/all/every=2/kills=4,5,17",
        "epochs/2/shuffle/augmented/plateau/overlap/all/every=epoch/kills=7,15",
        "flat/0/batches/collate/accumulate/boundary/all/every=epoch/kills=8,9,18",
        "trainer/2p/generator/augmented/accumulate/overlap/all/every=epoch/kills=7,12,18",
        "epochs/2p/generator/augmented/adamw/overlap/fork/every=9/kills=10,11,13",  # once more into the fork, then on in it
        "flat/0/weighted/own/sgd/boundary/fork/every=10/kills=11,11",  # saved when it holds no batch yet
        "trainer/2/batches/collate/ema/overlap/fork/every=epoch/kills=13,15,18",
    ],
)
def test_kills_before_the_first_checkpoint_and_several_in_a_row(text, tmp_path):
    law.check(Case.parse(text), tmp_path)


@pytest.mark.parametrize("loop", ["epochs", "flat", "steps"])
@pytest.mark.parametrize("moment", ["attached", "over"])
def test_a_kill_before_the_first_step_or_after_the_last(loop, moment, tmp_path):
    law.check_killed_at(Cell(loop, "0", "generator", "own", "ema", "overlap", "all"), moment, tmp_path)


def test_the_rows_hold_every_pair():
    wanted = set(pairs(ALL, is_possible))
    rows = list(all_pairs(ALL, is_possible))
    assert all(is_possible(row) for row in rows)
    met = {frozenset({(a, row[a]), (b, row[b])}) for row in rows for a in ALL for b in ALL if a != b}
    assert met == wanted
    assert len(rows) < 60


def test_a_case_is_read_from_what_it_prints():
    for case in law.random_cases(random.Random(1), 50):
        assert Case.parse(str(case)) == case
        assert all(0 <= step <= STEPS for step in case.resumes())


def test_a_difference_is_named():
    end = {
        "inexact": [],
        "differences": 0,
        "logged": {},
        "live": {"model/weight": "a"},
        "checkpoint": {},
        "step": STEPS,
    }
    batches = [{"indices": [i], "inputs": "x", "loss": "0x1p0"} for i in range(STEPS)]
    cell = Cell("epochs", "0", "shuffle", "plain", "sgd", "boundary", "all")
    whole = [*batches, {**end, "hash": "h"}]
    law.assert_same_run(cell, whole, [batches[:3], [*batches[2:], {**end, "hash": "h"}]], [2])
    other = [*batches[2:5], {**batches[5], "loss": "0x1p1"}, *batches[6:], {**end, "hash": "h"}]
    with pytest.raises(AssertionError, match="loss of step 6"):
        law.assert_same_run(cell, whole, [batches[:3], other], [2])
    last = {**end, "live": {"model/weight": "b"}, "hash": "h"}
    with pytest.raises(AssertionError, match="live: model/weight"):
        law.assert_same_run(cell, whole, [batches[:3], [*batches[2:], last]], [2])
