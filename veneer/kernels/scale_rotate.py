"""A layer's output scaled, shifted, or turned in pairs of features by vectors: g ⊙ h + b, and a 2×2 matrix for every pair.

Bound, for N rows: 2·N·out operations (turned: 3·N·out) forward and about three times that backward, so memory decides:
h and the result pass once forward; h, the gradient and its own once backward. Plain operations on half-precision h
pass float32 copies between them; a compiler or `veneer.kernels.triton.scale_rotate` does not. The definitions are
`scale_reference` and `rotate_reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.kernels import scaled_output
from veneer.kernels.dispatch import fused
from veneer.kernels.eager import eager


def scale_reference(h: Tensor, g: Tensor, b: Tensor | None = None) -> Tensor:
    """The definition: h [..., d], g [d], b [d] or None → g ⊙ h + b in h's dtype, rounded once."""
    y = g * h
    return (y if b is None else y + b).to(h.dtype)


def rotate_reference(h: Tensor, C: Tensor, S: Tensor) -> Tensor:
    """The definition: h [..., d]; C, S [groups, 1 or 2, half] with d = groups·2·half → [..., d] in h's dtype.

    In each group feature a of the first half goes with c of the second: y_a = C a − S c, y_c = S a + C c, by the first
    row of C and S for y_a and the last for y_c."""
    a, c = h.unflatten(-1, (-1, 2, C.shape[-1])).unbind(-2)  # views: only h is kept for backward
    return torch.stack([C[:, 0] * a - S[:, 0] * c, S[:, -1] * a + C[:, -1] * c], -2).flatten(-3).to(h.dtype)


def scale(h: Tensor, g: Tensor, b: Tensor | None = None) -> Tensor:
    """As `scale_reference`."""
    if fused(h, g, *(() if b is None else (b,))) and h.is_contiguous() and g.ndim == 1:
        from veneer.kernels.triton.scale_rotate import scale as triton

        return triton(h, g, b)
    if _plain(h, g, b):
        return scaled_output.scale(h, g, b)
    return scale_reference(h, g, b)


def rotate(h: Tensor, C: Tensor, S: Tensor) -> Tensor:
    """As `rotate_reference`."""
    if fused(h, C, S) and h.is_contiguous():
        from veneer.kernels.triton.scale_rotate import rotate as triton

        return triton(h, C, S)
    if C.shape[1] == S.shape[1] == 1 and _plain(h, C, S):
        return scaled_output.turn(h, C[:, 0], S[:, 0])
    return rotate_reference(h, C, S)


def _plain(h: Tensor, g: Tensor, other: Tensor | None) -> bool:
    """Whether the function that does not keep h may run: training, one wide dtype."""
    same = h.dtype == g.dtype and (other is None or other.dtype == h.dtype)
    wide = h.dtype in (torch.float32, torch.float64)
    return same and wide and g.requires_grad and torch.is_grad_enabled() and eager(h)
