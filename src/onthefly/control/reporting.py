"""Reports of a live session: collectors are put on at one boundary and taken off at another, and what they read is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from statistics import median
from typing import Any

from onthefly.control import commands
from onthefly.control.checkpointer import Checkpointer, Save
from onthefly.control.history import History
from onthefly.control.ring import Kept
from onthefly.control.sampling import Inputs
from onthefly.control.start import Start, environment
from onthefly.errors import CommandError, InvalidCommandError
from onthefly.health import activations, determinism, distribution, gradients, health, numerics, throughput
from onthefly.health.collect import ranks
from onthefly.health.collect.collection import Collected, Collection, Subject
from onthefly.health.findings import Finding, Report, Table, in_order
from onthefly.state import rng
from onthefly.state.knobs import CLIP, Knobs
from onthefly.state.loader import ExactLoader
from onthefly.state.train_state import TrainState

Result = dict[str, Any]

_DOUBLE_RUN = 3  # steps: what differs at all mostly differs in the first
_MOST_ROWS, _MOST_IN_SUMMARY = 200, 40  # of a table: a report is kept for as long as the store
_IN_STEPS = {"health", "numerics", "activations", "gradients", "throughput"}
"""Reports of what happens in steps: while training stands they have nothing to look at."""


@dataclass
class _Asked:
    """A report that is under way."""

    command: commands.ReportRun
    future: Future[Result]
    begun: int
    steps: int
    start: Future[Kept] | None
    """The checkpoint that a double run begins from."""


class Reporting:
    """Owns the report under way: one at a time.

    The session calls `boundary` when it comes to a boundary and `leave` when it goes on; `end` when the steps stop being those
    of one training: then the report is of what was seen until there.
    """

    def __init__(
        self,
        state: TrainState,
        knobs: Knobs,
        loader: ExactLoader | None,
        inputs: Inputs,
        begun: Start,
        history: History,
        checkpointer: Checkpointer,
        save: Save,
    ) -> None:
        self.watch: Collection | None = None
        """Collects what the steps tell, while a report is under way."""
        self.paused = False
        self._asked: _Asked | None = None
        self._state = state
        self._knobs = knobs
        self._loader = loader
        self._inputs = inputs
        self._start = begun
        self._history = history
        self._checkpointer = checkpointer
        self._save = save
        self._epoch = 0

    def begin(self, command: commands.ReportRun) -> Result | Future[Result]:
        """Begin a report at this boundary. While training stands it is of what can be seen standing.

        Raises `CommandError` while another is under way.
        """
        if self._asked is not None:
            raise CommandError(
                f"a report on {self._asked.command.report} is under way, up to step {self._asked.begun + self._asked.steps}; "
                "ask again then"
            )
        kind, step = command.report, self._step
        if kind == "distribution":
            return self._told(command, Collected(0), [], step)
        if self.paused:
            seen = "steps" if kind in _IN_STEPS else "operations, and a double run"
            missing = [f"{seen}: the session is paused, and they are seen only while it trains (`onthefly resume`)"]
            return self._told(command, Collected(0), missing, step)
        start = None
        steps = _DOUBLE_RUN if kind == "determinism" else command.steps
        if kind == "determinism" and command.double_run and self._start.launch is not None:
            start = self._save("report")
        self.watch = Collection(self._subject(), kind, step, steps, lambda: self._checkpointer.spent)
        self._epoch = self._state_number("epoch")
        self._asked = _Asked(command, Future(), step, steps, start)
        self._history.event("reportBegun", step, self._epoch, kind=kind, steps=steps)
        return self._asked.future

    @property
    def next_step(self) -> float:
        """The step of the boundary that this wants to be told of."""
        return self._step + 1 if self.watch is not None else float("inf")

    def boundary(self) -> None:
        """A step, or the time before the first one, is over."""
        if self.watch is None or self._asked is None:
            return
        epoch = self._state_number("epoch")
        numbers = self.watch.enter(epoch != self._epoch)
        self._record(numbers)
        self._epoch = epoch
        if self._step >= self._asked.begun + self._asked.steps:
            self._finish([], whole=True)

    def leave(self) -> None:
        """From the boundary into the next step."""
        if self.watch is not None:
            self.watch.leave()

    def disturbed(self) -> None:
        """A command is carried out: this boundary's time is not the training's."""
        if self.watch is not None:
            self.watch.disturbed()

    def cancel(self) -> None:
        """Make the report under way of what was seen until here. Raises `InvalidCommandError` if there is none."""
        if self._asked is None:
            raise InvalidCommandError("no report is under way")
        self.end("it was cancelled")

    def end(self, reason: str) -> None:
        """The steps end here: take the collectors off, and answer with what they have seen."""
        if self._asked is None or self.watch is None:
            return
        done = f"{self.watch.steps} of {self._asked.steps} steps"
        self._finish([f"all after {done}: {reason}"], whole=False)

    # -- parts -------------------------------------------------------------------------------------------------

    @property
    def _step(self) -> int:
        return self._state_number("step")

    def _state_number(self, name: str) -> int:
        return int(self._state.counters.get(name) or 0)

    def _subject(self) -> Subject:
        return Subject(
            modules=self._state.modules,
            optimizers=self._state.optimizers,
            scaler=self._inputs.scaler,
            loader=self._loader,
            train_loader=self._inputs.train_loader,
            clip=lambda: self._knobs.values().get(CLIP),
        )

    def _finish(self, missing: list[str], *, whole: bool) -> None:
        asked, watch = self._asked, self.watch
        if asked is None or watch is None:
            return
        self._asked = self.watch = None
        watch.close()
        end: Future[Kept] | None = None
        try:
            if asked.command.double_run and asked.command.report == "determinism":
                if asked.start is None:
                    missing = [
                        *missing,
                        "a double run: this process was not started by a command line that can be run again",
                    ]
                elif whole:
                    end = self._save("report")
                else:
                    missing = [*missing, "a double run: it needs three steps on end"]
            result = self._told(asked.command, watch.collected(), missing, asked.begun)
        except Exception as e:  # noqa: BLE001  whoever waits is told, and training goes on
            asked.future.set_exception(CommandError(f"the report failed: {type(e).__name__}: {e}"))
            return
        if asked.start is None or end is None:
            asked.future.set_result(result)
        else:
            _once_saved(asked.start, end, asked.future, result)

    def _told(self, command: commands.ReportRun, collected: Collected, missing: list[str], begun: int) -> Result:
        """The report as an answer, recorded as an event, its numbers as metrics."""
        kind = command.report
        findings, facts = self._judged(kind, collected)
        most = _MOST_IN_SUMMARY if kind == "health" else _MOST_ROWS
        newest = self._checkpointer.ring.newest()
        looked = collected.steps > 0
        report = Report(
            kind=kind,
            run=self._history.run,
            generation=self._history.generation,
            step=self._step,
            epoch=self._state_number("epoch"),
            live=True,
            first_step=begun + 1 if looked else None,
            last_step=begun + collected.steps if looked else None,
            checkpoint=newest.hash if newest is not None else None,
            checkpoint_step=newest.step if newest is not None else None,
            findings=in_order(findings),
            facts=tuple(facts),
            missing=(*collected.missing, *missing),
            tables=tuple(table.at_most(most) for table in _tables(kind, collected)),
        )
        self._record(_metrics(collected))
        told = report.to_json()
        # Everybody who follows the events gets them; tables are for who asks for the report.
        event = {name: value for name, value in told.items() if name != "tables"}
        self._history.event("report", report.step, report.epoch, **event)
        return told

    def _judged(self, kind: str, collected: Collected) -> tuple[list[Finding], list[str]]:
        findings: list[Finding] = []
        facts: list[str] = []
        summary = kind == "health"

        def add(judged: Iterable[Finding], told: Callable[[], list[str]]) -> None:
            findings.extend(judged)
            facts.extend([] if summary else told())

        if collected.numerics is not None:
            seen = collected.numerics
            add(numerics.judge(seen), lambda: numerics.facts(seen))
        if collected.activations is not None and kind in ("health", "activations"):
            active = collected.activations
            add(activations.judge(active), lambda: activations.facts(active))
        if collected.gradients is not None:
            slopes = collected.gradients
            add(gradients.judge(slopes), lambda: gradients.facts(slopes))
        if collected.throughput is not None:
            times = collected.throughput
            add(throughput.judge(times), lambda: throughput.facts(times))
        if kind in ("health", "determinism"):
            exact = self._exactness(collected)
            add(determinism.judge(exact), lambda: determinism.facts(exact))
        if kind in ("health", "distribution"):
            indices = self._loader.indices if self._loader is not None else None
            number = ranks.world()[1]
            mine = ranks.this_rank(self._state.modules, self._step, indices)
            among = distribution.Numbers([mine], number)
            add(distribution.judge(among), lambda: distribution.facts(among))
            if number > 1:
                # A collective call that the other ranks do not make would hang the training.
                collected.missing.append(
                    "the other ranks: each has a session of its own; `health.collect.ranks.gathered`, called by all, compares them"
                )
        if summary:
            findings.extend(health.judge(self._course()))
        return findings, facts

    def _exactness(self, collected: Collected) -> determinism.Numbers:
        loader = self._inputs.train_loader
        found = rng.find_generators({name: getattr(loader, name, None) for name in ("dataset", "collate_fn")})
        return determinism.Numbers(
            environment=environment(),
            inexact=self._start.inexact,
            operations=collected.operations,
            generators=sorted(found),
            workers=getattr(loader, "num_workers", None),
            step=self._step,
        )

    def _course(self) -> health.Numbers:
        schedulers = [
            health.Scheduler(name, int(one.last_epoch), float(one.optimizer.param_groups[0]["lr"]))
            for name, one in self._inputs.schedulers.items()
            if hasattr(one, "last_epoch") and hasattr(one, "optimizer")
        ]
        loader = self._loader
        first = loader.batches if loader is not None and loader.subset is None else None
        return health.Numbers(
            step=self._step, epoch=self._state_number("epoch"), schedulers=schedulers, first_epoch_ended=first
        )

    def _record(self, numbers: dict[str, float]) -> None:
        """As metrics of this step; but not in steps that are being repeated, where they would be held against those of before."""
        if numbers and self._step > self._history.head:
            self._history.metrics(self._step, self._state_number("epoch"), numbers)


def _tables(kind: str, collected: Collected) -> Iterator[Table]:
    """Those of the report that was asked for: to judge one kind, some of another may have been read."""
    wanted = {kind} if kind != "health" else {"numerics", "activations", "gradients", "throughput"}
    if collected.throughput is not None and "throughput" in wanted:
        yield from throughput.tables(collected.throughput)
    if collected.gradients is not None and "gradients" in wanted:
        yield from gradients.tables(collected.gradients)
    if collected.activations is not None and "activations" in wanted:
        yield from activations.tables(collected.activations)
    if collected.numerics is not None and "numerics" in wanted:
        yield from numerics.tables(collected.numerics)


def _metrics(collected: Collected) -> dict[str, float]:
    """What is worth a chart over a run: one number for each layer and report."""
    found: dict[str, float] = {}
    for p in collected.numerics.parameters if collected.numerics is not None else ():
        if p.ratios and p.dimensions > 1:
            found[f"health/update_ratio/{p.name}"] = median(p.ratios)
            found[f"health/weight_norm/{p.name}"] = p.norms[-1]
    for layer in collected.activations.layers if collected.activations is not None else ():
        if layer.units:
            found[f"health/dead/{layer.name}"] = layer.dead / layer.units
    if (slopes := collected.gradients) is not None:
        found |= {f"health/gradient_norm/{w.name}": median(w.norms) for w in slopes.weights if w.norms}
        if slopes.noise is not None and slopes.noise.scale is not None:
            found["health/noise_scale"] = slopes.noise.scale
    return found


def _once_saved(start: Future[Kept], end: Future[Kept], answer: Future[Result], result: Result) -> None:
    """Answer when both checkpoints of a double run are durable, with their places; the writer saves them in their order."""

    def tell(done: Future[Kept]) -> None:
        if start.exception() is not None or done.exception() is not None:
            missing = [*result["missing"], f"a double run: {start.exception() or done.exception()}"]
            answer.set_result({**result, "missing": missing})
            return
        ends = [start.result(), done.result()]
        about = [{"run": result["run"], "hash": kept.hash, "path": str(kept.path), "step": kept.step} for kept in ends]
        answer.set_result({**result, "checkpoints": about})

    end.add_done_callback(tell)
