"""Recipes: how samples are chosen, as plain JSON, and as the short notation that people type.

    {"select": "quantile", "field": "loss", "low": 0.9, "high": 1.0}         quantile(loss, 0.9, 1)
    {"minus": [{"select": "hard", "fraction": 0.1}, {"select": "suspects"}]}   hard(0.1) - suspects()

`and` (&), `or` (|) and `minus` (-) compose two recipes each. `SELECTORS` lists what there is to compose.
"""

from __future__ import annotations

import ast
import itertools
import math
import numbers
import operator
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onthefly.errors import InvalidCommandError, MissingPartError
from onthefly.samples import selectors

Recipe = dict[str, Any]
Columns = Mapping[str, np.ndarray]

SCAN_FIELDS = ("loss", "correct", "confidence", "margin", "el2n", "prediction", "label")
DYNAMICS_FIELDS = (
    *("seen", "last_loss", "mean_loss", "variability", "max_loss", "forgotten", "known"),
    *("mean_confidence", "confidence_variability", "mean_margin"),
)
DEPTH = 32
"""How deep recipes may be nested."""

_JUDGED_BY_SCAN = ("confidence", "margin", "prediction", "label")
_JUDGED_BY_DYNAMICS = ("seen", "mean_confidence", "confidence_variability", "mean_margin")
_NOTHING: Any = object()
_LARGEST = 2**63 - 1  # what an index can be; a number of any length would be one that cannot even be printed
_SIGNS = {"and": "&", "or": "|", "minus": "-"}
_OPERATORS: dict[type[ast.operator], str] = {ast.BitAnd: "and", ast.BitOr: "or", ast.Sub: "minus"}
_ALGEBRA = {"and": selectors.intersection, "or": selectors.union, "minus": selectors.difference}


@dataclass(frozen=True)
class Needs:
    """What a recipe reads. `either`: dynamics or a scan, whichever is there (`enough_dynamics` says which)."""

    scan: bool
    embedding: bool
    dynamics: bool
    either: bool
    columns: frozenset[str]
    """The columns that it reads in any case: those of `either` are not among them."""


@dataclass(frozen=True)
class LabelDoubt:
    """How many of the chosen samples are likely label errors."""

    chosen: int
    size: int
    base: float
    """Their rate in the whole data set, 0 to 1."""

    @property
    def rich(self) -> bool:
        """Whether to warn: 5 or more, 10 % of the selection or more, and over 3 times the odds of the whole data set.

        Odds, since no rate can be 3 times one that is above a third.
        """
        over = self.chosen * (1 - self.base) > 3 * self.base * (self.size - self.chosen)
        return self.chosen >= 5 and self.chosen >= 0.1 * self.size and over


@dataclass(frozen=True)
class _Argument:
    name: str
    check: Callable[[str, Any], Any]
    default: Any = _NOTHING
    many: bool = False  # takes all further arguments, in the notation


@dataclass(frozen=True)
class _Selector:
    arguments: tuple[_Argument, ...]
    choose: Callable[[Recipe, _Values], np.ndarray]
    columns: tuple[str, ...] = ()
    either: bool = False


