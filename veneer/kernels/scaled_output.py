"""g ⊙ h + b, and pairs of features turned by one angle and length each, without keeping h for the vectors' gradients.

What reads the result keeps it anyway, more often than not; h is had back from it by a division (or the turn back). Where h
itself is made of tensors that the graph keeps (see `replay`), those are kept. Bound: one pass forward, three backward. A
scale of exactly zero counts as `TINY`. For float32 and float64; the definitions are in `scale_rotate`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels.replay import keeps, kept
from veneer.kernels.scaled import TINY


def _total(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).sum(0)


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, g: Tensor, b: Tensor | None) -> Tensor:
        g = torch.where(g == 0, TINY, g)
        y = g * h if b is None else torch.addcmul(b, g, h)
        ctx.make, sources = kept(h)
        ctx.apart = not keeps(ctx.make)
        ctx.save_for_backward(g, b, *(sources if ctx.apart else (y,)))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        g, b, *sources = ctx.saved_tensors
        gb = _total(grad) if b is not None else None
        if ctx.apart:
            gg = _total(grad * ctx.make(sources))
        else:
            gg = _total(grad * sources[0])
            gg = (gg if b is None or gb is None else gg - b * gb) / g
        return grad * g if ctx.needs_input_grad[0] else None, gg, gb


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, C: Tensor, S: Tensor) -> Tensor:
        C = torch.where((C == 0) & (S == 0), TINY, C)
        y = _turned(h, C, S)
        ctx.save_for_backward(y, C, S)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, C, S = ctx.saved_tensors
        back = _turned(grad, C, -S)  # the transpose turns the other way
        half = C.shape[-1]
        p, q = grad.unflatten(-1, (-1, 2, half)).unbind(-2)
        u, v = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        along, across = ((p * u + q * v).reshape(-1, *C.shape).sum(0), (q * u - p * v).reshape(-1, *C.shape).sum(0))
        length = C.square() + S.square()
        return back if ctx.needs_input_grad[0] else None, (C * along + S * -across) / length, (S * along + C * across) / length


def _turned(h: Tensor, C: Tensor, S: Tensor) -> Tensor:
    a, c = h.unflatten(-1, (-1, 2, C.shape[-1])).unbind(-2)
    y = torch.empty_like(h, memory_format=torch.contiguous_format)
    first, second = y.unflatten(-1, (-1, 2, C.shape[-1])).unbind(-2)
    torch.mul(a, C, out=first).addcmul_(c, S, value=-1)
    torch.mul(c, C, out=second).addcmul_(a, S)
    return y


def scale(h: Tensor, g: Tensor, b: Tensor | None = None) -> Tensor:
    """g ⊙ h + b for h [..., d], g [d], b [d] or None, all of one dtype."""
    return _Scale.apply(h, g, b)


def turn(h: Tensor, C: Tensor, S: Tensor) -> Tensor:
    """h [..., d] with features a and c of every pair as C a − S c and S a + C c; C, S [groups, half], d = groups·2·half."""
    return _Turn.apply(h, C, S)
