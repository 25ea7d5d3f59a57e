"""Losses that need no labels: masked autoencoding (2021, arXiv:2111.06377) and DINOv2's three (2023, arXiv:2304.07193)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# -- masked autoencoding ------------------------------------------------------------------------------------------


def patches(x: Tensor, p: int) -> Tensor:
    """Pictures [B, C, H, W] as patches [B, L, p² C], L = H W / p², each flattened by row, column, channel."""
    B, C, H, W = x.shape
    return x.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)


def masking(noise: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of noise [B, L]: indices of the ⌊L (1 − ratio)⌋ kept patches, the inverse order [B, L], the mask [B, L], 1 where removed."""
    order = noise.argsort(1)
    restore, kept = order.argsort(1), int(noise.shape[1] * (1 - ratio))
    return order[:, :kept], restore, (restore >= kept).to(noise.dtype)


def standardised(target: Tensor) -> Tensor:
    """Every patch [..., n] with mean 0 and (unbiased) variance 1."""
    return (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()


def reconstruction(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of the removed patches, picture by picture, [B]; all have equally many, so their mean is the loss."""
    return ((pred - target).square().mean(-1) * mask).sum(-1) / mask.sum(-1)


# -- self-distillation --------------------------------------------------------------------------------------------


def sharpened(logits: Tensor, centre: Tensor, tau: float) -> Tensor:
    """The teacher's probabilities softmax((z − c) / τ), [..., K]."""
    return ((logits - centre) / tau).softmax(-1)


def moved_centre(centre: Tensor, logits: Tensor, momentum: float = 0.9) -> Tensor:
    """The running mean of the teacher's logits [..., K] for the next step."""
    return momentum * centre + (1 - momentum) * logits.flatten(0, -2).mean(0).reshape(centre.shape)


def sinkhorn(logits: Tensor, tau: float, iterations: int = 3) -> Tensor:
    """Probabilities [B, K] from logits [B, K]: rows that sum to 1, columns that are used alike (arXiv:2006.09882)."""
    Q = ((logits - logits.max()) / tau).exp()  # a common factor falls out
    Q = Q / Q.sum()
    for _ in range(iterations):
        Q = Q / Q.sum(0, keepdim=True) / Q.shape[1]
        Q = Q / Q.sum(1, keepdim=True) / Q.shape[0]
    return Q * Q.shape[0]


def disagreement(teacher: Tensor, student: Tensor, tau: float = 0.1) -> Tensor:
    """Cross-entropy of the student's logits [..., K] under the teacher's probabilities, [...]."""
    return -(teacher * (student / tau).log_softmax(-1)).sum(-1)


def class_terms(teacher: Tensor, student_global: Tensor, student_local: Tensor) -> tuple[Tensor, Tensor]:
    """DINO's terms of the two global crops, each against the other one, and of the local crops against both.

    Args:
        teacher: probabilities [2 B, K], first crops first. student_global: logits [2 B, K]. student_local: logits [n B, K].
    """
    halves = teacher.chunk(2)
    n = len(student_local) * 2 // len(teacher)
    terms = 2 * n + 2
    across = disagreement(torch.cat([halves[1], halves[0]]), student_global).mean() * 2 / terms
    local = [disagreement(half, crop).mean() for crop in (student_local.chunk(n) if n else ()) for half in halves]
    return across, torch.stack(local).sum() / terms if local else across.new_zeros(())


def patch_term(teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    """iBOT: mean over masked patches of a picture, then over all pictures; those without masked patches count 0.

    Args:
        teacher: probabilities [N, L, K]. student: logits [N, L, K]. mask: bool [N, L].
    """
    each = disagreement(teacher, student) * mask
    return (each.sum(-1) / mask.sum(-1).clamp_min(1)).mean()


def spreading(x: Tensor) -> Tensor:
    """KoLeo (arXiv:1806.03198): −mean log distance of each row of x [B, D], at unit length, to its nearest other row."""
    x = F.normalize(x, dim=-1)
    with torch.no_grad():
        near = (x @ x.T).fill_diagonal_(-2).argmax(1)
    return -((x - x[near]).norm(dim=-1) + 1e-8).log().mean()
