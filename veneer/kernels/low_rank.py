"""y = x Wᵀ + b + (x Rᵀ) Lᵀ in one autograd function, never forming L R.

Bound, for N rows: 2·N·r·(in + out) extra operations forward and twice that backward; saved for backward are x (shared
by every layer that reads it; only if R is trained), t = x Rᵀ [N, r] (only if L is) and the parameters. The plain
reference is `reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def reference(x: Tensor, W: Tensor, b: Tensor | None, L: Tensor, R: Tensor) -> Tensor:
    """The definition: x [..., in], W [out, in], L [out, r], R [r, in] → [..., out]."""
    return torch.nn.functional.linear(x, W + L @ R, b)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, b, L, R):
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ W.t() if b is None else torch.addmm(b, rows, W.t())
        t = rows @ R.t()
        y.addmm_(t, L.t())
        _, _, _, needs_L, needs_R = ctx.needs_input_grad
        ctx.shape = x.shape
        ctx.save_for_backward(x if needs_R else None, W, L, R, t if needs_L else None)
        return y.view(*x.shape[:-1], W.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, W, L, R, t = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        u = g @ L  # [N, r]
        gx = gL = gR = None
        if ctx.needs_input_grad[0]:
            gx = (g @ W).addmm_(u, R).view(ctx.shape)
        if ctx.needs_input_grad[3]:
            gL = g.t() @ t
        if ctx.needs_input_grad[4]:
            gR = u.t() @ x.reshape(-1, x.shape[-1])
        return gx, None, None, gL, gR


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, L, R):
        t = x.reshape(-1, x.shape[-1]) @ R.t()
        _, _, needs_L, needs_R = ctx.needs_input_grad
        ctx.shape = x.shape
        ctx.save_for_backward(x if needs_R else None, L, R, t if needs_L else None)
        return torch.addmm(y.reshape(-1, y.shape[-1]), t, L.t()).view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, L, R, t = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        u = g @ L
        gx = (u @ R).view(ctx.shape) if ctx.needs_input_grad[1] else None
        gL = g.t() @ t if ctx.needs_input_grad[2] else None
        gR = u.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[3] else None
        return (grad if ctx.needs_input_grad[0] else None), gx, gL, gR


def low_rank_linear(x: Tensor, W: Tensor, b: Tensor | None, L: Tensor, R: Tensor) -> Tensor:
    """x Wᵀ + b + (x Rᵀ) Lᵀ; W and b get no gradient. L and R are cast to x's dtype."""
    return _LowRankLinear.apply(x, W, b, L.to(x.dtype), R.to(x.dtype))


def add_low_rank(y: Tensor, x: Tensor, L: Tensor, R: Tensor) -> Tensor:
    """y + (x Rᵀ) Lᵀ for y [..., out], x [..., in]. L and R are cast to x's dtype."""
    return _AddLowRank.apply(y, x, L.to(x.dtype), R.to(x.dtype))
