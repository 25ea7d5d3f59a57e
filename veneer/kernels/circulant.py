"""y = x ΔWᵀ for a ΔW [I·b, J·b] of circulant blocks, by Fourier transforms: a block's product is a correlation.

Bound, for N rows: N·(I + J)·b·log b for the transforms and N·I·J·b/2 complex products between them, forward; about
twice that backward. Saved for backward are x, or what it is made of (see `replay`), and w: the transform of x, twice
its size in half precision, is made again. The plain reference is `reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels.replay import kept


def rolled(w: Tensor) -> Tensor:
    """The dense matrix [I·b, J·b] whose block (i, j) has the first row w[i, j], and in every further row the one above moved by one."""
    at = torch.arange(w.shape[-1], device=w.device)
    return w[..., (at - at[:, None]) % len(at)].movedim(-2, -3).flatten(-2).flatten(-3, -2)


def reference(x: Tensor, w: Tensor) -> Tensor:
    """The definition: x [..., J·b], w [I, J, b] → [..., I·b]."""
    return torch.nn.functional.linear(x, rolled(w))


def _spectrum(x: Tensor, b: int, dtype: torch.dtype) -> Tensor:
    """x [..., n·b] → the transforms of its pieces, [b//2 + 1, rows, n]."""
    return torch.fft.rfft(x.reshape(-1, x.shape[-1] // b, b).to(dtype)).permute(2, 0, 1)


def _signal(X: Tensor, b: int, leading: torch.Size) -> Tensor:
    """Back from [b//2 + 1, rows, n] to [..., n·b]."""
    return torch.fft.irfft(X.permute(1, 2, 0), n=b).reshape(*leading, -1)


class _CirculantLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        b, ctx.wide = w.shape[-1], torch.promote_types(torch.promote_types(x.dtype, w.dtype), torch.float32)
        ctx.make, sources = kept(x) if ctx.needs_input_grad[1] else (None, ())
        ctx.save_for_backward(w, *sources)
        W = torch.fft.rfft(w.to(ctx.wide)).permute(2, 1, 0)  # [b//2 + 1, J, I]
        return _signal(_spectrum(x, b, ctx.wide) @ W.conj(), b, x.shape[:-1]).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        w, *sources = ctx.saved_tensors
        b, G, gx, gw = w.shape[-1], _spectrum(grad, w.shape[-1], ctx.wide), None, None
        if ctx.needs_input_grad[0]:
            gx = _signal(G @ torch.fft.rfft(w.to(ctx.wide)).permute(2, 0, 1), b, grad.shape[:-1]).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            gw = torch.fft.irfft((G.mH @ _spectrum(ctx.make(sources), b, ctx.wide)).permute(1, 2, 0), n=b).to(w.dtype)
        return gx, gw


def circulant_linear(x: Tensor, w: Tensor) -> Tensor:
    """x ΔWᵀ for w [I, J, b], [..., J·b] → [..., I·b] in x's dtype; computed in float32 at least."""
    return _CirculantLinear.apply(x, w)
