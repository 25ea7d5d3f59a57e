"""(x Rᵀ) Lᵀ for thick factors built from few trained numbers, which are not kept for backward but built again there.

Bound, for N rows, inner size r and a build of B operations: B twice, 2·N·r·(in + out) forward, at most twice that
backward. Saved for backward are x, or what it is made of (see `replay`; only if R is trained), t = R xᵀ [r, N] (only if
L is) and the tensors the factors are built from. The plain reference is `reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from veneer.kernels.eager import eager
from veneer.kernels.replay import kept, times

Build = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]


def reference(x: Tensor, build: Build, p: dict[str, Tensor]) -> Tensor:
    """The definition: x [..., in], build(p) = L [out, r], R [r, in] → [..., out]."""
    L, R = build(p)
    return linear(linear(x, R.to(x.dtype)), L.to(x.dtype))


class _RebuiltLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, build: Build, names: list[str], *tensors: Tensor) -> Tensor:
        ctx.build, ctx.names, ctx.shape = build, names, x.shape
        L, R, _ = _built(ctx, x.dtype, tensors)
        t = R.detach() @ x.reshape(-1, x.shape[-1]).t()  # [r, N]: the fast order, see `low_rank`
        ctx.make, sources = kept(x) if R.requires_grad else (None, ())
        ctx.save_for_backward(t if L.requires_grad else None, *tensors, *sources)
        return (t.t() @ L.detach().t()).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        t, *rest = ctx.saved_tensors
        tensors, sources = rest[: len(ctx.names)], rest[len(ctx.names) :]
        L, R, leaves = _built(ctx, grad.dtype, tensors)
        g = grad.reshape(-1, grad.shape[-1])
        needs_x = ctx.needs_input_grad[0]
        u: Any = L.detach().t() @ g.t() if needs_x or sources else None  # [r, N]
        gx = (u.t() @ R.detach()).view(ctx.shape) if needs_x else None
        factors = {} if t is None else {L: (t @ g).t()}
        if sources:
            factors[R] = times(u, ctx.make, sources, ctx.shape)
        trained = [leaf for leaf in leaves if leaf.requires_grad]
        made = iter(torch.autograd.grad(list(factors), trained, list(factors.values()), allow_unused=True) if factors else ())
        return gx, None, None, *(next(made, None) if leaf.requires_grad else None for leaf in leaves)


def _built(ctx: Any, dtype: torch.dtype, tensors: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """L and R in this dtype with their graph, and the leaves it begins at."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(n) for t, n in zip(tensors, ctx.needs_input_grad[3:])]
        L, R = ctx.build(dict(zip(ctx.names, leaves)))
        return L.to(dtype), R.to(dtype), leaves


def rebuilt_low_rank(x: Tensor, build: Build, p: dict[str, Tensor]) -> Tensor:
    """x (L R)ᵀ for L, R = build(p), cast to x's dtype; `build` must give the same factors both times."""
    if not eager(x):
        return reference(x, build, p)  # a compiler decides by itself what to build twice
    return _RebuiltLowRank.apply(x, build, list(p), *p.values())
