"""Merging in a live session: candidates are made from files, judged one at a time, and only then is one of them gone on with,
on all of the data.

Training stands meanwhile. Until a merge is committed nothing of it is left, but what was measured of the parents, which
stands in the store under the hash of the checkpoint that it is of.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onthefly.checkpoints.format import open_checkpoint, write
from onthefly.checkpoints.weights import entry, value_of
from onthefly.control import commands
from onthefly.control.branches import Branches
from onthefly.control.checkpointer import Save
from onthefly.control.history import History
from onthefly.control.ring import Kept
from onthefly.control.sampling import Inputs, Sampling
from onthefly.control.start import Start
from onthefly.errors import (
    CheckpointError,
    CommandError,
    InvalidCommandError,
    MissingPartError,
    StateMismatchError,
    UnknownReferenceError,
    said,
)
from onthefly.merging import optimizers
from onthefly.merging.bench import Bench, Tensors
from onthefly.merging.explain import compare, linear_path
from onthefly.merging.fisher import diagonal_fisher
from onthefly.merging.grams import gram_matrices
from onthefly.merging.parents import Parent, open_parent
from onthefly.merging.preview import Preview, Scores
from onthefly.merging.registry import STRATEGIES, Strategy, strategy_named
from onthefly.merging.strategies import greedy
from onthefly.merging.streaming import Merged, merge_files
from onthefly.samples.loading import batches
from onthefly.samples.scan import ScanStopped, per_sample_loss
from onthefly.state.knobs import Knobs
from onthefly.state.train_state import TrainState, Value
from onthefly.state.undisturbed import undisturbed
from onthefly.store import queries
from onthefly.store.projection import project

Result = dict[str, Any]

GREEDY = "greedy"


@dataclass(frozen=True)
class _Member:
    """A parent: a checkpoint of a run, and the samples that it was trained on, or None for all."""

    label: str
    run: str
    kept: Kept
    value: Value
    samples: np.ndarray | None


@dataclass
class _Candidate:
    """What a strategy made, and how. `made` are views of a file that has no name any more."""

    name: str
    made: Tensors
    how: dict[str, Any]
    buffers: Tensors = field(default_factory=dict)
    """Batch-norm statistics that were estimated anew."""

    @property
    def tensors(self) -> Tensors:
        return {**self.made, **self.buffers}


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
        members = self._members(command.parents)
        base = None if command.base is None else self._member(command.base)
        names, skips = _chosen(command, len(members), base is not None, self._tensors(members[0]))
        given = self._inputs
        try:
            with undisturbed(self._sampling.model(), {"train": given.train_loader, "data": self._judges(command)}):
                bench = self._bench(command, members)
                made, skipped = self._candidates(command, names, skips, members, base, bench)
                preview = self._previewed(command, members, made, bench)
                told = {} if preview is None else {**preview.told(), "explained": self._explained(members, base, bench)}
        except ScanStopped as e:
            raise CommandError(f"{e}; nothing was merged") from e
        finally:
            self._sampling.progress = None
        result = {**told, "averaged": {c.name: c.how["averaged"] for c in made}, "skipped": skipped, "committed": None}
        warnings = {c.name: c.how["warnings"] for c in made if c.how["warnings"]}
        result |= {"warnings": warnings} if warnings else {}
        if command.commit is None:
            return result
        chosen = _best(command, made, preview)
        if command.floor and preview is not None and preview.falls_short(chosen.name):
            parent = preview.best_parent
            return {
                **result,
                "refused": f"{chosen.name} is worse than {parent} on {preview.judge} by {preview.metric}, so nothing was "
                f"committed: go on with {parent} (onthefly switch), or commit it all the same with --no-floor",
            }
        return {**result, "committed": chosen.name, **self._commit(command, members, chosen, told)}

    # -- what is asked for -------------------------------------------------------------------------------------

    def _demand(self, command: commands.MergeRuns) -> None:
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
        runs = [member.run for member in found]
        return [replace(m, label=m.run) if runs.count(m.run) == 1 else m for m in found]

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
        value = value_of(kept.path)
        samples = entry(value, "loader/subset")
        chosen = samples.numpy() if isinstance(samples, torch.Tensor) else None
        return _Member(f"{run}@{kept.step}", run, kept, value, chosen)

    # -- judging -----------------------------------------------------------------------------------------------

    def _bench(self, command: commands.MergeRuns, members: Sequence[_Member]) -> Bench:
        assert self._inputs.model_factory is not None
        live = self._sampling.model()
        fresh = self._inputs.model_factory()
        fresh.to(next((p.device for p in live.parameters()), torch.device("cpu")))
        given = self._inputs
        bench = Bench(
            model=fresh,
            data=self._judges(command),
            train=given.train_loader,
            losses=per_sample_loss(given.loss_fn, given.per_sample_loss),
            autocast=self._sampling.autocast or nullcontext,
            on_batch=lambda done, total: self._sampling.look_up(),
            whole=command.data,
            named=command.slices,
            subsets={f"{m.label}'s samples": m.samples for m in members if m.samples is not None},
            recalibrate=command.recalibrate,
        )
        try:
            bench.load(_entry(self._state.capture(), self._part()))
        except StateMismatchError as e:
            raise StateMismatchError(f"model_factory makes another model than the one that is trained: {e}") from e
        return bench

    def _previewed(
        self, command: commands.MergeRuns, members: Sequence[_Member], made: Sequence[_Candidate], bench: Bench
    ) -> Preview | None:
        if bench.data is None:
            return None
        scores: dict[str, Scores] = {}
        for number, member in enumerate(members):
            self._sampling.progress = number / (len(members) + len(made) + 1)
            scores[member.label] = bench.scores_of(self._tensors(member))
        if all(member.kept.hash != self._present() for member in members):
            scores["now"] = bench.scores_of(_entry(self._state.capture(), self._part()))
        for number, candidate in enumerate(made):
            self._sampling.progress = (len(members) + 1 + number) / (len(members) + len(made) + 1)
            scores[candidate.name] = bench.scores_of(candidate.tensors)
        judge = command.judge or command.data
        if judge not in bench.slices:
            raise InvalidCommandError(f"there is no slice {judge!r} to judge by; there are: {', '.join(bench.slices)}")
        metric = command.metric or ("accuracy" if bench.classifies else "loss")
        if metric == "accuracy" and not bench.classifies:
            raise InvalidCommandError("these are no classifiers, and have no accuracy: judge by loss")
        labels = tuple(member.label for member in members)
        return Preview(labels, tuple(c.name for c in made), scores, judge, metric)  # type: ignore[arg-type]

    def _explained(self, members: Sequence[_Member], base: _Member | None, bench: Bench) -> Result:
        """Why a merge works or does not: how parents stand to each other, and the loss on the way between them."""
        tensors = [self._tensors(member) for member in members]
        found = [asdict(one) for one in compare(tensors, None if base is None else self._tensors(base))]
        for one in found:
            one["first"], one["second"] = members[one["first"]].label, members[one["second"]].label
        paths = []
        for member, other in zip(members[1:], tensors[1:], strict=True):
            path = linear_path(lambda between: bench.loss_of(between, anew=True), tensors[0], other)
            told = {"losses": [_json(loss) for loss in path.losses], "barrier": _json(path.barrier)}
            paths.append({"first": members[0].label, "second": member.label, **told})
        return {"pairs": [_finite(one) for one in found], "paths": paths}

    # -- candidates --------------------------------------------------------------------------------------------

    def _candidates(
        self,
        command: commands.MergeRuns,
        names: Sequence[str],
        skipped: Mapping[str, str],
        members: Sequence[_Member],
        base: _Member | None,
        bench: Bench,
    ) -> tuple[list[_Candidate], dict[str, str]]:
        made, skips = [], dict(skipped)
        for name in names:
            self._sampling.look_up()
            try:
                made.append(self._candidate(command, name, members, base, bench))
            except (CommandError, StateMismatchError) as e:
                if command.strategies != ["all"]:
                    raise
                skips[name] = said(e)
        if not made:
            raise InvalidCommandError(
                f"no strategy can merge these: {'; '.join(f'{k}: {v}' for k, v in skips.items())}"
            )
        return made, skips

    def _candidate(
        self,
        command: commands.MergeRuns,
        name: str,
        members: Sequence[_Member],
        base: _Member | None,
        bench: Bench,
    ) -> _Candidate:
        if name == GREEDY:
            return self._soup(command, members, bench)
        strategy = strategy_named(name)
        options = {key: value for key, value in command.options.items() if key in _options_of(strategy)}
        weights = command.weights if strategy.takes_weights else None
        statistics, files = self._statistics(strategy, command, members, bench)
        told, made = self._merged(
            [self._parent(member) for member in members],
            name,
            options,
            weights=weights,
            base=self._parent(base) if base is not None and "base" in strategy.needs else None,
            statistics=statistics,
        )
        how = {
            "strategy": name,
            "options": {key: list(v) if isinstance(v, tuple) else v for key, v in told.options.items()},
            "weights": weights,
            "base": base.kept.hash if base is not None and "base" in strategy.needs else None,
            "statistics": files,
            "averaged": list(told.averaged),
            "warnings": list(told.warnings),
        }
        return self._calibrated(_Candidate(name, made, how), bench)

    def _merged(self, parents: Sequence[Parent], strategy: str, *how: Any, **more: Any) -> tuple[Merged, Tensors]:
        """What a strategy makes, through a file that is gone when nobody looks at it any more, also after a death."""
        out = self._start.folder / f".merge-{secrets.token_hex(4)}.safetensors"
        told = merge_files(
            parents, strategy, *how, out=out, on_progress=lambda done, total: self._sampling.look_up(), **more
        )
        try:
            return told, open_parent(out).tensors
        finally:
            out.unlink()

    def _soup(self, command: commands.MergeRuns, members: Sequence[_Member], bench: Bench) -> _Candidate:
        """The greedy soup: the average of those parents that make it better."""
        if bench.data is None:
            raise MissingPartError("a greedy soup is chosen by validation data: pass a val_loader to attach")
        metric: Any = command.metric or ("accuracy" if bench.classifies_of(self._tensors(members[0])) else "loss")
        judge = command.judge or command.data

        def goodness(scores: Scores) -> float:
            return -scores[judge].badness(metric)[0]

        def of_mean(chosen: tuple[int, ...]) -> float:
            mean = self._calibrated(_Candidate(GREEDY, self._mean([members[i] for i in chosen]), {}), bench)
            return goodness(bench.scores_of(mean.tensors))

        chosen = greedy([goodness(bench.scores_of(self._tensors(member))) for member in members], of_mean)
        how: dict[str, Any] = {"strategy": "swa", "members": [members[i].kept.hash for i in chosen], "options": {}}
        how |= {"weights": None, "base": None, "statistics": [], "averaged": [], "warnings": []}
        if len(chosen) == 1:
            how["warnings"] = [f"no average with {members[chosen[0]].label} is better than it alone"]
        mean = self._mean([members[i] for i in chosen])
        return self._calibrated(_Candidate(GREEDY, mean, how), bench, averaged=len(chosen) > 1)

    def _mean(self, members: Sequence[_Member]) -> Tensors:
        if len(members) == 1:
            return self._tensors(members[0])
        return self._merged([self._parent(member) for member in members], "swa")[1]

    def _calibrated(self, candidate: _Candidate, bench: Bench, *, averaged: bool = True) -> _Candidate:
        if averaged and bench.recalibrate and bench.train is not None:
            bench.load(candidate.tensors)
            candidate.buffers = bench.recalibrated()
        names = sorted(candidate.buffers)
        candidate.how["recalibrated"] = {"buffers": names, "samples": bench.recalibrate if names else 0}
        return candidate

    def _statistics(
        self, strategy: Strategy, command: commands.MergeRuns, members: Sequence[_Member], bench: Bench
    ) -> tuple[list[Parent] | None, list[dict[str, str]]]:
        """What a strategy needs to know of each parent's own data, and under which hashes it stands."""
        need = next((need for need in ("fishers", "grams") if need in strategy.needs), None)
        if need is None:
            return None, []
        found, files = [], []
        for member in members:
            self._sampling.look_up()
            path = self._measured(need, command, member, bench)
            file = open_checkpoint(path)
            found.append(Parent(f"the {need} of {member.label}", file.tensors))
            files.append({"file": path.name, "hash": file.hash})
        return found, files

    def _measured(self, need: str, command: commands.MergeRuns, member: _Member, bench: Bench) -> Path:
        """The file with a parent's statistics. What was measured of a state once is not measured again."""
        kind = f"fisher-{command.fisher}" if need == "fishers" else need
        folder = self._start.store.statistics_dir
        path = folder / f"{member.kept.hash[:16]}-{kind}-{command.samples}.safetensors"
        try:
            tree = open_checkpoint(path).tree
            if isinstance(tree, dict) and tree.get("of") == member.kept.hash:
                return path
        except CheckpointError:
            pass  # there is none, or it is damaged: it can be measured again
        if self._inputs.train_loader is None:
            raise MissingPartError(f"{need} are measured on a parent's own data, and attach was given no train_loader")
        bench.load(self._tensors(member))
        chosen = bench.some(member.samples, command.samples)
        with closing(batches(bench.train, chosen)) as data:
            if need == "fishers":
                measured = diagonal_fisher(
                    bench.model,
                    data,
                    bench.losses,
                    kind=command.fisher,  # type: ignore[arg-type]
                    samples=len(chosen),
                    autocast=bench.autocast,
                )
                about: dict[str, Any] = {"samples": measured.samples, "path": measured.path}
                tensors = measured.diagonal
            else:
                grams = gram_matrices(bench.model, data, samples=len(chosen), autocast=bench.autocast)
                about, tensors = {"samples": grams.samples, "left_out": grams.left_out}, grams.matrices
        folder.mkdir(exist_ok=True)
        write(path, {"of": member.kept.hash, "kind": kind, **about}, tensors)
        return path

    # -- committing --------------------------------------------------------------------------------------------

    def _commit(
        self, command: commands.MergeRuns, members: Sequence[_Member], chosen: _Candidate, preview: Result
    ) -> Result:
        value = self._composed(command, members, chosen)
        preview = {key: preview[key] for key in ("scores", "judge", "metric") if key in preview}
        policies = {"optimizer": command.optimizer, "warmup": command.warmup, "part": self._part()}
        how = {**chosen.how, **policies, "preview": preview}
        born = [] if entry(value, "loader/subset") is None else [commands.Subset(recipe=None, selection=None)]
        return self._branches.merge(value, [(m.run, m.kept) for m in members], how, command.name, born)

    def _composed(self, command: commands.MergeRuns, members: Sequence[_Member], chosen: _Candidate) -> Value:
        """The present state with the merged model in it."""
        value = self._state.capture()
        merged, part = chosen.tensors, self._part()
        firsts: dict[tuple[Any, ...], torch.Tensor] = {}  # tied tensors stay one
        model = {}
        for name, live in _entry(value, part).items():
            place = (live.data_ptr(), live.shape, live.stride()) if live.numel() else (name,)
            model[name] = firsts.setdefault(place, merged[name])
        _replace(value, part, model)
        for name in self._state.optimizers:
            stored = [entry(member.value, name) for member in members]
            policy: Any = command.optimizer
            _replace(value, name, optimizers.merged(_entry(value, name), stored, policy, name))
        value["knobs"] = self._knobs.warmed_up(value["knobs"], command.warmup)
        return value

    # -- small things ------------------------------------------------------------------------------------------

    def _part(self) -> str:
        """The name of the model in the train state."""
        return next(name for name, module in self._state.modules.items() if module is self._sampling.model())

    def _tensors(self, member: _Member) -> Tensors:
        found = entry(member.value, self._part())
        if not isinstance(found, dict):
            raise StateMismatchError(f"{member.label} has no {self._part()!r} to merge")
        return found

    def _parent(self, member: _Member) -> Parent:
        return Parent(member.label, self._tensors(member), member.kept.path, member.kept.hash)

    def _present(self) -> str:
        """The hash of the state that the session is in, or "" if that was not saved."""
        step = self._state.counters["step"]
        rows = [row for row in queries.checkpoints(self._start.store, self._history.run) if row.step == step]
        return rows[-1].hash if rows else ""


