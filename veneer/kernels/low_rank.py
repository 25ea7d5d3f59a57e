"""y = x Wᵀ + b + (x Rᵀ) Lᵀ in one autograd function, never forming L R.

Bound, for N rows: 2·N·r·(in + out) extra operations forward and twice that backward; saved for backward are x (or
what it is made of, see `replay`; only if R is trained), t = x Rᵀ [N, r] (only if L is) and the parameters. The plain
reference is `reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from veneer.kernels.eager import eager
from veneer.kernels.replay import kept, times


def reference(x: Tensor, W: Tensor, b: Tensor | None, L: Tensor, R: Tensor) -> Tensor:
    """The definition: x [..., in], W [out, in], L [out, r], R [r, in] → [..., out]."""
    return linear(x, W + L @ R, b)


# The thin products run as [r, ·] @ [·, N]: with few rows on the left they take a quarter to two thirds of the time of the
# other orders (r = 8, N = in = out = 512, one thread: 73 against 121 µs for x Rᵀ, 79 against 352 µs for gᵀ t).


# They also come first, and the layer's own product adds to them: a pass over y less (512 × 512: 30 instead of 120 µs).


def _outer(t, L, b):
    """tᵀ Lᵀ + b [N, out]."""
    return t.t() @ L.t() if b is None else torch.addmm(b, t.t(), L.t())


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, b, L, R):
        rows = x.reshape(-1, x.shape[-1])
        t = R @ rows.t()  # [r, N]
        y = _outer(t, L, b).addmm_(rows, W.t())
        _, _, _, needs_L, needs_R = ctx.needs_input_grad
        ctx.shape = x.shape
        ctx.make, sources = kept(x) if needs_R else (None, ())
        ctx.save_for_backward(W, L, R, t if needs_L else None, *sources)
        return y.view(*x.shape[:-1], W.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        W, L, R, t, *sources = ctx.saved_tensors
        needs_x, _, _, needs_L, needs_R = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])
        u = L.t() @ g.t() if needs_x or needs_R else None  # [r, N]
        gx = (u.t() @ R).addmm_(g, W).view(ctx.shape) if needs_x else None
        return gx, None, None, *_factors(ctx, g, sources, t, u, needs_L, needs_R)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, L, R):
        t = R @ x.reshape(-1, x.shape[-1]).t()
        _, _, needs_L, needs_R = ctx.needs_input_grad
        ctx.shape = x.shape
        ctx.make, sources = kept(x) if needs_R else (None, ())
        ctx.save_for_backward(L, R, t if needs_L else None, *sources)
        return torch.addmm(y.reshape(-1, y.shape[-1]), t.t(), L.t()).view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        L, R, t, *sources = ctx.saved_tensors
        needs_y, needs_x, needs_L, needs_R = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])
        u = L.t() @ g.t() if needs_x or needs_R else None
        gx = (u.t() @ R).view(ctx.shape) if needs_x else None
        return (grad if needs_y else None), gx, *_factors(ctx, g, sources, t, u, needs_L, needs_R)


class _EditLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, L, R):
        rows = x.reshape(-1, x.shape[-1])
        t = R @ rows.t()
        _, needs_L, needs_R = ctx.needs_input_grad
        ctx.shape = x.shape
        ctx.make, sources = kept(x) if needs_R else (None, ())
        ctx.save_for_backward(L, R, t if needs_L else None, *sources)
        return torch.addmm(rows, t.t(), L.t()).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        L, R, t, *sources = ctx.saved_tensors
        needs_x, needs_L, needs_R = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])
        u = L.t() @ g.t()
        gx = torch.addmm(g, u.t(), R).view_as(grad) if needs_x else None
        return gx, *_factors(ctx, g, sources, t, u, needs_L, needs_R)


class _Inner(torch.autograd.Function):
    """R x of several R at once: layers that read the same x read it together."""

    @staticmethod
    def forward(ctx, x, *Rs):
        R = torch.cat(Rs) if len(Rs) > 1 else Rs[0]
        ctx.shape, ctx.sizes = x.shape, [len(each) for each in Rs]
        ctx.make, sources = kept(x) if any(ctx.needs_input_grad[1:]) else (None, ())
        ctx.save_for_backward(R, *sources)
        return (R @ x.reshape(-1, x.shape[-1]).t()).split(ctx.sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx, *us):
        R, *sources = ctx.saved_tensors
        u = torch.cat(us)  # [r of all, N]
        gx = (u.t() @ R).view(ctx.shape) if ctx.needs_input_grad[0] else None
        gR = times(u, ctx.make, sources, ctx.shape).split(ctx.sizes) if sources else [None] * len(us)
        return gx, *gR


class _OuterLinear(torch.autograd.Function):
    """x Wᵀ + b + tᵀ Lᵀ."""

    @staticmethod
    def forward(ctx, x, W, b, t, L):
        rows = x.reshape(-1, x.shape[-1])
        y = _outer(t, L, b).addmm_(rows, W.t())
        ctx.save_for_backward(W, L, t if ctx.needs_input_grad[4] else None)
        ctx.shape = x.shape
        return y.view(*x.shape[:-1], W.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        W, L, t = ctx.saved_tensors
        needs_x, _, _, needs_t, needs_L = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])
        gx = (g @ W).view(ctx.shape) if needs_x else None
        return gx, None, None, L.t() @ g.t() if needs_t else None, (t @ g).t() if needs_L else None


class _AddOuter(torch.autograd.Function):
    """y + tᵀ Lᵀ."""

    @staticmethod
    def forward(ctx, y, t, L):
        ctx.save_for_backward(L, t if ctx.needs_input_grad[2] else None)
        return torch.addmm(y.reshape(-1, y.shape[-1]), t.t(), L.t()).view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        L, t = ctx.saved_tensors
        needs_y, needs_t, needs_L = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])
        return grad if needs_y else None, L.t() @ g.t() if needs_t else None, (t @ g).t() if needs_L else None


class _LinearOnto(torch.autograd.Function):
    """d + x Wᵀ + b: the layer's own product adds to what is there."""

    @staticmethod
    def forward(ctx, d, x, W, b, fresh):
        ctx.save_for_backward(W)
        ctx.shape, ctx.of = x.shape, d.shape
        rows, inputs = d.reshape(-1, d.shape[-1]), x.reshape(-1, x.shape[-1])
        if not fresh:
            return torch.addmm(rows if b is None else rows + b, inputs, W.t()).view(*x.shape[:-1], -1)
        ctx.mark_dirty(d)
        (rows if b is None else rows.add_(b)).addmm_(inputs, W.t())
        return d

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (W,) = ctx.saved_tensors
        gx = (grad.reshape(-1, grad.shape[-1]) @ W).view(ctx.shape) if ctx.needs_input_grad[1] else None
        return grad.view(ctx.of) if ctx.needs_input_grad[0] else None, gx, None, None, None


