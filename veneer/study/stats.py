"""How sure a number is: intervals, and whether two methods can be told apart on the same test examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from veneer.tasks.metric import bootstrap as resampled
from veneer.tasks.metric import proportion


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion, `right` answers of `n` → (low, high) in 0 … 1 (Wilson 1927)."""
    found = proportion(right, n)
    return found.low, found.high


def bootstrap(values: Sequence[Any], statistic: Callable[[Any], float] | None = None, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of a statistic (the mean unless given) over resampled test examples → (low, high).

    `values` holds one number, or one row of numbers, an example; `statistic` takes such an array.
    """
    found = resampled(statistic or (lambda rows: float(rows.mean())), values, seed)
    return found.low, found.high


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Exact two-sided p-value that two methods err equally often, from the same examples in the same order.

    Only the examples where exactly one of the two is right count; under equality they fall to either side like a fair coin
    (McNemar 1947). Raises `ValueError` for sequences of different length.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} answers cannot be paired; both methods must answer the same examples.")
    gained = sum(1 for a, b in zip(first, second) if a and not b)
    lost = sum(1 for a, b in zip(first, second) if b and not a)
    n, k = gained + lost, min(gained, lost)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, 2 * tail / 2**n)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for being several (Holm 1979), in the given order."""
    m = len(p_values)
    adjusted, floor = [0.0] * m, 0.0
    for rank, i in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        floor = max(floor, min(1.0, (m - rank) * p_values[i]))
        adjusted[i] = floor
    return adjusted


def best_index(rows: Sequence[Mapping[str, Any]], higher: bool = True) -> int | None:
    """Index of the row with the best `value`; the first of equals; None if no row has one."""
    known = [i for i, r in enumerate(rows) if r.get("value") is not None]
    if not known:
        return None
    return max(known, key=lambda i: rows[i]["value"]) if higher else min(known, key=lambda i: rows[i]["value"])


def indistinguishable(rows: Sequence[Mapping[str, Any]], *, higher: bool = True, level: float = 0.05) -> list[bool]:
    """For every row, whether it cannot be told apart from the best one (the best itself included).

    A row has `value`, and `correct` (one truth value a test example) or else `low` and `high`. Rows that answered the same
    examples are paired (`mcnemar`, adjusted by `holm`); the others count as alike while their intervals overlap.
    """
    best = best_index(rows, higher)
    marks = [i == best for i in range(len(rows))]
    if best is None:
        return marks
    top = rows[best]
    others = [i for i, r in enumerate(rows) if i != best and r.get("value") is not None]
    paired = [i for i in others if top.get("correct") and rows[i].get("correct") and len(top["correct"]) == len(rows[i]["correct"])]
    for i, p in zip(paired, holm([mcnemar(top["correct"], rows[i]["correct"]) for i in paired])):
        marks[i] = p >= level
    for i in set(others) - set(paired):
        marks[i] = _overlap(top, rows[i])
    return marks


def _overlap(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    if any(r.get(k) is None for r in (a, b) for k in ("low", "high")):
        return a["value"] == b["value"]
    return a["low"] <= b["high"] and b["low"] <= a["high"]
