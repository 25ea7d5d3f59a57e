"""Tensor rings: a vector or matrix whose entry is the trace of a product of small matrices, one from each core.

A ring vector with cores B_d [n_d, R, R] has the entry tr(B_1[i_1] · … · B_D[i_D]) at (i_1 … i_D), the first index the
slowest. A ring matrix [I, I] has cores A_d [I_d, I_d, R, R] and the entry tr(A_1[i_1, j_1] · … · A_D[i_D, j_D]).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor, einsum

from veneer.init import Shape, normal

NOISE = 0.02
"""Standard deviation of the noise that tells slices apart without changing the ring matrix."""


def cores_of(p: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """The cores name1, name2 … among named tensors."""
    return [p[f"{name}{d}"] for d in range(1, len(p) + 1) if f"{name}{d}" in p]


def product(cores: Sequence[Tensor]) -> Tensor:
    """The open ring of cores [n_d, R, R]: [Π n_d, R, R]."""
    out = cores[0]
    for B in cores[1:]:
        out = einsum("nab,mbc->nmac", out, B).flatten(0, 1)
    return out


def closed(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """L [n, R²] and R [R², m] with L R the traces tr(left[n] right[m]) of two open rings."""
    return left.flatten(1), right.mT.flatten(1).T


def dense(cores: Sequence[Tensor]) -> Tensor:
    """The ring matrix [I, I] of cores [I_d, I_d, R, R]."""
    if len(cores) == 1:
        return cores[0].diagonal(dim1=2, dim2=3).sum(-1)
    flat = [A.flatten(0, 1) for A in cores]
    left, right = closed(product(flat[:-1]), flat[-1])
    sizes = [n for A in cores for n in A.shape[:2]]  # i_1, j_1, i_2, j_2 …
    T = (left @ right).reshape(sizes).permute(*range(0, len(sizes), 2), *range(1, len(sizes), 2))
    return T.reshape(width(cores), -1)


def less_identity(cores: Sequence[Tensor]) -> Tensor:
    """T − Id [I, I]: what a transform adds to x, small enough to be rounded to half precision."""
    T = dense(cores)
    return T - torch.eye(len(T), dtype=T.dtype, device=T.device)


def width(cores: Sequence[Tensor]) -> int:
    """I = Π I_d."""
    return math.prod([A.shape[0] for A in cores])


def along(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """x Tᵀ [..., I] for the ring matrix T, core by core: R² numbers for each of x instead of [I, I]."""
    if len(cores) == 1:
        return x @ dense(cores).T
    n = cores[0].shape[0]
    state = einsum("njr,ijab->nirab", x.reshape(-1, n, x.shape[-1] // n), cores[0])
    for A in cores[1:-1]:
        state = state.reshape(-1, A.shape[0], state.shape[2] // A.shape[0], *A.shape[2:])
        state = einsum("njrab,ijbc->nirac", state, A)
    last = cores[-1]
    return einsum("njab,ijba->ni", state.reshape(-1, *last.shape[1:]), last).reshape(x.shape)


# -- distances from the identity, by the cores alone --------------------------------------------------------------


def _trace(matrices: Sequence[Tensor]) -> Tensor:
    out = matrices[0]
    for M in matrices[1:]:
        out = out @ M
    return out.trace()


def from_identity(cores: Sequence[Tensor]) -> Tensor:
    """‖T − Id‖² = ‖T‖² − 2 ⟨T, Id⟩ + I, with ‖T‖² = tr Π Σ_ij A_d[i, j] ⊗ A_d[i, j] and ⟨T, Id⟩ = tr Π Σ_i A_d[i, i]."""
    square = [einsum("ijab,ijcd->acbd", A, A).flatten(2).flatten(0, 1) for A in cores]
    return _trace(square) - 2 * _trace([einsum("iiab->ab", A) for A in cores]) + width(cores)


def from_orthogonal(cores: Sequence[Tensor]) -> Tensor:
    """‖TᵀT − Id‖²: TᵀT is the ring matrix of the cores Σ_i A_d[i, j] ⊗ A_d[i, k]."""
    return from_identity([einsum("ijab,ikcd->jkacbd", A, A).flatten(4).flatten(2, 3) for A in cores])


# -- first values -------------------------------------------------------------------------------------------------


def identity(sizes: Sequence[int], R: int, noise: str, generator: Generator) -> list[Tensor]:
    """Cores of Id: Id / R in every slice, plus noise, without which all slices would get equal gradients and stay equal.

    "silent" noise leaves the ring matrix Id: it sums to zero over the left ring index, so it cancels out next to a core
    without noise, and the last core's is the same for all right indices, so it cancels out next to the first core's.
    "gaussian" noise is N(0, 0.001²).
    """
    cores = [(torch.eye(n) / R)[..., None, None].repeat(1, 1, R, R) for n in sizes]
    if noise == "gaussian":
        return [A + normal(tuple(A.shape), generator, 1e-3) for A in cores]
    last = _cancelling((sizes[-1], sizes[-1], R, 1), generator)
    return [*(A + _cancelling(tuple(A.shape), generator) for A in cores[:-1]), cores[-1] + last]


def _cancelling(shape: Shape, generator: Generator) -> Tensor:
    """Noise whose sum over the left ring index is exactly zero: in multiples of 2⁻¹⁶."""
    noise = (normal(shape, generator, NOISE) * 2**16).round() / 2**16
    noise[:, :, 0] = -noise[:, :, 1:].sum(2)
    return noise
