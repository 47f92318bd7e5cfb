"""Small trainings on handwritten digits. A report is asked at a step: it is at the gate before the training goes on."""

import threading
import time
import uuid
from dataclasses import dataclass, field

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import onthefly
from onthefly.store import queries

BATCH = 32
PATIENCE = 60.0


def digits(count=320):
    """Images [N, 1, 8, 8] in 0..1, and their digits [N]."""
    found = load_digits()
    images = torch.tensor(found.images[:count], dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.tensor(found.target[:count])


class Transformer(nn.Module):
    """A row of an image is a token."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.places = nn.Parameter(torch.randn(8, 32) * 0.02)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, images):
        return self.head(self.encoder(self.embed(images.squeeze(1)) + self.places).mean(1))


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def cnn():
    first = (nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.1))
    return nn.Sequential(*first, nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))


MODELS = {"mlp": mlp, "cnn": cnn, "transformer": Transformer}


@dataclass
class Digits:
    """One training, as a script of its user's."""

    model: str = "mlp"
    dataset: object = None
    optimizer: object = None
    """Makes the optimizer from the model; by default AdamW."""
    change: object = lambda model: None
    """What is done to the model before."""
    scheduler: object = None
    scaler: object = None
    autocast: object = None
    loss: object = F.cross_entropy
    accumulate: int = 1
    epochs: int = 3
    loader: dict = field(default_factory=dict)
    parts: dict = field(default_factory=dict)
    clip: float | None = None
    """Its script's own."""


class Run:
    """The training, and what is left of it: `reports` by the step at which they were asked, `state`, and `hooks`.

    `asks`: step to (kind, options of `client.report`); 0 is before the first boundary. `does`: step to a function of a client,
    called in a thread of its own, whose answer is in `answers`. `fails` is a step in which the loop raises.
    """

    def __init__(self, digits_run, store, *, asks=None, does=None, fails=None, **config):
        self.store = store
        self.asks, self.does, self.fails = dict(asks or {}), dict(does or {}), fails
        self.reports, self.answers, self.threads = {}, {}, []
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.run = run = digits_run
        self.model = MODELS[run.model]() if isinstance(run.model, str) else run.model
        run.change(self.model)
        make = run.optimizer or (lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3))
        self.optimizer = make(self.model)
        scheduler = run.scheduler(self.optimizer) if run.scheduler else None
        dataset = run.dataset if run.dataset is not None else TensorDataset(*digits())
        loader = DataLoader(dataset, batch_size=BATCH, shuffle=True, **run.loader)
        self.session = onthefly.attach(
            self.model,
            self.optimizer,
            scheduler=scheduler,
            scaler=run.scaler,
            train_loader=loader,
            config=onthefly.SessionConfig(
                store=store, handle_signals=False, ckpt_every_minutes=None, ckpt_every_epoch=False, **config
            ),
            **run.parts,
        )
        before = hooks(self.model, self.optimizer)
        self.error = None
        try:
            with self.session:
                self._meet(0)
                for _ in self.session.epochs(run.epochs):
                    self.model.train()
                    for batch in self.session:
                        self._step(*batch)
                        self._meet(self.session.step)
                    self._validate()
                self.left = {key: hooks(self.model, self.optimizer)[key] - n for key, n in before.items()}
        except ZeroDivisionError as e:
            self.error = e
        for thread in self.threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        self.hooks = hooks(self.model, self.optimizer)
        self.state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "torch": torch.get_rng_state(),
            "loss": self.losses,
            "val_loss": self.series("val_loss"),
        }

    def _step(self, images, targets):
        run = self.run
        with torch.autocast("cpu", run.autocast) if run.autocast else torch.enable_grad():
            loss = run.loss(self.model(images), targets)
        self.session.log(loss=loss)
        (run.scaler.scale(loss) if run.scaler else loss / run.accumulate).backward()
        if self.session.step == self.fails:
            raise ZeroDivisionError
        if self.session.step % run.accumulate:
            return
        if run.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), run.clip)
        if run.scaler:
            run.scaler.step(self.optimizer)
            run.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()

    def _validate(self):
        self.model.eval()
        with torch.no_grad():
            images, targets = digits(64)
            self.session.log(val_loss=F.cross_entropy(self.model(images).float(), targets))

    def _meet(self, step):
        if step in self.asks:
            kind, options = self.asks.pop(step)  # a step may come twice
            self._in_a_thread(step, "report", lambda client: client.report(kind, **options), self.reports)
        if step in self.does:
            kind, action = self.does.pop(step)
            self._in_a_thread(step, kind, action, self.answers)

    def _in_a_thread(self, step, kind, action, answers):
        """Have it done, and come back when the command is at the gate: commands are taken in their order."""

        def do():
            with onthefly.connect(self.store) as client:
                try:
                    answers[step] = action(client)
                except onthefly.OnTheFlyError as e:
                    answers[step] = e

        thread = threading.Thread(target=do)
        self.threads.append(thread)
        with onthefly.connect(self.store) as client:
            session = client.session()
            thread.start()
            until(lambda: any(row.kind == kind for row in client.store.queued_commands(session.id)))
            id = uuid.uuid4().hex
            client.store.insert_command(session.id, id, "nonsense", {}, time.time())
            until(lambda: queries.command(client.store, id).status == "failed")

    @property
    def losses(self):
        return self.series("loss")

    def series(self, name):
        with onthefly.connect(self.store) as client:
            return client.series("baseline", name).values.tolist()

    def events(self, kind):
        with onthefly.connect(self.store) as client:
            return client.events("baseline", kinds=[kind])


def until(fact):
    end = time.monotonic() + PATIENCE
    while not fact():
        assert time.monotonic() < end
        time.sleep(0.002)


def hooks(model, optimizer):
    """How many hooks there are, by kind: on modules, on parameters, on the optimizer, and for the whole process."""
    everywhere = nn.modules.module
    of_modules = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "modules": sum(len(getattr(m, name)) for m in model.modules() for name in of_modules),
        "parameters": sum(
            len(getattr(p, name) or ())
            for p in model.parameters()
            for name in ("_backward_hooks", "_post_accumulate_grad_hooks")
        ),
        "optimizer": len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks),
        "process": len(everywhere._global_forward_hooks) + len(everywhere._global_forward_pre_hooks),
    }
