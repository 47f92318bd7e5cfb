"""One cell of the exactness matrix: a small training that is built from scratch, and a trace of what it did.

A trace is a file of JSON lines, written as training goes, so that a killed process leaves its part: one line for each
batch (sample indices, hash of the inputs, loss), and one at the end with the hash of every leaf of the final state.
"""

import functools
import gc
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset, WeightedRandomSampler, default_collate

import onthefly
from onthefly.checkpoints import format
from onthefly.runs import launch
from onthefly.state import rng
from onthefly.state.tree import flatten
from onthefly.store import queries
from onthefly.store.store import Store

FACTORS = {
    "loop": ("epochs", "flat", "trainer", "steps"),  # the last has no loader: it draws its own batches
    "workers": ("0", "2", "2p"),  # p: persistent
    "sampling": ("shuffle", "generator", "weighted", "batches", "sequential"),
    "augmentation": ("plain", "augmented", "collate", "own", "getitems"),
    "optimisation": ("sgd", "adamw", "fused", "onecycle", "plateau", "accumulate", "bf16", "ema"),
    "staging": ("boundary", "overlap"),  # when a save copies what only an optimizer's step changes
    "samples": ("all", "fork"),  # the latter trains on a few of them from the middle of an epoch on
}
SAMPLES, BATCH, EPOCHS = 23, 4, 3  # the last batch of an epoch is a short one
PER_EPOCH = (SAMPLES + BATCH - 1) // BATCH
STEPS = EPOCHS * PER_EPOCH
# In a fork the second epoch has four batches of all samples, then all four of these; so both kinds have 18 steps.
FORKED_AT, FORKED_TO = 10, [21, 3, 17, 8, 0, 14, 5, 11, 20, 9, 2, 15, 6, 12]
EPOCH_ENDS = {"all": (6, 12, STEPS), "fork": (6, 14, STEPS)}
ACCUMULATE = 4
RUN = "cell"


@dataclass(frozen=True)
class Cell:
    """One value of each factor."""

    loop: str
    workers: str
    sampling: str
    augmentation: str
    optimisation: str
    staging: str
    samples: str

    def __str__(self):
        return "/".join(getattr(self, name) for name in FACTORS)

    @property
    def is_possible(self):
        return self.loop != "steps" or (self.workers == "0" and self.samples == "all")

    @property
    def has_plain_loop(self):
        """Whether a loop without OnTheFly can do the same."""
        # Workers seed samples by their position. And an order is drawn whole, while in a plain loop that leaves an epoch
        # in the middle the sampler has not drawn all from its generator; a shuffle by a seed does not show that.
        leaves_draws = self.samples == "fork" and self.sampling in ("generator", "batches")
        return self.workers == "0" and not leaves_draws

    @property
    def is_announced(self):
        """Whether the session must say that this cell cannot be repeated: each worker has a copy of the generator."""
        return self.augmentation == "own" and self.workers != "0"


@dataclass(frozen=True)
class Order:
    """What one process is told to do."""

    cell: Cell
    folder: str
    trace: str
    attached: bool = True
    resumed: bool = False
    every: int | str | None = None  # steps between checkpoints, or "epoch"
    kill: int | None = None  # in which batch of this process, after its loss is known, it is killed
    kill_at: str | None = None  # or "attached": before the loop begins; "over": after it ended
    seed: int = 1
    exact_augmentation: bool = True


class Trace:
    def __init__(self, path, kill):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._kill = kill
        self._count = 0
        self._inputs = ""

    def inputs(self, module, arguments):
        """A forward hook of the model."""
        if module.training:
            self._inputs = fingerprint(arguments[0])

    def batch(self, indices, loss):
        self._write({"indices": indices.tolist(), "inputs": self._inputs, "loss": loss.item().hex()})
        self._count += 1
        if self._count == self._kill:
            die_with_all_saved()

    def end(self, **found):
        self._write(found)

    def _write(self, line):
        os.write(self._file, json.dumps(line).encode() + b"\n")


def die_with_all_saved():
    """Where the next process begins must be known here. (Deaths in the middle of a save are met in tests/laws.)"""
    for session in sessions():
        session._checkpointer.settle()
    die()


def sessions():
    """A Trainer shows its session to nobody."""
    return [found for found in gc.get_objects() if isinstance(found, onthefly.Session)]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fingerprint(tensor):
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype}{list(tensor.shape)} {hashlib.blake2b(content, digest_size=8).hexdigest()}"


# -- data ------------------------------------------------------------------------------------------------------


