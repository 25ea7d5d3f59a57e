"""Few coefficients of a transform placed and valued so that they repair the error of a quantised weight (arXiv:2509.17428).

The change is F H / n for sparse coefficients F [out, n] and a matrix H [n, n] with H Hᵀ = n I.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from veneer.method import Method
from veneer.site import Site

TOGETHER = 2**24
"""Entries of the systems that are solved together."""


def allocate(a: Tensor, total: int, most: int) -> Tensor:
    """`total` coefficients shared among rows in proportion to a [rows], at most `most` a row; [rows], summing to `total`.

    What rounding down leaves is spread evenly over the rows with room, the last units over those that have the least.
    """
    a = a.double()
    a = a if bool(a.sum() > 0) else torch.ones_like(a)  # no error at all: an even split
    given = (total * a / a.sum()).floor().long().clamp_max(most)
    while (rest := total - int(given.sum())) > 0:
        room = given < most
        each = rest // int(room.sum())
        if each:
            given = torch.where(room, given + each, given).clamp_max(most)
        else:
            given[torch.where(room, given, most + 1).argsort(stable=True)[:rest]] += 1
    return given


def largest(score: Tensor, given: Tensor) -> Tensor:
    """Row and column [p, 2] of the given[i] largest scores of every row i, row by row, columns ascending."""
    place = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (place < given[:, None]).nonzero()


def refined(v: Tensor, G: Tensor, given: Tensor, E: Tensor) -> Tensor:
    """Coefficients [p] at E [p, 2] of the least squares c_i = v_i[E_i] G[E_i, E_i]⁻¹ of every row i.

    Args:
        v: [out, n], errors of the rows times the images of all coefficients. G: [n, n], the images' Gram matrix.
    """
    start, order, done = given.cumsum(0) - given, given.argsort(descending=True), 0
    c = v.new_zeros(len(E))
    while done < len(order) and (width := int(given[order[done]])):
        rows = order[done : done + max(TOGETHER // width**2, 1)]  # of about the same length, the shorter ones filled up
        done += len(rows)
        at = torch.arange(width, device=E.device)
        real = at < given[rows][:, None]
        where = torch.where(real, start[rows][:, None] + at, 0)
        columns = torch.where(real, E[where, 1], 0)
        own = G[columns[:, :, None], columns[:, None, :]] * (real[:, :, None] & real[:, None, :])
        own = own + torch.diag_embed((~real).to(own))
        wanted = torch.where(real, v[rows[:, None], columns], 0)
        found = torch.cholesky_solve(wanted[..., None], torch.linalg.cholesky(own))[..., 0]
        c[where[real]] = found[real]
    return c


def repair(
    error: Tensor, S: Tensor | None, total: int, n: int, turn: Callable[[Tensor], Tensor], t: float = 1.0, rule: str = "output"
) -> tuple[Tensor, Tensor]:
    """E [total, 2] and c [total] of the coefficients that repair `error` [out, in] best, in float64.

    Args:
        S: damped Xᵀ X [in, in] of the inputs; None: every input counts alike. n: Hᵀ H = n I. turn: rows x → H x.
        t: temperature of the shares of rows. rule: shares from the norms of the rows' output error and places by the
            largest coefficients ("output"), or shares from the norms of the rows and places by the largest output
            of a coefficient ("weight", as the authors' code does).
    """
    error = error.double()
    F = turn(error)  # error Hᵀ
    seen = error if S is None else error @ S
    size = F.norm(dim=1) if rule == "weight" else (seen * error).sum(1).clamp_min(0).sqrt()
    given = allocate(size**t, total, error.shape[1])
    if S is None:
        E = largest(F.abs(), given)
        return E, F[E[:, 0], E[:, 1]]  # all images are of one length and orthogonal
    G = turn(turn(S).T) / n**2
    score = F.abs() * G.diagonal().clamp_min(0).sqrt() if rule == "weight" else F.abs()
    E = largest(score, given)
    return E, refined(turn(seen) / n, G, given, E)


def check_places(method: Method, E: Tensor, count: int, site: Site) -> None:
    """Raises `BadValue` unless E [count, 2] holds rows and columns of the site's weight, row by row, each once."""
    out, inside = site.out_features, site.in_features
    whole = E.dtype == torch.int64 and E.shape == (count, 2) and bool((E >= 0).all() and (E[:, 0] < out).all() and (E[:, 1] < inside).all())
    if not whole or not bool(((E[:, 0] * inside + E[:, 1]).diff() > 0).all()):
        raise method.refuse(f"E must hold positions in [{out}, {inside}], row by row, each once {{at}}.", site)
