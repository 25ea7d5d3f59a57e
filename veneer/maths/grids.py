"""Weights on evenly spaced levels: W [out, in] in groups of g neighbouring columns, each with a step of its own [out, in/g].

A fixed grid (minimum to maximum, with a whole zero point), one with learned steps and offsets (LSQ+, arXiv:2004.09576),
and the column by column rounding that later columns make up for (GPTQ, arXiv:2210.17323).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 128
"""Columns that are rounded before the rest of the matrix is told."""


def groups(W: Tensor, g: int) -> Tensor:
    """[out, in] → [out, in/g, g]."""
    return W.unflatten(-1, (-1, g))


def rounded_before(W: Tensor) -> bool:
    """Whether 64 neighbouring entries never take more than 16 values, most of them often: what a 4-bit format leaves of a weight."""
    runs = W.detach().flatten()[: W.numel() // 64 * 64][: 64 * 256].view(-1, 64).sort(1).values
    if not len(runs):
        return False
    values = 1 + (runs.diff(dim=1) != 0).sum(1)
    again = (runs.diff(dim=1) == 0) & (runs[:, 1:] != 0)  # a pruned weight repeats its zeros alone
    return 2 < int(values.max()) <= 16 and 2 * int(again.sum()) > int((runs != 0).sum())


# -- a fixed grid -----------------------------------------------------------------------------------------------


def grid(W: Tensor, bits: int, g: int) -> tuple[Tensor, Tensor]:
    """Steps and whole zero points in 0 … 2^bits − 1, [out, in/g], of a grid from min(W, 0) to max(W, 0) of every group."""
    low, high = groups(W, g).aminmax(dim=-1)
    low, high = low.clamp_max(0), high.clamp_min(0)
    step = (high - low) / (2**bits - 1)
    step = torch.where(step > 0, step, 1)
    return step, (-low / step).round()


def on_grid(W: Tensor, step: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest codes, 0 … 2^bits − 1; all of one shape, or broadcast."""
    return ((W / step).round() + zero).clamp(0, 2**bits - 1)


