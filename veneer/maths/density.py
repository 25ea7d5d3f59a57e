"""Activation density: the share of a layer's units that are not zero, counted, and smooth (2024, arXiv:2402.01911)."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.kernels.smooth_density import smooth_density, wide


def by_sample(h: Tensor, real: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """h as [B, T, F] and the weight of each token in its sample's mean, [B, T], rows of which sum to 1.

    real [B, T] is 1 at tokens and 0 at padding; where it does not fit h (tokens were added on the way) all count.
    Layers that see all samples' tokens in one row, [B · T, F], or tokens first, [T, B, F], are put right by it.
    """
    if real is not None:
        if h.ndim == 2 and len(h) == real.numel():
            h = h.view(*real.shape, -1)
        elif h.ndim == 3 and h.shape[:2] != real.shape and h.shape[:2] == real.T.shape:
            h = h.transpose(0, 1)
    h = h.reshape(len(h), -1, h.shape[-1])
    if real is None or real.shape != h.shape[:2]:
        real = torch.ones(h.shape[:2], device=h.device)
    kept = real.to(h.device, dtype)
    return h, kept / kept.sum(1, keepdim=True).clamp_min(1)


def smooth(h: Tensor, eps: float, real: Tensor | None = None) -> Tensor:
    """Mean over tokens and units of h² / (h² + eps), one number a sample, [B], below 1; it is differentiable.

    Its slope is largest at |h| = √(eps / 3): eps is the square of the size below which a unit is pulled to zero."""
    h, w = by_sample(h, real, torch.promote_types(h.dtype, torch.float32))
    return smooth_density(h, w / h.shape[-1], eps)


@torch.no_grad()
def counted(h: Tensor, threshold: float = 0.0, real: Tensor | None = None) -> Tensor:
    """Share of |h| > threshold over tokens and units, [B], in float64; 0 counts what is not exactly zero in h's own dtype."""
    h, w = by_sample(h, real, torch.float64)
    on = h != 0 if threshold == 0 else wide(h).abs() > threshold
    return (on.double().mean(-1) * w).sum(-1)
