"""Pairwise covering: a few cases in which every two values of different factors meet."""

import itertools
import random


def all_pairs(factors, is_possible, seed=0):
    """Rows (dicts of factor to value) that cover every possible pair, greedily; the same rows for the same seed.

    `is_possible` takes a dict of some of the factors, and says whether they may stand in one row.
    """
    rng = random.Random(seed)
    missing = set(pairs(factors, is_possible))
    while missing:
        rows = [_row(factors, is_possible, missing, rng) for _ in range(20)]
        best = max(rows, key=lambda row: len(missing & _pairs_of(row)))
        missing -= _pairs_of(best)
        yield best


def pairs(factors, is_possible):
    """Every pair that a row may hold."""
    for one, other in itertools.combinations(factors, 2):
        for a, b in itertools.product(factors[one], factors[other]):
            if is_possible({one: a, other: b}):
                yield frozenset({(one, a), (other, b)})


def _row(factors, is_possible, missing, rng):
    row = dict(rng.choice(sorted(map(sorted, missing))))  # begun with what is not covered
    rest = [name for name in factors if name not in row]
    rng.shuffle(rest)
    for name in rest:
        values = [value for value in factors[name] if is_possible({**row, name: value})]
        rng.shuffle(values)
        row[name] = max(values, key=lambda value: len(missing & _pairs_of({**row, name: value})))
    return {name: row[name] for name in factors}


def _pairs_of(row):
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
