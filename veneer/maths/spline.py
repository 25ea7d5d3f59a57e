"""B-splines on an even grid, and the layer that sums a learned one of every input: a Kolmogorov–Arnold layer (arXiv:2404.19756)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, silu
from torch.utils.checkpoint import checkpoint


def bsplines(v: Tensor, n: int, order: int, span: float) -> Tensor:
    """The n = G + order B-splines of this degree on G intervals of [−span, span], [...] → [..., n]; they sum to one there.

    Cox–de Boor with even knots: B_g^p = (y_g B_g^{p−1} + (p + 1 − y_g) B_{g+1}^{p−1}) / p, y_g the place after the g-th knot
    in intervals.
    """
    y = (v.unsqueeze(-1) + span) * ((n - order) / (2 * span)) + order - torch.arange(n + order, device=v.device)
    B = ((y >= 0) & (y < 1)).to(v.dtype)
    for p in range(1, order + 1):
        y = y[..., :-1]
        B = (y * B[..., :-1] + (p + 1 - y) * B[..., 1:]) / p
    return B


def kan(v: Tensor, base: Tensor, scale: Tensor, coef: Tensor, span: float, order: int) -> Tensor:
    """Σ_i base_ji SiLU(v_i) + scale_ji Σ_g coef_jig B_g(v_i), [..., p] → [..., q] in the parameters' dtype at least.

    base, scale [q, p]; coef [q, p, n]. A few inputs at a time, their splines made again in backward: what lies between is
    not much larger than the wider of input and output, and only v is kept.
    """
    size = len(base.T) if torch.compiler.is_compiling() else max(1, max(base.shape) // coef.shape[-1])  # compilers cut for themselves

    def part(v: Tensor, base: Tensor, scale: Tensor, coef: Tensor) -> Tensor:
        v = v.to(torch.promote_types(v.dtype, coef.dtype))
        B = bsplines(v, coef.shape[-1], order, span)
        return linear(silu(v), base) + linear(B.flatten(-2), (scale.unsqueeze(-1) * coef).flatten(1))

    parts = zip(v.split(size, -1), base.split(size, 1), scale.split(size, 1), coef.split(size, 1))
    z = [checkpoint(part, *tensors, use_reentrant=False) for tensors in parts]
    return torch.stack(z).sum(0) if len(z) > 1 else z[0]
