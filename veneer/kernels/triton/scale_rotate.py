"""Outputs scaled, shifted or turned in pairs, computed in float32 inside: one pass forward, one backward.

The vectors' gradients are column sums: each program sums its share of the rows and leaves one line, which torch adds up;
no atomics, so results repeat bit by bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels.triton.launch import on, processors

BN, BD = 16, 128
"""Rows and features of a tile."""


@triton.jit
def scale_forward(h, g, b, y, rows, width, HAS_B: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    where = n.to(tl.int64)[:, None] * width + d[None, :]
    inside = (n < rows)[:, None] & (d < width)[None, :]
    made = tl.load(h + where, mask=inside, other=0.0).to(tl.float32) * tl.load(g + d, mask=d < width, other=0.0).to(tl.float32)[None, :]
    if HAS_B:
        made += tl.load(b + d, mask=d < width, other=0.0).to(tl.float32)[None, :]
    tl.store(y + where, made.to(y.dtype.element_ty), mask=inside)


@triton.jit
def scale_backward(grad, h, g, gh, sums, rows, width, part, NEEDS_H: tl.constexpr, NEEDS_G: tl.constexpr, NEEDS_B: tl.constexpr,
                   BN: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """One share of the rows of one block of columns; sums [shares, 2, width]."""
    share = tl.program_id(1)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    seen = d < width
    if NEEDS_H:
        gain = tl.load(g + d, mask=seen, other=0.0).to(tl.float32)[None, :]
    sum_g, sum_b = tl.full([BN, BD], 0.0, tl.float32), tl.full([BN, BD], 0.0, tl.float32)
    last = min(share * part + part, rows)
    for n0 in range(share * part, last, BN):
        n = n0 + tl.arange(0, BN)
        where = n.to(tl.int64)[:, None] * width + d[None, :]
        inside = (n < last)[:, None] & seen[None, :]
        back = tl.load(grad + where, mask=inside, other=0.0).to(tl.float32)
        if NEEDS_G:
            sum_g += back * tl.load(h + where, mask=inside, other=0.0).to(tl.float32)
        if NEEDS_B:
            sum_b += back
        if NEEDS_H:
            tl.store(gh + where, (back * gain).to(gh.dtype.element_ty), mask=inside)
    line = share.to(tl.int64) * 2 * width + d
    if NEEDS_G:
        tl.store(sums + line, tl.sum(sum_g, 0), mask=seen)
    if NEEDS_B:
        tl.store(sums + line + width, tl.sum(sum_b, 0), mask=seen)


@triton.jit
def places(j, half):
    """Features a and c of pair j: in each group of 2·half features the first half goes with the second."""
    a = j // half * (2 * half) + j % half
    return a, a + half


@triton.jit
def rotate_forward(h, M, y, rows, pairs, half, BN: tl.constexpr, BD: tl.constexpr):
    """y_a = m0 a + m1 c, y_c = m2 a + m3 c for M [4, pairs]."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    j = tl.program_id(1) * BD + tl.arange(0, BD)
    seen = j < pairs
    a, c = places(j, half)
    line = n.to(tl.int64)[:, None] * (2 * pairs)
    inside = (n < rows)[:, None] & seen[None, :]
    ha = tl.load(h + line + a[None, :], mask=inside, other=0.0).to(tl.float32)
    hc = tl.load(h + line + c[None, :], mask=inside, other=0.0).to(tl.float32)
    m0, m1 = tl.load(M + j, mask=seen, other=0.0)[None, :], tl.load(M + pairs + j, mask=seen, other=0.0)[None, :]
    m2, m3 = tl.load(M + 2 * pairs + j, mask=seen, other=0.0)[None, :], tl.load(M + 3 * pairs + j, mask=seen, other=0.0)[None, :]
    tl.store(y + line + a[None, :], (m0 * ha + m1 * hc).to(y.dtype.element_ty), mask=inside)
    tl.store(y + line + c[None, :], (m2 * ha + m3 * hc).to(y.dtype.element_ty), mask=inside)


