"""A second, narrow stream that travels from block to block behind the first one's tokens, as further tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def joined(h: Tensor, g: Tensor) -> Tensor:
    """h [B, T, D] with g [B, T, w] behind it, as ⌈T w / D⌉ further tokens."""
    flat = g.flatten(1)
    return torch.cat([h, F.pad(flat, (0, -flat.shape[1] % h.shape[2])).unflatten(1, (-1, h.shape[2]))], 1)


def parted(x: Tensor, w: int) -> tuple[Tensor, Tensor]:
    """h without gradient, and g, as `joined` put them together: n tokens are those of T + ⌈T w / D⌉."""
    T = x.shape[1] * x.shape[2] // (x.shape[2] + w)
    return x[:, :T].detach(), x[:, T:].flatten(1)[:, : T * w].unflatten(1, (T, w))
