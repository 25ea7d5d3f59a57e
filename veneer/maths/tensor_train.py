"""Tensor trains: a matrix [rows, columns], read row-major, as a chain of small cores.

Core d is G_d [ρ_{d-1}, n_d, ρ_d] with ρ_0 = ρ_D = 1 and Π n_d = rows · columns; entry (i_1 … i_D) is
G_1[:, i_1] · … · G_D[:, i_D]. The border between rows and columns may fall inside a core.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor
from torch.nn.functional import linear

from veneer.init import Shape, normal
from veneer.maths.factor import balanced

SMALLEST, LARGEST = 4, 16
"""Usual sizes of a core's middle axis."""


PUBLISHED: dict[tuple[int, int], Shape] = {
    (768, 8): (8, 8, 12, 8), (1024, 8): (4, 8, 8, 8, 4), (4096, 8): (16, 16, 8, 4, 4), (5120, 8): (8, 8, 10, 8, 8),
    (8192, 8): (4, 16, 16, 16, 4), (768, 64): (8, 8, 12, 8, 8), (1024, 64): (4, 8, 8, 8, 8, 4), (4096, 64): (16, 16, 16, 4, 4, 4),
    (5120, 64): (5, 8, 8, 16, 8, 8), (768, 768): (8, 8, 12, 12, 8, 8), (1024, 1024): (4, 8, 8, 16, 8, 8, 4),
    (4096, 4096): (4, 4, 16, 16, 16, 16, 4, 4),
}  # fmt: skip
"""Larger and smaller side of a matrix → sizes of its cores, as in the experiments of arXiv:2402.11417."""


def usual_shape(rows: int, columns: int) -> Shape | None:
    """Sizes n_1 … n_D of the cores for a matrix: published ones, else even ones; None where there are none."""
    return PUBLISHED.get((max(rows, columns), min(rows, columns))) or even_shape(rows * columns)


def even_shape(n: int) -> Shape | None:
    """n as near-equal factors up to 16, none under 4 if that can be; None where its primes do not allow it."""
    counts = sorted(range(1, n.bit_length() + 1), key=lambda count: abs(count - math.log(n, 8)))
    for smallest in (SMALLEST, 1):
        for count in counts:
            shape = balanced(n, count)
            if min(shape) >= min(smallest, n) and max(shape) <= LARGEST:
                return shape
    return None


def loose_shape(n: int) -> Shape:
    """n as a product of about log_8 n factors, whatever their size."""
    return balanced(n, max(1, round(math.log(n, 8))))


def bonds(shape: Sequence[int], rank: int, clip: bool) -> list[int]:
    """ρ_0 … ρ_D for one rank; with `clip` no larger than the tensor on either side of the link."""
    inner = [min(rank, math.prod(shape[:d]), math.prod(shape[d:])) if clip else rank for d in range(1, len(shape))]
    return [1, *inner, 1]


def random_cores(shape: Sequence[int], bonds: Sequence[int], std: float, generator: Generator, zero: bool = False) -> list[Tensor]:
    """Gaussian cores whose contraction has entries of standard deviation `std`; the last core zero if asked."""
    each = std ** (1 / len(shape))
    cores = [normal((bonds[d], n, bonds[d + 1]), generator, each / bonds[d + 1] ** 0.5) for d, n in enumerate(shape)]
    return [*cores[:-1], torch.zeros_like(cores[-1])] if zero else cores


def cores_of(p: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """The cores name0, name1 … among named tensors."""
    return [p[f"{name}{d}"] for d in range(len(p)) if f"{name}{d}" in p]


def chain(cores: Sequence[Tensor]) -> Tensor:
    """The contraction of neighbours: [ρ_left, Π n, ρ_right]."""
    out = cores[0]
    for G in cores[1:]:
        out = (out.flatten(0, 1) @ G.flatten(1)).reshape(out.shape[0], -1, G.shape[-1])
    return out


def halves(cores: Sequence[Tensor], at: int) -> tuple[Tensor, Tensor]:
    """[Π n before the cut, ρ] and [ρ, Π n after it], whose product is the whole."""
    return chain(cores[:at]).squeeze(0), chain(cores[at:]).squeeze(-1)


def matrix(cores: Sequence[Tensor], rows: int, columns: int) -> Tensor:
    """The matrix [rows, columns]; one may be -1. From both ends to the middle: only two thin pieces are kept for backward."""
    if len(cores) == 1:
        return cores[0].reshape(rows, columns)
    left, right = halves(cores, len(cores) // 2)
    return (left @ right).reshape(rows, columns)


def through(x: Tensor, cores: Sequence[Tensor], rows: int) -> Tensor:
    """x [..., rows] times the matrix, in x's dtype; by way of the bond where a cut separates rows from columns and is thin."""
    for at in range(1, len(cores)):
        size = [math.prod([G.shape[1] for G in side]) for side in (cores[:at], cores[at:])]
        if size[0] == rows and cores[at].shape[0] < min(size):
            left, right = halves(cores, at)
            return linear(linear(x, left.T.to(x.dtype)), right.T.to(x.dtype))
    return torch.matmul(x, matrix(cores, rows, -1).to(x.dtype))
