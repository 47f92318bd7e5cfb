"""What a session makes of single samples: scans of its data, and selections of what to train on."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from onthefly import sample_values
from onthefly.control import commands
from onthefly.control.checkpointer import Save
from onthefly.control.history import History, Line
from onthefly.control.start import ScanOrder, Start
from onthefly.errors import (
    CommandError,
    InvalidCommandError,
    MissingPartError,
    UnsupportedLoaderError,
)
from onthefly.sample_values import Scanned
from onthefly.samples import recipes
from onthefly.samples.contents import Content, columns, read
from onthefly.samples.dynamics import Dynamics
from onthefly.samples.export import export
from onthefly.samples.loading import Source
from onthefly.samples.scan import PerSampleLoss, ScanStopped, per_sample_loss, scan
from onthefly.samples.selection import Selection, find
from onthefly.samples.table import Columns, SampleTable
from onthefly.state.loader import ExactLoader
from onthefly.state.train_state import TrainState
from onthefly.state.undisturbed import same_randomness, undisturbed
from onthefly.store.projection import project

Result = dict[str, Any]

_SHOWING = 10.0
"""Seconds after which no more samples are read for somebody to look at."""


@dataclass(frozen=True)
class Inputs:
    """What the session was given and only some commands need."""

    train_loader: Any = None
    val_loader: Any = None
    test_loader: Any = None
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None
    per_sample_loss: Callable[[Any, Any], torch.Tensor] | None = None
    embed: Callable[..., torch.Tensor] | None = None
    model_factory: Callable[[], nn.Module] | None = None
    schedulers: Mapping[str, Any] = field(default_factory=dict)
    scaler: Any = None


class Sampling:
    """Scans data, and turns recipes into selections. Owns the values that were read last."""

    def __init__(
        self,
        state: TrainState,
        loader: ExactLoader | None,
        dynamics: Dynamics | None,
        inputs: Inputs,
        begun: Start,
        history: History,
        save: Save,
        look_up: Callable[[], None],
    ) -> None:
        self.progress: float | None = None
        """How much of the scan under way is done."""
        self.autocast: Callable[[], AbstractContextManager[Any]] | None = None
        """How training runs the model. Learned from its first forward pass, unless somebody says it."""
        told = begun.autocast
        self._recalled = None if told is None else _autocast(told["device"], told["dtype"])
        self._state = state
        self._loader = loader
        self._dynamics = dynamics
        self._inputs = inputs
        self._start = begun
        self._history = history
        self._save = save
        self.look_up = look_up  # raises `ScanStopped` when a scan is to stop
        self._last: Scanned | None = None
        self._columns: Columns = {}  # what the last selection was made from
        for module in state.modules.values():
            _learn_autocast(module, self._learned)

    @property
    def forward(self) -> Callable[[], AbstractContextManager[Any]]:
        """Makes the context that training runs the model in, as far as that is known."""
        return self.autocast or self._recalled or nullcontext

    def scan(self, data: str, *, embeddings: bool = False) -> Result:
        """Compute the values of every sample of a data set. See `onthefly.samples.scan.scan` for what they are.

        A state that was scanned before is not scanned again. Raises `MissingPartError` for a loader or a loss that attach was not
        given, and `CommandError` when it is stopped.
        """
        return self._scanned(data, embeddings).told()

    def scan_to(self, order: ScanOrder, out: Path, step: int, epoch: int) -> None:
        """Scan the state that this process was started for, and leave the table in a file. Raises as `scan`."""
        self._table(order.data, order.embeddings, order.content, step, epoch).write(out)

    def adopt(self, command: commands.AdoptScan) -> Result:
        """Record a scan that another process has made of a checkpoint of this session, or of its run.

        Raises `InvalidCommandError` when its file is not in the store.
        """
        path = Path(command.path)
        if path.parent != self._start.store.scans_dir or not path.is_file():
            raise InvalidCommandError(f"{path} is no scan in {self._start.store.scans_dir}")
        told = command.model_dump()
        line = Line(told.pop("run"), told.pop("generation"))
        self._history.scan(line, told.pop("step"), told.pop("epoch"), **told)
        return {"path": str(path), "checkpoint": command.checkpoint}

    def show(self, data: str, indices: Sequence[int]) -> Result:
        """Read samples from the data set, for somebody to look at, and leave them in the store. Each is as a scan sees it.

        What was read by this session already is not read again. What the data set raises is the content of that sample. Raises
        `MissingPartError` for a loader that attach was not given, `UnsupportedLoaderError`, `InvalidCommandError` for indices that are not
        of the data set, and `CommandError` when it is cancelled.
        """
        loader, store = self._loader_of(data), self._start.store
        length = Source.of(loader).length
        key = sample_values.shown_key(self._start.session, data, length, indices)
        path = sample_values.shown_path(store, key)
        again = path.is_file()
        if not again:
            found = self._read(loader, indices)
            if any(one.kind == "error" for one in found.values()):  # it is tried again when it is asked for again
                key = secrets.token_hex(16)
                path = sample_values.shown_path(store, key)
            SampleTable(columns(found), {"run": self._history.run, "data": data, "length": length}).write(path)
            sample_values.forget_shown(store)
        return {"shown": key, "data": data, "samples": len(indices), "again": again, "path": str(path)}

    def _read(self, loader: Any, indices: Sequence[int]) -> dict[int, Content]:
        try:
            with (
                same_randomness(loader),
                closing(read(loader, indices, patience=_SHOWING, look_up=self.look_up)) as contents,
            ):
                found = dict(contents)
        except ScanStopped as e:
            raise CommandError(str(e)) from e
        late = Content("error", f"not read: after {_SHOWING:g} s training goes on; ask for fewer samples")
        return {index: found.get(index, late) for index in indices}

    def selection(self, command: commands.Chosen) -> Selection | None:
        """The samples that a command chooses; None: it chooses none. What has to be computed for it is computed.

        Raises `InvalidCommandError` for a recipe that gives nothing, and for a selection of another data set.
        """
        self._columns = {}
        if command.selection is not None:
            found = find(self._start.selections, command.selection)
            if found.length != self._length():
                raise InvalidCommandError(
                    f"that selection is of a data set of {found.length} samples, and this one has {self._length()}"
                )
            return found
        if command.recipe is None:
            return None
        columns, sources = self._columns_for(command.recipe)
        indices = recipes.choose(command.recipe, columns, self._length())
        self._columns = columns
        made = Selection(command.recipe, indices, self._length(), tuple(sources))
        made.write(self._start.store.scans_dir)
        return made

    def doubt(self, selection: Selection | None) -> Result:
        """A warning, when the last selection holds many samples that are probably mislabelled."""
        if selection is None:
            return {}
        columns = {
            **(self._dynamics.columns() if self._recorded() and self._dynamics is not None else {}),
            **self._columns,
        }
        found = recipes.likely_label_errors(columns, selection.indices)
        if found is None or not found.rich:
            return {}
        return {
            "warning": f"{found.chosen} of {found.size} chosen samples are likely label errors ({found.base:.1%} of all data are): "
            "`--select 'noise_aware(0.1)'` takes hard samples without them, `- suspects()` takes them from any selection"
        }

    def export(self, command: commands.ExportSubset, path: Path) -> Result:
        """Write the chosen samples, by default those that are trained on, with their values under the present weights."""
        chosen = self.selection(command)
        scanned = self._scanned("train", embeddings=False)
        columns = {**self._columns, **scanned.table.columns}
        if self._recorded() and self._dynamics is not None:
            columns = {**self._dynamics.columns(), **columns}
        columns |= sample_values.tag_column(self._start.store, self._history.run, self._length())
        active = self._loader.subset if self._loader is not None else None
        indices = (
            chosen.indices if chosen is not None else np.arange(self._length()) if active is None else active.numpy()
        )
        done = export(columns, np.sort(indices), path)
        return {"path": str(done.path), "rows": done.rows}

    # -- parts -------------------------------------------------------------------------------------------------

    def _columns_for(self, recipe: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        needs = recipes.needs(recipe)
        columns: dict[str, Any] = {}
        sources: list[dict[str, Any]] = []
        if self._recorded() and (needs.dynamics or needs.either):
            assert self._dynamics is not None
            columns |= self._dynamics.columns()
            sources.append(self._written_dynamics(columns))
        if needs.scan or needs.embedding or (needs.either and not recipes.enough_dynamics(columns)):
            scanned = self._scanned("train", needs.embedding)
            columns |= scanned.table.columns
            sources.append(
                {"kind": "scan", "hash": scanned.hash, "checkpoint": scanned.checkpoint, "file": scanned.path.name}
            )
        return columns, sources

    def _scanned(self, data: str, embeddings: bool) -> Scanned:
        self._needed(data)
        store, line = self._start.store, self._history.line
        kept = self._save("scan", goes_on=False).result()
        if (known := self._known(kept.hash, data, embeddings)) is not None:
            self._last = known
            return known
        began = time.perf_counter()
        step, epoch = kept.step, kept.epoch
        table = self._table(data, embeddings, kept.hash, step, epoch)
        seconds = time.perf_counter() - began
        path = sample_values.place(store, kept.hash, data, embeddings=embeddings)
        digest = table.write(path)
        told = {
            "checkpoint": kept.hash,
            "data": data,
            "columns": list(table.columns),
            "length": len(table),
            "path": str(path),
        }
        self._history.scan(line, step, epoch, **told, hash=digest, seconds=seconds)
        self._last = Scanned(table, path, digest, data, kept.hash, step, seconds, again=False)
        return self._last

    def _table(self, data: str, embeddings: bool, content: str, step: int, epoch: int) -> SampleTable:
        """What the model makes of every sample now, in the state of that hash."""
        loader, per_sample = self._needed(data)
        model = self.model()
        try:
            with undisturbed(model, loader, self._inputs.loss_fn):
                columns = scan(
                    model,
                    loader,
                    per_sample,
                    embed=self._inputs.embed,
                    embeddings=embeddings,
                    autocast=self.forward,
                    on_batch=self._on_batch,
                )
        except ScanStopped as e:
            raise CommandError(str(e)) from e
        finally:
            self.progress = None
        about = {"run": self._history.run, "step": step, "epoch": epoch, "checkpoint": content, "data": data}
        return SampleTable(columns, about)

    def _needed(self, data: str) -> tuple[Any, PerSampleLoss]:
        given = self._inputs
        return self._loader_of(data), per_sample_loss(given.loss_fn, given.per_sample_loss)

    def _loader_of(self, data: str) -> Any:
        given = self._inputs
        loader = {"train": given.train_loader, "val": given.val_loader, "test": given.test_loader}[data]
        if loader is None:
            raise MissingPartError(f"attach was given no {data}_loader, so there is nothing to scan")
        return loader

    def _known(self, content: str, data: str, embeddings: bool) -> Scanned | None:
        last = self._last
        if (
            last is not None
            and (last.checkpoint, last.data) == (content, data)
            and (not embeddings or "embedding" in last.table.columns)
        ):
            return replace(last, again=True)
        project(self._start.store, self._start.session)
        return sample_values.known(self._start.store, content, data, embeddings=embeddings)

    def _written_dynamics(self, columns: Columns) -> dict[str, Any]:
        """What training has recorded, as a file: a selection that is made from it can be made again."""
        step = self._state.counters["step"]
        path = self._start.store.scans_dir / f"dynamics-{self._history.run}-{self._history.generation}-{step}.arrow"
        digest = SampleTable(columns, {"run": self._history.run, "step": step, "data": "train"}).write(path)
        return {"kind": "dynamics", "hash": digest, "run": self._history.run, "step": step, "file": path.name}

    def _recorded(self) -> bool:
        return self._dynamics is not None and self._dynamics.recorded

    def _length(self) -> int:
        length = self._loader.samples if self._loader is not None else None
        if length is None:
            raise UnsupportedLoaderError(
                "samples can be chosen only from a data set with a length and an order: pass a torch.utils.data.DataLoader over one"
            )
        return length

    def model(self) -> nn.Module:
        """The model that is looked at. Raises `MissingPartError` when there are several."""
        modules = self._state.modules
        if len(modules) > 1 and "model" not in modules:
            raise MissingPartError(f"this session trains several models ({', '.join(modules)}): a scan needs just one")
        return modules.get("model") or next(iter(modules.values()))

    def _on_batch(self, done: int, total: int) -> None:
        self.progress = done / max(total, 1)
        self.look_up()

    def _learned(self, device: str, enabled: bool, dtype: torch.dtype) -> None:
        if self.autocast is not None:
            return
        name = str(dtype).removeprefix("torch.")
        self.autocast = _autocast(device, name, enabled)
        if enabled:  # a process that scans a checkpoint of this run makes no step from which it could learn it
            counters = self._state.counters
            self._history.event(
                "autocast", int(counters["step"] or 0), int(counters["epoch"] or 0), device=device, dtype=name
            )


def _autocast(device: str, dtype: str, enabled: bool = True) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: torch.autocast(device, getattr(torch, dtype), enabled=enabled)


def _learn_autocast(module: nn.Module, learned: Callable[[str, bool, torch.dtype], None]) -> None:
    """Say, at the first forward pass of training, under which autocast it runs."""

    def note(module: nn.Module, arguments: Any) -> None:
        if not torch.is_grad_enabled():
            return
        handle.remove()
        kind = next((p.device.type for p in module.parameters()), "cpu")
        learned(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    handle = module.register_forward_pre_hook(note)
