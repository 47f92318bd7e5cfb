"""Two real ranks, compared by hash."""

import subprocess
import sys

from onthefly.health import distribution
from onthefly.health.distribution import Numbers, Rank

PROGRAM = """
import random, sys
import numpy as np, torch
from onthefly.health import distribution
from onthefly.health.collect import ranks
rank = int(sys.argv[1])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
random.seed(0), np.random.seed(0), torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
same = ranks.gathered(ranks.this_rank({"model": model}, 5, torch.arange(4).numpy() + 4 * rank))
if rank == 1:
    with torch.no_grad():
        model[0].bias[2] += 1e-7
        model[1].running_mean[0] += 1
        torch.rand(1)
other = ranks.gathered(ranks.this_rank({"model": model}, 6, torch.arange(4).numpy()))
if rank == 0:
    for numbers in (same, other):
        print([(f.severity.value, f.where, f.evidence.get("ranks")) for f in distribution.judge(numbers)])
torch.distributed.destroy_process_group()
"""


def test_two_ranks_are_compared_by_hash(tmp_path):
    command = [sys.executable, "-c", PROGRAM]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    same, other = map(eval, said[0].splitlines())
    assert same == [("note", "", None)]  # they draw alike
    assert sorted(other) == [
        ("error", "0.bias", "1"),
        ("warning", "1.running_mean", "1"),
        ("warning", "train_loader", "0, 1"),
    ]


def test_the_rank_that_is_unlike_the_others_is_named():
    ranks = [Rank(i, 1, {"w": "a" if i != 2 else "b"}, random=str(i), data=str(i)) for i in range(4)]
    (found,) = distribution.judge(Numbers(ranks, 4))
    assert (found.where, found.evidence["ranks"]) == ("w", "2")


def test_one_rank_has_nothing_to_compare_with():
    alone = Numbers([Rank(0, 1)], 1)
    assert distribution.judge(alone) == []
    assert distribution.facts(alone) == ["there is one rank: nothing to compare with"]
