"""Sketches of a weight: a few values for every block of a row and an index for every entry (arXiv:2410.06364).

Values are weighted one-dimensional k-means; indices are assigned column by column, later columns making up for errors.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from veneer.maths.grids import compensated, damped, groups, lively, upper_root

CHUNK = 4096
"""Blocks that are clustered together."""


def gathered(w: Tensor, codes: Tensor) -> Tensor:
    """The weight [out, in] of values w [out, blocks, K] and codes [out, in]."""
    return w.gather(-1, groups(codes, codes.shape[-1] // w.shape[-2]).long()).flatten(-2)


def first_centres(x: Tensor, weight: Tensor, K: int, generator: Generator) -> Tensor:
    """Centres [rows, K] to begin with, of points x [rows, n]: evenly spaced up to 8, else drawn by their distance (k-means++)."""
    if K <= 8:
        low, high = x.aminmax(dim=1, keepdim=True)
        return low + (high - low) * torch.linspace(0, 1, K).to(x)
    draws = torch.rand(K, len(x), 1, generator=generator).to(x)
    mass, centres = weight, []
    for draw in draws:
        ladder = mass.cumsum(1)
        at = torch.searchsorted(ladder, draw * ladder[:, -1:]).clamp_max(x.shape[1] - 1)
        centres.append(x.gather(1, at))
        far = (x - centres[-1]).square() * weight
        mass = far if len(centres) == 1 else torch.minimum(mass, far)
    return torch.cat(centres, 1)


def k_means(x: Tensor, weight: Tensor, centres: Tensor, rounds: int = 100, tolerance: float = 1e-6) -> Tensor:
    """Centres [rows, K] of points x [rows, n] with these weights; one that no point is nearest to stays where it is."""
    x, order = x.sort(1)
    weight = weight.gather(1, order)
    nothing = x.new_zeros(len(x), 1)
    mass, moment = (torch.cat([nothing, t.cumsum(1)], 1) for t in (weight, weight * x))
    for _ in range(rounds):
        centres, place = centres.sort(1)  # nearest in one dimension: between the midpoints
        ends = torch.searchsorted(x, (centres[:, 1:] + centres[:, :-1]) / 2)
        ends = torch.cat([nothing.long(), ends, nothing.long() + x.shape[1]], 1)
        total, first = (t.gather(1, ends).diff(dim=1) for t in (mass, moment))
        moved = torch.where(ends.diff(dim=1) > 0, first / total, centres)
        still = bool(((moved - centres).square().sum(1) <= tolerance * x.var(1, correction=0)).all())
        centres = torch.empty_like(moved).scatter_(1, place, moved)
        if still:
            break
    return centres


def sketch(
    W: Tensor, S: Tensor | None, K: int, blocks: int, exponent: float, damp: float, act_order: bool, seed: int
) -> tuple[Tensor, Tensor]:
    """Values [out, blocks, K] and codes [out, in] of W [out, in], learned in float64.

    Args:
        S: Xᵀ X [in, in] of the inputs; None: all count alike, and every entry takes its nearest value.
        exponent: an entry's weight among the values is d^−exponent, d² what its column cannot pass on to later ones.
        act_order: columns by descending diagonal of S.
    """
    W, g = W.double(), W.shape[1] // blocks
    order = torch.arange(W.shape[1], device=W.device)
    d = torch.ones_like(W[0])
    if S is not None:
        W = W * (S.diagonal() != 0)  # an input never met
        S = lively(S.double())
        order = S.diagonal().argsort(descending=True, stable=True) if act_order else order
        U = upper_root(damped(S[order][:, order], damp))
        d = torch.empty_like(d).scatter_(0, order, U.diagonal())
    x, generator = W.reshape(-1, g), Generator().manual_seed(seed)
    weight = (d / d.amin()).pow(-exponent).view(blocks, g).repeat(len(W), 1)
    parts = [k_means(a, b, first_centres(a, b, K, generator)) for a, b in zip(x.split(CHUNK), weight.split(CHUNK))]
    w = torch.cat(parts).view(len(W), blocks, K)

    block_of = (order // g).tolist()

    def nearest(column: Tensor, j: int) -> tuple[Tensor, Tensor]:
        values = w[:, block_of[j]]
        code = (values - column[:, None]).abs().argmin(1)
        return code, values.gather(1, code[:, None])[:, 0]

    if S is None:
        return w, torch.stack([nearest(W[:, j], j)[0] for j in range(W.shape[1])], 1)
    found = compensated(W[:, order], U, nearest)
    return w, torch.empty_like(found).index_copy_(1, order, found)
