"""Strategies: pure functions from one tensor's numbers in several parents to its numbers in the merge.

Each computes in float64, one operation after the other in a fixed order. It adds products by ``a + b * c`` and never by one
fused operation, which rounds once where there is such an instruction and twice where not; and sums by halves, since torch
sums in an order that depends on threads and processor. So what is elementwise gives equal bits on every machine, however it
is sliced. (`regmean` and `lora` go through LAPACK, `slerp` through the C library's sine: equal bits on one machine.)

A new strategy is a function here, a line in `registry`, and its words in `catalogue`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from onthefly.errors import InvalidCommandError, StateMismatchError

SLICE = 2**15
"""Numbers that are computed with at once: as float64 they fit the cache of one core, and torch does not split them among
threads, which wait for each other longer than they compute, the more so where other processes want the cores.
"""

_ROWS = 2**23  # numbers of a matrix that RegMean solves at once: as float64, 64 MiB
_PARALLEL = 0.9995  # a cosine above which an angle says nothing any more, and a line is the same curve
_FACTOR = re.compile(r"(?<![a-zA-Z])lora_(?:embedding_)?([AB])(?![a-zA-Z])")


@dataclass(frozen=True)
class Part:
    """What a strategy is given: the numbers of one tensor, or of a slice of it, flat unless the strategy needs it whole.

    `statistics` are one tensor a parent, or None when there are none of this tensor. `weights` are ones unless others were given.
    `found` is what the strategy's survey says of this tensor. `begin` is where in the whole tensor the slice begins.
    """

    name: str
    parents: tuple[Tensor, ...]
    weights: tuple[float, ...]
    base: Tensor | None = None
    statistics: tuple[Tensor, ...] | None = None
    found: Any = None
    begin: int = 0

    def slices(self, size: int = SLICE) -> Iterator[Part]:
        """The same numbers, flat, so many at once."""
        parents = [tensor.reshape(-1) for tensor in self.parents]
        base = None if self.base is None else self.base.reshape(-1)
        statistics = None if self.statistics is None else [tensor.reshape(-1) for tensor in self.statistics]
        for begin in range(0, parents[0].numel(), size):
            piece = slice(begin, begin + size)
            yield replace(
                self,
                parents=tuple(tensor[piece] for tensor in parents),
                base=None if base is None else base[piece],
                statistics=None if statistics is None else tuple(tensor[piece] for tensor in statistics),
                begin=begin,
            )


# -- averages --------------------------------------------------------------------------------------------------


def mean(part: Part) -> Tensor:
    """``sum w_i theta_i / sum w_i``.

    Uniform, it is stochastic weight averaging (Izmailov et al. 2018) over checkpoints of one run, and the uniform soup (Wortsman et
    al. 2022) over fine-tunings of one model. For parents that are near each other: on one trajectory, or from one start with
    a small learning rate. Weighted, for parents that saw different amounts of data.
    """
    return _sum_of(map(_wide, part.parents), part.weights).div_(math.fsum(part.weights))


def fisher(part: Part, *, floor: float, normalize: bool) -> Tensor:
    """``sum w_i F_i theta_i / sum w_i F_i``, F_i the diagonal Fisher information, at least `floor` (Matena & Raffel 2022).

    For parents trained on different data: each has its say where its own data care. `normalize` divides each F_i by its
    norm over the whole model, for parents whose losses are of different scales.
    """
    assert part.statistics is not None
    norms = part.found if normalize else [1.0] * len(part.weights)
    total = torch.zeros(part.parents[0].shape, dtype=torch.float64)
    mass = torch.zeros_like(total)
    for tensor, information, weight, norm in zip(part.parents, part.statistics, part.weights, norms, strict=True):
        share = _wide(information).clamp_(min=floor).mul_(weight / norm)
        total.add_(_wide(tensor).mul_(share))
        mass.add_(share)
    return total.div_(mass)


def fisher_norms(parts: Iterable[Part], *, floor: float, normalize: bool) -> dict[str, Any]:
    """The norm of each parent's Fisher information over the whole model, for `fisher`."""
    if not normalize:
        return {}
    names, totals = [], []
    for part in parts:
        names.append(part.name)
        if part.statistics is not None:
            totals.append([_dot(tensor, tensor) for tensor in part.statistics])
    norms = [math.sqrt(math.fsum(column)) for column in zip(*totals, strict=True)]
    if not all(0 < norm < math.inf for norm in norms):
        raise InvalidCommandError(
            f"the Fisher information of the parents has the norms {norms}: there is nothing to normalise by; "
            "merge with normalize=false"
        )
    return dict.fromkeys(names, norms)


def adapter(part: Part) -> Tensor:
    """The average of tensors whose name contains ``adapter`` or ``lora``; all others from the first parent.

    For bottleneck adapters trained on one frozen model. For LoRA, `lora` is the right one.
    """
    return mean(part) if is_adapter(part.name) else _wide(part.parents[0])


