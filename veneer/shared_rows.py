"""Rows of one batch with different adapters that only add to the layer's output: the frozen product runs once for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from veneer.method import Call, LowRankMethod
from veneer.part import Part


def share(groups: Sequence[Sequence[Part]]) -> bool:
    """Whether all parts of all row groups only add to the output of one whole layer."""
    return all(part.site.rows is None and part.method.adds(part.site) for parts in groups for part in parts)


def added(call: Call, x: Tensor, groups: Sequence[tuple[Sequence[Part], Tensor]], axis: int) -> Tensor:
    """call(x) plus, in each group's rows (indices along the batch axis), the changes of the group's parts.

    Low-rank changes of all groups are two batched products over the rows, whatever the number of adapters.
    """
    y = call(x)
    thin = [(parts, index) for parts, index in groups if parts and all(isinstance(p.method, LowRankMethod) for p in parts)]
    if thin:
        y = _with_products(y.movedim(axis, 0), x.movedim(axis, 0), thin).movedim(0, axis)
    for parts, index in groups:
        if parts and not any(parts is own for own, _ in thin):
            rows = x.index_select(axis, index)
            y = y.index_add(axis, index, sum(part.method.delta(rows, part.tensors(), part.site).to(y.dtype) for part in parts))  # type: ignore
    return y


def _with_products(y: Tensor, x: Tensor, groups: Sequence[tuple[Sequence[Part], Tensor]]) -> Tensor:
    """y [rows, ..., out] plus each row's low-rank term, x [rows, ..., in]. Ranks are padded to the largest, rows of no group get zeros."""
    pairs = []
    for parts, _ in groups:
        factors = [part.method.factors(part.tensors(), part.site) for part in parts]  # type: ignore[attr-defined]
        pairs.append(factors[0] if len(factors) == 1 else (torch.cat([L for L, _ in factors], 1), torch.cat([R for _, R in factors])))
    owner = torch.full((len(x),), len(groups), device=x.device)
    for n, (_, index) in enumerate(groups):
        owner[index] = n
    if sum(len(index) for _, index in groups) < len(x):
        pairs.append((torch.zeros_like(pairs[0][0]), torch.zeros_like(pairs[0][1])))
    rank = max(L.shape[1] for L, _ in pairs)
    L = torch.stack([pad(L, (0, rank - L.shape[1])) if L.shape[1] < rank else L for L, _ in pairs]).to(x.dtype)  # [groups, out, rank]
    R = torch.stack([pad(R, (0, 0, 0, rank - len(R))) if len(R) < rank else R for _, R in pairs]).to(x.dtype)  # [groups, rank, in]
    t = torch.bmm(x.reshape(len(x), -1, x.shape[-1]), R[owner].mT)
    return torch.baddbmm(y.reshape(len(y), -1, y.shape[-1]), t, L[owner].mT).view_as(y)
