"""A toy training that records checkpoints at steps 0, 3 and 7 and a `set` at step 5, and that can be replayed.

It speaks to the store alone, like a session. In the environment, TOY
says what is to go wrong: `drifts`, `fails`, `hangs`.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path

import torch

from onthefly.checkpoints import format
from onthefly.runs import launch
from onthefly.state.tree import flatten, unflatten
from onthefly.store.journal import Journal
from onthefly.store.liveness import SessionLock
from onthefly.store.projection import project
from onthefly.store.store import Store

RUN = "toy"
TROUBLE = os.environ.get("TOY")


def step(state, number, lr):
    torch.set_rng_state(state["rng"]["torch"])
    state["model"]["w"] = state["model"]["w"] * 0.9 + lr * torch.rand(4)
    state["rng"]["torch"] = torch.get_rng_state()
    state["counters"]["step"] = number


def write(path, state):
    return format.write(path, *flatten(state))


def replay(orders):
    if TROUBLE == "fails":
        print("no such luck")
        sys.exit(3)
    if TROUBLE == "hangs":
        time.sleep(600)
    file = format.open_checkpoint(orders["checkpoint"])
    assert file.hash == orders["hash"]
    state = unflatten(file.tree, file.tensors)
    changes = {command["step"]: command["arguments"]["values"]["lr"] for command in orders["commands"]}
    for number in range(state["counters"]["step"] + 1, orders["until"][0] + 1):
        state["counters"]["lr"] = changes.get(number - 1, state["counters"]["lr"])
        step(state, number, state["counters"]["lr"])
    if TROUBLE == "drifts":
        state["model"]["w"][2] += 1e-6
        state["rng"]["torch"][10] ^= 1
        state["counters"]["drift"] = 1
    write(orders["out"], state)


def train():
    store = Store.open(create=True)
    run = store.create_run(RUN, project="default")
    inexact = ["a kernel is nondeterministic"]
    about = {"project": "default", "run": run, "pid": os.getpid(), "host": socket.gethostname()}
    nothing = {"environment": {}, "config": {}, "inexact": inexact, "launch": launch.record()}
    session = store.create_session(**about, **nothing, time=time.time())
    lock = SessionLock(store.lock_path(session))
    lock.acquire()
    journal = Journal(store.journal_path(session))
    torch.manual_seed(0)
    state = {
        "model": {"w": torch.zeros(4)},
        "rng": {"torch": torch.get_rng_state()},
        "counters": {"step": 0, "lr": 0.1, "drift": 0},
    }

    def record(kind, number, **data):
        place = {"run": run, "generation": 0, "step": number, "epoch": 0, "time": time.time()}
        journal.fact(kind, {**place, **data})

    for number in range(8):
        if number:
            step(state, number, state["counters"]["lr"])
        if number in (0, 3, 7):
            captured = journal.seq
            path = store.checkpoints_dir / f"{RUN}-step{number:08}.safetensors"
            written = write(path, state)
            saved = {"path": str(path), "hash": written.hash, "size": written.size, "captured": captured}
            record("checkpoint", number, **saved, reason="interval", pinned=False, metrics={})
        if number == 5:
            state["counters"]["lr"] = 0.01
            record("event", number, event="command", data={"kind": "set", "arguments": {"values": {"lr": 0.01}}})
            record("event", number, event="command", data={"kind": "pause", "arguments": {}})
    journal.fact("run", {"run": run, "status": "finished"})
    journal.fact("session", {"status": "ended", "outcome": "finished", "ended": time.time()})
    project(store, session)
    journal.close()
    lock.release()
    store.close()


if __name__ == "__main__":
    orders = os.environ.pop(launch.REPLAY, None)
    if orders is None:
        train()
    else:
        assert Path(os.environ["ONTHEFLY_STORE"]).name == "store"
        replay(json.loads(orders))
