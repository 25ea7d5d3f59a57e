"""Random views of pictures that are tensors already: crops, mirrored and with other light, and blocks of patches to hide."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


def crops(x: Tensor, side: int, scale: tuple[float, float], generator: Generator | None = None) -> Tensor:
    """A random part of each picture [B, C, H, W], resized to [B, C, side, side]; half of them mirrored, all with other light.

    Args:
        scale: smallest and largest share of the area. Width over height is between 3/4 and 4/3, contrast and brightness within 0.4.
        generator: on the CPU; None takes torch's own.
    """
    B = len(x)
    u = torch.rand(7, B, generator=generator).to(x)
    area, ratio = scale[0] + (scale[1] - scale[0]) * u[0], (math.log(4 / 3) * (2 * u[1] - 1)).exp()
    wide, high = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    theta = x.new_zeros(B, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = wide * torch.where(u[2] < 0.5, -1.0, 1.0).to(x), high
    theta[:, 0, 2], theta[:, 1, 2] = (1 - wide) * (2 * u[3] - 1), (1 - high) * (2 * u[4] - 1)
    grid = F.affine_grid(theta, [B, x.shape[1], side, side], align_corners=False)
    y = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    middle = y.mean((1, 2, 3), keepdim=True)
    contrast, brightness = 0.6 + 0.8 * u[5], 0.8 * u[6] - 0.4
    return middle + contrast[:, None, None, None] * (y - middle) + brightness[:, None, None, None]


def hidden_blocks(count: int, rows: int, columns: int, generator: Generator | None = None) -> Tensor:
    """Masks bool [count, rows · columns]: every second picture has a block of its patches hidden, 10 to 50 % of them.

    The shares lie evenly between the two, in random order, as in DINOv2; a block is as square as the grid allows.
    """
    masks = torch.zeros(count, rows, columns, dtype=torch.bool)
    chosen = torch.randperm(count, generator=generator)[: count // 2]
    for share, i in zip(torch.linspace(0.1, 0.5, max(len(chosen), 1)).tolist(), chosen.tolist()):
        wanted = max(1, round(share * rows * columns))
        high = min(rows, max(1, round(math.sqrt(wanted * rows / columns))))
        wide = min(columns, max(1, round(wanted / high)))
        top, left = (int(torch.randint(0, n + 1, (1,), generator=generator)) for n in (rows - high, columns - wide))
        masks[i, top : top + high, left : left + wide] = True
    return masks.flatten(1)