class Samples(Dataset):
    """(8 numbers, [class, index]); the index travels with the sample, so that what was drawn can be told afterwards."""

    def __init__(self):
        source = np.random.default_rng(0)
        self.inputs = torch.from_numpy(source.normal(size=(SAMPLES, 8)).astype(np.float32))
        self.classes = torch.from_numpy(source.integers(0, 3, SAMPLES))

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return self.inputs[index], torch.tensor([self.classes[index], index])


class Augmented(Samples):
    def __getitem__(self, index):
        inputs, target = super().__getitem__(index)
        return noisy(inputs), target


class WithGenerator(Samples):
    def __init__(self, seed):
        super().__init__()
        self.noise = np.random.default_rng(seed)

    def __getitem__(self, index):
        inputs, target = super().__getitem__(index)
        return inputs * self.noise.random(), target


class Fetched(Samples):
    """Gives a batch's samples at once, with noise that belongs to the batch."""

    def __getitems__(self, indices):
        noise = torch.rand(len(indices), 8) * random.random()
        return [(inputs + noise[i], target) for i, (inputs, target) in enumerate(self[j] for j in indices)]


class Batches:
    """A batch sampler of a user's own: batches of 3 to 5 samples, drawn as they are asked for."""

    def __init__(self, source, samples=SAMPLES):
        self.random, self.samples = source, samples
        self.sizes = []
        while (rest := samples - sum(self.sizes)) > 0:
            self.sizes.append(min((3, 5, 4, 4, 5, 2)[len(self.sizes)], rest))

    def __iter__(self):
        for size in self.sizes:
            yield [self.random.randrange(self.samples) for _ in range(size)]

    def __len__(self):
        return len(self.sizes)

    def subset(self, indices):
        return Batches(self.random, len(indices))


def noisy(inputs):
    return inputs * random.random() + float(np.random.rand()) + torch.rand(inputs.shape)


def noisy_collate(samples):
    inputs, targets = default_collate(samples)
    return inputs + torch.rand(()) * random.random() * float(np.random.rand()), targets


WEIGHTS = torch.linspace(0.1, 2.0, SAMPLES).tolist()


def make_loader(cell, seed):
    datasets = {"augmented": Augmented, "own": lambda: WithGenerator(seed), "getitems": Fetched}
    dataset = datasets.get(cell.augmentation, Samples)()
    order = {
        "shuffle": {"shuffle": True, "batch_size": BATCH},
        "generator": {"shuffle": True, "batch_size": BATCH, "generator": torch.Generator().manual_seed(seed)},
        "weighted": {"sampler": WeightedRandomSampler(WEIGHTS, SAMPLES), "batch_size": BATCH},
        "batches": {"batch_sampler": Batches(random.Random(seed))},
        "sequential": {"batch_size": BATCH},
    }[cell.sampling]
    collate = noisy_collate if cell.augmentation == "collate" else None
    workers = int(cell.workers[0])
    return DataLoader(
        dataset, num_workers=workers, persistent_workers=cell.workers.endswith("p"), collate_fn=collate, **order
    )


def loader_of_fork(loader):
    """What somebody writes who wants to train on a few samples alone, and knows nothing of OnTheFly."""
    sampler = loader.sampler
    order = {"shuffle": isinstance(sampler, RandomSampler)}
    if isinstance(sampler, WeightedRandomSampler):
        order = {"sampler": WeightedRandomSampler(sampler.weights[FORKED_TO], len(FORKED_TO))}
    dataset = Subset(loader.dataset, FORKED_TO)
    return DataLoader(dataset, BATCH, collate_fn=loader.collate_fn, generator=loader.generator, **order)


class Draws:
    """Batches of a loop without a loader, from generators that are tracked or process-wide."""

    def __init__(self, cell, seed):
        self.cell = cell
        self.samples = Samples()
        self.generators = {}
        if cell.sampling == "generator":
            self.generators["order"] = torch.Generator().manual_seed(seed)
        if cell.sampling == "batches":
            self.generators["order"] = random.Random(seed)
        if cell.augmentation == "own":
            self.generators["noise"] = np.random.default_rng(seed)

    def batch(self, step):
        indices = self._indices(step)
        inputs = self.samples.inputs[indices]
        match self.cell.augmentation:
            case "augmented":
                inputs = torch.stack([noisy(row) for row in inputs])
            case "collate":
                inputs = inputs + torch.rand(()) * random.random()
            case "own":
                inputs = inputs * self.generators["noise"].random()
            case "getitems":
                inputs = inputs + torch.rand(inputs.shape)
        return inputs, torch.stack([self.samples.classes[indices], indices], 1)

    def _indices(self, step):
        match self.cell.sampling:
            case "shuffle":
                return torch.randperm(SAMPLES)[:BATCH]
            case "generator":
                return torch.randint(SAMPLES, (BATCH,), generator=self.generators["order"])
            case "weighted":
                return torch.multinomial(torch.tensor(WEIGHTS), BATCH)
            case "batches":
                return torch.tensor([self.generators["order"].randrange(SAMPLES) for _ in range(BATCH)])
        return torch.arange(step * BATCH, (step + 1) * BATCH) % SAMPLES