def is_adapter(name: str) -> bool:
    """Whether a tensor belongs to an adapter, by its name."""
    return "adapter" in name.lower() or "lora" in name.lower()


# -- differences to a base -------------------------------------------------------------------------------------


def task_arithmetic(part: Part, *, scale: float) -> Tensor:
    """``base + scale * sum w_i (theta_i - base)`` (Ilharco et al. 2023).

    For fine-tunings of one base on different tasks. With scale = 1 / parents it is their average; more amplifies, and
    less than zero unlearns.
    """
    assert part.base is not None
    base = _wide(part.base)
    return _sum_of(_deltas(part, base), part.weights).mul_(scale).add_(base)


def ties(part: Part, *, density: float, scale: float) -> Tensor:
    """Trim, elect sign, merge (Yadav et al. 2023), tensor by tensor.

    Of each parent's difference to the base the `density` largest in magnitude stay. Each number's sign is that of their sum; the
    result is ``base + scale *`` the mean of those that have it. For many fine-tunings of one base that pull in different directions.
    """
    assert part.base is not None
    base = _wide(part.base)
    kept = []
    for delta, threshold in zip(_deltas(part, base), part.found, strict=True):
        kept.append(delta.mul_(_magnitude(delta) >= threshold))
    return _elected_mean(kept, part.weights).mul_(scale).add_(base)


def ties_thresholds(parts: Iterable[Part], *, density: float, scale: float) -> dict[str, Any]:
    """The magnitude from which on `ties` keeps a difference: of every tensor, for each parent."""
    found = {}
    for part in parts:
        assert part.base is not None
        found[part.name] = [_threshold(tensor, part.base, density) for tensor in part.parents]
    return found


def dare(part: Part, *, drop: float, scale: float, seed: int) -> Tensor:
    """``base + scale * sum w_i m_i (theta_i - base) / (1 - drop)``, m_i zero with probability `drop` (Yu et al. 2024).

    For fine-tunings whose differences to the base are small and redundant, as those of large models are: the more so, the more
    can be dropped. The mask depends on seed, tensor and parent alone.
    """
    assert part.base is not None
    base = _wide(part.base)
    return _sum_of(_dropped(part, base, drop, seed), part.weights).mul_(scale / (1 - drop)).add_(base)


def dare_ties(part: Part, *, drop: float, scale: float, seed: int) -> Tensor:
    """`dare` in place of the trimming of `ties`: for many fine-tunings with small differences that conflict (Yu et al. 2024)."""
    assert part.base is not None
    base = _wide(part.base)
    return _elected_mean(list(_dropped(part, base, drop, seed)), part.weights).mul_(scale / (1 - drop)).add_(base)


# -- two parents -----------------------------------------------------------------------------------------------


def slerp(part: Part, *, t: float) -> Tensor:
    """``sin((1-t) a) / sin a * theta_1 + sin(t a) / sin a * theta_2``, a the angle between them (Shoemake 1985).

    From the first parent (t = 0) to the second (t = 1) along an arc, tensor by tensor, so that norms do not shrink as those of an
    average do. For two parents that are far apart. Vectors that are nearly parallel, or zero, go along a line.
    """
    first, second = part.found
    return _wide(part.parents[0]).mul_(first).add_(_wide(part.parents[1]).mul_(second))


def slerp_factors(parts: Iterable[Part], *, t: float) -> dict[str, Any]:
    """What `slerp` multiplies the two parents by, for every tensor."""
    return {part.name: _on_arc(part, t) for part in parts}


# -- linear layers ---------------------------------------------------------------------------------------------


