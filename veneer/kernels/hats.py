"""z = Σ_k max(0, 1 − |u x − t_k|) C_k: every feature through its own hat functions, mixed into r features; the hats are not kept.

Bound, for N rows, K knots: 2·N·in·K·r operations forward and twice that backward. One knot at a time, so that what lies
between is of x's size and not K times that; saved for backward are x, or what it is made
of (see `replay`), and the parameters; the hats are made again.
The plain reference is `reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels.replay import kept


def hats(x: Tensor, knots: Tensor, u: Tensor) -> Tensor:
    """x [..., in], knots [in, K], u [in] → [..., in, K]: 1 on a knot, 0 from distance 1 on."""
    return (1 - (x * u).unsqueeze(-1).sub(knots).abs()).relu()


def reference(x: Tensor, knots: Tensor, u: Tensor, C: Tensor) -> Tensor:
    """The definition: x [..., in], knots [in, K], u [in], C [in, K, r] → [..., r]."""
    return torch.einsum("...dk,dkr->...r", hats(x, knots, u), C)


class _Hats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, knots, u, C):
        ctx.make, sources = kept(x)
        ctx.save_for_backward(knots, u, C, *sources)
        at = x.reshape(-1, x.shape[-1]).to(knots.dtype) * u  # near knots half precision is too coarse
        z = at.new_zeros(at.shape[0], C.shape[-1])
        for k in range(knots.shape[1]):
            phi = (1 - (at - knots[:, k]).abs_()).relu_()
            z += phi.to(x.dtype) @ C[:, k].to(x.dtype)
        return z.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        knots, u, C, *sources = ctx.saved_tensors
        x = ctx.make(sources)
        rows = x.reshape(-1, x.shape[-1]).to(knots.dtype)
        at, g = rows * u, grad.reshape(-1, grad.shape[-1]).to(x.dtype)
        g_at, g_knots, g_C = torch.zeros_like(at), [], []
        for k in range(knots.shape[1]):
            far = at - knots[:, k]
            phi = (1 - far.abs()).relu_()
            g_C.append((phi.to(x.dtype).t() @ g).to(C.dtype))
            slope = far.sign_() * (phi > 0)  # 0 at the tips and beyond
            slope *= g @ C[:, k].to(x.dtype).t()
            g_at -= slope
            g_knots.append(slope.sum(0))
        gx = (g_at * u).view(x.shape).to(x.dtype) if ctx.needs_input_grad[0] else None
        return gx, torch.stack(g_knots, 1), (g_at * rows).sum(0), torch.stack(g_C, 1)


def hat_features(x: Tensor, knots: Tensor, u: Tensor, C: Tensor) -> Tensor:
    """x [..., in], knots [in, K], u [in], C [in, K, r] → z [..., r] in the parameters' dtype; products run in x's."""
    wide = torch.promote_types(x.dtype, knots.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _Hats.apply(x, *(t.to(wide) for t in (knots, u, C)))
