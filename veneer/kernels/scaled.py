"""Low-rank terms scaled by trained vectors, and layers scaled output by output; the scaled product itself is not kept.

`scaled_random`: ((t ⊙ d)ᵀ Bᵀ) ⊙ b for an inner product t = A xᵀ of fixed A and B. Bound, for N rows: 2·N·r·out operations
forward and as many backward for u. b's gradient needs the product before b: it is kept where it is no wider than 2 r, else had from
gᵀ (t ⊙ d)ᵀ, whose rows times those of B are the same sums, for as many operations again. Saved for backward are t [r, N], the
parameters and that product.

`scaled_outer`: c ⊙ (x Wᵀ + tᵀ Lᵀ) + b. Bound: a pass over y and one over its gradient beside the low-rank form's. Saved for
backward are y itself, of which c's gradient is made (most layers' outputs are kept by what reads them anyway), t and L.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TINY = 1e-20
"""Stands for a scale of exactly zero, so that what was scaled can be had back from the product."""


def reference(x: Tensor, A: Tensor, d: Tensor, B: Tensor, b: Tensor) -> Tensor:
    """The definition of `scaled_random` with t = A xᵀ: x [..., in] → [..., out]."""
    return (x @ A.t() * d) @ B.t() * b


def reference_outer(x: Tensor, W: Tensor, b: Tensor | None, c: Tensor, L: Tensor, R: Tensor) -> Tensor:
    """The definition of `scaled_outer` with t = R xᵀ: x [..., in], W [out, in], c [out], L [out, r], R [r, in] → [..., out]."""
    y = c * torch.nn.functional.linear(x, W + L @ R)
    return y if b is None else y + b


WIDE = 2
"""Over how many times r outputs the product [N, out] is not kept but b's gradient had from another product."""


class _ScaledRandom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, d: Tensor, B: Tensor, b: Tensor) -> Tensor:
        z = (t * d[:, None]).t() @ B.t()
        ctx.save_for_backward(t, d, B, b, z if len(b) <= WIDE * len(d) and ctx.needs_input_grad[3] else None)
        return z * b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        t, d, B, b, z = ctx.saved_tensors
        u = (B * b[:, None]).t() @ g.t()  # [r, N]
        gb = None
        if ctx.needs_input_grad[3]:
            gb = (g * z).sum(0) if z is not None else (B * ((t * d[:, None]) @ g).t()).sum(1)
        gd = (u * t).sum(1) if ctx.needs_input_grad[1] else None
        return u.mul_(d[:, None]) if ctx.needs_input_grad[0] else None, gd, None, gb


class _ScaledOuter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, c: Tensor, t: Tensor, L: Tensor) -> Tensor:
        ctx.shape = x.shape
        c = torch.where(c == 0, TINY, c)
        y = (t.t() @ L.t()).addmm_(x.reshape(-1, x.shape[-1]), W.t())
        ctx.apart = y.dtype not in (torch.float32, torch.float64) and (b is not None or y.dtype == torch.float16)
        kept = y.clone() if ctx.apart else y  # too coarse to take bias and scale off again
        y.mul_(c)
        if b is not None:
            y.add_(b)
        y = y.view(*x.shape[:-1], -1)
        needs_c, needs_L = ctx.needs_input_grad[3], ctx.needs_input_grad[5]
        ctx.save_for_backward(W, b, c, L, t if needs_L else None, (kept if ctx.apart else y) if needs_c else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        W, b, c, L, t, y = ctx.saved_tensors
        needs_x, _, _, _, needs_t, needs_L = ctx.needs_input_grad
        g, gc = grad.reshape(-1, grad.shape[-1]), None
        if y is not None:
            gc = (g * y.reshape(g.shape)).sum(0)
            if not ctx.apart:
                gc = (gc if b is None else gc - b * g.sum(0)) / c
        g = g * c
        gx = (g @ W).view(ctx.shape) if needs_x else None
        return gx, None, None, gc, L.t() @ g.t() if needs_t else None, (t @ g).t() if needs_L else None


def scaled_random(t: Tensor, d: Tensor, B: Tensor, b: Tensor) -> Tensor:
    """((t ⊙ d)ᵀ Bᵀ) ⊙ b [N, out] for t [r, N], in t's dtype; B gets no gradient."""
    return _ScaledRandom.apply(t, *(each.to(t.dtype) for each in (d, B, b)))


def scaled_outer(x: Tensor, W: Tensor, b: Tensor | None, c: Tensor, t: Tensor, L: Tensor) -> Tensor:
    """c ⊙ (x Wᵀ + tᵀ Lᵀ) + b for x [..., in], t [r, N]; W and b get no gradient. c and L are cast to x's dtype."""
    return _ScaledOuter.apply(x, W, b, c.to(x.dtype), t, L.to(x.dtype))
