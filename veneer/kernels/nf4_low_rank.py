"""y = x Wᵀ + b + (x Rᵀ) Lᵀ over a weight packed to 4 bits in blocks (NF4, FP4; the layout of bitsandbytes).

Bound, for M rows: 2·M·(in·out + r·(in + out)) operations forward, as many backward to x, four times the thin part for
L and R. With few rows the packed weight, in·out/2 bytes and one scale for each block, is all that has to pass through
memory; unpacked to half precision first it passes as 4.5·in·out bytes. So with few rows one kernel
(`veneer.kernels.triton.nf4_low_rank`) reads it packed; with many a plain product of the unpacked weight is faster.
The definition is `reference`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from veneer.kernels.dispatch import fused

FEW = 64
"""Rows up to which the packed weight is read directly. From the bounds of one H100, not yet from measurements."""
WIDE = 64
"""Inputs that share a scale: the kernel takes blocks of this many and multiples of it."""
RANKS = 128
"""The largest rank whose factors stay beside the weight in one kernel."""


class Packed(NamedTuple):
    """A weight [out, in] in 4 bits.

    Args:
        values: uint8 [in·out/2], two codes a byte, the earlier one in the high half. shape: (out, in).
        code: float32 [16], what each code stands for. block: values that share a scale.
        scales: float32, or uint8 if they are packed too: then code2 [256][scales] · scales2[… // block2] + offset.
    """

    values: Tensor
    shape: tuple[int, int]
    code: Tensor
    block: int
    scales: Tensor
    code2: Tensor | None = None
    scales2: Tensor | None = None
    block2: int = 256
    offset: Tensor | None = None


def packed(weight: Any) -> Packed:
    """Of a bitsandbytes `Params4bit`."""
    state, values = weight.quant_state, weight.data.reshape(-1).view(torch.uint8)
    own = Packed(values, tuple(state.shape), state.code, state.blocksize, state.absmax)
    if state.state2 is None:
        return own
    second = state.state2
    return own._replace(code2=second.code, scales2=second.absmax, block2=second.blocksize, offset=state.offset)


def scales_of(W: Packed) -> Tensor:
    """One float32 scale a block."""
    if W.code2 is None or W.scales2 is None or W.offset is None:
        return W.scales.float()
    return W.code2[W.scales.long()] * W.scales2.repeat_interleave(W.block2)[: len(W.scales)] + W.offset


def unpacked(W: Packed, dtype: torch.dtype) -> Tensor:
    """The dense weight [out, in]."""
    codes = torch.stack([W.values >> 4, W.values & 15], -1).flatten().long()
    scales = scales_of(W).repeat_interleave(W.block)[: len(codes)]
    return (W.code[codes] * scales).to(dtype).view(W.shape)


def reference(x: Tensor, W: Packed, b: Tensor | None, L: Tensor, R: Tensor) -> Tensor:
    """The definition: x [..., in], L [out, r], R [r, in] → [..., out]."""
    y = linear(x, unpacked(W, x.dtype), b) + linear(linear(x, R.to(x.dtype)), L.to(x.dtype))
    return y.to(x.dtype)


def nf4_low_rank(x: Tensor, W: Packed, b: Tensor | None, L: Tensor, R: Tensor) -> Tensor | None:
    """As `reference`, in one kernel; None where that does not pay: the caller runs the layer and adds the term."""
    few = x.numel() // x.shape[-1] <= FEW and L.shape[1] <= RANKS
    aligned = W.block % WIDE == 0 and W.shape[1] % WIDE == 0
    half = x.dtype in (torch.float16, torch.bfloat16)  # float32 has no tensor cores
    if not few or not aligned or not half or not fused(x, L, R, W.code):
        return None
    from veneer.kernels.triton.nf4_low_rank import nf4_low_rank as triton

    return triton(x, W, b, L, R)
