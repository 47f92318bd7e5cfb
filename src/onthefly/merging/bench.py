"""Where models are judged: on slices of data, by what a scan says of each sample."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, closing
from typing import Any

import numpy as np
import torch
from torch import nn

from onthefly.merging.preview import Scores, class_rows, score
from onthefly.merging.recalibrate import recalibrate
from onthefly.samples import recipes, selectors
from onthefly.samples.loading import batches
from onthefly.samples.scan import PerSampleLoss, scan
from onthefly.state.parts import check_same_names, check_tensor, copy_tensors, plain_names, unwrapped

Tensors = dict[str, torch.Tensor]
_SEED = 0xB1E4D  # of the choice of samples that statistics are taken of


class Bench:
    """A model of one form that is given the weights of each, one after the other. It is in evaluation mode.

    `data` judges, `train` is what batch-norm statistics are estimated on, and what `subsets` are of; either may be None. `whole` is what all of
    `data` is called, `named` are recipes of further slices of it.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        data: Any,
        train: Any,
        losses: PerSampleLoss,
        autocast: Callable[[], AbstractContextManager[Any]],
        look_up: Callable[[], None],
        whole: str,
        named: Mapping[str, Any],
        subsets: Mapping[str, np.ndarray],
        recalibrate: int,
    ) -> None:
        self.model = model
        self.data = data
        self.train = train
        self.losses = losses
        self.autocast = autocast
        self.recalibrate = recalibrate
        self.classifies = False
        self.slices: list[str] = []
        self._look_up = look_up
        self._whole = whole
        self._named = named
        self._subsets = subsets if train is not None else {}
        self._rows: dict[str, np.ndarray | None] | None = None  # of the judging data, by slice

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give the model these weights. Raises `StateMismatchError`, with nothing changed, where they do not fit."""
        module = unwrapped(self.model)
        plain = plain_names(module)
        own = {plain(name): tensor for name, tensor in module.state_dict().items()}
        check_same_names(own, tensors, "the model to judge")
        for name, tensor in own.items():
            check_tensor(tensor, tensors[name], name)
        copy_tensors((tensor, tensors[name]) for name, tensor in own.items())

    def recalibrated(self) -> Tensors:
        """Batch-norm buffers of the loaded model, estimated anew, under each of their names; none for a model without."""
        module = unwrapped(self.model)
        plain = plain_names(module)
        with closing(self.watched(batches(self.train, self.some(None, self.recalibrate)))) as data:
            changed = recalibrate(self.model, data, autocast=self.autocast)
        buffers = {plain(name): buffer for name, buffer in module.named_buffers(remove_duplicate=False)}
        new = {id(buffers[name]) for name in changed}
        return {name: buffer.detach().cpu().clone() for name, buffer in buffers.items() if id(buffer) in new}

    def watched(self, batches: Iterable[Any]) -> Generator[Any, None, None]:
        """Batches, each after a look whether somebody wants it all to stop."""
        for batch in batches:
            self._look_up()
            yield batch

    def some(self, samples: np.ndarray | None, count: int) -> np.ndarray:
        """So many of some samples of the train data, or of all, always the same ones."""
        every = np.arange(len(self.train.dataset)) if samples is None else samples
        return every if count >= len(every) else every[selectors.random(len(every), count, _SEED)]

    def scores_of(self, tensors: Mapping[str, torch.Tensor]) -> Scores:
        """How good a model is on each slice. The slices of `named` are chosen by the values of the first that is judged."""
        self.load(tensors)
        columns = self._scan(self.data, None)
        if self._rows is None:
            self._rows = self._sliced(columns)
        found = {name: score(columns, rows) for name, rows in self._rows.items()}
        for name, samples in self._subsets.items():
            found[name] = score(self._scan(self.train, samples))
        self.slices = list(found)
        return found

    def loss_of(self, tensors: Mapping[str, torch.Tensor], *, anew: bool = False) -> float:
        """The loss on all of the judging data; `anew`, with batch-norm statistics of the model's own."""
        self.load(tensors)
        if anew and self.recalibrate and self.train is not None:
            self.recalibrated()
        return score(self._scan(self.data, None)).loss

    def _scan(self, loader: Any, indices: np.ndarray | None) -> dict[str, np.ndarray]:
        columns = scan(
            self.model,
            loader,
            self.losses,
            indices=indices,
            autocast=self.autocast,
            on_batch=lambda done, total: self._look_up(),
        )
        self.classifies = "correct" in columns
        return columns

    def _sliced(self, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray | None]:
        named = {name: recipes.choose(recipe, columns, len(columns["loss"])) for name, recipe in self._named.items()}
        return {self._whole: None, **named, **class_rows(columns)}
