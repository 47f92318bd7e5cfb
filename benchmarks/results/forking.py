"""Does it help to fork a training onto its hard samples? Real digits, the same number of steps for every arm.

One training goes to its branching point, and from that very checkpoint each arm goes on as a run of its own, by the
product's own `fork` and `switch`, in one session: on all samples, on those with the highest loss, on the hardest whose label
is not suspected, on as many at random. Nothing but the samples (and, where it says so, the learning rate) differs. What is hard among the held-out images is fixed at
the branching point.
"""

from __future__ import annotations

import argparse
import logging
import queue
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import BATCH, MODELS, Training, ask, digits, flipped, one_thread, shown, table, write
from sklearn.model_selection import train_test_split
from torch import Tensor

import onthefly

EPOCHS = 10
"""Epochs before the branching point, and, counted in steps over all samples, after it."""
HARD = 0.2
"""The hard slice: this share of the held-out images, those with the highest loss at the branching point."""
FRACTIONS = (0.1, 0.3)
"""How much of the train data an arm is forked on."""
SLOWER = 0.1
"""The one of them that is also trained on with a tenth of the learning rate."""
NOISE = (0.0, 0.1)
ALL = "all samples"


def arms(samples: int) -> dict[str, dict[str, Any]]:
    """The arms that are forks: what `Client.fork` is told. With a tenth of the learning rate, too, as in the README's example."""
    found: dict[str, dict[str, Any]] = {}
    for fraction in FRACTIONS:
        count = round(fraction * samples)
        found[f"top loss, {fraction:.0%}"] = {"recipe": f"top(loss, {count})"}
        found[f"noise-aware hard, {fraction:.0%}"] = {"recipe": f"noise_aware({fraction})"}
        found[f"random, {fraction:.0%}"] = {"recipe": f"random({count}, seed=1)"}
    slower = [("all samples", {}), *((name, told) for name, told in found.items() if name.endswith(f"{SLOWER:.0%}"))]
    return found | {f"{name}, lr * 0.1": {**told, "values": {"lr": "*0.1"}} for name, told in slower}


def evaluated(logits: Tensor, labels: Tensor, hard: Tensor) -> dict[str, float]:
    right = (logits.argmax(1) == labels).double()
    losses = F.cross_entropy(logits, labels, reduction="none").double()
    return {"overall": float(right.mean()), "hard": float(right[hard].mean()), "loss": float(losses.mean())}


class Steering(threading.Thread):
    """The second terminal: each time the training has paused, it goes over to the next arm."""

    def __init__(self, store: Path, forks: Mapping[str, dict[str, Any]]) -> None:
        super().__init__(daemon=True)
        self.turns: queue.Queue[str] = queue.Queue()
        self.told: dict[str, dict[str, Any]] = {}
        self.error: BaseException | None = None
        self._store, self._forks = store, forks
        self.start()

    def run(self) -> None:
        try:
            with onthefly.connect(self._store) as client:
                while (arm := self.turns.get()) != "end":
                    if client.session().run != "baseline":
                        client.switch("baseline")
                    if arm in self._forks:
                        self.told[arm] = client.fork(**self._forks[arm])
                        if "recipe" in self._forks[arm]:
                            self.told[arm]["indices"] = client.selection(self.told[arm]["run"]).indices
                    client.resume()
        except BaseException as e:  # noqa: BLE001  the training's thread is told
            self.error = e
            with onthefly.connect(self._store) as client:
                client.stop(save=False)


