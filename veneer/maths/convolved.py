"""Bottleneck convolutions on maps [rows, channels, …] of one to three axes, or on tokens as maps of one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CONVS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def mapped(y: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """w y + b at every place: y [rows, in, …], w [out, in] → [rows, out, …]."""
    return torch.baddbmm(b[:, None], w.expand(len(y), *w.shape), y.flatten(2)).unflatten(-1, y.shape[2:])


def pointwise(y: Tensor, q: dict[str, Tensor]) -> Tensor:
    """y ← y + up_w GELU(down_w y + down_b) + up_b, one after another."""
    for D, d, U, u in zip(q["down_w"], q["down_b"], q["up_w"], q["up_b"]):
        y = y + mapped(F.gelu(mapped(y, D, d)), U, u)
    return y


def dilated(h: Tensor, w: Tensor, b: Tensor, causal: bool = False) -> Tensor:
    """h ← h + w_i ∗ GELU(h) + b_i with dilation 2^i; w [n, m, m, kernel…], b [n, m], odd kernels.

    Causal (one axis): a kernel ends at its own place instead of having it in the middle."""
    for i, (w_i, b_i) in enumerate(zip(w, b)):
        reach = (w.shape[-1] // 2) << i
        z = F.pad(F.gelu(h), (2 * reach, 0)) if causal else F.gelu(h)
        h = h + CONVS[h.ndim - 2](z, w_i, b_i, padding=0 if causal else reach, dilation=1 << i)
    return h


def squeezed(h: Tensor, first: Tensor, second: Tensor, causal: bool = False) -> Tensor:
    """Channels weighed by σ(second ReLU(first mean h)), the mean over all places (squeeze and excitation).

    Causal (one axis): at every place the mean up to it."""
    if causal:
        counts = torch.arange(1, h.shape[-1] + 1, device=h.device)
        mean = (h.cumsum(-1, dtype=torch.promote_types(h.dtype, torch.float32)) / counts).to(h.dtype).transpose(1, 2)
        return h * F.linear(F.relu(F.linear(mean, first)), second).sigmoid().transpose(1, 2)
    gate = F.linear(F.relu(F.linear(h.flatten(2).mean(-1), first)), second).sigmoid()
    return h * gate.reshape(*gate.shape, *(1,) * (h.ndim - 2))
