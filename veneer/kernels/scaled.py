"""b ⊙ ((x Aᵀ ⊙ d) Bᵀ) for fixed A [r, in], B [out, r] and trained d [r], b [out].

Bound, for N rows: 2·N·r·(in + out) operations forward and as many backward: both vectors' gradients are sums of
products that are there anyway, so no third thin product is needed. Saved for backward are x Aᵀ [N, r] and z [N, out],
what b multiplies. The plain reference is `reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def reference(x: Tensor, A: Tensor, d: Tensor, B: Tensor, b: Tensor) -> Tensor:
    """The definition: x [..., in] → [..., out]."""
    return (x @ A.t() * d) @ B.t() * b


class _ScaledRandom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, d: Tensor, B: Tensor, b: Tensor) -> Tensor:
        t = A @ x.reshape(-1, x.shape[-1]).t()  # [r, N]
        z = (t * d[:, None]).t() @ B.t()
        ctx.shape = x.shape
        ctx.save_for_backward(t, z, A, d, B, b)
        return (z * b).view(*x.shape[:-1], len(b))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        t, z, A, d, B, b = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        u = B.t() @ (g * b).t()  # [r, N]
        gb = (g * z).sum(0) if ctx.needs_input_grad[4] else None
        gd = (u * t).sum(1) if ctx.needs_input_grad[2] else None
        gx = ((u * d[:, None]).t() @ A).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return gx, None, gd, None, gb


def scaled_random(x: Tensor, A: Tensor, d: Tensor, B: Tensor, b: Tensor) -> Tensor:
    """b ⊙ ((x Aᵀ ⊙ d) Bᵀ) in x's dtype; A and B get no gradient."""
    return _ScaledRandom.apply(x, *(t.to(x.dtype) for t in (A, d, B, b)))
