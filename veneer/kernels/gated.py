"""y + (t ⊙ (g M)) Lᵀ in one autograd function: a low-rank term whose inner coordinates each token weighs for itself.

Bound, for N rows, E gates and r inner coordinates: 2·N·r·(E + out) operations forward and about three times that
backward; saved for backward are t [N, r], g [N, E] and the parameters, not the weighed coordinates, which are made
again. The plain reference is `reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def reference(y: Tensor, t: Tensor, g: Tensor, M: Tensor, L: Tensor) -> Tensor:
    """The definition: y [..., out], t [..., r], g [..., E], M [E, r], L [out, r] → [..., out]."""
    return y + torch.nn.functional.linear(t * (g @ M), L)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, t: Tensor, g: Tensor, M: Tensor, L: Tensor) -> Tensor:
        ctx.save_for_backward(t, g, M, L)
        inner = (t * (g @ M)).reshape(-1, t.shape[-1])
        return torch.addmm(y.reshape(-1, y.shape[-1]), inner, L.t()).view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        t, g, M, L = ctx.saved_tensors
        rows, t_rows, g_rows = (each.reshape(-1, each.shape[-1]) for each in (grad, t, g))
        needs_y, needs_t, needs_g, needs_M, needs_L = ctx.needs_input_grad
        d, gt, gg, gM = g_rows @ M, None, None, None
        if needs_t or needs_g or needs_M:
            inner = rows @ L
            gt = (inner * d).view(t.shape) if needs_t else None
            weighed = inner.mul_(t_rows)
            gg = (weighed @ M.t()).view(g.shape) if needs_g else None
            gM = g_rows.t() @ weighed if needs_M else None
        gL = rows.t() @ d.mul_(t_rows) if needs_L else None
        return (grad if needs_y else None), gt, gg, gM, gL


def gated(y: Tensor, t: Tensor, g: Tensor, M: Tensor, L: Tensor) -> Tensor:
    """y + (t ⊙ (g M)) Lᵀ. Everything is cast to y's dtype; gates are best made in float32 before."""
    if torch.is_autocast_enabled(y.device.type):
        return reference(y, t, g, M, L)
    return _Gated.apply(y, *(each.to(y.dtype) for each in (t, g, M, L)))
