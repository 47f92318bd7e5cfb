"""Ten thousand damaged and forged checkpoints: each is refused by a typed error that changes nothing, or was a legal state."""

import json
import os
import resource
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from onthefly.checkpoints import load_checkpoint, save_checkpoint
from onthefly.checkpoints.format import digest, open_checkpoint, write
from onthefly.checkpoints.header import read_header
from onthefly.errors import CorruptCheckpointError, StateMismatchError
from onthefly.state.train_state import TrainState
from onthefly.state.tree import flatten

LOADER = Path(__file__).with_name("fuzz_loading.py")
COUNT = 10_200
PROCESSOR = 600  # seconds of it, after which a load hangs

IN_THE_HEADER = {"header_length", "cut_off", "appended", "places"}
"""Mutations that no header survives, however right the hash is."""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is as Linux counts it")
@pytest.mark.parametrize("seed", ["99", pytest.param(os.environ["ONTHEFLY_SEED"], marks=pytest.mark.long)])
def test_a_mutated_checkpoint_loads_as_what_it_says_or_is_refused_with_all_as_it_was(tmp_path, seed):
    limited = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR, PROCESSOR))}
    command = [sys.executable, str(LOADER), str(tmp_path), seed, str(COUNT)]
    done = subprocess.run(command, capture_output=True, text=True, **limited)
    last = (tmp_path / "index").read_text() if (tmp_path / "index").exists() else "none"
    again = f"python {LOADER} FOLDER {seed} {COUNT} {last.strip()}"
    assert done.returncode == 0, f"at mutant {last}, status {done.returncode}; again: {again}\n{done.stderr}"
    found = {kind: Counter(ends) for kind, ends in json.loads(done.stdout).items()}
    print(json.dumps(found, indent=1))
    assert sum(ends.total() for ends in found.values()) == COUNT
    for kind, ends in found.items():
        assert ends["plain header"], kind
        assert ends["plain header"] + ends["plain equal"] == COUNT // len(found) / 2, kind
        if kind in IN_THE_HEADER:
            assert ends["hashed header"], kind
        else:
            assert ends["hashed tree"] + ends["hashed state"], kind
    assert sum(ends["hashed loaded"] for ends in found.values())


def test_no_more_memory_than_the_file_takes_is_needed_to_check_it(tmp_path):
    path = tmp_path / "a"
    size = write(path, {}, {"x": torch.zeros(3000)}).size
    read_header(path, verify=True)  # what is done for the first time imports
    tracemalloc.start()
    try:
        read_header(path, verify=True)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 8 * size


FORGED = {
    "a tensor owns a parameter": (("owners", "optimizer", 0), {"$tensor": "rng/torch"}),
    "an array of records owns one": (("owners", "optimizer", 0), {"$npscalar": ["V8", "00" * 8]}),
    "a number owns one": (("owners", "optimizer", 0), 7),
    "the class is an array": (("optimizer", "class"), {"$ndarray": "rng/torch", "dtype": "V8", "shape": [632], "order": "C"}),
    "a form is a tensor": (("optimizer", "parameters", 0), {"$tensor": "rng/torch"}),
    "a parameter's number is a tensor": (("optimizer", "param_groups", 0, "params", 0), {"$tensor": "rng/torch"}),
    "nobody knows whether it is fused": (("optimizer", "param_groups", 0, "fused"), {"$tensor": "rng/torch"}),
    "nobody knows whether it is capturable": (("optimizer", "param_groups", 0, "capturable"), {"$tensor": "rng/torch"}),
    "a tensor is a key of the state": (("optimizer", "state", "$dict", 0, 0), {"$tensor": "rng/torch"}),
}  # fmt: skip
"""Places in a tree, and what never stands there. Each was found by the mutants."""


@pytest.mark.parametrize("what", FORGED)
def test_what_no_optimizer_can_have_given_is_refused_with_the_live_one_as_it_was(tmp_path, what):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    live = {"model": model, "optimizer": optimizer}
    hash = save_checkpoint(tmp_path / "a", live).hash
    file = open_checkpoint(tmp_path / "a")
    (*above, last), forged = FORGED[what]
    node = file.tree
    for key in above:
        node = node[key]
    node[last] = forged
    file.tree["optimizer"]["param_groups"][0]["lr"] = 0.5
    write(tmp_path / "b", file.tree, file.tensors)
    with pytest.raises((CorruptCheckpointError, StateMismatchError), match="optimizer"):
        load_checkpoint(tmp_path / "b", live)
    assert digest(*flatten(TrainState.of(live).capture())) == hash