def off_grid(codes: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """The weight [out, in] of codes [out, in]."""
    g = codes.shape[-1] // step.shape[-1]
    return ((groups(codes, g).to(step.dtype) - zero.to(step.dtype)[..., None]) * step[..., None]).flatten(-2)


# -- learned steps and offsets ----------------------------------------------------------------------------------


def first_steps(W: Tensor, bits: int, g: int, start: str) -> tuple[Tensor, Tensor]:
    """Steps and offsets [out, in/g] for codes −2^(bits−1) … 2^(bits−1) − 1; a group of zeros gets step 1.

    "fitted" clips nothing and has offset 0; "symmetric" the largest magnitude over 2^(bits−1); "asymmetric" minimum to
    maximum; "lsq+" three standard deviations about the mean.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    w = groups(W, g)
    smallest, largest = w.aminmax(dim=-1)
    beta = torch.zeros_like(largest)
    if start == "fitted":
        s = torch.maximum((smallest / low).abs(), (largest / high).abs())
    elif start == "symmetric":
        s = w.abs().amax(-1) / -low
    elif start == "lsq+":
        mean, deviation = w.mean(-1), 3 * w.std(-1, correction=0)
        s = torch.maximum((mean - deviation).abs(), (mean + deviation).abs()) / -low
    else:
        s = (largest - smallest) / (high - low)
        beta = smallest - s * low
    return torch.where(s > 0, s, 1), beta


def codes_of(W: Tensor, s: Tensor, beta: Tensor, bits: int) -> Tensor:
    """The codes [out, in] in W's dtype: clamped first, then rounded, half to even."""
    w = (groups(W, W.shape[-1] // s.shape[-1]) - beta[..., None]) / s[..., None]
    return w.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).round().flatten(-2)


def from_codes(codes: Tensor, s: Tensor, beta: Tensor) -> Tensor:
    """The weight [out, in] of codes [out, in]: code · s + beta."""
    return (groups(codes.to(s.dtype), codes.shape[-1] // s.shape[-1]) * s[..., None] + beta[..., None]).flatten(-2)


def on_learned_grid(W: Tensor, s: Tensor, beta: Tensor, bits: int) -> Tensor:
    """The weight [out, in] of W's codes, with gradients to W, s and beta that pass the rounding (straight-through).

    To W the gate M of what is not clipped, to s code − M w, to beta 1 − M: their closed forms, so that without clipping
    nothing at all reaches beta.
    """
    with torch.no_grad():
        value = from_codes(codes := codes_of(W, s, beta, bits), s, beta)
        w = (groups(W, W.shape[-1] // s.shape[-1]) - beta[..., None]) / s[..., None]
        gate = ((w >= -(2 ** (bits - 1))) & (w <= 2 ** (bits - 1) - 1)).to(w.dtype)
        to_s = groups(codes, w.shape[-1]) - gate * w
    slope = gate * groups(W, w.shape[-1]) + to_s * s[..., None] + (1 - gate) * beta[..., None]
    return value + (slope - slope.detach()).flatten(-2)


# -- rounding that the columns to the right make up for -----------------------------------------------------------


def damped(S: Tensor, damp: float) -> Tensor:
    """S + damp · mean(diag S) · I, in float64."""
    S = S.double()
    return S + damp * S.diagonal().mean() * torch.eye(len(S)).to(S)


def lively(S: Tensor) -> Tensor:
    """S with 1 on the diagonal where an input is never met, so that it can be inverted."""
    return S + torch.diag((S.diagonal() == 0).to(S))


def upper_root(S: Tensor) -> Tensor:
    """U, upper triangular, with S⁻¹ = Uᵀ U."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(S)), upper=True)


def compensated(W: Tensor, U: Tensor, nearest: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> Tensor:
    """Codes [out, in]: left to right, what rounding a column leaves is made up for in the columns that follow.

    Args:
        nearest: a column [out] and its position → its codes and the values they stand for.
    """
    W, codes = W.clone(), []
    for start in range(0, W.shape[1], BLOCK):
        end = min(start + BLOCK, W.shape[1])
        errors = W.new_zeros(len(W), end - start)
        for j in range(start, end):
            code, value = nearest(W[:, j], j)
            codes.append(code)
            error = errors[:, j - start] = (W[:, j] - value) / U[j, j]
            W[:, j:end] -= torch.outer(error, U[j, j:end])
        W[:, end:] -= errors @ U[start:end, end:]
    return torch.stack(codes, 1)


def gptq(W: Tensor, S: Tensor | None, step: Tensor, zero: Tensor, bits: int, damp: float = 0.01) -> Tensor:
    """Codes [out, in] of W on a fixed grid for inputs with S = Xᵀ X [in, in]; the nearest ones without S."""
    g = W.shape[1] // step.shape[1]
    if S is None:
        return on_grid(groups(W, g), step[..., None], zero[..., None], bits).flatten(-2)

    def nearest(w: Tensor, j: int) -> tuple[Tensor, Tensor]:
        s, z = step[:, j // g], zero[:, j // g]
        code = on_grid(w, s, z, bits)
        return code, (code - z) * s

    return compensated(W.double(), upper_root(damped(lively(S), damp)), nearest)


# -- storage ----------------------------------------------------------------------------------------------------


def packed(codes: Tensor) -> Tensor:
    """Codes 0 … 15, [..., n] with n even → uint8 [..., n/2], two a byte, the first in the high half."""
    codes = codes.to(torch.uint8)
    return codes[..., ::2] << 4 | codes[..., 1::2]


def unpacked(codes: Tensor) -> Tensor:
    """uint8 [..., n/2] → uint8 [..., n]."""
    return torch.stack([codes >> 4, codes & 15], -1).flatten(-2)
