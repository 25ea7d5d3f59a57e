"""Compound matrices: all minors of one order, and what else can be made of the same submatrices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import pad


@cache
def _subsets(n: int, k: int, device: torch.device) -> Tensor:
    sets, place = list(combinations(range(n), k)), {s: i for i, s in enumerate(combinations(range(n), k - 1))}
    elements = [[s[m] for s in sets] for m in range(k)]
    others = [[place[s[:m] + s[m + 1 :]] for s in sets] for m in range(k)]
    with torch.inference_mode(False):  # it is kept, and later uses may need gradients
        return torch.tensor([*elements, *others], device=device)


@torch.compiler.assume_constant_result
def subsets(n: int, k: int, device: torch.device) -> Tensor:
    """The k-subsets of n in lexicographic order, k ≥ 2: rows m of the first half have their m-th elements, rows k + m the
    places of the subsets without these among the (k − 1)-subsets; [2k, C(n, k)]."""
    return _subsets(n, k, device)


def compounds(A: Tensor, orders: Sequence[int], minor: str = "det") -> list[Tensor]:
    """The compound A^(k) of A [..., n, n] for each order k ≤ n: [..., C(n, k), C(n, k)], entry I, J the minor of rows I, columns J.

    Index sets are in lexicographic order. In place of the determinant of a submatrix `minor` takes its permanent
    ("perm"), largest ("max") or mean entry ("avg"). Each order is made from the one below by Laplace's expansion:
    A^(k)[I, J] = Σ_m (−1)^m A[i_0, j_m] A^(k−1)[I without i_0, J without j_m].
    """
    made = [A]
    for k in range(2, max(orders) + 1):
        at = subsets(A.shape[-1], k, A.device)
        top, below = A.index_select(-2, at[0]), made[-1].index_select(-2, at[k])
        total: Tensor | None = None
        for m in range(k):
            entry, rest = top.index_select(-1, at[m]), below.index_select(-1, at[k + m])
            if minor == "max":
                total = torch.maximum(entry, rest) if total is None else torch.maximum(total, torch.maximum(entry, rest))
                continue
            if minor == "avg":
                term = (entry + (k - 1) * rest) / k**2
            else:
                term = -entry * rest if minor == "det" and m % 2 else entry * rest
            total = term if total is None else total + term
        assert total is not None
        made.append(total)
    return [made[k - 1] for k in orders]


def by_compounds(h: Tensor, made: list[Tensor], blocks: int, groups: int = 1) -> Tensor:
    """h (Q − I) [..., out] for Q of equal blocks, each with these compounds [groups · blocks or 1, d, d] along its diagonal, then ones.

    Each group of outputs has so many blocks from its start on; what no whole block covers is left alone.
    """
    size, used = h.shape[-1] // groups, sum(M.shape[-1] for M in made)
    b = size // blocks
    inner = h.unflatten(-1, (groups, size))[..., : blocks * b].unflatten(-1, (blocks, b)).flatten(-3, -2)
    changes = []
    for part, M in zip(inner.split([*(M.shape[-1] for M in made), b - used], -1), made):
        step = M - torch.eye(M.shape[-1]).to(M)  # a small step of its own: next to 1 half precision would lose it
        changes.append(part @ step[0] if len(M) == 1 else torch.einsum("...nc,ncd->...nd", part, step))
    change = pad(torch.cat(changes, -1), (0, b - used)).unflatten(-2, (groups, blocks)).flatten(-2)
    return pad(change, (0, size - blocks * b)).flatten(-2)