# -- training --------------------------------------------------------------------------------------------------


class Training:
    """Every object of a cell's training."""

    def __init__(self, cell, seed, trace):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        self.cell, self.trace = cell, trace
        self.steps = 0  # of a plain loop
        self.draws = Draws(cell, seed) if cell.loop == "steps" else None
        self.loader = None if cell.loop == "steps" else make_loader(cell, seed)
        samples = Samples()
        validation = [(samples.inputs[i : i + 8], torch.stack([samples.classes[i : i + 8]] * 2, 1)) for i in (0, 8, 16)]
        # A loader of the user's draws a seed at each pass; what a Trainer validates on leaves no trace.
        self.validation = validation if cell.loop == "trainer" else DataLoader(samples, batch_size=8)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
        self.optimizer = self._optimizer()
        self.scheduler = self._scheduler()
        self.ema = None
        if cell.optimisation == "ema":
            self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.model.register_forward_pre_hook(trace.inputs)  # after the average has copied the model

    def _optimizer(self):
        match self.cell.optimisation:
            case "sgd" | "onecycle" | "ema":
                return torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
            case "fused":
                return torch.optim.AdamW(self.model.parameters(), lr=0.01, fused=True)
        return torch.optim.AdamW(self.model.parameters(), lr=0.01)

    def _scheduler(self):
        match self.cell.optimisation:
            case "onecycle":
                return OneCycleLR(self.optimizer, max_lr=0.1, total_steps=STEPS + 1)
            case "plateau":
                return ReduceLROnPlateau(self.optimizer, factor=0.5, patience=0)
        return None

    def plain_epoch(self):
        """An epoch's batches without OnTheFly, each with its number (from 1, and anew in a fork) and how many there are."""
        for number, batch in enumerate(self.loader, 1):
            yield number, len(self.loader), batch
            self.steps += 1
            if self.cell.samples == "fork" and self.steps == FORKED_AT:
                self.loader = loader_of_fork(self.loader)
                yield from self.plain_epoch()
                return

    def fork(self, session):
        """Called after each step: a fork does this to the session's loader, and here the training program itself does."""
        if self.cell.samples == "fork" and session.step == FORKED_AT:
            session._loader.rebind(FORKED_TO)

    @property
    def accumulate(self):
        return ACCUMULATE if self.cell.optimisation == "accumulate" else 1

    @property
    def tracked(self):
        ema = {} if self.ema is None else {"ema": self.ema}
        return {**ema, **(self.draws.generators if self.draws else {})}

    def loss_fn(self, outputs, targets):
        """Called for every batch, and traces those of the training."""
        loss = F.cross_entropy(outputs, targets[:, 0])
        if torch.is_grad_enabled():
            self.trace.batch(targets[:, 1], loss)
        return loss

    def step(self, batch, number, last, log, *, short_groups=False):
        """One batch, the `number`-th of an epoch with `last` batches, or of an endless one (None)."""
        inputs, targets = batch
        size = self.accumulate
        complete = number % size == 0 or number == last
        if short_groups and last is not None:
            size = min(size, last - (number - 1) // size * size)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.cell.optimisation == "bf16"):
            loss = self.loss_fn(self.model(inputs), targets)
        log(loss=loss)
        (loss / size).backward()
        if complete:
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.after_step()
            if self.cell.optimisation == "onecycle":
                self.scheduler.step()
        if last is None and number % 5 == 0:
            self.plateau(loss.item())

    def after_step(self):
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def validate(self, log):
        """An epoch's end in a loop of the user's own."""
        self.model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.cell.optimisation == "bf16"):
            losses = [self.loss_fn(self.model(x), y).item() * len(y) for x, y in self.validation]
        self.model.train()
        mean = sum(losses) / SAMPLES
        log(val_loss=mean)
        self.plateau(mean)

    def plateau(self, loss):
        if self.cell.optimisation == "plateau":
            self.scheduler.step(loss)

    def leaves(self):
        """The hash of every leaf of what was trained, and of the process-wide random state."""
        live = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "ema": self.ema}
        state = {name: value.state_dict() for name, value in live.items() if value is not None}
        return fingerprints(*flatten({**state, "rng": rng.capture()}))


