"""The law: a run that was killed, and resumed by a new process, is the run that never stopped, bit for bit.

python tests/exactness/exactness_law.py CASE      checks one case, such as epochs/2p/shuffle/own/adamw/overlap/all/every=6/kills=8,11
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from exactness_cells import ACCUMULATE, EPOCH_ENDS, FACTORS, FORKED_AT, FORKED_TO, PER_EPOCH, STEPS, Cell, Order, run

STOPS = {
    "all": {"first": 1, "middle": PER_EPOCH + PER_EPOCH // 2, "last": 2 * PER_EPOCH, "next": PER_EPOCH + 1},
    # The first is a checkpoint that holds no batch of the fork yet.
    "fork": {"first": FORKED_AT, "middle": FORKED_AT + 2, "last": FORKED_AT + 4, "next": FORKED_AT + 1},
}
SEED = int(os.environ.get("ONTHEFLY_SEED") or random.randrange(10**6))
_PATIENCE = 120  # seconds for a process of a second; one that hangs must not hang the suite

# A process that is forked from one that has torch needs no 1.7 s to import it (and 1 s for what the first optimizer imports).
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["torch._dynamo", "onthefly.trainer", "sqlalchemy.dialects.sqlite"])


@dataclass(frozen=True)
class Case:
    """A cell, the steps between its checkpoints (or "epoch", or None), and the batches in which it is killed, from 1."""

    cell: Cell
    every: int | str | None
    kills: tuple[int, ...]

    def __str__(self):
        return f"{self.cell}/every={self.every or 0}/kills={','.join(map(str, self.kills))}"

    @classmethod
    def parse(cls, text):
        *values, every, kills = text.split("/")
        cell = Cell(*values)
        wrong = [value for name, values in FACTORS.items() if (value := getattr(cell, name)) not in values]
        if wrong or not cell.is_possible:
            raise ValueError(f"no such cell: {cell} ({', '.join(wrong)})")
        numbers = tuple(map(int, kills.removeprefix("kills=").split(",")))
        every = every.removeprefix("every=")
        return cls(cell, every if every == "epoch" else int(every) or None, numbers)

    def resumes(self):
        """At which step each process after the first has to begin."""
        begun = 0
        for kill in self.kills:
            begun = saved_last(self.cell, self.every, begun, kill)
            yield begun


def saved_last(cell, every, begun, kill):
    """The step of the newest checkpoint of a process that began at one step, and was killed in another's batch."""
    newest, due = begun, due_after(cell, every, begun)
    for step in range(begun, kill):  # the boundaries that it saw; it is killed behind that of `kill - 1` batches
        if step >= due and not gradients_are_pending(cell, step):
            newest, due = step, due_after(cell, every, step)
    return newest


