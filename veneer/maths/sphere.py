"""Features on the unit sphere: alignment and uniformity of a batch (2020, arXiv:2005.10242), spherical interpolation."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

EDGE = 1e-7
"""How near to ±1 a cosine may come: the angle between equal or opposite features has no finite gradient."""


def on_sphere(z: Tensor) -> Tensor:
    """z / ‖z‖ along the last axis, [..., D], in float32 at least: in half precision 1 − 1e-7 is 1."""
    return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)


def pairs(f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices i < j of all pairs of rows of unit vectors f [N, D], and ‖f_i − f_j‖² = 2 − 2 f_i·f_j, each [N (N − 1) / 2]."""
    i, j = torch.triu_indices(len(f), len(f), 1, device=f.device)
    return i, j, (2 - 2 * (f @ f.T)[i, j]).clamp(min=0)


def alignment(f: Tensor, labels: Tensor) -> Tensor:
    """Mean squared distance of pairs with equal labels [N], in [0, 4]; 0 where no label occurs twice."""
    i, j, squared = pairs(f)
    same = (labels[i] == labels[j]).to(f.dtype)
    return (squared * same).sum() / same.sum().clamp(min=1)


def uniformity(f: Tensor, t: float = 2.0, floor: float = 1e-6) -> Tensor:
    """log of the mean of exp(−t ‖f_i − f_j‖²) over all pairs, floored; in [max(−4t, log floor), 0].

    Of fewer than two features nothing can be said: 0, with a warning.
    """
    if len(f) < 2:
        warnings.warn("A batch of one picture has no pairs: it counts without the uniformity of its features.", stacklevel=2)
        return f.sum() * 0
    return (-t * pairs(f)[2]).exp().mean().clamp(min=floor).log()


def slerp(a: Tensor, b: Tensor, t: Tensor | float) -> Tensor:
    """The point at share t of the arc from a to b, unit vectors [..., D] of any a and b; beyond them for t outside [0, 1]."""
    a, b = on_sphere(a), on_sphere(b)
    angle = (a * b).sum(-1, keepdim=True).clamp(EDGE - 1, 1 - EDGE).arccos()
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()


def slerp_within_classes(f: Tensor, labels: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Every unit vector of f [N, D] moved towards a random one of its class, by a share drawn from [low, high].

    One that is drawn as its own partner, as it must be where its class has no other, stays what it is.
    """
    own = torch.arange(len(f), device=f.device)
    partner = own.clone()
    for label in labels.unique():
        rows = own[labels == label]
        partner[rows] = rows[torch.randperm(len(rows), device=f.device)]
    t = torch.empty(len(f), 1, dtype=f.dtype, device=f.device).uniform_(low, high)
    return torch.where((partner == own)[:, None], f, slerp(f, f[partner], t))
