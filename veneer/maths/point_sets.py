"""Sets of points in space: farthest-point samples, nearest neighbours, and values carried from some points to others."""

from __future__ import annotations

import torch
from torch import Tensor

NEAR = 1e-8
"""Added to squared distances before they are inverted, so that a point may stand on another one."""


def wide(points: Tensor) -> Tensor:
    """In float32 at least: distances of close points vanish in half precision."""
    return points.to(torch.promote_types(points.dtype, torch.float32))


@torch.no_grad()
def farthest(points: Tensor, count: int) -> Tensor:
    """Indices [batch, count] of a farthest-point sample of points [batch, n, axes]: point 0 first, then always the point that is
    farthest from those chosen. One step a point, as each choice depends on the one before."""
    points = wide(points)
    batch, n, axes = points.shape
    current = torch.zeros(batch, 1, dtype=torch.long, device=points.device)
    distance = torch.full((batch, n), torch.inf, dtype=points.dtype, device=points.device)
    chosen = [current]
    for _ in range(count - 1):
        here = points.gather(1, current[..., None].expand(-1, -1, axes))
        distance = torch.minimum(distance, (points - here).square().sum(-1))
        current = distance.argmax(-1, keepdim=True)
        chosen.append(current)
    return torch.cat(chosen, 1)


@torch.no_grad()
def nearest(points: Tensor, centres: Tensor, k: int) -> Tensor:
    """Indices [batch, m, k] of the k points [batch, n, axes] that are nearest to each centre [batch, m, axes], nearest first."""
    far = torch.cdist(wide(centres), wide(points), compute_mode="donot_use_mm_for_euclid_dist")
    return far.topk(k, largest=False).indices


def taken(values: Tensor, index: Tensor) -> Tensor:
    """values [batch, n, D] at index [batch, …] → [batch, …, D]."""
    flat = index.flatten(1)
    return values.gather(1, flat[..., None].expand(-1, -1, values.shape[-1])).reshape(*index.shape, values.shape[-1])


def nearness(points: Tensor, centres: Tensor) -> Tensor:
    """Weights [batch, n, m] of the centres for each point, by inverse squared distance; every row sums to 1."""
    square = (wide(points)[:, :, None] - wide(centres)[:, None]).square().sum(-1)
    return torch.nn.functional.normalize(1 / (square + NEAR), p=1, dim=-1)


def places(n: int, like: Tensor) -> Tensor:
    """Places [n, 3] of tokens that have none of their own: a square grid where n is one (patches), else a line, from −1 to 1."""
    side = int(n**0.5 + 0.5)
    along = torch.linspace(-1, 1, side if side * side == n else n, device=like.device, dtype=wide(like).dtype)
    first, second = torch.cartesian_prod(along, along).unbind(-1) if side * side == n and n > 1 else (along, torch.zeros_like(along))
    return torch.stack([first, second, torch.zeros_like(first)], -1)
