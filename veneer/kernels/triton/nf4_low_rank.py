"""A packed 4-bit weight and a low-rank term in one kernel: the weight passes through memory once, packed.

A byte holds neighbouring inputs, so a product runs as two: even inputs with the high halves, odd ones with the low
halves. In a block of 64 inputs each output has one scale. The thin product is made again by every block of outputs
(of inputs, backward): its factors come from the cache, and a second launch would cost more.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels.nf4_low_rank import WIDE, Packed
from veneer.kernels.triton.launch import on, power, products

BO = 32
"""Outputs of a tile: 128 programs for 4096 outputs, about one a processor."""


@triton.jit
def scale_at(place, seen, scales, code2, scales2, offset, block, block2, NESTED: tl.constexpr):
    """The scale of the value at each place of the flattened weight."""
    at = place // block
    if NESTED:
        second = tl.load(code2 + tl.load(scales + at, mask=seen, other=0).to(tl.int32))
        return second * tl.load(scales2 + at // block2, mask=seen, other=0.0) + tl.load(offset)
    else:
        return tl.load(scales + at, mask=seen, other=0.0)


@triton.jit
def forward(x, W, code, scales, code2, scales2, offset, b, L, R, y, t, rows, out, width, rank, block, block2, NESTED: tl.constexpr,
            HAS_B: tl.constexpr, KEEP: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, DOT: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    r, half = tl.arange(0, BR), tl.arange(0, 32)
    has_o, has_m, has_r = o < out, m < rows, r < rank
    acc, inner = tl.full([BM, BO], 0.0, tl.float32), tl.full([BM, BR], 0.0, tl.float32)
    line = o.to(tl.int64) * width
    for k in range(0, width, 64):
        scale = scale_at(line + k, has_o, scales, code2, scales2, offset, block, block2, NESTED)
        byte = tl.load(W + ((line + k) // 2)[:, None] + half[None, :], mask=has_o[:, None], other=0).to(tl.int32)
        high, low = (tl.load(code + (byte >> 4)) * scale[:, None]).to(DOT), (tl.load(code + (byte & 15)) * scale[:, None]).to(DOT)
        at = x + m.to(tl.int64)[:, None] * width + k + 2 * half[None, :]
        even, odd = tl.load(at, mask=has_m[:, None], other=0.0).to(DOT), tl.load(at + 1, mask=has_m[:, None], other=0.0).to(DOT)
        thin = R + r[:, None] * width + k + 2 * half[None, :]
        r_even, r_odd = tl.load(thin, mask=has_r[:, None], other=0.0).to(DOT), tl.load(thin + 1, mask=has_r[:, None], other=0.0).to(DOT)
        acc = tl.dot(even, tl.trans(high), acc, input_precision=PRECISION)
        acc = tl.dot(odd, tl.trans(low), acc, input_precision=PRECISION)
        inner = tl.dot(even, tl.trans(r_even), inner, input_precision=PRECISION)
        inner = tl.dot(odd, tl.trans(r_odd), inner, input_precision=PRECISION)
    l = tl.load(L + o.to(tl.int64)[:, None] * rank + r[None, :], mask=has_o[:, None] & has_r[None, :], other=0.0).to(DOT)
    acc = tl.dot(inner.to(DOT), tl.trans(l), acc, input_precision=PRECISION)
    if HAS_B:
        acc += tl.load(b + o, mask=has_o, other=0.0).to(tl.float32)[None, :]
    seen = has_m[:, None] & has_o[None, :]
    tl.store(y + m.to(tl.int64)[:, None] * out + o[None, :], acc.to(y.dtype.element_ty), mask=seen)
    if KEEP and tl.program_id(0) == 0:
        tl.store(t + m[:, None] * rank + r[None, :], inner.to(t.dtype.element_ty), mask=has_m[:, None] & has_r[None, :])


@triton.jit
def backward(g, W, code, scales, code2, scales2, offset, L, R, gx, u, rows, out, width, rank, block, block2, NESTED: tl.constexpr,
             KEEP: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, DOT: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """gx = g W + (g L) R for 64 inputs and some rows."""
    k = tl.program_id(0) * 64
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    r, half = tl.arange(0, BR), tl.arange(0, 32)
    has_m, has_r = m < rows, r < rank
    even, odd = tl.full([BM, 32], 0.0, tl.float32), tl.full([BM, 32], 0.0, tl.float32)
    inner = tl.full([BM, BR], 0.0, tl.float32)
    for o0 in range(0, out, BO):
        o = o0 + tl.arange(0, BO)
        has_o, line = o < out, o.to(tl.int64) * width + k
        scale = scale_at(line, has_o, scales, code2, scales2, offset, block, block2, NESTED)
        byte = tl.load(W + (line // 2)[:, None] + half[None, :], mask=has_o[:, None], other=0).to(tl.int32)
        high, low = (tl.load(code + (byte >> 4)) * scale[:, None]).to(DOT), (tl.load(code + (byte & 15)) * scale[:, None]).to(DOT)
        a = tl.load(g + m.to(tl.int64)[:, None] * out + o[None, :], mask=has_m[:, None] & has_o[None, :], other=0.0).to(DOT)
        l = tl.load(L + o.to(tl.int64)[:, None] * rank + r[None, :], mask=has_o[:, None] & has_r[None, :], other=0.0).to(DOT)
        even = tl.dot(a, high, even, input_precision=PRECISION)
        odd = tl.dot(a, low, odd, input_precision=PRECISION)
        inner = tl.dot(a, l, inner, input_precision=PRECISION)
    thin = R + r[:, None] * width + k + 2 * half[None, :]
    r_even, r_odd = tl.load(thin, mask=has_r[:, None], other=0.0).to(DOT), tl.load(thin + 1, mask=has_r[:, None], other=0.0).to(DOT)
    even = tl.dot(inner.to(DOT), r_even, even, input_precision=PRECISION)
    odd = tl.dot(inner.to(DOT), r_odd, odd, input_precision=PRECISION)
    at = gx + m.to(tl.int64)[:, None] * width + k + 2 * half[None, :]
    tl.store(at, even.to(gx.dtype.element_ty), mask=has_m[:, None])
    tl.store(at + 1, odd.to(gx.dtype.element_ty), mask=has_m[:, None])
    if KEEP and tl.program_id(0) == 0:
        tl.store(u + m[:, None] * rank + r[None, :], inner.to(u.dtype.element_ty), mask=has_m[:, None] & has_r[None, :])


def _weight(W: Packed) -> tuple[Any, ...]:
    return W.values, W.code, W.scales, W.code2, W.scales2, W.offset


def _sizes(W: Packed, rows: int, rank: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "block": W.block, "block2": W.block2, "NESTED": W.code2 is not None,
        "BM": power(rows, 16, 64), "BO": BO, "BR": power(rank, 16, 128), **products(dtype),
        "num_warps": 8 if rows > 32 and rank > 32 else 4,
    }  # fmt: skip


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Packed, b: Tensor | None, L: Tensor, R: Tensor) -> Tensor:
        (out, width), (rows, rank) = W.shape, (len(x), L.shape[1])
        _, _, _, needs_L, needs_R = ctx.needs_input_grad
        y, t = x.new_empty(rows, out), x.new_empty(rows, rank) if needs_L else None
        sizes = _sizes(W, rows, rank, x.dtype)
        with on(x):
            forward[(triton.cdiv(out, BO), triton.cdiv(rows, sizes["BM"]))](
                x, *_weight(W), b, L, R, y, t, rows, out, width, rank, HAS_B=b is not None, KEEP=needs_L, **sizes
            )
        ctx.W = W
        ctx.save_for_backward(x if needs_R else None, L, R, t)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, L, R, t = ctx.saved_tensors
        needs_x, _, _, _, needs_R = ctx.needs_input_grad
        g, (out, width), rank = grad.contiguous(), ctx.W.shape, L.shape[1]
        gx = u = None
        if needs_x:
            gx, u = g.new_empty(len(g), width), g.new_empty(len(g), rank) if needs_R else None
            sizes = _sizes(ctx.W, len(g), rank, g.dtype)
            with on(g):
                backward[(width // WIDE, triton.cdiv(len(g), sizes["BM"]))](
                    g, *_weight(ctx.W), L, R, gx, u, len(g), out, width, rank, KEEP=needs_R, **sizes
                )
        elif needs_R:
            u = g @ L.to(g.dtype)
        gL = (g.t() @ t).to(L.dtype) if t is not None else None
        gR = (u.t() @ x).to(R.dtype) if needs_R and u is not None else None
        return gx, None, None, gL, gR


def nf4_low_rank(x: Tensor, W: Packed, b: Tensor | None, L: Tensor, R: Tensor) -> Tensor:
    """x Wᵀ + b + (x Rᵀ) Lᵀ: as veneer.kernels.nf4_low_rank.reference. W and b get no gradient; in and W.block are multiples of 64."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return _Packed.apply(rows, W, b, L.contiguous(), R.contiguous()).view(*x.shape[:-1], -1)