def _chosen(
    command: commands.MergeRuns, parents: int, based: bool, tensors: Collection[str]
) -> tuple[list[str], dict[str, str]]:
    """The strategies to try, and why others of all are not."""
    for name in command.options:
        if not any(name in _options_of(strategy) for strategy in STRATEGIES):
            raise InvalidCommandError(f"no strategy has an option {name!r}")
    if command.strategies != ["all"]:
        for name in command.strategies:
            if name != GREEDY:
                strategy_named(name)
        return list(dict.fromkeys(command.strategies)), {}
    names, skipped = [], {}
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
    return [*names, GREEDY], skipped


def _options_of(strategy: Strategy) -> set[str]:
    return {option.name for option in strategy.options}


def _best(command: commands.MergeRuns, made: Sequence[_Candidate], preview: Preview | None) -> _Candidate:
    name = command.commit
    if name == "best" and preview is not None:
        name = preview.best(preview.candidates)
    for candidate in made:
        if candidate.name == name:
            return candidate
    raise InvalidCommandError(
        f"{name!r} was not made here; to commit there are: best, {', '.join(c.name for c in made)}"
    )


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


def _json(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _finite(value: Any) -> Any:
    """A value whose numbers all have a form in JSON."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return _json(value) if isinstance(value, float) else value
