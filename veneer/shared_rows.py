"""Rows of one batch with different adapters that only add to the layer's output: the frozen product runs once for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.kernels.grouped_low_rank import grouped_low_rank
from veneer.method import Call, LowRankMethod
from veneer.part import Part


def share(groups: Sequence[Sequence[Part]]) -> bool:
    """Whether all parts of all row groups only add to the output of one whole layer."""
    return all(part.site.rows is None and part.method.adds(part.site) for parts in groups for part in parts)


def added(call: Call, x: Tensor, groups: Sequence[tuple[Sequence[Part], Tensor]], axis: int) -> Tensor:
    """call(x) plus, in each group's rows (indices along the batch axis), the changes of the group's parts.

    Low-rank changes of all groups are one grouped product, whatever the number of adapters.
    """
    y = call(x)
    thin = [(parts, index) for parts, index in groups if parts and all(isinstance(p.method, LowRankMethod) for p in parts)]
    if thin:
        L, R = zip(*(_factors(parts) for parts, _ in thin))
        y = grouped_low_rank(y.movedim(axis, 0), x.movedim(axis, 0), L, R, [index for _, index in thin]).movedim(0, axis)
    for parts, index in groups:
        if parts and not any(parts is own for own, _ in thin):
            rows = x.index_select(axis, index)
            y = y.index_add(axis, index, sum(part.method.delta(rows, part.tensors(), part.site).to(y.dtype) for part in parts))  # type: ignore
    return y


def _factors(parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """L [out, r] and R [r, in] of all parts side by side: their changes add up."""
    factors = [part.method.factors(part.tensors(), part.site) for part in parts]  # type: ignore[attr-defined]
    return factors[0] if len(factors) == 1 else (torch.cat([L for L, _ in factors], 1), torch.cat([R for _, R in factors]))
