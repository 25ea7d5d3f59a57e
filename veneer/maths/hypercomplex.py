"""Hypercomplex products: x (Σ_i A_i ⊗ W_i) of small n × n rules A_i with blocks W_i, never building the sum."""

from __future__ import annotations

import torch
from torch import Tensor


def hypercomplex(x: Tensor, A: Tensor, L: Tensor, R: Tensor | None = None) -> Tensor:
    """x (Σ_i A_i ⊗ (L_i R_i)), [..., in] → [..., out], for A [n, n, n], L [n, in/n, r], R [n, r, out/n]; without R, L is whole."""
    blocks = x.unflatten(-1, (A.shape[1], L.shape[1]))  # [..., p, in/n]: the first index is the Kronecker block
    if R is None:
        mixed = torch.einsum("...pk,ipq->...qik", blocks, A)
        return (mixed.flatten(-2) @ L.flatten(0, 1)).flatten(-2)
    thin = (blocks @ L.transpose(0, 1).flatten(1)).unflatten(-1, (L.shape[0], L.shape[2]))  # [..., p, i, r]
    return (torch.einsum("...pir,ipq->...qir", thin, A).flatten(-2) @ R.flatten(0, 1)).flatten(-2)


def dense(A: Tensor, L: Tensor, R: Tensor | None = None) -> Tensor:
    """The weight [out, in] of the same product: (Σ_i A_i ⊗ (L_i R_i))ᵀ."""
    blocks = L if R is None else L @ R
    return sum(torch.kron(a, w) for a, w in zip(A, blocks)).T  # type: ignore[union-attr]
