"""Many low-rank terms in one launch: rows sorted by group, tiles of rows that share their factors, ranks as they are.

All factors stand below one another: R [Σr, in] and, transposed, L [Σr, out]. Then three kernels are forward and backward:
`shrink` t = x Pᵀ, `expand` y + t P, `outer` tᵀ x, each for P = R or Lᵀ. No atomics: results repeat bit by bit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels.triton.launch import on, power, processors, products


@triton.jit
def shrink(x, P, t, order, tiles, at, count, width, most, part, BN: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
           DOT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """t[piece, n, :rank] = x[order[n], part of the features] P[group]ᵀ for one tile."""
    tile, piece, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group, first, end = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    start = tl.load(at + group)
    rank = tl.load(at + group + 1) - start
    if block * BR < rank:
        n = first + tl.arange(0, BN)
        r = block * BR + tl.arange(0, BR)
        row = tl.load(order + n, mask=n < end, other=0).to(tl.int64)
        acc = tl.full([BN, BR], 0.0, tl.float32)
        for d0 in range(piece * part, min(piece * part + part, width), BD):
            d = d0 + tl.arange(0, BD)
            inside = d[None, :] < width
            a = tl.load(x + row[:, None] * width + d[None, :], mask=(n < end)[:, None] & inside, other=0.0).to(DOT)
            p = tl.load(P + (start + r).to(tl.int64)[:, None] * width + d[None, :], mask=(r < rank)[:, None] & inside, other=0.0).to(DOT)
            acc = tl.dot(a, tl.trans(p), acc, input_precision=PRECISION)
        where = (piece * count + n).to(tl.int64)[:, None] * most + r[None, :]
        tl.store(t + where, acc, mask=(n < end)[:, None] & (r < rank)[None, :])


@triton.jit
def summed(t, n, end, r, rank, count, most, pieces, BN: tl.constexpr, BR: tl.constexpr):
    """t[n, r], summed over the pieces that `shrink` left."""
    total = tl.full([BN, BR], 0.0, tl.float32)
    for piece in range(pieces):
        where = (piece * count + n).to(tl.int64)[:, None] * most + r[None, :]
        total += tl.load(t + where, mask=(n < end)[:, None] & (r < rank)[None, :], other=0.0)
    return total


@triton.jit
def expand(t, P, y, out, order, tiles, at, count, width, most, pieces, HAS_Y: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
           BD: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """out[order[n]] = y[order[n]] + t[n] P[group] for one tile and some features; without y from zero."""
    tile = tl.program_id(0)
    group, first, end = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    start = tl.load(at + group)
    rank = tl.load(at + group + 1) - start
    n = first + tl.arange(0, BN)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    row = tl.load(order + n, mask=n < end, other=0).to(tl.int64)
    acc = tl.full([BN, BD], 0.0, tl.float32)
    for r0 in range(0, rank, BR):
        r = r0 + tl.arange(0, BR)
        inner = summed(t, n, end, r, rank, count, most, pieces, BN, BR)
        inside = (r < rank)[:, None] & (d < width)[None, :]
        p = tl.load(P + (start + r).to(tl.int64)[:, None] * width + d[None, :], mask=inside, other=0.0)
        acc = tl.dot(inner.to(DOT), p.to(DOT), acc, input_precision=PRECISION)
    where = row[:, None] * width + d[None, :]
    seen = (n < end)[:, None] & (d < width)[None, :]
    if HAS_Y:
        acc += tl.load(y + where, mask=seen, other=0.0).to(tl.float32)
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=seen)


@triton.jit
def outer(t, h, G, order, ends, at, count, width, most, pieces, BN: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
          DOT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """G[group] = Σ t[n]ᵀ h[order[n]] over a group's rows, for some ranks and features."""
    group, block = tl.program_id(0), tl.program_id(2)
    start, first, end = tl.load(at + group), tl.load(ends + group), tl.load(ends + group + 1)
    rank = tl.load(at + group + 1) - start
    if block * BR < rank:
        r = block * BR + tl.arange(0, BR)
        d = tl.program_id(1) * BD + tl.arange(0, BD)
        acc = tl.full([BR, BD], 0.0, tl.float32)
        for n0 in range(first, end, BN):
            n = n0 + tl.arange(0, BN)
            row = tl.load(order + n, mask=n < end, other=0).to(tl.int64)
            inner = summed(t, n, end, r, rank, count, most, pieces, BN, BR)
            a = tl.load(h + row[:, None] * width + d[None, :], mask=(n < end)[:, None] & (d < width)[None, :], other=0.0)
            acc = tl.dot(tl.trans(inner.to(DOT)), a.to(DOT), acc, input_precision=PRECISION)
        where = (start + r).to(tl.int64)[:, None] * width + d[None, :]
        tl.store(G + where, acc.to(G.dtype.element_ty), mask=(r < rank)[:, None] & (d < width)[None, :])


class Plan(NamedTuple):
    """Which rows go together. Rows of no group are one more group at the end, of rank 0.

    Args:
        order: int32 [N], the rows group by group. ends: int32 [groups + 2], where each group begins in it, and N.
        tiles: int32 [tiles, 3]: group, first and end in `order`, at most `block` apart.
    """

    order: Tensor
    ends: Tensor
    tiles: Tensor
    block: int


