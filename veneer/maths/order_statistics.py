"""Order statistics of many numbers without sorting: the k-th smallest, a quantile, which the k smallest are.

Found digit by digit from counts of the numbers' bits. So the numbers may come in pieces that are never held together,
k may be a tensor that is never read on the CPU, and any size will do (`torch.quantile` takes at most 2²⁴ numbers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Pieces = Callable[[], Iterable[Tensor]]
"""Gives all the numbers, piece by piece, each time it is called; the same ones every time."""

DIGIT = 16
"""Bits of a digit: two passes over numbers in float32, four in float64."""

PIECE = 1 << 21
"""Numbers of one tensor that are looked at together."""


def _ordered(bits: Tensor) -> Tensor:
    """Integers in the order of the floating-point numbers with these bits; its own inverse."""
    info = torch.iinfo(bits.dtype)
    return bits ^ ((bits >> (info.bits - 1)) & info.max)  # the more negative, the larger the bits below the sign


def order_statistics(pieces: Pieces, ranks: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The numbers at these ranks (whole tensors without dimensions, counted from 0, ascending), without gradient.

    dtype: of the pieces, float32 or float64.
    """
    kind = torch.int64 if dtype == torch.float64 else torch.int32
    ranks, prefixes, size, half = list(ranks), list(ranks), 1 << DIGIT, 1 << (DIGIT - 1)
    for shift in range(torch.iinfo(kind).bits - DIGIT, -1, -DIGIT):
        first = shift == torch.iinfo(kind).bits - DIGIT
        counts = [torch.zeros(size, dtype=torch.int32, device=ranks[0].device)] * (1 if first else len(ranks))
        for piece in pieces():
            key = _ordered(piece.detach().flatten().view(kind)) >> shift
            digit = (key & (size - 1)).long()
            if first:  # it has the sign
                digit = digit ^ half
            for i, count in enumerate(counts):  # only of numbers that begin with the digits found so far
                begin = torch.ones_like(digit, dtype=count.dtype) if first else (key >> DIGIT == prefixes[i]).to(count.dtype)
                counts[i] = count.scatter_add(0, digit, begin)
        for i, rank in enumerate(ranks):
            up_to = counts[0 if first else i].cumsum(0)
            found = (up_to <= rank).sum()
            ranks[i] = rank - torch.where(up_to <= rank, up_to, 0).amax()
            prefixes[i] = found - half if first else (prefixes[i] << DIGIT) | found
    return [_ordered(prefix.to(kind)).view(dtype) for prefix in prefixes]


def quantile(pieces: Pieces, count: int, q: float | Tensor, like: Tensor) -> Tensor:
    """The q-quantile of `count` numbers, linear between neighbours, as `torch.quantile` gives it; like: dtype and device."""
    wide = torch.float32 if like.device.type == "mps" else torch.float64  # in float32 large ranks are not exact
    at = torch.as_tensor(q, dtype=wide, device=like.device).reshape(()).clamp(0, 1) * (count - 1)
    low = at.floor()
    a, b = order_statistics(pieces, [low.long(), low.long().add(1).clamp_max(count - 1)], like.dtype)
    return torch.lerp(a, b, (at - low).to(a.dtype))


def smallest(x: Tensor, k: Tensor) -> Tensor:
    """A mask like x: true for its k smallest numbers; of equal ones the first by flat index. k: whole, one number."""
    k = k.reshape(())
    (last,) = order_statistics(lambda: x.flatten().split(PIECE), [(k - 1).clamp(0, x.numel() - 1)], x.dtype)
    less, equal = x < last, x == last
    return less | (equal & (equal.flatten().cumsum(0, dtype=torch.int32).view_as(x) <= k - less.sum()))
