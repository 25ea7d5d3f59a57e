"""Logits [N, D]: how near two sets of them are, how varied one is, and in how few directions it lies (2024, arXiv:2408.04556)."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn.functional import log_softmax, normalize

EXACT_UP_TO = 4096
"""Columns up to which singular values are worked out in full unless told otherwise."""


def wide(Z: Tensor) -> Tensor:
    return Z.to(torch.promote_types(Z.dtype, torch.float32))


def divergence(teacher: Tensor, student: Tensor, T: float = 1.0) -> Tensor:
    """T² · mean over rows of KL(softmax(teacher / T) ‖ softmax(student / T))."""
    p, q = log_softmax(wide(teacher) / T, -1), log_softmax(wide(student) / T, -1)
    return T**2 * (p.exp() * (p - q)).sum(-1).mean()


def direction_gap(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over all entries of the squared difference of rows divided by their lengths."""
    return (normalize(wide(student), dim=-1) - normalize(wide(teacher), dim=-1)).square().mean()


def entropy(Z: Tensor, top: int | None = None) -> Tensor:
    """Mean entropy of softmax(Z); with `top` of the softmax over each row's so many largest logits only."""
    Z = wide(Z)
    q = log_softmax(Z if top is None or top >= Z.shape[-1] else Z.topk(top, dim=-1).values, -1)
    return -(q.exp() * q).sum(-1).mean()


def correlation(Z: Tensor) -> Tensor:
    """(1 / D) · Σ over i ≠ j of C_ij², C the covariance of the columns; N ≥ 2."""
    C = torch.cov(wide(Z).T).reshape(Z.shape[1], -1)
    return (C.square().sum() - C.diagonal().square().sum()) / len(C)


def singular_values(Z: Tensor, k: int, how: str = "exact", generator: Generator | None = None) -> Tensor:
    """The k largest, descending: "exact"; "gram", from Z Zᵀ, cheap for few long rows, with half the digits; "randomised", from
    k + 5 random directions and two power iterations."""
    Z = wide(Z)
    if how == "gram":
        G = Z @ Z.T if len(Z) <= Z.shape[1] else Z.T @ Z
        tiny = torch.finfo(Z.dtype).tiny
        return torch.linalg.eigvalsh(G).flip(0)[:k].clamp_min(tiny).sqrt()  # the root of zero has no slope
    if how == "randomised":
        Z = _sketched(Z, min(*Z.shape, k + 5), generator)
    return torch.linalg.svdvals(Z)[:k]


def _sketched(Z: Tensor, width: int, generator: Generator | None) -> Tensor:
    """Qᵀ Z, [width, D], with Q an orthonormal basis of the range of Z's largest directions; its own gradient is left out, as the
    slope of a singular value, u vᵀ, does not depend on how its vectors were found."""
    with torch.no_grad():
        Q = torch.linalg.qr(Z @ torch.randn(Z.shape[1], width, generator=generator).to(Z))[0]
        for _ in range(2):
            Q = torch.linalg.qr(Z @ torch.linalg.qr(Z.T @ Q)[0])[0]
    return Q.T @ Z


def leading_share(Z: Tensor, k: int) -> Tensor:
    """Σ of the k largest singular values over Σ of all, in (0, 1]."""
    s = torch.linalg.svdvals(wide(Z))
    return s[:k].sum() / s.sum()


def leading_energy(Z: Tensor, k: int, how: str | None = None, generator: Generator | None = None) -> Tensor:
    """Σ of the k largest singular values over ‖Z‖_F, in (0, √k]; None: exact up to 4096 columns, else randomised."""
    how = how or ("exact" if Z.shape[1] <= EXACT_UP_TO else "randomised")
    return singular_values(Z, k, how, generator).sum() / torch.linalg.vector_norm(wide(Z))
