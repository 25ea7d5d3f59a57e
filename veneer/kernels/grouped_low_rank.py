"""y + (x Rᵀ) Lᵀ with other factors for every group of rows: many adapters in one batch.

Bound, for N rows in groups of rank r: 2·N·r·(in + out) operations forward and twice that backward, whatever the number
of groups; x, y and the result pass through memory once, and each group's factors once. The plain form gathers the
factors of every row, so it moves rank·(in + out) numbers a row besides; `veneer.kernels.triton.grouped_low_rank` does not.
The definition is `reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from veneer.kernels.dispatch import fused


def reference(y: Tensor, x: Tensor, L: Sequence[Tensor], R: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    """The definition: y [B, ..., out], x [B, ..., in]; for each group L [out, r], R [r, in] and its rows, indices below B."""
    for l, r, index in zip(L, R, rows):
        t = linear(x.index_select(0, index), r.to(x.dtype))
        y = y.index_add(0, index, linear(t, l.to(x.dtype)).to(y.dtype))
    return y


def grouped_low_rank(y: Tensor, x: Tensor, L: Sequence[Tensor], R: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    """As `reference`; ranks may differ, no row is in two groups, rows of none keep their y. Factors are cast to x's dtype."""
    if x.dtype == y.dtype and fused(y, x, *L, *R):
        from veneer.kernels.triton.grouped_low_rank import grouped_low_rank as triton

        return triton(y, x, L, R, rows)
    return _batched(y, x, L, R, rows)


def _batched(y: Tensor, x: Tensor, L: Sequence[Tensor], R: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    """Two batched products over the rows. Ranks are padded to the largest, rows of no group get zeros."""
    pairs = list(zip(L, R))
    owner = torch.full((len(x),), len(rows), device=x.device)
    for n, index in enumerate(rows):
        owner[index] = n
    if sum(len(index) for index in rows) < len(x):
        pairs.append((torch.zeros_like(L[0]), torch.zeros_like(R[0])))
    rank = max(l.shape[1] for l, _ in pairs)
    Ls = torch.stack([pad(l, (0, rank - l.shape[1])) if l.shape[1] < rank else l for l, _ in pairs]).to(x.dtype)  # [groups, out, rank]
    Rs = torch.stack([pad(r, (0, 0, 0, rank - len(r))) if len(r) < rank else r for _, r in pairs]).to(x.dtype)  # [groups, rank, in]
    t = torch.bmm(x.reshape(len(x), -1, x.shape[-1]), Rs[owner].mT)
    return torch.baddbmm(y.reshape(len(y), -1, y.shape[-1]), t, Ls[owner].mT).view_as(y)
