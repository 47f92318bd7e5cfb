"""What the children of these tests run: one small training, attached to a session or not.

It is a loop as a user writes it: batches with random augmentation, dropout, batch norm, validation at each epoch's
end. `Plain` stands where the session stands when there is none; it does what a user would do by hand.
"""

import functools
import gc
import json
import logging
import os
import random
import struct
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

SAMPLES, BATCH = 40, 8
PER_EPOCH = SAMPLES // BATCH
LINE = struct.Struct("<Qd")
"""One value that `session.log` has taken, as a child notes it for the test: step, loss."""


@dataclass(frozen=True)
class Program:
    """One process. `store` is None for a plain loop."""

    folder: str
    """Where it leaves its files: what it said, its trace, its result."""
    store: str | None
    resume: str | None = None
    loop: str = "epochs"
    """Or "batches" (one loop over all epochs), or "steps" (without a loader)."""
    epochs: int = 3
    seed: int = 0
    workers: int = 0
    persistent: bool = False
    context: str = "fork"
    """How loader workers begin. (A forkserver's children would let a forkserver of their own do it.)"""
    accumulate: int = 1
    schedule: bool = False
    augmented: bool = True
    """Whether samples are seen through a random augmentation. With workers a session seeds it in a way of its own."""
    val_workers: bool = True
    """Whether the validation's loader has workers, if the training's has."""
    optimizer: str = "adamw"
    knobs: tuple[str, ...] = ("noise",)
    """Values that it registers. Only the first is used."""
    width: int = 8
    factory: int | None = 8
    """The width of the models that its model factory makes; None: it has none; 0: it gives the trained model itself."""
    test_loss: str = "fine"
    """What the `loss_fn` given to the session does: "fine", "fails", or None for no loss_fn."""
    break_at: int | None = None
    """The step after which the loop is left by `break`."""
    stops: tuple[int, ...] = ()
    """Steps in which it waits to be let on: 0 is before the first boundary, -1 after the loop."""
    flood: int | None = None
    """A step in which it logs more than a full journal can hold."""
    given: tuple = ()
    """For a plain loop: (step, epoch, values) that its user changes by hand."""
    hold: bool = False
    """Whether a learning rate given under a scheduler is fixed (until the scheduler's own is given)."""
    group: bool = False
    """Be the leader of a process group of its own."""
    user: int | None = None
    """Be that user, who is not root."""
    config: dict = field(default_factory=dict)


class Samples(Dataset):
    """Noise, seen through an augmentation that draws from all three process-wide generators."""

    def __init__(self, seed, augmented=True):
        self.augmented = augmented
        self.inputs = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        inputs = self.inputs[index]
        if self.augmented:
            inputs = inputs * random.uniform(0.9, 1.1) + np.random.normal(0, 0.01) + 0.01 * torch.randn(6)
        return inputs, torch.tensor(index % 3)


class Plain:
    """A loop's hand-made parts, under the session's names."""

    def __init__(self, optimizer, loader, given, hold):
        self.step = self.epoch = 0
        self.clip = None
        self.factors = {}
        self.tracked = {}
        self._optimizer = optimizer
        self._loader = loader
        self._given = list(given)
        self._hold = hold

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def epochs(self, n):
        for self.epoch in range(n):
            self._change()
            yield self.epoch

    def __iter__(self):
        for batch in self._loader:
            self._change()
            self.step += 1
            yield batch

    def steps(self, n):
        for _ in range(n):
            self._change()
            self.step += 1
            yield self.step - 1

    def log(self, **numbers):
        pass

    def track(self, **objects):
        pass

    def knob(self, name, value):
        self.noise = self.tracked[name] = type("Knob", (), {"value": value})()
        return self.noise

    def _change(self):
        group = self._optimizer.param_groups[0]
        while self._given and self._given[0][0] <= self.step and self._given[0][1] <= self.epoch:
            _, _, values = self._given.pop(0)
            for name, value in values.items():
                if name in self.tracked:
                    self.tracked[name].value = value
                elif name == "grad_clip":
                    self.clip = value
                elif name == "lr" and value is None:
                    self.factors.clear()
                elif name == "lr" and "initial_lr" in group:  # a scheduler drives it
                    self.factors[name] = value if self._hold else value / group[name]
                else:
                    group[name] = tuple(value) if isinstance(group[name], tuple) else value

    def optimize(self):
        group = self._optimizer.param_groups[0]
        if self.clip is not None:
            nn.utils.clip_grad_norm_(group["params"], self.clip)
        before = {name: group[name] for name in self.factors}
        group.update({k: f if self._hold else group[k] * f for k, f in self.factors.items()})
        self._optimizer.step()
        group.update(before)


def run(program, pipe):
    """Train, and leave the result in the program's folder. The forkserver's children begin here."""
    gc.freeze()  # what it was forked with is not looked through again and again for what could go
    folder = Path(program.folder)
    said = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for number in (1, 2):
        os.dup2(said, number)
    # A forkserver's child has no command line of its own, and it is not one that nobody may interrupt.
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(message)s", level=logging.INFO, force=True)
    if program.group:
        os.setpgid(0, 0)
    if program.user is not None:
        become(program.user)
    if program.resume is not None:
        os.environ.update(ONTHEFLY_RESUME=program.resume, ONTHEFLY_STORE=program.store)
    try:
        train(program, functools.partial(_meet, pipe))
    except BaseException:
        traceback.print_exc()
        raise