def one(kind: str, seed: int, noise: float, store: Path) -> dict[str, Any]:
    """One seed: what every arm comes to."""
    images, labels = digits()
    rows = train_test_split(np.arange(len(labels)), test_size=0.4, stratify=labels, random_state=seed)
    train, held = (torch.tensor(part) for part in rows)
    given, wrong = flipped(labels[train], noise, np.random.default_rng(seed))
    training = Training(kind, seed, images[train], given, store)
    session, stretch = training.session, EPOCHS * -(-len(train) // BATCH)
    forks = arms(len(train))
    todo = [*forks, ALL]
    hard = torch.empty(0, dtype=torch.int64)
    found: dict[str, Any] = {}
    steering = Steering(store, forks)

    def arrive() -> None:
        """At the end of an arm, or at the branching point: hold, and let the other thread go to the next one."""
        with onthefly.connect(store) as client:
            ask(session, client, "pause", save=False)
        steering.turns.put(todo[0])

    with session:
        for _ in session.epochs(10**6):
            for batch in session:
                training.step(batch)
                if session.step == stretch and not found:
                    logits = training.logits(images[held])
                    losses = F.cross_entropy(logits, labels[held], reduction="none")
                    hard = losses.topk(round(HARD * len(held))).indices
                    found["the branching point"] = evaluated(logits, labels[held], hard)
                    arrive()
                elif session.step == 2 * stretch:
                    arm = todo.pop(0)
                    expected = "baseline" if arm == ALL else steering.told[arm]["run"]
                    assert session.run == expected, f"{arm}: on {session.run}, not {expected}"
                    found[arm] = evaluated(training.logits(images[held]), labels[held], hard)
                    if not todo:
                        break
                    arrive()
            if not todo:
                break
    steering.turns.put("end")
    steering.join()
    if steering.error is not None:
        raise steering.error
    for arm, told in steering.told.items():
        assert told["step"] == stretch, f"{arm} began at step {told['step']}"
        found[arm]["warned"] = float("warning" in told)
        if (chosen := told.get("indices")) is not None:
            found[arm] |= {"samples": float(len(chosen)), "flipped": float(wrong[chosen].mean())}
    assert len({told["hash"] for told in steering.told.values()}) == 1, "the arms are of different checkpoints"
    return found


def tables(kind: str, noise: float, seeds: list[dict[str, Any]]) -> str:
    rows = []
    for arm in ["the branching point", ALL, *(a for a in seeds[0] if a not in (ALL, "the branching point"))]:
        row = [arm]
        chosen = [seed[arm].get("samples") for seed in seeds]
        row.append("" if chosen[0] is None else f"{np.mean([float(c) for c in chosen]):.0f}")
        row.append("" if chosen[0] is None else f"{np.mean([seed[arm]['flipped'] for seed in seeds]):.1%}")
        for figure in ("overall", "hard"):
            row.append(shown([seed[arm][figure] for seed in seeds]))
            less = [seed[arm][figure] - seed[ALL][figure] for seed in seeds]
            row.append("" if arm == ALL else shown(less, sign=True))
        rows.append(row)
    pairs = []
    for arm in (arm for arm in seeds[0] if arm.startswith("noise-aware")):
        for other in (arm.replace("noise-aware hard", word) for word in ("top loss", "random")):
            less = [[seed[arm][f] - seed[other][f] for seed in seeds] for f in ("overall", "hard")]
            pairs.append([arm, other, *(shown(differences, sign=True) for differences in less)])
    head = ["trained on", "samples", "flipped", "accuracy", "less that on all", "on the hard slice", "less that on all"]
    warned = {a: sum(s[a]["warned"] for s in seeds) for a in seeds[0] if "warned" in seeds[0][a]}
    said = ", ".join(f"{arm} in {count:.0f} of {len(seeds)}" for arm, count in warned.items() if count) or "never"
    title = f"**{kind}, {noise:.0%} of the train labels flipped**"
    compared = table(["arm", "less", "accuracy", "on the hard slice"], pairs)
    return f"{title}\n\n{table(head, rows)}\n\n{compared}\n\nThe fork warned of label errors: {said}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["MLP"])
    parser.add_argument("--json", type=Path, default=Path("results/forking.json"))
    options = parser.parse_args()
    logging.getLogger("onthefly").setLevel(logging.ERROR)
    began = time.perf_counter()
    found: dict[str, Any] = {}
    with one_thread():
        for kind in options.models:
            for noise in NOISE:
                seeds = []
                for seed in range(options.seeds):
                    with tempfile.TemporaryDirectory() as folder:
                        seeds.append(one(kind, seed, noise, Path(folder) / "store"))
                found[f"{kind}, {noise:g}"] = seeds
                print(tables(kind, noise, seeds), flush=True)
    write(options.json, {"epochs": EPOCHS, "hard": HARD, "seeds": options.seeds, "found": found})
    print(f"{options.seeds} seeds, {time.perf_counter() - began:.0f} s; every figure is in {options.json}")


if __name__ == "__main__":
    main()
