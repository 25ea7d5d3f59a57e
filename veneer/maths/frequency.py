"""Low and high spatial frequencies of patch tokens on their grid, without complex numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from veneer.method import Method
from veneer.site import Site


def window(n: int, c: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of the projection [n, n] on the frequencies −c … c − 1 of n points: 1/n Σ_k exp(2πi k (a − b) / n)."""
    points = torch.arange(n, device=like.device, dtype=like.dtype)
    angle = (2 * math.pi / n) * (points[:, None] - points)
    waves = angle * torch.arange(-c, c, device=like.device, dtype=like.dtype)[:, None, None]
    return waves.cos().sum(0) / n, waves.sin().sum(0) / n


def low_pass(z: Tensor, sides: tuple[int, int], c: int) -> Tensor:
    """Tokens on a grid [..., h · w, d] → the real part of what the frequencies −c … c − 1 of both axes hold, [..., h · w, d].

    It equals the inverse Fourier transform of the shifted, masked transform: the mask is a product over the two axes, so
    the projections P_h, P_w act on them one by one. The window holds −c but not c, hence the imaginary parts.
    In float32 at least.
    """
    g = z.to(torch.promote_types(z.dtype, torch.float32)).unflatten(-2, sides)
    (rows, rows_i), (columns, columns_i) = (window(n, c, g) for n in sides)
    kept = torch.einsum("ha,...abd->...hbd", rows, g), torch.einsum("ha,...abd->...hbd", rows_i, g)
    low = torch.einsum("wb,...hbd->...hwd", columns, kept[0]) - torch.einsum("wb,...hbd->...hwd", columns_i, kept[1])
    return low.flatten(-3, -2)


def cut_off(grid: tuple[int, int], rho: float, method: Method, site: Site) -> int:
    """⌊rho · the shorter side / 2⌋, at least 1."""
    least = min(grid)
    c = int(least * rho // 2)
    if not c:
        way = f"rho ≥ {2 / least:.3g}" if least > 1 else "frequency=0"
        raise method.refuse(f"rho={rho} leaves no low frequency on the grid of {grid[0]} × {grid[1]} {{at}}; choose {way}.", site)
    return c