@functools.lru_cache(maxsize=16)
def plan(rows: tuple[Tensor, ...], batch: int, tokens: int, device: torch.device, most: int) -> Plan:
    """For groups of rows of a batch, every row `tokens` long, in tiles of at most `most`. The index tensors are the same objects
    in every layer of a pass, so this is made once a pass."""
    taken = torch.zeros(batch, dtype=torch.int32, device=device)
    for index in rows:
        taken[index] = 1
    left = batch - sum(map(len, rows))
    index = torch.cat([*rows, torch.argsort(taken, stable=True)[:left]])
    order = (index[:, None] * tokens + torch.arange(tokens, device=device)).flatten().int()
    sizes, at, tiles = [tokens * n for n in (*map(len, rows), left)], [0], []
    block = power(max(sizes), 16, most)
    for group, size in enumerate(sizes):
        end = at[-1] + size
        tiles += [(group, first, min(first + block, end)) for first in range(at[-1], end, block)]
        at.append(end)
    return Plan(order, _ints(tuple(at), device), torch.tensor(tiles, dtype=torch.int32, device=device), block)


@functools.lru_cache(maxsize=64)
def _ints(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


class Launch(NamedTuple):
    """One plan with the ranks of its groups and the type of the products."""

    plan: Plan
    ranks: tuple[int, ...]
    dtype: torch.dtype

    @property
    def at(self) -> Tensor:
        """Where each group's factors begin; the last two are the same, as rows of no group have rank 0."""
        sums = [0]
        for r in (*self.ranks, 0):
            sums.append(sums[-1] + r)
        return _ints(tuple(sums), self.plan.order.device)

    @property
    def sizes(self) -> dict[str, Any]:
        """Tiles; ranks beyond 32 take turns."""
        return {"BN": self.plan.block, "BR": power(max(self.ranks), 16, 32), **products(self.dtype)}

    @property
    def wide(self) -> int:
        """Features of a tile of `expand` and `outer`."""
        return 64 if self.dtype == torch.float32 else 128

    def shrink(self, x: Tensor, P: Tensor) -> Tensor:
        """x [N, d], P [Σr, d] → t float32 [pieces, N, largest rank]; with few tiles several programs share the features of one."""
        order, _, tiles, _ = self.plan
        sizes, width, most = self.sizes, x.shape[1], max(self.ranks)
        blocks = triton.cdiv(most, sizes["BR"])
        pieces = min(8, triton.cdiv(processors(x.device), len(tiles) * blocks), triton.cdiv(width, 512))
        part = triton.cdiv(triton.cdiv(width, pieces), 64) * 64
        t = torch.empty(pieces, len(order), most, dtype=torch.float32, device=x.device)
        with on(x):
            shrink[(len(tiles), pieces, blocks)](
                x, P, t, order, tiles, self.at, len(order), width, most, part, BD=self.wide // 2, **sizes
            )  # fmt: skip
        return t

    def expand(self, t: Tensor, P: Tensor, y: Tensor | None) -> Tensor:
        """y [N, d] or zeros, plus t P, in the products' dtype."""
        order, _, tiles, _ = self.plan
        out = torch.empty(len(order), P.shape[1], dtype=self.dtype, device=P.device)
        grid = (len(tiles), triton.cdiv(P.shape[1], self.wide))
        with on(P):
            expand[grid](t, P, y, out, order, tiles, self.at, len(order), P.shape[1], t.shape[2], len(t),
                         HAS_Y=y is not None, BD=self.wide, num_stages=1, **self.sizes)  # fmt: skip
        return out

    def outer(self, t: Tensor, h: Tensor, P: Tensor) -> Tensor:
        """The gradient of P [Σr, d]: each group's tᵀ h, in P's dtype."""
        order, ends, _, _ = self.plan
        G, sizes = torch.empty_like(P), {**self.sizes, "BN": 32}
        grid = (len(self.ranks), triton.cdiv(P.shape[1], self.wide), triton.cdiv(t.shape[2], sizes["BR"]))
        with on(P):
            outer[grid](t, h, G, order, ends, self.at, len(order), P.shape[1], t.shape[2], len(t), BD=self.wide, **sizes)
        return G


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, L: Tensor, R: Tensor, launch: Launch) -> Tensor:
        _, _, needs_L, needs_R, _ = ctx.needs_input_grad
        t = launch.shrink(x, R)
        ctx.launch = launch
        ctx.save_for_backward(x if needs_R else None, L, R, t if needs_L else None)
        return launch.expand(t, L, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, L, R, t = ctx.saved_tensors
        needs_y, needs_x, needs_L, needs_R, _ = ctx.needs_input_grad
        g, launch = grad.contiguous(), ctx.launch
        u: Any = launch.shrink(g, L) if needs_x or needs_R else None
        gx = launch.expand(u, R, None) if needs_x else None
        gL = launch.outer(t, g, L) if needs_L else None
        gR = launch.outer(u, x, R) if needs_R else None
        return (grad if needs_y else None), gx, gL, gR, None


def grouped_low_rank(y: Tensor, x: Tensor, L: Sequence[Tensor], R: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    """y [B, ..., out] + (x Rᵀ) Lᵀ by groups, x [B, ..., in]: as veneer.kernels.grouped_low_rank.reference."""
    ranks = tuple(map(len, R))
    if not any(ranks) or not x.numel():
        return y
    flat_y, flat_x = (t.reshape(-1, t.shape[-1]).contiguous() for t in (y, x))
    most = 32 if x.dtype == torch.float32 else 64  # no tensor cores for float32: smaller tiles stay in registers
    made = plan(tuple(rows), len(x), len(flat_x) // len(x), x.device, most)
    out = _Grouped.apply(flat_y, flat_x, torch.cat([l.t() for l in L]), torch.cat(list(R)), Launch(made, ranks, x.dtype))
    return out.view(y.shape)
