"""Hadamard matrices and their fast products: ±1 matrices H [n, n] with H Hᵀ = n I.

Powers of two take Sylvester's matrix, H[i, j] = (−1)^popcount(i & j). Any other n is K · 2^m with H = C ⊗ Sylvester(2^m),
row and column k · 2^m + j, where the core C [K, K] is one of Paley's matrices over a finite field.
"""

from __future__ import annotations

import itertools
from functools import cache

import torch
from torch import Tensor

LARGEST = 512
"""The largest core: it is multiplied densely."""
RADIX = 16
"""Sylvester's matrix of this order is multiplied densely, larger ones as its Kronecker powers. With one thread, 512 rows
of 4096 numbers: 38 ms, against 86 by sums and differences."""


def sylvester(n: int) -> Tensor:
    """[n, n] in int8, for a power of two."""
    H = torch.ones(1, 1, dtype=torch.int8)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


@cache
def _field(q: int) -> tuple[int, int, tuple[int, ...]] | None:
    """p, k and the tail of an irreducible x^k − tail, for q = p^k with k ≤ 3; None for any other q."""
    p = next((d for d in range(2, q + 1) if q % d == 0), 0)
    k = next((k for k in (1, 2, 3) if p and p**k == q), 0)
    if not k:
        return None
    if k == 1:
        return p, 1, (0,)
    for tail in itertools.product(range(p), repeat=k):  # of degree 2 and 3 irreducible is: without a root
        if all((x**k - sum(a * x**i for i, a in enumerate(tail))) % p for x in range(p)):
            return p, k, tail
    return None


def _square(a: tuple[int, ...], p: int, tail: tuple[int, ...]) -> tuple[int, ...]:
    k = len(a)
    product = [0] * (2 * k - 1)
    for (i, x), (j, y) in itertools.product(enumerate(a), repeat=2):
        product[i + j] += x * y
    for top in range(2 * k - 2, k - 1, -1):
        for i, t in enumerate(tail):
            product[top - k + i] += product[top] * t
    return tuple(v % p for v in product[:k])


def _residues(q: int) -> Tensor:
    """Q [q, q] in int8: 1 where the difference of row's and column's element is a square, −1 where not, 0 on the diagonal."""
    found = _field(q)
    assert found is not None
    p, k, tail = found
    elements = list(itertools.product(range(p), repeat=k))
    squares = {_square(a, p, tail) for a in elements if any(a)}
    sign = {a: 1 if a in squares else -1 for a in elements} | {(0,) * k: 0}
    return torch.tensor([[sign[tuple((x - y) % p for x, y in zip(a, b))] for b in elements] for a in elements], dtype=torch.int8)


def _paley(n: int) -> int:
    """1 or 2 if one of Paley's constructions gives order n, else 0."""
    if n % 4 == 0 and _field(n - 1):
        return 1
    return 2 if n % 4 == 0 and n // 2 % 4 == 2 and _field(n // 2 - 1) else 0


def core(n: int) -> Tensor:
    """Paley's matrix of order n, [n, n] in int8."""
    if _paley(n) == 1:  # I + [[0, −1], [1, Q]]
        H = torch.ones(n, n, dtype=torch.int8)
        H[0, 1:] = -1
        H[1:, 1:] = _residues(n - 1) + torch.eye(n - 1, dtype=torch.int8)
        return H
    C = torch.ones(n // 2, n // 2, dtype=torch.int8)  # symmetric with a zero diagonal
    C[0, 0] = 0
    C[1:, 1:] = _residues(n // 2 - 1)
    one = torch.eye(n // 2, dtype=torch.int8)
    pair, other = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8), torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(C, pair) + torch.kron(one, other)


@cache
def core_order(n: int) -> int | None:
    """The smallest K with n = K · 2^m of which a matrix is known here, 1 for powers of two; None if there is none."""
    K = n // (n & -n)
    if K == 1:
        return 1
    while n % K == 0 and K <= LARGEST:
        if _paley(K):
            return K
        K *= 2
    return None


def transform(x: Tensor, outer: Tensor | None = None, block: int = 0) -> Tensor:
    """H xᵀ for every row of x [..., n], in [..., n]: n log n operations a row.

    H is outer ⊗ Sylvester for the core `outer` [K, K], Sylvester's own without one; with `block`, a power of two that
    divides n, it is block-diagonal with Sylvester(block) in every block.
    """
    n = x.shape[-1]
    width = block or n // (1 if outer is None else len(outer))
    y, right = x.reshape(-1, n), 1
    while right < width:
        R = min(RADIX, width // right)
        H = sylvester(R).to(y)
        y = y.reshape(-1, R) @ H if right == 1 else H @ y.reshape(-1, R, right)
        right *= R
    if outer is not None:
        y = outer.to(y) @ y.reshape(-1, len(outer), width)
    return y.reshape(x.shape)
