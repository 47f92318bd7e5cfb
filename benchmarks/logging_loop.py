"""What the browser's benchmark watches: a training that says when it logs, or how long each of its steps takes.

    logging_loop.py STORE --pause 0.25      # four updates a second
    logging_loop.py STORE --pause 0         # as fast as it can, on one thread

Each step is one line of output: its number, Unix seconds just before it logs, and the seconds that the step took.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

import onthefly


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("--pause", type=float, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    batch = torch.randn(64, 256)
    config = onthefly.SessionConfig(store=options.store, ckpt_every_minutes=None)
    with onthefly.attach(model, optimizer, config=config) as session:
        for step in session.steps(10**9):
            time.sleep(options.pause)
            began = time.perf_counter()
            optimizer.zero_grad()
            loss = model(batch).square().mean()
            loss.backward()
            optimizer.step()
            logged = time.time()
            session.log(loss=float(loss.detach()), tick=step + 1)
            print(step + 1, logged, time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
