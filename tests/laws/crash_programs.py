"""A process that forks savers and kills each at another of its system calls. It prints what became of every one.

    python crash_programs.py over|beside FOLDER           `save_checkpoint`, over the older file or beside it: every stop
    python crash_programs.py session FOLDER LIVES SEED    a session's save: about so many stops, evenly, from a random one on

Each life has a folder of its own below. The first line tells of one that nobody ends, and so does the last: it was over
before its stop came. The process itself starts no thread, since what it forks could wait for it forever.
"""

import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import sqlalchemy.dialects.sqlite  # noqa: F401  what a session or an optimizer would import in every child
import syscalls
import torch
import torch._dynamo
from torch import nn

import onthefly.session
from onthefly.checkpoints.format import digest
from onthefly.checkpoints.sidecar import name_for
from onthefly.checkpoints.standalone import save_checkpoint
from onthefly.runs import launch
from onthefly.state.train_state import TrainState
from onthefly.state.tree import flatten

RUN = "baseline"


def objects():
    """A tiny training before its first step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01), "step": 0}


def train(state):
    state["optimizer"].zero_grad()
    state["model"](torch.randn(5, 3)).square().sum().backward()
    state["optimizer"].step()


def content(state):
    """The hash that a checkpoint of these objects has."""
    return digest(*flatten(TrainState.of(state).capture()))


# -- what the children do --------------------------------------------------------------------------------------


def files(folder, kind):
    """Where the older state is saved, and where the newer one."""
    older = folder / name_for(RUN, 1)
    return older, older if kind == "over" else folder / name_for(RUN, 2)


def save_twice(kind, folder, pipe):
    state = objects()
    for step, path in enumerate(files(folder, kind), 1):
        train(state)
        state["step"] = step
        os.write(pipe, f"{content(state)} ".encode())
        if step == 2:
            syscalls.begin()
        save_checkpoint(path, state)
    os.write(pipe, b"saved")


def resume_for_a_step(first, store, pipe):
    shutil.copytree(first, store, dirs_exist_ok=True)
    os.environ[launch.RESUME] = RUN
    live_through(store, 2, before_the_save=syscalls.begin)
    os.write(pipe, b"saved")


def live_through(store, count, before_the_save=None):
    """A session up to so many steps. Each is saved."""
    state = objects()
    config = onthefly.SessionConfig(
        store=store, run=RUN, ckpt_every_minutes=None, ckpt_every_steps=1, handle_signals=False
    )
    with onthefly.attach(state["model"], state["optimizer"], config=config) as session:
        for step in session.steps(count):
            train(state)
            session.log(loss=step)
            if before_the_save is not None and session.step == count:
                before_the_save()


# -- the parent ------------------------------------------------------------------------------------------------


def main(kind, folder, lives=None, seed=0):
    torch.set_num_threads(1)
    folder = Path(folder)
    first = folder / "first"
    if kind == "session":
        syscalls.live(lambda pipe: live_through(first, 1))

    def live(name, last=None):
        home = folder / str(name)
        home.mkdir()

        def work(pipe):
            resume_for_a_step(first, home, pipe) if kind == "session" else save_twice(kind, home, pipe)

        found = syscalls.live(work, last)
        about = {"killed": found.killed, "stops": found.stops, "call": found.call, "said": found.said}
        about["writes"] = [(syscalls.WRITES[n], first) for n, first in found.calls if n in syscalls.WRITES]
        print(json.dumps({"folder": str(home), **about}), flush=True)
        return found

    whole = live("whole")
    every = 1 if lives is None else -(-whole.stops // int(lives))
    for stop in itertools.count(1 + int(seed) % every, every):
        if not live(stop, stop).killed:
            break


if __name__ == "__main__":
    main(*sys.argv[1:])