class _Values:
    """The columns that a recipe is applied to."""

    def __init__(self, columns: Columns, length: int) -> None:
        self.columns = columns
        self.length = length

    def __getitem__(self, name: str) -> np.ndarray:
        """A column with a value for every sample; NaN where it has none. Raises what `choose` says."""
        column = self.raw(name)
        if name in ("label", "prediction"):
            return np.where(column >= 0, column, np.nan)
        if name == "correct" and "label" in self.columns:
            return np.where(self.raw("label") >= 0, column, np.nan)
        if name in DYNAMICS_FIELDS and name != "seen" and "seen" in self.columns:
            return np.where(self.raw("seen") > 0, column, np.nan)
        return column

    def raw(self, name: str) -> np.ndarray:
        if name not in self.columns:
            raise MissingPartError(_missing(name, self.columns))
        column = self.columns[name]
        if len(column) != self.length:
            raise InvalidCommandError(
                f"`{name}` has values of {len(column)} samples, and the data set has {self.length}: scan it again"
            )
        if column.dtype.kind == "f" and not np.isfinite(column).any():
            raise InvalidCommandError(f"`{name}` has no finite value for any sample: choose by another field")
        return column

    def suspects(self) -> np.ndarray:
        if enough_dynamics(self.columns):
            self.raw("seen")
            return selectors.suspects_by_dynamics(*(self.columns[name] for name in _JUDGED_BY_DYNAMICS))
        return selectors.suspects_by_scan(*(self.raw(name) for name in _JUDGED_BY_SCAN))

    def noise_aware(self, fraction: float) -> np.ndarray:
        values = self["mean_loss" if enough_dynamics(self.columns) else "loss"]
        return selectors.noise_aware_hard(values, fraction, self.suspects())


