"""Mixtures of experts: gates, their load balance, and how much the experts of a layer differ (arXiv:2402.08562)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from veneer.tuned import Tuned


def gates(logits: Tensor, K: int) -> Tensor:
    """g [..., N] of router logits [..., N]: their softmax at the K largest, divided by its sum there; 0 elsewhere.

    In float32 at least, as half precision changes which are the largest. Which ones they are is not differentiated.
    """
    p = probabilities(logits)
    kept = p * picked(p, K)
    return kept / kept.sum(-1, keepdim=True)


def balance(logits: Tensor, K: int) -> Tensor:
    """N · Σ_e f_e · p̄_e of router logits [..., N]: f the shares of the picks, a constant, p̄ the mean probabilities.

    1 where either is uniform, N where all tokens pick one expert with certainty.
    """
    p = probabilities(logits).flatten(0, -2)
    return p.shape[-1] * (picked(p, K).mean(0) / K * p.mean(0)).sum()


def probabilities(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)


def picked(p: Tensor, K: int) -> Tensor:
    """1 at the K largest of p [..., N], 0 elsewhere."""
    return torch.zeros_like(p).scatter(-1, p.detach().topk(K, -1).indices, 1.0)


def distance(A: Tensor, B: Tensor) -> Tensor:
    """Mean of ‖B_i A_i − B_j A_j‖ (Frobenius) over all pairs of the experts A [N, r, in], B [N, out, r]; 0 for one expert.

    From inner products of the thin factors, ⟨B_i A_i, B_j A_j⟩ = Σ (B_iᵀ B_j) ∘ (A_i A_jᵀ): no [out, in] is formed.
    """
    N = len(A)
    G = (torch.einsum("ior,jos->ijrs", B, B) * torch.einsum("irk,jsk->ijrs", A, A)).sum((-2, -1))
    i, j = torch.triu_indices(N, N, 1, device=A.device)
    square = G.diagonal()[i] + G.diagonal()[j] - 2 * G[i, j]
    return square.clamp_min(0).sqrt().sum() / max(len(i), 1)


@torch.no_grad()
def redundancy(tuned: Tuned, name: str | None = None, targets: tuple[str, ...] = ("attn", "cross")) -> dict[int | None, float]:
    """By block depth, the mean `distance` of the experts of its modules: the smaller, the more redundant they are.

    Args:
        tuned, name: an adapter whose sites hold experts as A [N, r, in] and B [N, out, r].
        targets: parents of the roles that count; by default attention's, as in the paper; () for all.
    """
    found: dict[int | None, list[float]] = {}
    for site, _, p in tuned.entries(name):
        if "A" in p and p["A"].ndim == 3 and (not targets or site.role.split(".")[0] in targets):
            found.setdefault(site.depth, []).append(float(distance(p["A"], p["B"])))
    return {depth: sum(values) / len(values) for depth, values in found.items()}