def train_plain(training):
    """The loops as they are without OnTheFly."""
    ignore = lambda **numbers: None  # noqa: E731
    match training.cell.loop:
        case "epochs" | "trainer":
            mine = training.cell.loop == "trainer"
            for _ in range(EPOCHS):
                for number, last, batch in training.plain_epoch():
                    training.step(batch, number, last, ignore, short_groups=mine)
                training.validate(ignore)
        case "flat":
            number = 0
            for _ in range(EPOCHS):
                for _, _, batch in training.plain_epoch():
                    number += 1
                    training.step(batch, number, None, ignore)
        case "steps":
            for step in range(STEPS):
                training.step(training.draws.batch(step), step + 1, None, ignore)


def train_attached(training, config, kill_at):
    if training.cell.loop == "trainer":
        optimisation = training.cell.optimisation
        session = functools.cache(lambda: sessions()[0])  # to find it takes long

        def after_step():
            training.after_step()
            training.fork(session())

        trainer = onthefly.Trainer(
            config,
            device="cpu",
            amp="bf16" if optimisation == "bf16" else None,
            accumulate=training.accumulate,
            schedule="step" if optimisation == "onecycle" else "epoch",
        )
        trainer.fit(
            training.model,
            training.optimizer,
            training.loss_fn,
            training.loader,
            training.validation,
            epochs=EPOCHS,
            scheduler=training.scheduler,
            track=training.tracked,
            after_step=after_step,
        )
        return
    parts = (training.model, training.optimizer)
    with onthefly.attach(*parts, scheduler=training.scheduler, train_loader=training.loader, config=config) as session:
        session.track(**training.tracked)
        if kill_at == "attached":
            die()
        match training.cell.loop:
            case "epochs":
                for _ in session.epochs(EPOCHS):
                    for batch in session:
                        training.step(batch, session.iteration, session.batches, session.log)
                        training.fork(session)
                    training.validate(session.log)
            case "flat":
                for batch in session:
                    training.step(batch, session.step, None, session.log)
                    training.fork(session)
            case "steps":
                for step in session.steps(STEPS):
                    training.step(training.draws.batch(step), step + 1, None, session.log)
        if kill_at == "over":
            die_with_all_saved()


def run(order):
    """What a process does: train as it was told, and leave a trace."""
    gc.freeze()  # what it was forked with is not collected: looking through it took half of a process's time
    folder = Path(order.folder)
    os.setpgrp()  # so that what it leaves behind when it is killed can be found
    output = os.open(Path(order.trace).with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.stdout.flush(), sys.stderr.flush()
    os.dup2(output, 1), os.dup2(output, 2)
    torch.set_num_threads(1)
    # Else loader workers came from the fork server, too: each one anew, and alive after their trainer was killed.
    multiprocessing.set_start_method("fork", force=True)
    trace = Trace(order.trace, order.kill)
    training = Training(order.cell, order.seed, trace)
    if not order.attached:
        train_plain(training)
        trace.end(live=training.leaves())
        return
    os.environ.pop(launch.STORE, None)  # whoever runs the tests may have one
    if order.resumed:
        os.environ[launch.RESUME] = RUN
    config = onthefly.SessionConfig(
        run=RUN,
        store=folder,
        max_epochs=EPOCHS if order.cell.loop == "flat" else None,
        ckpt_every_steps=order.every if isinstance(order.every, int) else None,
        ckpt_every_epoch=order.every == "epoch",
        exact_augmentation=order.exact_augmentation,
        ckpt_staging=order.cell.staging,
    )
    train_attached(training, config, order.kill_at)
    trace.end(live=training.leaves(), **recorded(folder))


# -- what a store holds at the end -----------------------------------------------------------------------------


def recorded(folder):
    store = Store.open(folder)
    try:
        series = {name: queries.series(store, RUN, name) for name in queries.metric_names(store, RUN)}
        last = queries.newest_checkpoint(store, RUN)
        kinds = [event.kind for event in queries.events(store, RUN)]
        return {
            "logged": {
                f"{name} of step {step}#{place}": value.hex()
                for name, s in series.items()
                for place, (step, value) in enumerate(zip(s.steps.tolist(), s.values.tolist(), strict=True))
            },
            "checkpoint": fingerprints((file := format.open_checkpoint(last.path)).tree, file.tensors),
            "hash": last.hash,
            "step": last.step,
            "inexact": queries.sessions(store)[-1].inexact,
            "differences": kinds.count("inexact"),
        }
    finally:
        store.close()


def fingerprints(tree, tensors):
    """Every leaf of a flattened state, by its path."""
    return {**dict(_leaves("", tree)), **{name: fingerprint(tensor) for name, tensor in tensors.items()}}


def _leaves(path, tree):
    if isinstance(tree, dict | list):
        for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(f"{path}/{key}", item)
    else:
        yield f"tree{path}", repr(tree)