def parse(text: str) -> Recipe:
    """Read the notation: ``top(el2n, 500) & cluster(20, 3, 7)``. Python's precedence: - before & before |.

    Raises `InvalidCommandError` for what is none; the message lists the selectors there are.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise InvalidCommandError(f"{_short(text)} cannot be read as a selection ({e}); {_there_are()}") from e
    return check(_read(tree.body, 1))


def check(recipe: Any) -> Recipe:
    """A recipe in its normal form: defaults written out, numbers of one type, indices sorted.

    Raises `InvalidCommandError`, naming the argument that is wrong.
    """
    return _check(recipe, 1)


def describe(recipe: Recipe) -> str:
    """The notation of a recipe: `parse` gives the same recipe again."""
    return _describe(check(recipe))


def needs(recipe: Recipe) -> Needs:
    """What has to be there, or be computed, before `choose`."""
    leaves = _leaves(check(recipe))
    kinds = [SELECTORS[leaf["select"]] for leaf in leaves]
    columns = {leaf["field"] for leaf in leaves if "field" in leaf} | {c for kind in kinds for c in kind.columns}
    return Needs(
        scan=not columns.isdisjoint(SCAN_FIELDS),
        embedding="embedding" in columns,
        dynamics=not columns.isdisjoint(DYNAMICS_FIELDS),
        either=any(kind.either for kind in kinds),
        columns=frozenset(columns),
    )


def enough_dynamics(columns: Columns) -> bool:
    """Whether training has recorded enough to judge labels by: more than half of the samples, 3 times or more each."""
    if not all(name in columns for name in (*_JUDGED_BY_DYNAMICS, "mean_loss")):
        return False
    seen = columns["seen"]
    return bool(np.count_nonzero(seen >= selectors.RECORDINGS) * 2 > len(seen))


def choose(recipe: Recipe, columns: Columns, length: int) -> np.ndarray:
    """The indices that a recipe gives for a data set of `length` samples: sorted, unique, int64, never empty.

    Equal columns give equal indices. Raises `InvalidCommandError` for an empty result, for indices beyond the end and for
    columns of another length, and `MissingPartError` when a column is not there.
    """
    recipe = check(recipe)
    chosen = _choose(recipe, _Values(columns, length))
    if not len(chosen):
        raise InvalidCommandError(
            f"no sample fits {_short(_describe(recipe))}: widen it (a larger fraction, k or range, | in place of &)"
        )
    return chosen


def likely_label_errors(columns: Columns, indices: np.ndarray) -> LabelDoubt | None:
    """How many of the chosen samples are likely label errors; None when there are no columns to judge by."""
    by_scan = all(name in columns for name in _JUDGED_BY_SCAN)
    if not len(indices) or not (enough_dynamics(columns) or by_scan):
        return None
    length = len(columns["seen" if enough_dynamics(columns) else "label"])
    if by_scan and not enough_dynamics(columns) and not np.isfinite(columns["margin"]).any():
        return None
    suspected = _Values(columns, length).suspects()
    both = np.isin(indices, suspected, assume_unique=True)
    return LabelDoubt(int(np.count_nonzero(both)), len(indices), len(suspected) / length)


# -- arguments -----------------------------------------------------------------------------------------------------


def _whole(low: int, high: int = _LARGEST) -> Callable[[str, Any], int]:
    def checked(name: str, value: Any) -> int:
        try:
            if isinstance(value, bool):
                raise TypeError
            number = operator.index(value)
        except TypeError:
            raise InvalidCommandError(f"{name} must be a whole number, not {_short(value)}") from None
        if not low <= number <= high:
            limits = f"{low} or more" if number < low and high == _LARGEST else f"{low} to {high}"
            raise InvalidCommandError(f"{name} must be {limits}, not {_short(number)}")
        return number

    return checked


def _real(name: str, value: Any) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError
        number = float(value)
    except (TypeError, OverflowError):
        raise InvalidCommandError(f"{name} must be a number, not {_short(value)}") from None
    if not math.isfinite(number):
        raise InvalidCommandError(f"{name} must be a finite number, not {number}")
    return number


def _end(name: str, value: Any) -> float | None:
    return None if value is None else _real(name, value)


def _quantile(name: str, value: Any) -> float:
    number = _real(name, value)
    if not 0 <= number <= 1:
        raise InvalidCommandError(f"{name} is a quantile, 0 to 1, not {number:g}")
    return number


def _fraction(name: str, value: Any) -> float:
    number = _real(name, value)
    if not 0 < number <= 1:
        raise InvalidCommandError(f"{name} must be above 0 and at most 1, not {number:g}")
    return number


def _field(name: str, value: Any) -> str:
    if not isinstance(value, str) or value not in SCAN_FIELDS + DYNAMICS_FIELDS:
        there_are = ", ".join(SCAN_FIELDS + DYNAMICS_FIELDS)
        raise InvalidCommandError(f"{name} must be one of {there_are}, not {_short(value)}")
    return value


def _distinct(name: str, value: Any) -> list[int]:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple) or not value:
        raise InvalidCommandError(f"{name} must be a list of one or more whole numbers, not {_short(value)}")
    whole = _whole(0)
    found = sorted(whole(name, one) for one in value)
    twice = next((a for a, b in itertools.pairwise(found) if a == b), None)
    if twice is not None:
        raise InvalidCommandError(f"{name} must be different numbers, and {twice} is there twice")
    return found


def _of_indices(recipe: Recipe, values: _Values) -> np.ndarray:
    indices: list[int] = recipe["indices"]
    if indices[-1] >= values.length:
        raise InvalidCommandError(
            f"index {indices[-1]} is beyond the data set, which has {values.length} samples: 0 to {values.length - 1}"
        )
    return np.array(indices, np.int64)


_FIELD = _Argument("field", _field)
_K = _Argument("k", _whole(1))
_SHARE = _Argument("fraction", _fraction)
_SEED = _Argument("seed", _whole(0, 2**32 - 1), default=0)

SELECTORS: Mapping[str, _Selector] = {
    "all": _Selector((), lambda r, v: np.arange(v.length, dtype=np.int64)),
    "indices": _Selector((_Argument("indices", _distinct, many=True),), _of_indices),
    "quantile": _Selector(
        (_FIELD, _Argument("low", _quantile), _Argument("high", _quantile, default=1.0)),
        lambda r, v: selectors.quantile(v[r["field"]], r["low"], r["high"]),
    ),
    "range": _Selector(
        (_FIELD, _Argument("low", _end, default=None), _Argument("high", _end, default=None)),
        lambda r, v: selectors.value_range(v[r["field"]], r["low"], r["high"]),
    ),
    "top": _Selector((_FIELD, _K), lambda r, v: selectors.top(v[r["field"]], r["k"])),
    "class_top": _Selector(
        (_FIELD, _K),
        lambda r, v: selectors.class_balanced_top(v[r["field"]], v.raw("label"), r["k"]),
        columns=("label",),
    ),
    "cluster": _Selector(
        (_K, _Argument("which", _distinct, many=True), _SEED),
        lambda r, v: selectors.clusters(v.raw("embedding"), r["k"], which=r["which"], seed=r["seed"]),
        columns=("embedding",),
    ),
    "hard": _Selector((_SHARE,), lambda r, v: selectors.hard(v["mean_loss"], r["fraction"]), columns=("mean_loss",)),
    "ambiguous": _Selector(
        (_SHARE,),
        lambda r, v: selectors.ambiguous(v["confidence_variability"], r["fraction"]),
        columns=("confidence_variability",),
    ),
    "forgotten": _Selector(
        (_Argument("times", _whole(1), default=1),),
        lambda r, v: selectors.forgotten(v["forgotten"], r["times"]),
        columns=("forgotten",),
    ),
    "el2n": _Selector((_SHARE,), lambda r, v: selectors.el2n(v["el2n"], r["fraction"]), columns=("el2n",)),
    "margin": _Selector((_SHARE,), lambda r, v: selectors.margin(v["margin"], r["fraction"]), columns=("margin",)),
    "random": _Selector((_K, _SEED), lambda r, v: selectors.random(v.length, r["k"], r["seed"])),
    "suspects": _Selector((), lambda r, v: v.suspects(), either=True),
    "noise_aware": _Selector((_SHARE,), lambda r, v: v.noise_aware(r["fraction"]), either=True),
}
"""Every selector by its name, with its arguments in order."""


# -- the two forms -------------------------------------------------------------------------------------------------


def _check(recipe: Any, depth: int) -> Recipe:
    if depth > DEPTH:
        raise InvalidCommandError(f"recipes can be nested {DEPTH} deep, and this one is deeper")
    if not isinstance(recipe, Mapping):
        raise InvalidCommandError(f"a recipe is an object such as {{'select': 'all'}}, not {_short(recipe)}")
    if "select" in recipe:
        return _check_leaf(recipe)
    if len(recipe) == 1 and (key := next(iter(recipe))) in _SIGNS:
        parts = recipe[key]
        if not isinstance(parts, list | tuple) or len(parts) != 2:
            raise InvalidCommandError(f"{key!r} takes a list of two recipes, not {_short(parts)}")
        return {key: [_check(part, depth + 1) for part in parts]}
    raise InvalidCommandError(f"a recipe has `select`, or one of `and`, `or`, `minus`; this has {_short(list(recipe))}")


def _check_leaf(recipe: Mapping[str, Any]) -> Recipe:
    kind = recipe["select"]
    if not isinstance(kind, str) or kind not in SELECTORS:
        raise InvalidCommandError(f"there is no selector {_short(kind)}; {_there_are()}")
    arguments = SELECTORS[kind].arguments
    unknown = [name for name in recipe if name != "select" and name not in {a.name for a in arguments}]
    if unknown:
        raise InvalidCommandError(f"{_usage(kind)} has no argument {_short(unknown[0])}")
    found: Recipe = {"select": kind}
    for argument in arguments:
        value = recipe.get(argument.name, argument.default)
        if value is _NOTHING:
            raise InvalidCommandError(f"{_usage(kind)} needs its argument `{argument.name}`")
        found[argument.name] = argument.check(f"`{argument.name}` of {kind}", value)
    _check_together(kind, found)
    return found


def _check_together(kind: str, found: Recipe) -> None:
    if kind == "quantile" and not found["low"] < found["high"]:
        raise InvalidCommandError(f"`low` of quantile must be below `high`, not {found['low']:g} and {found['high']:g}")
    if kind == "range":
        low, high = found["low"], found["high"]
        if low is None and high is None:
            raise InvalidCommandError("range needs `low`, `high` or both")
        if low is not None and high is not None and low > high:
            raise InvalidCommandError(f"`low` of range must be at most `high`, not {low:g} and {high:g}")
    if kind == "cluster" and found["which"][-1] >= found["k"]:
        raise InvalidCommandError(f"`which` of cluster must be below `k` = {found['k']}, not {found['which'][-1]}")


def _read(node: ast.expr, depth: int) -> Recipe:
    if depth > DEPTH:
        raise InvalidCommandError(f"recipes can be nested {DEPTH} deep, and this one is deeper")
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return {_OPERATORS[type(node.op)]: [_read(node.left, depth + 1), _read(node.right, depth + 1)]}
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise InvalidCommandError(f"a selection is made of selectors with (), &, | and -; {_there_are()}")
    kind = node.func.id
    if kind not in SELECTORS:
        raise InvalidCommandError(f"there is no selector {kind!r}; {_there_are()}")
    found: Recipe = {"select": kind}
    given = [_constant(argument, kind) for argument in node.args]
    for argument in SELECTORS[kind].arguments:
        if argument.many:
            if given:
                found[argument.name], given = given, []
        elif given:
            found[argument.name] = given.pop(0)
    if given:
        raise InvalidCommandError(f"too many arguments: it is {_usage(kind)}")
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in found:
            raise InvalidCommandError(f"`{keyword.arg or '**'}` cannot stand here: it is {_usage(kind)}")
        found[keyword.arg] = _constant(keyword.value, kind)
    return found


def _constant(node: ast.expr, kind: str) -> Any:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Constant(value=int() | float() | str() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
    raise InvalidCommandError(f"an argument is a number or the name of a field; it is {_usage(kind)}")


def _describe(recipe: Recipe) -> str:
    if "select" in recipe:
        return f"{recipe['select']}({', '.join(_arguments(recipe))})"
    ((key, parts),) = recipe.items()
    first, second = (_describe(part) if "select" in part else f"({_describe(part)})" for part in parts)
    return f"{first} {_SIGNS[key]} {second}"


def _arguments(recipe: Recipe) -> list[str]:
    words: list[str] = []
    by_name = False
    for argument in SELECTORS[recipe["select"]].arguments:
        value = recipe[argument.name]
        if argument.many:
            words += map(str, value)
            by_name = True
        elif value != argument.default or argument.default is _NOTHING:
            words.append(f"{argument.name}={_number(value)}" if by_name else _number(value))
        else:
            by_name = True  # what follows one that is left out
    return words


def _number(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)


def _leaves(recipe: Recipe) -> list[Recipe]:
    if "select" in recipe:
        return [recipe]
    return [leaf for parts in recipe.values() for part in parts for leaf in _leaves(part)]


def _choose(recipe: Recipe, values: _Values) -> np.ndarray:
    if "select" in recipe:
        return SELECTORS[recipe["select"]].choose(recipe, values)
    ((key, parts),) = recipe.items()
    return _ALGEBRA[key](_choose(parts[0], values), _choose(parts[1], values))


# -- messages ------------------------------------------------------------------------------------------------------


def _usage(kind: str) -> str:
    def shown(argument: _Argument) -> str:
        if argument.many:
            return f"{argument.name}..."
        return argument.name if argument.default is _NOTHING else f"{argument.name}={argument.default}"

    return f"{kind}({', '.join(map(shown, SELECTORS[kind].arguments))})"


def _there_are() -> str:
    return f"there are: {', '.join(map(_usage, SELECTORS))}"


def _short(value: Any) -> str:
    try:
        text = repr(value) if isinstance(value, str) else reprlib.repr(value)  # of a long list the first few
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _missing(name: str, columns: Columns) -> str:
    if name == "embedding":
        return "there are no embeddings: scan with embeddings (`onthefly scan --embeddings`; embed= says how)"
    if name in DYNAMICS_FIELDS:
        return (
            f"training has recorded no `{name}`: pass per_sample_loss= to attach, or call session.log_samples(losses) "
            "at every step"
        )
    if "loss" in columns:
        return f"the scan has no `{name}`: only that of a classifier has (outputs [N, C], whole-number targets [N])"
    return f"there is no `{name}` yet: run `onthefly scan`; a loss of several numbers needs per_sample_loss="