def _factors(ctx, g, sources, t, u, needs_L, needs_R):
    """Gradients of L and R from the output's gradient g [N, out], what x is made of, t = R xᵀ and u = Lᵀ gᵀ."""
    gL = (t @ g).t() if needs_L else None
    return gL, times(u, ctx.make, sources, ctx.shape) if needs_R else None


def low_rank_linear(x: Tensor, W: Tensor, b: Tensor | None, L: Tensor, R: Tensor) -> Tensor:
    """x Wᵀ + b + (x Rᵀ) Lᵀ; W and b get no gradient. L and R are cast to x's dtype."""
    return _LowRankLinear.apply(x, W, b, L.to(x.dtype), R.to(x.dtype))


def add_low_rank(y: Tensor, x: Tensor, L: Tensor, R: Tensor) -> Tensor:
    """y + (x Rᵀ) Lᵀ for y [..., out], x [..., in]. L and R are cast to x's dtype."""
    if not eager(x):
        return y + linear(linear(x, R.to(x.dtype)), L.to(x.dtype))
    return _AddLowRank.apply(y, x, L.to(x.dtype), R.to(x.dtype))


def edit_low_rank(x: Tensor, L: Tensor, R: Tensor) -> Tensor:
    """x + (x Rᵀ) Lᵀ for x [..., d], L [d, r], R [r, d]. L and R are cast to x's dtype."""
    if not eager(x):
        return x + linear(linear(x, R.to(x.dtype)), L.to(x.dtype))
    return _EditLowRank.apply(x, L.to(x.dtype), R.to(x.dtype))


def inner_products(x: Tensor, Rs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """R xᵀ [r, N] for each R [r, in], in one product. They are cast to x's dtype."""
    return _Inner.apply(x, *(R.to(x.dtype) for R in Rs))


def outer_linear(x: Tensor, W: Tensor, b: Tensor | None, t: Tensor, L: Tensor) -> Tensor:
    """x Wᵀ + b + tᵀ Lᵀ for an inner product t [r, N]; W and b get no gradient. L is cast to x's dtype."""
    return _OuterLinear.apply(x, W, b, t, L.to(x.dtype))


def add_outer(y: Tensor, t: Tensor, L: Tensor) -> Tensor:
    """y + tᵀ Lᵀ for y [..., out] of N rows and an inner product t [r, N]. L is cast to y's dtype."""
    return _AddOuter.apply(y, t.to(y.dtype), L.to(y.dtype))


def linear_onto(d: Tensor, x: Tensor, W: Tensor, b: Tensor | None, fresh: bool = False) -> Tensor:
    """d + x Wᵀ + b for d [..., out] (or its rows [N, out]), x [..., in]; W and b get no gradient. A fresh d is overwritten."""
    y = _LinearOnto.apply(d, x, W, b, fresh and d.is_contiguous())
    return y.view(*x.shape[:-1], -1)