def due_after(cell, every, step):
    """The step of the next checkpoint after that of one."""
    if every == "epoch":
        ends = EPOCH_ENDS[cell.samples] if cell.loop != "steps" else ()
        return next((end for end in ends if end > step), STEPS)
    return (step // every + 1) * every if every else STEPS


def gradients_are_pending(cell, step):
    if cell.optimisation != "accumulate":
        return False
    if cell.loop in ("flat", "steps"):  # these two know of no epochs
        return step % ACCUMULATE != 0
    begins = [0, *EPOCH_ENDS[cell.samples], *([FORKED_AT] if cell.samples == "fork" else [])]
    return (step - max(begin for begin in begins if begin <= step)) % ACCUMULATE != 0


def case_of(cell, stop, rng):
    """A case that is stopped at a place of `STOPS`, or at a random step, and killed at once or a few batches later."""
    stops = STOPS[cell.samples]
    step = stops[stop] if stop in stops else rng.randrange(1, STEPS)
    while gradients_are_pending(cell, step):
        step += 1
    return Case(cell, step, (min(step + rng.choice((1, 1, 2, 3)), STEPS),))


def random_cases(rng, count):
    """Cases of any kind: random cells, checkpoints at random distances, and one to three kills."""
    for _ in range(count):
        while not (cell := Cell(*(rng.choice(values) for values in FACTORS.values()))).is_possible:
            pass
        kills = sorted(rng.sample(range(1, STEPS + 1), rng.choice((1, 1, 2, 3))))
        yield Case(cell, rng.choice((None, "epoch", *range(1, STEPS))), tuple(kills))


# -- processes -------------------------------------------------------------------------------------------------


class Processes:
    """The trainings of one cell. With the block ends what is left of them.

    That may be a loader worker: one that is just being started when its trainer is killed does not notice, and would stay.
    """

    def __init__(self, cell, folder):
        self._cell = cell
        self._folder = folder
        self._started = []

    def start(self, store, number, **options):
        """Start a training that is recorded in a store of that name: its first process (0), or a later one."""
        folder, trace = self._folder / store, self._folder / f"{store}-{number}.trace"
        folder.mkdir(parents=True, exist_ok=True)
        # A later process has other random numbers at first: what it does not restore cannot be right by chance.
        options = {"resumed": number > 0, "seed": 1 + number, **options}
        self._started.append(Process(Order(self._cell, str(folder), str(trace), **options)))
        return self._started[-1]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self._started:
            process.end()


class Process:
    """A training that is under way."""

    def __init__(self, order):
        self.order = order
        self._process = _processes.Process(target=run, args=(order,))
        self._process.start()

    def lines(self):
        """Its trace, once it has ended as it should: killed if it was to be killed, and well if not."""
        self._process.join(_PATIENCE)
        assert not self._process.is_alive(), f"a process hung; {self._said()}"
        code, expected = self._process.exitcode, -9 if self.order.kill or self.order.kill_at else 0
        assert code == expected, f"a process ended with {code}, not {expected}; {self._said()}"
        trace = Path(self.order.trace)
        return [json.loads(line) for line in trace.read_text().splitlines()] if trace.exists() else []

    def end(self):
        self._process.kill()
        self._process.join()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # the group that `run` made, if anyone is left in it

    def _said(self):
        return f"it said:\n{Path(self.order.trace).with_suffix('.out').read_text()}"


# -- the law ---------------------------------------------------------------------------------------------------


def check(case, folder):
    """Raises `AssertionError`, naming the first difference, and how to check this case alone."""
    cell = case.cell
    try:
        with Processes(cell, folder) as processes:
            whole = processes.start("whole", 0, every="epoch")
            plain = processes.start("plain", 0, attached=False) if cell.has_plain_loop else None
            parts = killed_and_resumed(case, processes)
            never_stopped = whole.lines()
            if plain is not None:
                assert_same_as_plain(plain.lines(), never_stopped)
            assert_same_run(cell, never_stopped, parts, list(case.resumes()))
    except AssertionError as e:
        raise AssertionError(f"{e}\nto check this case alone: {sys.executable} {__file__} {case}") from None


def check_plain(cell, folder, **options):
    """An attached run is the plain loop."""
    with Processes(cell, folder) as processes:
        attached, plain = processes.start("whole", 0, **options), processes.start("plain", 0, attached=False)
        assert_same_as_plain(plain.lines(), attached.lines())


def check_killed_at(cell, moment, folder):
    """A run that was killed between `attach` and its first step, or between its last and the session's end."""
    with Processes(cell, folder) as processes:
        whole, killed = processes.start("whole", 0), processes.start("stopped", 0, kill_at=moment)
        before = killed.lines()
        # Before its first step a run has no checkpoint: it begins anew, from the objects as the script makes them.
        again = {"seed": 1} if moment == "attached" else {}
        after = processes.start("stopped", 1, **again).lines()
        assert_same_run(cell, whole.lines(), [before, after], [0 if moment == "attached" else STEPS])


def killed_and_resumed(case, processes):
    """The traces of all the processes that a run took."""
    parts, begun = [], 0
    for number, (kill, resumed) in enumerate(zip(case.kills, case.resumes(), strict=True)):
        parts.append(processes.start("stopped", number, every=case.every, kill=kill - begun).lines())
        begun = resumed
    return [*parts, processes.start("stopped", len(case.kills), every=case.every).lines()]


def assert_same_as_plain(plain, attached):
    assert len(plain) == len(attached) == STEPS + 1
    for step, (mine, other) in enumerate(zip(plain[:-1], attached[:-1], strict=True), 1):
        for key in mine:
            assert other[key] == mine[key], differs(f"{key} of step {step}", mine[key], other[key], "plain loop")
    assert_same_leaves("live", plain[-1]["live"], attached[-1]["live"], "plain loop")


def assert_same_run(cell, whole, parts, resumes):
    """Every process's batches, and the end, are those of the run that never stopped."""
    *batches, end = whole
    assert len(batches) == STEPS, f"the run that never stopped had {len(batches)} batches, not {STEPS}"
    if cell.samples == "fork":
        forked = {index for batch in batches[FORKED_AT:] for index in batch["indices"]}
        assert forked <= set(FORKED_TO), f"a batch of the fork held other samples: {forked - set(FORKED_TO)}"
    what = ("indices",) if cell.is_announced else ("indices", "inputs", "loss")
    *killed, (*rest, last) = parts
    for begun, part in zip([0, *resumes], [*killed, rest], strict=True):
        for step, (mine, other) in enumerate(zip(batches[begun:], part, strict=False), begun + 1):
            for key in what:
                assert other[key] == mine[key], differs(f"{key} of step {step}", mine[key], other[key])
    begun = (0, *resumes)[-1]
    assert len(rest) == STEPS - begun, (
        f"the last process had {len(rest)} batches; from step {begun} there were {STEPS - begun}"
    )
    if cell.is_announced:
        assert any("dataset.noise" in reason for reason in last["inexact"]), "nobody said that this cell is inexact"
        return
    assert last["inexact"] == end["inexact"] == [], f"this cell is said to be inexact: {last['inexact']}"
    assert last["differences"] == 0, "the session itself found that repeated steps came out otherwise"
    for part in ("logged", "live", "checkpoint"):
        assert_same_leaves(part, end[part], last[part])
    assert last["step"] == STEPS, f"the newest checkpoint is of step {last['step']}, not of the last, {STEPS}"
    assert last["hash"] == end["hash"], "the last checkpoints differ, though none of their leaves does"


def assert_same_leaves(part, mine, other, whose="run that never stopped"):
    for leaf in {**mine, **other}:
        assert mine.get(leaf) == other.get(leaf), differs(f"{part}: {leaf}", mine.get(leaf), other.get(leaf), whose)


def differs(what, mine, other, whose="run that never stopped"):
    return f"first difference: {what} is {mine} in the {whose}, and {other} in the other"


if __name__ == "__main__":
    for text in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as place:
            check(Case.parse(text), Path(place))
        print(f"{text}: exact")
