"""Merging in a live session: candidates are made from files, judged one at a time, and only then is one of them gone on with,
on all of the data.

Training stands meanwhile. Until a merge is committed nothing of it is left, but a checkpoint of the present state, as of a scan, and what was
measured of the parents, which stands in the store under the hash of the checkpoint that it is of.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from onthefly.checkpoints.format import open_checkpoint
from onthefly.checkpoints.weights import entry, value_in
from onthefly.control import commands
from onthefly.control.branches import Branches
from onthefly.control.checkpointer import Save
from onthefly.control.history import History
from onthefly.control.ring import Kept
from onthefly.control.sampling import Inputs, Sampling
from onthefly.control.start import Start
from onthefly.errors import (
    CommandError,
    CorruptCheckpointError,
    InvalidCommandError,
    MissingPartError,
    OnTheFlyError,
    StateMismatchError,
    UnknownReferenceError,
    said,
)
from onthefly.merging import catalogue, optimizers
from onthefly.merging.bench import Bench, Tensors
from onthefly.merging.explain import compare, linear_path
from onthefly.merging.measured import measured
from onthefly.merging.parents import Parent
from onthefly.merging.preview import Metric, Preview, Scores
from onthefly.merging.registry import STRATEGIES, Strategy, strategy_named
from onthefly.merging.strategies import greedy
from onthefly.merging.streaming import Mapped, merge_mapped
from onthefly.runs import names as naming
from onthefly.samples.scan import ScanStopped, per_sample_loss
from onthefly.state.knobs import Knobs
from onthefly.state.parts import unwrapped
from onthefly.state.train_state import TrainState, Value
from onthefly.state.undisturbed import undisturbed
from onthefly.store import queries
from onthefly.store.projection import project

Result = dict[str, Any]

GREEDY = catalogue.GREEDY.name
NOW = "now"
_SUBSET = "'s samples"  # ends the name of the slice of a parent's own samples
_CLASS = "class "


@dataclass(frozen=True)
class _Member:
    """A parent: a checkpoint of a run, and the samples that it was trained on, or None for all."""

    label: str
    run: str
    kept: Kept
    value: Value
    tensors: Tensors
    samples: np.ndarray | None

    def parent(self) -> Parent:
        return Parent(self.label, self.tensors, self.kept.path, self.kept.hash)


@dataclass
class _Candidate:
    """What a strategy made, and how. `made` are views of a file without a name."""

    name: str
    made: Tensors
    how: dict[str, Any]
    buffers: Tensors = field(default_factory=dict)
    """Batch-norm statistics that were estimated anew."""

    @property
    def tensors(self) -> Tensors:
        return {**self.made, **self.buffers}


@dataclass(frozen=True)
class _Task:
    """A command under way: what is merged, where it is judged, and how good the parents are."""

    command: commands.MergeRuns
    members: Sequence[_Member]
    base: _Member | None
    bench: Bench
    scores: Mapping[str, Scores]
    judge: str
    metric: Metric

    def goodness(self, scores: Scores) -> float:
        """Higher is better; NaN for what cannot be judged."""
        score = scores[self.judge]
        return -score.badness(self.metric)[0] if math.isfinite(score.loss) else math.nan


class Merges:
    """Previews merges, and commits them. Owns nothing that outlives a command but files of statistics."""

    def __init__(
        self,
        state: TrainState,
        knobs: Knobs,
        inputs: Inputs,
        begun: Start,
        history: History,
        sampling: Sampling,
        branches: Branches,
        save: Save,
    ) -> None:
        self._state = state
        self._knobs = knobs
        self._inputs = inputs
        self._start = begun
        self._history = history
        self._sampling = sampling
        self._branches = branches
        self._save = save

    def merge(self, command: commands.MergeRuns) -> Result:
        """Make every candidate, judge it beside its parents, and go on with one of them if that is asked for.

        Raises `MissingPartError` for what attach was not given, `InvalidCommandError`, `StateMismatchError` for parents that do not
        fit each other, `CheckpointError` for one that cannot be read, and `CommandError` when it is cancelled; always with
        training as it was.
        """
        self._demand(command)
        named = [parent for parent in (*command.parents, command.base) if parent is not None]
        # The present state is saved, too, and must not push out what it is to be merged with.
        with self._branches.needing(Path(parent.path) for parent in named if parent.path is not None):
            members = self._members(command.parents)
            base = None if command.base is None else self._member(command.base)
            names, skips = _chosen(command, len(members), base is not None, members[0].tensors)
            given = self._inputs
            try:
                loaders = {"train": given.train_loader, "data": self._judges(command)}
                with undisturbed(self._sampling.model(), loaders, given.loss_fn):
                    task = self._task(command, members, base)
                    made, skipped = self._candidates(task, names, skips)
                    preview = self._previewed(task, made)
                    told = {} if preview is None else preview.told()
                    if preview is not None and command.commit is None:
                        told["explained"] = self._explained(task)
            except ScanStopped as e:
                raise CommandError(f"{e}; nothing was merged") from e
            finally:
                self._sampling.progress = None
            result = {**told, "averaged": {c.name: c.how["averaged"] for c in made}, "skipped": skipped}
            result |= {"committed": None, "warnings": {c.name: c.how["warnings"] for c in made if c.how["warnings"]}}
            if command.commit is None:
                return result
            chosen = _best(command.commit, made, preview)
            if command.floor and preview is not None and preview.falls_short(chosen.name):
                parent = preview.best_parent
                return {
                    **result,
                    "refused": f"{chosen.name} is worse than {parent} on {preview.judge} by {preview.metric}, so nothing was "
                    f"committed: go on with {parent} (onthefly switch), or commit it all the same with --no-floor",
                }
            return {**result, "committed": chosen.name, **self._commit(task, chosen, told)}

    # -- what is asked for -------------------------------------------------------------------------------------

    def _demand(self, command: commands.MergeRuns) -> None:
        """Raise for what could only fail later."""
        given = self._inputs
        if given.model_factory is None:
            raise MissingPartError(
                "a merge is judged in a model of its own: pass model_factory= to attach, a function that makes one like yours"
            )
        if self._judges(command) is None and (command.floor or command.commit in (None, "best")):
            raise MissingPartError(
                f"attach was given no {command.data}_loader, so there is nothing to judge a merge by: pass one, or name what to "
                "commit, with --no-floor"
            )
        per_sample_loss(given.loss_fn, given.per_sample_loss)
        for name in command.slices:
            if name in (command.data, NOW) or name.startswith(_CLASS) or name.endswith(_SUBSET):
                raise InvalidCommandError(f"a slice cannot be called {name!r}, which is the name of another row")
        if command.name is not None:
            naming.free_name(command.name, ())

    def _judges(self, command: commands.MergeRuns) -> Any:
        return self._inputs.val_loader if command.data == "val" else self._inputs.test_loader

    def _members(self, parents: Sequence[commands.MergeParent]) -> list[_Member]:
        found = [self._member(parent) for parent in parents]
        for number, member in enumerate(found):
            twin = next((other for other in found[:number] if other.kept.hash == member.kept.hash), None)
            if twin is not None:
                raise InvalidCommandError(
                    f"{member.label} and {twin.label} are one state ({member.kept.hash[:12]}): merge different ones"
                )
        return _labelled(found)

    def _member(self, parent: commands.MergeParent) -> _Member:
        if parent.path is None:
            run, kept = self._history.run, self._save("merge", goes_on=False).result()
        else:
            project(self._start.store, self._start.session)
            path = Path(parent.path)
            rows = [row for row in queries.checkpoints(self._start.store) if row.path == path]
            rows = [row for row in rows if parent.hash is None or row.hash.startswith(parent.hash)]
            if not rows:
                raise UnknownReferenceError(
                    f"{path} is no checkpoint of this store: `onthefly checkpoint import` makes it one"
                )
            row = rows[-1]
            run = row.run
            kept = Kept(path, row.hash, row.size, row.generation, row.step, row.epoch, row.reason, row.pinned, None)
        file = open_checkpoint(kept.path)
        if file.hash != kept.hash:
            raise CorruptCheckpointError(f"{kept.path}: its content is {file.hash[:12]}, not {kept.hash[:12]}")
        value = value_in(file)
        tensors = entry(value, self._part())
        if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise StateMismatchError(f"{run}@{kept.step} has no {self._part()!r} that is made of tensors alone")
        samples = entry(value, "loader/subset")
        chosen = samples.numpy() if isinstance(samples, torch.Tensor) else None
        return _Member(f"{run}@{kept.step}", run, kept, value, tensors, chosen)

    def _task(self, command: commands.MergeRuns, members: Sequence[_Member], base: _Member | None) -> _Task:
        """What is needed to judge, with the parents judged already."""
        bench = self._bench(command, members)
        judge = command.judge or command.data
        scores: dict[str, Scores] = {}
        for number, member in enumerate(members if bench.data is not None else ()):
            self._sampling.progress = number / (len(members) + 1)
            scores[member.label] = bench.scores_of(member.tensors)
            if judge not in bench.slices:
                there_are = ", ".join(bench.slices)
                raise InvalidCommandError(f"there is no slice {judge!r} to judge by; there are: {there_are}")
        if command.metric == "accuracy" and scores and not bench.classifies:
            raise InvalidCommandError("these are no classifiers, and have no accuracy: judge by loss")
        metric: Any = command.metric or ("accuracy" if bench.classifies else "loss")
        return _Task(command, members, base, bench, scores, judge, metric)

    def _bench(self, command: commands.MergeRuns, members: Sequence[_Member]) -> Bench:
        given, live = self._inputs, self._sampling.model()
        assert given.model_factory is not None
        fresh = given.model_factory()
        if shared := _storages(fresh) & _storages(live):
            raise InvalidCommandError(
                f"model_factory gives a model that shares {len(shared)} tensors with the one that is trained: judging would overwrite "
                "its weights; make every parameter and buffer anew"
            )
        fresh.to(next((p.device for p in live.parameters()), torch.device("cpu")))
        bench = Bench(
            model=fresh,
            data=self._judges(command),
            train=given.train_loader,
            losses=per_sample_loss(given.loss_fn, given.per_sample_loss),
            autocast=self._sampling.forward,
            look_up=self._sampling.look_up,
            whole=command.data,
            named=command.slices,
            subsets={f"{m.label}{_SUBSET}": m.samples for m in members if m.samples is not None},
            recalibrate=command.recalibrate,
        )
        try:
            bench.load(_entry(self._state.capture(), self._part()))
        except StateMismatchError as e:
            raise StateMismatchError(f"model_factory makes another model than the one that is trained: {e}") from e
        return bench

    # -- judging -----------------------------------------------------------------------------------------------

    def _previewed(self, task: _Task, made: Sequence[_Candidate]) -> Preview | None:
        if task.bench.data is None:
            return None
        scores = dict(task.scores)
        if all(parent.path is not None for parent in task.command.parents):
            scores[NOW] = task.bench.scores_of(_entry(self._state.capture(), self._part()))
        for number, candidate in enumerate(made):
            self._sampling.progress = (number + 1) / (len(made) + 1)
            scores[candidate.name] = task.bench.scores_of(candidate.tensors)
        labels = tuple(member.label for member in task.members)
        return Preview(labels, tuple(c.name for c in made), scores, task.judge, task.metric)

    def _explained(self, task: _Task) -> Result:
        """Why a merge works or does not: how parents stand to each other, and the loss on the way between them."""
        members, bench = task.members, task.bench
        tensors = [member.tensors for member in members]
        base = None if task.base is None else task.base.tensors
        pairs = [asdict(one) for one in compare(tensors, base, on_piece=self._sampling.look_up)]
        for one in pairs:
            one["first"], one["second"] = members[one["first"]].label, members[one["second"]].label
        paths = []
        for member, other in zip(members[1:], tensors[1:], strict=True):
            path = linear_path(lambda between: bench.loss_of(between, anew=True), tensors[0], other)
            paths.append(
                {"first": members[0].label, "second": member.label, "losses": path.losses, "barrier": path.barrier}
            )
        return {"pairs": _finite(pairs), "paths": _finite(paths)}

    # -- candidates --------------------------------------------------------------------------------------------

    def _candidates(
        self, task: _Task, names: Sequence[str], skipped: Mapping[str, str]
    ) -> tuple[list[_Candidate], dict[str, str]]:
        made, skips = [], dict(skipped)
        for name in names:
            self._sampling.look_up()
            try:
                made.append(self._soup(task) if name == GREEDY else self._candidate(task, strategy_named(name)))
            except ScanStopped:
                raise
            except Exception as e:  # of whatever kind: the user's own model and loss are called
                if task.command.strategies != ["all"]:
                    raise
                if not isinstance(e, OnTheFlyError):
                    logging.getLogger("onthefly").warning("the strategy %s failed", name, exc_info=True)
                skips[name] = said(e)
        if not made:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in skips.items())
            raise InvalidCommandError(f"no strategy can merge these: {reasons}")
        return made, skips

    def _candidate(self, task: _Task, strategy: Strategy) -> _Candidate:
        command, members = task.command, task.members
        options = {key: value for key, value in command.options.items() if key in _options_of(strategy)}
        weights = command.weights if strategy.takes_weights else None
        base = task.base if "base" in strategy.needs else None
        statistics, files = self._statistics(task, strategy)
        merged = self._merged(
            members,
            strategy.name,
            options,
            weights=weights,
            base=None if base is None else base.parent(),
            statistics=statistics,
        )
        how = {
            "strategy": strategy.name,
            "options": {key: list(v) if isinstance(v, tuple) else v for key, v in merged.options.items()},
            "weights": weights,
            "base": None if base is None else base.kept.hash,
            "members": [member.kept.hash for member in members],
            "statistics": files,
            "averaged": list(merged.averaged),
            "warnings": list(merged.warnings),
        }
        return _calibrated(_Candidate(strategy.name, merged.tensors, how), task.bench)

    def _merged(self, members: Sequence[_Member], strategy: str, *how: Any, **more: Any) -> Mapped:
        return merge_mapped(
            [member.parent() for member in members],
            strategy,
            *how,
            folder=self._start.folder,
            on_progress=lambda done, total: self._sampling.look_up(),
            **more,
        )

    def _soup(self, task: _Task) -> _Candidate:
        """The greedy soup: the average of those parents that make it better."""
        members, bench = task.members, task.bench
        if bench.data is None:
            raise MissingPartError("a greedy soup is chosen by validation data: pass a val_loader to attach")

        def mean(chosen: tuple[int, ...], how: dict[str, Any]) -> _Candidate:
            some = [members[i] for i in chosen]
            tensors = self._merged(some, "swa").tensors if len(some) > 1 else some[0].tensors
            return _calibrated(_Candidate(GREEDY, tensors, how), bench, averaged=len(some) > 1)

        chosen = greedy(
            [task.goodness(task.scores[member.label]) for member in members],
            lambda some: task.goodness(bench.scores_of(mean(some, {}).tensors)),
        )
        alone = f"no average with {members[chosen[0]].label} is better than it alone"
        how: dict[str, Any] = {"strategy": "swa", "members": [members[i].kept.hash for i in chosen], "options": {}}
        how |= {"weights": None, "base": None, "statistics": [], "averaged": []}
        return mean(chosen, {**how, "warnings": [alone] if len(chosen) == 1 else []})

    def _statistics(self, task: _Task, strategy: Strategy) -> tuple[list[Parent] | None, list[dict[str, str]]]:
        """What a strategy needs to know of each parent's own data, and under which hashes it stands."""
        need = next((need for need in ("fishers", "grams") if need in strategy.needs), None)
        if need is None:
            return None, []
        command, bench = task.command, task.bench
        if bench.train is None:
            raise MissingPartError(f"{need} are measured on a parent's own data, and attach was given no train_loader")
        found, files = [], []
        for member in task.members:
            self._sampling.look_up()
            file = measured(
                self._start.store.statistics_dir,
                bench,
                member.tensors,
                of=member.kept.hash,
                part=self._part(),
                kind="grams" if need == "grams" else f"fisher-{command.fisher}",  # type: ignore[arg-type]
                among=member.samples,
                samples=command.samples,
                loss=self._inputs.per_sample_loss or self._inputs.loss_fn,
            )
            found.append(Parent(f"the {need} of {member.label}", file.tensors))
            files.append({"file": file.path.name, "hash": file.hash})
        return found, files

    # -- committing --------------------------------------------------------------------------------------------

    def _commit(self, task: _Task, chosen: _Candidate, preview: Result) -> Result:
        command = task.command
        value = self._composed(task, chosen)
        preview = {key: preview[key] for key in ("scores", "judge", "metric") if key in preview}
        policies = {"optimizer": command.optimizer, "warmup": command.warmup, "part": self._part()}
        how = {**chosen.how, **policies, "preview": preview}
        base = None if task.base is None or chosen.how["base"] is None else task.base.kept
        born = [] if entry(value, "loader/subset") is None else [commands.Subset(recipe=None, selection=None)]
        parents = [(member.run, member.kept) for member in task.members]
        told = self._branches.merge(value, parents, how, command.name, born, base)
        return told | ({"unmerged": unmerged} if (unmerged := self._unmerged()) else {})

    def _composed(self, task: _Task, chosen: _Candidate) -> Value:
        """The present state with the merged model in it."""
        value = self._state.capture()
        merged, part = chosen.tensors, self._part()
        firsts: dict[tuple[Any, ...], torch.Tensor] = {}  # tied tensors stay one
        model = {}
        for name, live in _entry(value, part).items():
            place = (live.data_ptr(), live.shape, live.stride()) if live.numel() else (name,)
            model[name] = firsts.setdefault(place, merged[name])
        _replace(value, part, model)
        policy: Any = task.command.optimizer
        for name, owners in value["owners"].items():
            if any(owner is not None and owner.startswith(f"{part}/") for owner in owners):
                stored = [entry(member.value, name) for member in task.members]
                _replace(value, name, optimizers.merged(_entry(value, name), stored, policy, name))
        value["knobs"] = self._knobs.warmed_up(value["knobs"], task.command.warmup)
        return value

    def _unmerged(self) -> list[str]:
        """Other modules that are tracked: they stay what they are, such as an average of weights that are no more."""
        return [name for name in self._state.modules if name != self._part()]

    def _part(self) -> str:
        """The name of the model in the train state."""
        return next(name for name, module in self._state.modules.items() if module is self._sampling.model())