def become(user):
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)


def can_write(folder, user, pipe):
    """Say through the pipe whether a user can make a file in a folder."""
    become(user)
    try:
        Path(folder, "proof").touch()
    except OSError as e:
        pipe.send(e.strerror)
    else:
        pipe.send(None)


def build_model(width):
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 3))


def train(program, meet):
    """The training itself. `meet(step)` is called in the steps of `program.stops`."""
    torch.set_num_threads(1)
    random.seed(program.seed)
    np.random.seed(program.seed)
    torch.manual_seed(program.seed)
    model = build_model(program.width)
    if program.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) if program.schedule else None
    several = {"num_workers": program.workers, "persistent_workers": program.persistent}
    if program.workers:
        several["multiprocessing_context"] = program.context
    loader = DataLoader(Samples(1, program.augmented), BATCH, shuffle=True, **several)
    # Workers that live on keep what their generators have come to; nobody can put that back from outside.
    augmented = program.augmented and not (program.persistent and program.val_workers)
    val_loader = DataLoader(Samples(2, augmented), 16, **several if program.val_workers else {})
    session = _attached(program, model, optimizer, scheduler, loader, val_loader)
    taken = os.open(Path(program.folder) / "taken.bin", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    losses, seen, numbers = [], [], []

    def step(batch, noise, epoch=0):
        inputs, targets = batch
        blurred = inputs + noise.value * (1 + epoch) * torch.randn_like(inputs)
        loss = nn.functional.cross_entropy(model(blurred), targets)
        session.log(loss=loss.detach())
        with suppress(OSError):  # where nothing can be written, the note cannot, either
            os.write(taken, LINE.pack(session.step, loss.item()))
        losses.append(loss.item())
        seen.append(inputs[:, 0].tolist())
        (loss / program.accumulate).backward()
        if session.step % program.accumulate == 0:
            session.optimize() if isinstance(session, Plain) else optimizer.step()
            optimizer.zero_grad()
        if session.step == program.flood:
            many = {f"flood{n}": 0.0 for n in range(1000)}
            for _ in range(1500):
                session.log(**many)
        if session.step in program.stops:
            meet(session.step)

    with session:
        average = torch.optim.swa_utils.AveragedModel(model)
        session.track(average=average)
        noise, *_ = [session.knob(name, 0.01) for name in program.knobs]
        if 0 in program.stops:
            meet(0)
        if program.loop == "epochs":
            for epoch in session.epochs(program.epochs):
                model.train()
                torch.rand(1)  # a loop's start of an epoch may draw
                for batch in session:
                    step(batch, noise, epoch)
                    if session.step == program.break_at:
                        break
                if session.step == program.break_at:
                    break
                average.update_parameters(model)
                session.log(val_loss=_validate(model, val_loader))
                if scheduler is not None:
                    scheduler.step()
        elif program.loop == "batches":
            for batch in session:
                step(batch, noise)
        else:
            for _ in session.steps(program.epochs * PER_EPOCH):
                numbers = torch.randint(SAMPLES, (BATCH,)).tolist()
                samples = [loader.dataset[number] for number in numbers]
                step((torch.stack([s[0] for s in samples]), torch.stack([s[1] for s in samples])), noise)
        if -1 in program.stops:
            meet(-1)
        result = {
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "noise": noise.value,
            "losses": losses,
            "seen": seen,
            "step": session.step,
            "random": {"torch": torch.get_rng_state(), "numpy": np.random.get_state()[1], "python": random.getstate()},
        }
    torch.save(result, Path(program.folder) / "result.pt")


def _attached(program, model, optimizer, scheduler, loader, val_loader):
    if program.store is None:
        return Plain(optimizer, loader, program.given, program.hold)
    import onthefly

    def fails(outputs, targets):
        raise ZeroDivisionError("the user's loss divides by zero")

    limit = {"max_epochs": program.epochs} if program.loop == "batches" else {}
    return onthefly.attach(
        model,
        optimizer,
        scheduler=scheduler,
        train_loader=None if program.loop == "steps" else loader,
        val_loader=val_loader,
        test_loader=DataLoader(Samples(3), 16),
        model_factory=_factory(program, model),
        loss_fn={"fine": nn.functional.cross_entropy, "fails": fails, None: None}[program.test_loss],
        config=onthefly.SessionConfig(store=program.store, **limit, **program.config),
    )


def _factory(program, model):
    if program.factory is None:
        return None
    return functools.partial(build_model, program.factory) if program.factory else lambda: model


def _validate(model, val_loader):
    model.eval()
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model(inputs), targets) for inputs, targets in val_loader]
    return torch.stack(losses).mean()


def _meet(pipe, step):
    pipe.send(step)
    pipe.recv()


def _meet_a_parent(step):
    print(step, flush=True)
    sys.stdin.readline()


if __name__ == "__main__":  # a real command line: its argument is a program as JSON
    train(Program(**json.loads(sys.argv[1])), _meet_a_parent)
