"""y + x ΔWᵀ for a ΔW [out, in] that is zero but in s columns, or but in s rows, and is never formed.

Bound, for N rows of x: columns take 2·N·s·out operations forward and twice that backward, rows 2·N·s·in and twice that,
next to a pass over y and, for columns, over the gradient of x. Saved for backward are I, V and, for columns, the chosen
features alone, x[..., I] [N, s]; for rows x, or what it is made of (see `replay`). The plain reference is `reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from veneer.kernels.replay import kept, times


def in_columns(V: Tensor, I: Tensor, inside: int) -> Tensor:
    """The matrix [out, in] that is V [out, s] in columns I [s] and zero elsewhere."""
    return V.new_zeros(V.shape[0], inside).index_add(1, I, V)


def in_rows(V: Tensor, I: Tensor, out: int) -> Tensor:
    """The matrix [out, in] that is V [s, in] in rows I [s] and zero elsewhere."""
    return V.new_zeros(out, V.shape[1]).index_add(0, I, V)


def reference(y: Tensor, x: Tensor, change: Tensor) -> Tensor:
    """The definition: y [..., out], x [..., in], change [out, in] from `in_columns` or `in_rows` → [..., out]."""
    return y + linear(x, change)


# Products run as [s, ·] @ [·, N], and what is picked or added is rows of transposed views: with one thread, s = 8, N = 2048
# and in, out = 256, 1024 that is 1.0 against 3.4 ms for g V, 0.06 against 0.14 for x[..., I].


class _AddColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, V: Tensor, I: Tensor) -> Tensor:
        t = _flat(x).t().index_select(0, I)  # [s, N]
        ctx.shape = x.shape
        ctx.save_for_backward(t if ctx.needs_input_grad[2] else None, V if ctx.needs_input_grad[1] else None, I)
        return _flat(y).clone().addmm_(t.t(), V.t()).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        t, V, I = ctx.saved_tensors
        g, gx = _flat(grad), None
        if V is not None:
            gx = g.new_zeros(len(g), ctx.shape[-1])
            gx.t().index_add_(0, I, V.t() @ g.t())
            gx = gx.view(ctx.shape)
        return grad, gx, None if t is None else (t @ g).t(), None


class _ColumnsLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, V: Tensor, I: Tensor) -> Tensor:
        rows = _flat(x)
        t = rows.t().index_select(0, I)  # [s, N]
        ctx.shape = x.shape
        ctx.save_for_backward(W, V, I, t if ctx.needs_input_grad[3] else None)
        y = t.t() @ V.t() if b is None else torch.addmm(b, t.t(), V.t())
        return y.addmm_(rows, W.t()).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        W, V, I, t = ctx.saved_tensors
        g, gx = _flat(grad), None
        if ctx.needs_input_grad[0]:
            gx = g @ W
            gx.t().index_add_(0, I, V.t() @ g.t())
            gx = gx.view(ctx.shape)
        return gx, None, None, None if t is None else (t @ g).t(), None


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, V: Tensor, I: Tensor) -> Tensor:
        ctx.shape = x.shape
        ctx.make, sources = kept(x) if ctx.needs_input_grad[2] else (None, ())
        ctx.save_for_backward(V if ctx.needs_input_grad[1] else None, I, *sources)
        out = _flat(y).clone()
        out.t().index_add_(0, I, V @ _flat(x).t())
        return out.view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        V, I, *sources = ctx.saved_tensors
        g = _flat(grad).t().index_select(0, I)  # [s, N]
        gx = None if V is None else (g.t() @ V).view(ctx.shape)
        return grad, gx, times(g, ctx.make, sources, ctx.shape) if sources else None, None


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def add_columns(y: Tensor, x: Tensor, V: Tensor, I: Tensor) -> Tensor:
    """y + x[..., I] Vᵀ for y [..., out], x [..., in], V [out, s], I [s]. V is cast to y's dtype."""
    if torch.is_autocast_enabled(y.device.type):
        return y + linear(x.index_select(-1, I), V)
    return _AddColumns.apply(y, x.to(y.dtype), V.to(y.dtype), I)


def columns_linear(x: Tensor, W: Tensor, b: Tensor | None, V: Tensor, I: Tensor) -> Tensor:
    """x Wᵀ + b + x[..., I] Vᵀ, the layer's own product adding to the thin one; W and b get no gradient. V is cast to x's dtype."""
    return _ColumnsLinear.apply(x, W, b, V.to(x.dtype), I)


def add_rows(y: Tensor, x: Tensor, V: Tensor, I: Tensor) -> Tensor:
    """y with x Vᵀ added to its features I, for y [..., out], x [..., in], V [s, in], I [s]. V is cast to y's dtype."""
    if torch.is_autocast_enabled(y.device.type):
        return y.index_add(-1, I, linear(x, V).to(y.dtype))
    return _AddRows.apply(y, x.to(y.dtype), V.to(y.dtype), I)