def regmean(part: Part, *, shrink: float, ridge: float) -> Tensor:
    """``W^T = (sum w_i G_i)^-1 sum w_i G_i W_i^T``, G_i = X_i^T X_i of the layer's inputs (Jin et al. 2023).

    The linear layer whose outputs are nearest to those of every parent on its own data. For parents trained on different data,
    however far apart. A convolution [out, in, k, ...] is the matrix [out, in * k * ...] on unfolded inputs.

    What is not on the diagonal of G_i is multiplied by `shrink`. Inputs that are always zero make the sum singular, so
    each G_i has `ridge` times the mean of its diagonal added to it: there the result is the average of the parents.
    """
    assert part.statistics is not None
    matrices = [tensor.reshape(tensor.shape[0], -1) for tensor in part.parents]
    rows, width = matrices[0].shape
    for gram in part.statistics:
        if gram.shape != (width, width):
            raise StateMismatchError(f"{part.name}: its Gram matrix is [{width}, {width}], not {list(gram.shape)}")
    traces = (weight * float(_wide(gram.diagonal()).sum()) for gram, weight in _weighted(part))
    level = ridge * math.fsum(traces) / width / math.fsum(part.weights) or (1.0 if ridge else 0.0)
    factor, failed = torch.linalg.cholesky_ex(
        _sum_of((_shrunk(g, shrink, level) for g in part.statistics), part.weights)
    )
    if failed:
        raise InvalidCommandError(
            f"{part.name}: the sum of its Gram matrices is not positive definite; merge with a larger ridge than {ridge}"
        )
    result = torch.empty(matrices[0].shape, dtype=part.parents[0].dtype)
    at_once = max(1, _ROWS // width)
    for begin in range(0, rows, at_once):
        piece = slice(begin, begin + at_once)
        wanted = (
            _shrunk(gram, shrink, level) @ _wide(matrix[piece]).T
            for gram, matrix in zip(part.statistics, matrices, strict=True)
        )
        result[piece] = torch.cholesky_solve(_sum_of(wanted, part.weights), factor).T.to(result.dtype)
    return result.reshape(part.parents[0].shape)


def lora(part: Part, *, rank: int, alpha: Sequence[float]) -> Tensor:
    """The factors, of `rank`, of ``sum w_i (alpha_i / r_i) B_i A_i / sum w_i``; all other tensors are averaged.

    The average of factors is not the average of their products, which is what a LoRA layer adds. This one is, and the nearest of its
    rank (Eckart & Young 1936): exact when the rank is that of the sum. The factors are for a layer with the `alpha` of the first parent.
    By default alpha is each parent's rank, which makes its scale 1, and rank that of the first.
    """
    downs, ups = part.found
    ranks = [tensor.shape[0] for tensor in downs]
    wanted = rank or ranks[0]
    alphas = _spread(alpha, len(ranks)) or ranks
    own = (alphas[0] if alpha else wanted) / wanted  # the scale of the layer that the result is for
    total = math.fsum(part.weights)
    scales = [w / total * a / r / own for w, a, r in zip(part.weights, alphas, ranks, strict=True)]
    left = torch.cat([_wide(up).reshape(up.shape[0], -1).mul_(s) for up, s in zip(ups, scales, strict=True)], 1)
    right = torch.cat([_wide(down).reshape(down.shape[0], -1) for down in downs], 0)
    down, up = _factored(left, right, wanted)
    return (
        down.reshape(wanted, *downs[0].shape[1:]) if _is_down(part.name) else up.reshape(-1, wanted, *ups[0].shape[2:])
    )


def lora_pairs(parts: Iterable[Part], *, rank: int, alpha: Sequence[float]) -> dict[str, Any]:
    """Both factors of every pair, under the name of each, for `lora`."""
    every = {part.name: part for part in parts}
    found = {}
    for name, part in every.items():
        if (other := partner(name)) is not None:
            if other not in every:
                raise StateMismatchError(f"{name} has no {other} beside it: the product of the two cannot be merged")
            pair = (part.parents, every[other].parents)
            found[name] = pair if _is_down(name) else pair[::-1]
    if not found:
        raise InvalidCommandError(
            "the parents have no pairs of LoRA factors (names with lora_A and lora_B); merge by `swa`"
        )
    return found


def partner(name: str) -> str | None:
    """The name of the other factor of a LoRA pair; None for a tensor that is no factor."""
    found = _FACTOR.search(name)
    return None if found is None else f"{name[: found.start(1)]}{'B' if found[1] == 'A' else 'A'}{name[found.end(1) :]}"


def rank_axis(name: str) -> int | None:
    """Along which axis of a LoRA factor its rank is; None for a tensor that is no factor."""
    return None if partner(name) is None else 0 if _is_down(name) else 1


# -- soup ------------------------------------------------------------------------------------------------------


def greedy(scores: Sequence[float], evaluate: Callable[[tuple[int, ...]], float]) -> tuple[int, ...]:
    """The members of a greedy soup, in the order in which they came in (Wortsman et al. 2022); higher scores are better.

    The best parent is the first. Each other one, best first, stays if the mean of all with it scores no less: `evaluate` gives the
    score of the mean of these parents. So on what it is judged by a soup is never below its best parent. A score of NaN is none.
    """
    order = sorted((i for i, score in enumerate(scores) if score == score), key=lambda i: -scores[i])
    if not order:
        raise InvalidCommandError("no parent has a score: there is nothing to begin a soup with")
    members: tuple[int, ...] = (order[0],)
    best = scores[order[0]]
    for candidate in order[1:]:
        score = evaluate((*members, candidate))
        if score >= best:
            members, best = (*members, candidate), score
    return members


# -- arithmetic ------------------------------------------------------------------------------------------------


def _wide(tensor: Tensor) -> Tensor:
    """A float64 copy, which may be written to."""
    return tensor.to(torch.float64, copy=True)


def _dot(one: Tensor, other: Tensor) -> float:
    """The sum of products: place by place over the slices, then by halves."""
    total = torch.zeros(SLICE, dtype=torch.float64)
    pair = Part("", (one, other), (1.0, 1.0))
    for piece in pair.slices():
        a, b = piece.parents
        total[: len(a)] += _wide(a).mul_(_wide(b))
    while len(total) > 1:
        total = total[: len(total) // 2] + total[len(total) // 2 :]
    return float(total)


def _sum_of(tensors: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum w_i t_i``. Uses their memory."""
    total: Tensor | None = None
    for tensor, weight in zip(tensors, weights, strict=True):
        product = tensor if weight == 1 else tensor.mul_(weight)
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


def _deltas(part: Part, base: Tensor) -> Iterator[Tensor]:
    return (_wide(tensor).sub_(base) for tensor in part.parents)


def _magnitude(delta: Tensor) -> Tensor:
    """What trimming compares."""
    return delta.abs().to(torch.float32)


def _threshold(tensor: Tensor, base: Tensor, density: float) -> float:
    """The magnitude of rank ``density * numbers`` in the difference of the two."""
    if not tensor.numel():
        return 0.0
    magnitudes = np.empty(tensor.numel(), np.float32)
    for piece in Part("", (tensor,), (1.0,), base).slices():
        assert piece.base is not None
        delta = _wide(piece.parents[0]).sub_(_wide(piece.base))
        magnitudes[piece.begin : piece.begin + len(delta)] = _magnitude(delta).numpy()
    rank = len(magnitudes) - max(1, round(density * len(magnitudes)))
    magnitudes.partition(rank)
    return float(magnitudes[rank])


def _elected_mean(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean of those that have the sign of the weighted sum; zero where that has none. Uses their memory."""
    elected = _sum_of((delta.clone() for delta in deltas), weights).sign_()
    total, mass = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta, weight in zip(deltas, weights, strict=True):
        share = (delta * elected > 0).to(torch.float64).mul_(weight)
        mass.add_(share)
        total.add_(delta.mul_(share))
    return total.div_(mass.masked_fill_(mass == 0, 1.0))


def _dropped(part: Part, base: Tensor, drop: float, seed: int) -> Iterator[Tensor]:
    for parent, delta in enumerate(_deltas(part, base)):
        kept = _random_bits(f"{seed}/{parent}/{part.name}", part.begin, delta.numel()) >= round(drop * 2**32)
        yield delta.mul_(torch.from_numpy(kept))


def _random_bits(key: str, begin: int, count: int) -> np.ndarray:
    """32 random bits for each number from `begin` on, by its place: a counter-based generator (Salmon et al. 2011)."""
    words = np.frombuffer(blake3(key.encode()).digest(), "<u8")[:2]
    generator = np.random.Philox(key=words, counter=begin // 8)  # one count is four words of 64 bits
    skipped = begin % 8
    raw = generator.random_raw((skipped + count + 1) // 2)
    return raw.astype("<u8", copy=False).view("<u4")[skipped : skipped + count]


def _on_arc(part: Part, t: float) -> tuple[float, float]:
    a, b = part.parents
    dot, first, second = _dot(a, b), _dot(a, a), _dot(b, b)
    size = math.sqrt(first) * math.sqrt(second)
    cosine = dot / size if size else 1.0
    if not abs(cosine) <= _PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _weighted(part: Part) -> Iterator[tuple[Tensor, float]]:
    assert part.statistics is not None
    return zip(part.statistics, part.weights, strict=True)


def _shrunk(gram: Tensor, shrink: float, level: float) -> Tensor:
    wide = _wide(gram)
    diagonal = wide.diagonal().clone()
    wide.mul_(shrink).diagonal().copy_(diagonal.add_(level))
    return wide


def _factored(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] whose product is the nearest to ``left @ right``, without that product ever being made."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, values, v = torch.linalg.svd(r_left @ r_right.T)
    kept = min(rank, len(values))
    roots = values[:kept].sqrt()
    up, down = q_left @ (u[:, :kept] * roots), (roots[:, None] * v[:kept]) @ q_right.T
    # A singular vector's sign is LAPACK's whim: the largest of each in B is positive.
    signs = up.gather(0, up.abs().argmax(0, keepdim=True)).sign()
    up, down = up * signs, down * signs.T
    empty = rank - kept
    return torch.nn.functional.pad(down, (0, 0, 0, empty)), torch.nn.functional.pad(up, (0, empty))


def _is_down(name: str) -> bool:
    found = _FACTOR.search(name)
    return found is not None and found[1] == "A"


def _spread(values: Sequence[float], count: int) -> list[float]:
    if len(values) in (0, count):
        return list(values)
    if len(values) == 1:
        return list(values) * count
    raise InvalidCommandError(f"alpha is one number, or one for each of the {count} parents, not {len(values)}")
