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


# The thin products run as [r, ·] @ [·, N]: with few rows on the left they take a quarter to two thirds of the time of the
# other orders (r = 8, N = in = out = 512, one thread: 73 against 121 µs for x Rᵀ, 79 against 352 µs for gᵀ t).


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, b, L, R):
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ W.t() if b is None else torch.addmm(b, rows, W.t())
        t = R @ rows.t()  # [r, N]
        y.addmm_(t.t(), L.t())
        _, _, _, needs_L, needs_R = ctx.needs_input_grad
        ctx.shape = x.shape
        ctx.save_for_backward(x if needs_R else None, W, L, R, t if needs_L else None)
        return y.view(*x.shape[:-1], W.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, W, L, R, t = ctx.saved_tensors
        needs_x, _, _, needs_L, needs_R = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])
        u = L.t() @ g.t() if needs_x or needs_R else None  # [r, N]
        gx = (g @ W).addmm_(u.t(), R).view(ctx.shape) if needs_x else None
        return gx, None, None, *_factors(g, x, t, u, needs_L, needs_R)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, L, R):
        t = R @ x.reshape(-1, x.shape[-1]).t()
        _, _, needs_L, needs_R = ctx.needs_input_grad
        ctx.shape = x.shape
        ctx.save_for_backward(x if needs_R else None, L, R, t if needs_L else None)
        return torch.addmm(y.reshape(-1, y.shape[-1]), t.t(), L.t()).view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, L, R, t = ctx.saved_tensors
        needs_y, needs_x, needs_L, needs_R = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])
        u = L.t() @ g.t() if needs_x or needs_R else None
        gx = (u.t() @ R).view(ctx.shape) if needs_x else None
        return (grad if needs_y else None), gx, *_factors(g, x, t, u, needs_L, needs_R)


class _EditLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, L, R):
        rows = x.reshape(-1, x.shape[-1])
        t = R @ rows.t()
        ctx.save_for_backward(x, L, R, t if ctx.needs_input_grad[1] else None)
        return torch.addmm(rows, t.t(), L.t()).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, L, R, t = ctx.saved_tensors
        needs_x, needs_L, needs_R = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])
        u = L.t() @ g.t()
        gx = torch.addmm(g, u.t(), R).view_as(grad) if needs_x else None
        return gx, *_factors(g, x, t, u, needs_L, needs_R)


def _factors(g, x, t, u, needs_L, needs_R):
    """Gradients of L and R from the output's gradient g [N, out], x, t = R xᵀ and u = Lᵀ gᵀ."""
    gL = (t @ g).t() if needs_L else None
    return gL, u @ x.reshape(-1, x.shape[-1]) if needs_R else None


def low_rank_linear(x: Tensor, W: Tensor, b: Tensor | None, L: Tensor, R: Tensor) -> Tensor:
    """x Wᵀ + b + (x Rᵀ) Lᵀ; W and b get no gradient. L and R are cast to x's dtype."""
    return _LowRankLinear.apply(x, W, b, L.to(x.dtype), R.to(x.dtype))


def add_low_rank(y: Tensor, x: Tensor, L: Tensor, R: Tensor) -> Tensor:
    """y + (x Rᵀ) Lᵀ for y [..., out], x [..., in]. L and R are cast to x's dtype."""
    return _AddLowRank.apply(y, x, L.to(x.dtype), R.to(x.dtype))


def edit_low_rank(x: Tensor, L: Tensor, R: Tensor) -> Tensor:
    """x + (x Rᵀ) Lᵀ for x [..., d], L [d, r], R [r, d]. L and R are cast to x's dtype."""
    return _EditLowRank.apply(x, L.to(x.dtype), R.to(x.dtype))
