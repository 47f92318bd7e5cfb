"""A ready training loop on top of `Session`. Read `fit` from top to bottom: the loop is all there.

The checkpoint's five hops: `Trainer.fit` > `Session.epochs` > `Session.save` > `Checkpointer.save` > `checkpoints.format.write_image`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from onthefly.config import SessionConfig
from onthefly.control.looking import evaluate
from onthefly.errors import MissingPartError, OnTheFlyError
from onthefly.samples import scan
from onthefly.samples.loading import moved
from onthefly.session import attach
from onthefly.state.loader import one_pass
from onthefly.state.undisturbed import undisturbed

Metric = Callable[[Any, Any], Any]
"""`metric(outputs, targets)` of one batch: a number, or a one-element tensor; batches are weighted by their size."""

_ENDLESS = 2**31
_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class FitResult:
    """What `fit` came to, at its last epoch. `validation` and `test` hold `loss`, each metric, and `samples`; empty without a loader."""

    run: str
    step: int
    epoch: int
    validation: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Trains a model on (inputs, targets) batches, steered like any session.

    `device`: where model and batches go; by default an accelerator if there is one. `amp`: None, "bf16", or "fp16" (with a
    gradient scaler). `accumulate`: batches per optimizer step; the last, shorter group of an epoch steps too (in a
    loader without a length it waits for the next epoch's batches). `schedule`: when the scheduler steps, after every
    "epoch" (a `ReduceLROnPlateau` is given the validation loss) or every optimizer "step". `metrics`: further
    numbers for validation and test. `dynamics`: record the loss of every sample in the batches that are trained on, for a loss of
    PyTorch's own or with `fit(per_sample_loss=)` (`onthefly samples --dynamics`). Gradient clip is `SessionConfig.grad_clip`.

    Raises `ValueError` for a setting that is none of these.
    """

    def __init__(
        self,
        config: SessionConfig | None = None,
        *,
        device: str | torch.device | None = None,
        amp: str | None = None,
        accumulate: int = 1,
        schedule: str = "epoch",
        metrics: Mapping[str, Metric] | None = None,
        dynamics: bool = True,
    ) -> None:
        if amp is not None and amp not in _AMP:
            raise ValueError(f"amp is None, 'bf16' or 'fp16', not {amp!r}")
        if schedule not in ("epoch", "step"):
            raise ValueError(f"schedule is 'epoch' or 'step', not {schedule!r}")
        if accumulate < 1:
            raise ValueError(f"accumulate is at least 1, not {accumulate}")
        self._config = config or SessionConfig()
        self._device = torch.device(device) if device is not None else _default_device()
        self._amp = amp
        self._accumulate = accumulate
        self._schedule = schedule
        self._metrics = dict(metrics or {})
        self._dynamics = dynamics

    def fit(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[[Any, Any], torch.Tensor],
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None = None,
        *,
        epochs: int | None = None,
        scheduler: Any = None,
        test_loader: Iterable[Any] | None = None,
        track: Mapping[str, Any] | None = None,
        after_step: Callable[[], None] | None = None,
        model_factory: Callable[[], nn.Module] | None = None,
        per_sample_loss: Callable[[Any, Any], torch.Tensor] | None = None,
        embed: Callable[..., torch.Tensor] | None = None,
    ) -> FitResult:
        """Train to `epochs` (or `config.max_epochs`) in all, validating after each, and test at the end.

        `loss_fn(outputs, targets)` gives a batch's mean loss. `track` names further objects of the train state, and
        `after_step` is called after every optimizer step: an average of the weights needs both. `per_sample_loss(outputs, targets)`
        gives the loss of each sample, where `loss_fn` with `reduction="none"` cannot. Raises what `attach` raises,
        `MissingPartError` for batches that are not pairs, and `ValueError` when nobody says how long to train.
        """
        last = epochs if epochs is not None else self._config.max_epochs
        if last is None and self._config.max_steps is None:
            raise ValueError("say how long to train: fit(..., epochs=10), or SessionConfig(max_epochs=10)")
        model.to(self._device)
        scaler = torch.amp.GradScaler(self._device.type) if self._amp == "fp16" else None
        validation: dict[str, float] = {}
        with attach(
            model,
            optimizer,
            scheduler=scheduler,
            scaler=scaler,
            train_loader=train_loader,
            val_loader=val_loader,
            test_loader=test_loader,
            loss_fn=loss_fn,
            per_sample_loss=per_sample_loss,
            embed=embed,
            model_factory=model_factory,
            config=self._config,
        ) as session:
            session.track(**(track or {}))
            session.sampling.autocast = self._autocast
            each = self._per_sample(loss_fn, per_sample_loss)

            for _ in session.epochs(last if last is not None else _ENDLESS):
                model.train()
                for batch in session:
                    inputs, targets = self._pair(batch)
                    size, complete = self._group(session.iteration, session.batches, train_loader)
                    with self._autocast():
                        outputs = model(inputs)
                        loss = loss_fn(outputs, targets)
                    session.log(loss=loss)
                    if each is not None and session.indices is not None:
                        try:
                            with torch.no_grad():
                                session.log_samples(each(outputs, targets), **_judged(outputs, targets))
                        except OnTheFlyError as e:  # such as batches that are not one row a sample
                            if per_sample_loss is not None:
                                raise
                            each = None
                            logging.getLogger("onthefly").warning("losses of single samples are not recorded: %s", e)
                    _backward(loss / size, scaler)
                    if complete:
                        _step(optimizer, scaler)
                        if scheduler is not None and self._schedule == "step":
                            scheduler.step()
                        if after_step is not None:
                            after_step()
                if val_loader is not None:
                    validation = self._evaluate(model, val_loader, loss_fn)
                    session.log(**{f"val_{name}": value for name, value in validation.items() if name != "samples"})
                if scheduler is not None and self._schedule == "epoch":
                    _step_epoch(scheduler, validation)

            if val_loader is not None and not validation:  # resumed behind the last epoch
                validation = self._evaluate(model, val_loader, loss_fn)
            test = self._evaluate(model, test_loader, loss_fn) if test_loader is not None else {}
            return FitResult(session.run, session.step, session.epoch, validation, test)

    def _pair(self, batch: Any) -> tuple[Any, Any]:
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            raise MissingPartError(
                f"Trainer needs batches that are (inputs, targets) pairs, not a {type(batch).__name__}; "
                "for others write the loop yourself, with onthefly.attach"
            )
        return moved(batch[0], self._device), moved(batch[1], self._device)

    def _per_sample(self, loss_fn: Any, given: Any) -> Callable[[Any, Any], torch.Tensor] | None:
        """What gives the loss of each sample. A loss of the user's own is not called a second time: it may keep count."""
        own = getattr(loss_fn, "func", loss_fn)  # of a functools.partial
        home = type(own).__module__ if isinstance(own, nn.Module) else getattr(own, "__module__", "")
        if not self._dynamics or (given is None and not str(home).startswith("torch.nn.")):
            return None
        return scan.per_sample_loss(loss_fn, given)

    def _group(self, batch: int, batches: int | None, loader: Any) -> tuple[int, bool]:
        """How many batches share the optimizer step of the epoch's `batch`-th, and whether it is the last of them."""
        total = batches or (len(loader) if hasattr(loader, "__len__") else _ENDLESS)
        first = (batch - 1) // self._accumulate * self._accumulate
        size = min(self._accumulate, total - first)
        return size, batch - first == size

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, _AMP[self._amp]) if self._amp is not None else nullcontext()

    def _evaluate(
        self, model: nn.Module, loader: Iterable[Any], loss_fn: Callable[[Any, Any], torch.Tensor]
    ) -> dict[str, float]:
        with undisturbed(model, loader), self._autocast():
            return evaluate(model, one_pass(loader), loss_fn, self._metrics, self._device)


def _judged(outputs: Any, targets: Any) -> dict[str, torch.Tensor]:
    """Whether a classifier is right about each sample [N], and by what margin; nothing for other outputs than logits [N, C]."""
    if not (isinstance(outputs, torch.Tensor) and isinstance(targets, torch.Tensor)) or outputs.dim() != 2:
        return {}
    if targets.shape != outputs.shape[:1] or targets.is_floating_point() or outputs.shape[1] < 2:
        return {}
    at = targets.long().clamp(min=0).unsqueeze(1)
    own = outputs.gather(1, at)
    others = outputs.scatter(1, at, -torch.inf).amax(1, keepdim=True)
    return {"correct": outputs.argmax(1) == targets, "margins": (own - others).squeeze(1)}


def _backward(loss: torch.Tensor, scaler: torch.amp.GradScaler | None) -> None:
    (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]


def _step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()


def _step_epoch(scheduler: Any, validation: Mapping[str, float]) -> None:
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        if not validation:
            raise MissingPartError("ReduceLROnPlateau watches the validation loss: pass a val_loader")
        scheduler.step(validation["loss"])
    else:
        scheduler.step()


def _default_device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator()
    return accelerator if accelerator is not None and torch.accelerator.is_available() else torch.device("cpu")