@triton.jit
def rotate_backward(grad, h, M, gh, sums, rows, pairs, half, part, NEEDS_H: tl.constexpr, NEEDS_M: tl.constexpr,
                    BN: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """One share of the rows of one block of pairs; sums [shares, 4, pairs]."""
    share = tl.program_id(1)
    j = tl.program_id(0) * BD + tl.arange(0, BD)
    seen = j < pairs
    a, c = places(j, half)
    if NEEDS_H:
        m0, m1 = tl.load(M + j, mask=seen, other=0.0)[None, :], tl.load(M + pairs + j, mask=seen, other=0.0)[None, :]
        m2, m3 = tl.load(M + 2 * pairs + j, mask=seen, other=0.0)[None, :], tl.load(M + 3 * pairs + j, mask=seen, other=0.0)[None, :]
    s0, s1 = tl.full([BN, BD], 0.0, tl.float32), tl.full([BN, BD], 0.0, tl.float32)
    s2, s3 = tl.full([BN, BD], 0.0, tl.float32), tl.full([BN, BD], 0.0, tl.float32)
    last = min(share * part + part, rows)
    for n0 in range(share * part, last, BN):
        n = n0 + tl.arange(0, BN)
        line = n.to(tl.int64)[:, None] * (2 * pairs)
        inside = (n < last)[:, None] & seen[None, :]
        ga = tl.load(grad + line + a[None, :], mask=inside, other=0.0).to(tl.float32)
        gc = tl.load(grad + line + c[None, :], mask=inside, other=0.0).to(tl.float32)
        if NEEDS_M:
            ha = tl.load(h + line + a[None, :], mask=inside, other=0.0).to(tl.float32)
            hc = tl.load(h + line + c[None, :], mask=inside, other=0.0).to(tl.float32)
            s0 += ga * ha
            s1 += ga * hc
            s2 += gc * ha
            s3 += gc * hc
        if NEEDS_H:
            tl.store(gh + line + a[None, :], (m0 * ga + m2 * gc).to(gh.dtype.element_ty), mask=inside)
            tl.store(gh + line + c[None, :], (m1 * ga + m3 * gc).to(gh.dtype.element_ty), mask=inside)
    if NEEDS_M:
        left = sums + share.to(tl.int64) * 4 * pairs + j
        tl.store(left, tl.sum(s0, 0), mask=seen)
        tl.store(left + pairs, tl.sum(s1, 0), mask=seen)
        tl.store(left + 2 * pairs, tl.sum(s2, 0), mask=seen)
        tl.store(left + 3 * pairs, tl.sum(s3, 0), mask=seen)


def shares(rows: int, blocks: int, device: torch.device) -> tuple[int, int]:
    """Into how many shares the rows are cut, so that every processor has a few programs, and how long one is."""
    count = max(1, min(triton.cdiv(rows, BN), triton.cdiv(4 * processors(device), blocks)))
    part = triton.cdiv(triton.cdiv(rows, count), BN) * BN
    return triton.cdiv(rows, part), part


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, g: Tensor, b: Tensor | None) -> Tensor:
        y, width = torch.empty_like(h), h.shape[-1]
        rows = h.numel() // width
        with on(h):
            scale_forward[(triton.cdiv(rows, BN), triton.cdiv(width, BD))](h, g, b, y, rows, width, HAS_B=b is not None, BN=BN, BD=BD)
        ctx.save_for_backward(h if ctx.needs_input_grad[1] else None, g)
        ctx.b_dtype = None if b is None else b.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, g = ctx.saved_tensors
        needs_h, needs_g, needs_b = ctx.needs_input_grad
        grad, width = grad.contiguous(), grad.shape[-1]
        rows, blocks = grad.numel() // width, triton.cdiv(width, BD)
        count, part = shares(rows, blocks, grad.device)
        gh = torch.empty_like(grad) if needs_h else None
        sums = torch.empty(count, 2, width, dtype=torch.float32, device=grad.device) if needs_g or needs_b else None
        with on(grad):
            scale_backward[(blocks, count)](grad, h, g, gh, sums, rows, width, part, NEEDS_H=needs_h, NEEDS_G=needs_g, NEEDS_B=needs_b,
                                            BN=BN, BD=BD)  # fmt: skip
        gg = sums[:, 0].sum(0).to(g.dtype) if sums is not None and needs_g else None
        gb = sums[:, 1].sum(0).to(ctx.b_dtype) if sums is not None and needs_b else None
        return gh, gg, gb


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, M: Tensor, half: int) -> Tensor:
        y, pairs = torch.empty_like(h), M.shape[1]
        rows = h.numel() // h.shape[-1]
        with on(h):
            rotate_forward[(triton.cdiv(rows, BN), triton.cdiv(pairs, BD))](h, M, y, rows, pairs, half, BN=BN, BD=BD)
        ctx.save_for_backward(h if ctx.needs_input_grad[1] else None, M)
        ctx.half = half
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, M = ctx.saved_tensors
        needs_h, needs_M, _ = ctx.needs_input_grad
        grad, pairs = grad.contiguous(), M.shape[1]
        rows, blocks = grad.numel() // grad.shape[-1], triton.cdiv(pairs, BD)
        count, part = shares(rows, blocks, grad.device)
        gh = torch.empty_like(grad) if needs_h else None
        sums = torch.empty(count, 4, pairs, dtype=torch.float32, device=grad.device) if needs_M else None
        with on(grad):
            rotate_backward[(blocks, count)](grad, h, M, gh, sums, rows, pairs, ctx.half, part, NEEDS_H=needs_h, NEEDS_M=needs_M,
                                             BN=BN, BD=BD)  # fmt: skip
        return gh, None if sums is None else sums.sum(0), None


def scale(h: Tensor, g: Tensor, b: Tensor | None = None) -> Tensor:
    """g ⊙ h + b: as veneer.kernels.scale_rotate.scale_reference, for contiguous h."""
    return _Scale.apply(h, g, b) if h.numel() else h * g.to(h.dtype)


def rotate(h: Tensor, C: Tensor, S: Tensor) -> Tensor:
    """Pairs turned: as veneer.kernels.scale_rotate.rotate_reference, for contiguous h."""
    if not h.numel():
        return h * 1
    M = torch.stack([C[:, 0], -S[:, 0], S[:, -1], C[:, -1]]).flatten(1).float()  # thin: [4, pairs]
    return _Rotate.apply(h, M, C.shape[-1])
