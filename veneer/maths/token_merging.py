"""Token merging: the tokens of a picture that are most alike become one, and are found again at the end (2022, arXiv:2210.09461)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Which r of n tokens go into which others.

    Args:
        source, target: rows that go, by falling likeness, and the rows that take them up, [B, r]; several may go into one.
        kept: the rows that stay, in their new order, [B, n − r].
        where: the new row of every old one, [B, n].
    """

    source: Tensor
    target: Tensor
    kept: Tensor
    where: Tensor


@torch.no_grad()
def alike(keys: Tensor, r: int, protected: int) -> Pairs:
    """The r most similar pairs of an even and an odd row of keys [B, n, c], by cosine; the first `protected` rows stay and
    stay first. r is at most (n − protected) // 2."""
    B, n, _ = keys.shape
    unit = F.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
    rows = torch.arange(n, device=keys.device)
    even, odd, first = rows[::2], rows[1::2], (protected + 1) // 2  # `first` of the even rows are protected ones
    barred = (even < protected)[:, None] | (odd < protected)
    best, partner = (unit[:, ::2] @ unit[:, 1::2].mT).masked_fill(barred, float("-inf")).max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    going, staying = order[:, :r], order[:, r:].sort(-1).values
    source, target = 2 * going, 2 * partner.gather(1, going) + 1
    kept = torch.cat([rows[:protected].expand(B, -1), 2 * staying[:, first:], odd[protected // 2 :].expand(B, -1)], 1)
    where = torch.zeros_like(rows).expand(B, n).scatter(1, kept, rows[: n - r].expand(B, -1))
    return Pairs(source, target, kept, where.scatter(1, source, where.gather(1, target)))


def taken(x: Tensor, rows: Tensor) -> Tensor:
    """The given rows [B, m] of x [B, n, d] → [B, m, d]."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


def merged(x: Tensor, going: Tensor, pairs: Pairs) -> Tensor:
    """The rows of x [B, n, d] that stay, with `going` [B, r, d] added where they go → [B, n − r, d]."""
    at = pairs.where.gather(1, pairs.source)
    return taken(x, pairs.kept).scatter_add(1, at[..., None].expand_as(going), going)


def counted(where: Tensor, n: int) -> Tensor:
    """How many of the first tokens each of n rows stands for, [B, n]; `where` [B, n₀] is the row of each."""
    return where.new_zeros(len(where), n).scatter_add(1, where, torch.ones_like(where))


# -- from block to block: as further tokens, so that checkpoints and compilers see a function of its inputs -----------


def packed(h: Tensor, where: Tensor) -> Tensor:
    """h [B, n, D] with `where` [B, n₀] behind it, as ⌈2 n₀ / D⌉ further tokens: two digits to the base 256, exact in half precision."""
    digits = torch.cat([where // 256, where % 256], 1).to(h.dtype)
    return torch.cat([h, F.pad(digits, (0, -digits.shape[1] % h.shape[2])).unflatten(1, (-1, h.shape[2]))], 1)


def unpacked(x: Tensor, gone: int) -> tuple[Tensor, Tensor]:
    """h and `where` as `packed` put them together, `gone` tokens after the start; before any are gone there is nothing behind h."""
    B, T, D = x.shape
    if not gone:
        return x, torch.arange(T, device=x.device).expand(B, T)
    n0 = (T + gone) * D // (D + 2)  # the one n₀ with n₀ + ⌈2 n₀ / D⌉ = T + gone
    high, low = x[:, n0 - gone :].detach().flatten(1)[:, : 2 * n0].to(torch.promote_types(x.dtype, torch.float32)).chunk(2, 1)
    return x[:, : n0 - gone], (256 * high + low).round().long()