def _calibrated(candidate: _Candidate, bench: Bench, *, averaged: bool = True) -> _Candidate:
    """With batch-norm statistics of its own, if it is an average."""
    if averaged and bench.recalibrate and bench.train is not None:
        bench.load(candidate.tensors)
        candidate.buffers = bench.recalibrated()
    names = sorted(candidate.buffers)
    candidate.how["recalibrated"] = {"buffers": names, "samples": bench.recalibrate if names else 0}
    return candidate


def _labelled(members: Sequence[_Member]) -> list[_Member]:
    """With labels that are all different, and none that is the name of a strategy: the shortest that are."""
    taken = {GREEDY, NOW, *(strategy.name for strategy in STRATEGIES)}
    for label in (
        lambda m: m.run,
        lambda m: f"{m.run}@{m.kept.step}",
        lambda m: f"{m.run}@{m.kept.step}:{m.kept.hash[:6]}",
    ):
        labels = [label(member) for member in members]
        if len(set(labels)) == len(labels) and not taken.intersection(labels):
            return [replace(member, label=text) for member, text in zip(members, labels, strict=True)]
    return [replace(member, label=member.kept.hash[:12]) for member in members]


def _chosen(
    command: commands.MergeRuns, parents: int, based: bool, tensors: Collection[str]
) -> tuple[list[str], dict[str, str]]:
    """The strategies to try, and why others of all are not."""
    names, skipped = list(dict.fromkeys(command.strategies)), {}
    if command.strategies == ["all"]:
        names = []
        for strategy in STRATEGIES:
            if "base" in strategy.needs and not based:
                skipped[strategy.name] = "it needs a base, and the parents have no checkpoint in common: --base REF"
            elif "weights" in strategy.needs and command.weights is None:
                skipped[strategy.name] = "it needs --weights"
            elif strategy.parents not in (None, parents):
                skipped[strategy.name] = f"it merges {strategy.parents} parents"
            elif strategy.name in ("adapter", "lora") and not any("lora" in n or "adapter" in n for n in tensors):
                skipped[strategy.name] = "no tensor is named adapter or lora"
            else:
                names.append(strategy.name)
        names.append(GREEDY)
    try:
        tried = [strategy_named(name) for name in names if name != GREEDY]
    except InvalidCommandError as e:
        raise InvalidCommandError(f"{e}; in a session there are also {GREEDY} and all") from e
    for option in command.options:
        if not any(option in _options_of(strategy) for strategy in tried):
            raise InvalidCommandError(f"no option {option!r} of {', '.join(names)}; docs/merging.md lists them")
    if command.commit not in (None, "best", *names):
        raise InvalidCommandError(
            f"{command.commit!r} is not among what is made here (best, {', '.join(names)}); --strategy {command.commit} adds it"
        )
    return names, skipped


def _options_of(strategy: Strategy) -> set[str]:
    return {option.name for option in strategy.options}


def _best(name: str, made: Sequence[_Candidate], preview: Preview | None) -> _Candidate:
    if name == "best":
        assert preview is not None
        # One that the floor would refuse is taken only if there is no other.
        sound = [candidate for candidate in preview.candidates if not preview.falls_short(candidate)]
        name = preview.best(sound or preview.candidates)
    for candidate in made:
        if candidate.name == name:
            return candidate
    raise CommandError(f"{name} could not be made, so there is nothing to commit")


def _storages(model: nn.Module) -> set[int]:
    tensors = (*unwrapped(model).parameters(), *unwrapped(model).buffers())
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def _entry(value: Value, name: str) -> Any:
    found = entry(value, name)
    assert found is not None
    return found


def _replace(value: Value, name: str, item: Any) -> None:
    *above, last = name.split("/")
    node: Any = value
    for key in above:
        node = node[key]
    node[last] = item


def _finite(value: Any) -> Any:
    """A value whose numbers all have a form in JSON."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
