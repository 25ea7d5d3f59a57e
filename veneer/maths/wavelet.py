"""Daubechies' orthonormal wavelets: filters, and one level of the transform along an axis, periodic or padded with zeros.

Periodic, n even: row k of S_n [n, n] has the low-pass taps, and row n/2 + k the high-pass taps, at columns 2k, 2k + 1, …
(mod n). S_n S_nᵀ = I. Nothing here builds S_n: a tap pair is one shift of the even and odd entries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

TAPS: dict[str, tuple[float, ...]] = {
    "db1": (0.707106781186547524, 0.707106781186547524),
    "db2": (0.482962913144534143, 0.836516303737807906, 0.224143868042013381, -0.129409522551260381),
    "db3": (
        0.332670552950082616, 0.806891509311092576, 0.45987750211849157,
        -0.135011020010254589, -0.0854412738820266617, 0.0352262918857095366,
    ),
    "db4": (
        0.230377813308896501, 0.714846570552915647, 0.630880767929858908, -0.0279837694168598542,
        -0.187034811719093084, 0.0308413818355607636, 0.0328830116668851997, -0.0105974017850690321,
    ),
}  # fmt: skip
"""Low-pass taps h by name; dbN has 2N of them."""
TAPS["haar"] = TAPS["db1"]


def filters(wavelet: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Low-pass taps h and high-pass taps g, g[j] = (−1)^j h[ℓ − 1 − j]."""
    low = TAPS[wavelet]
    return low, tuple(-t if j % 2 else t for j, t in enumerate(reversed(low)))


def halved(x: Tensor, taps: tuple[float, ...]) -> Tensor:
    """One half of the transform, [..., n] → [..., n/2]: Σ_j taps[j] · x[(2k + j) mod n]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return _weighed([part.roll(-i, -1) if i else part for i in range(len(taps) // 2) for part in (even, odd)], taps)


def doubled(c: Tensor, taps: tuple[float, ...]) -> Tensor:
    """The transpose of `halved`, [..., n/2] → [..., n]: rows of S_n weighted by c and added up."""
    shifted = [c.roll(i, -1) if i else c for i in range(len(taps) // 2)]
    return torch.stack((_weighed(shifted, taps[0::2]), _weighed(shifted, taps[1::2])), -1).flatten(-2)


def _weighed(terms: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    total = weights[0] * terms[0]
    for term, weight in zip(terms[1:], weights[1:]):
        total = torch.add(total, term, alpha=weight)
    return total


def analysed(x: Tensor, wavelet: str, axis: int = -1) -> Tensor:
    """x S_nᵀ along an axis of even length: the low half, then the high half."""
    x, (low, high) = x.movedim(axis, -1), filters(wavelet)
    return torch.cat([halved(x, low), halved(x, high)], -1).movedim(-1, axis)


def synthesised(c: Tensor, wavelet: str, axis: int = -1) -> Tensor:
    """c S_n along an axis of even length: the inverse of `analysed`, and its transpose."""
    (smooth, detail), (low, high) = c.movedim(axis, -1).chunk(2, -1), filters(wavelet)
    return (doubled(smooth, low) + doubled(detail, high)).movedim(-1, axis)


def padded(n: int, wavelet: str) -> int:
    """The number of coefficients of n entries where the transform reaches over both ends instead of wrapping: even, at least n."""
    longer = n + len(TAPS[wavelet]) - 2
    return longer + longer % 2


def _frame(n: int, wavelet: str) -> tuple[int, int, int]:
    """Coefficients of each half; the length of their whole synthesis; where in it the n entries stand."""
    half, taps = padded(n, wavelet) // 2, len(TAPS[wavelet])
    whole, trim = 2 * (half - 1) + taps, (2 * taps - 3) // 2
    return half, whole, trim + (whole - 2 * trim - n) // 2


def synthesised_padded(c: Tensor, n: int, wavelet: str) -> Tensor:
    """Coefficients [..., padded(n)], low half first → the n entries in the middle of their synthesis, [..., n]."""
    half, whole, start = _frame(n, wavelet)
    halves = [pad(part, (0, whole // 2 - half)) for part in c.chunk(2, -1)]  # so long that nothing wraps
    return synthesised(torch.cat(halves, -1), wavelet)[..., start : start + n]


def analysed_padded(x: Tensor, wavelet: str) -> Tensor:
    """The transpose of `synthesised_padded`, [..., n] → [..., padded(n)]."""
    n = x.shape[-1]
    half, whole, start = _frame(n, wavelet)
    smooth, detail = analysed(pad(x, (start, whole - start - n)), wavelet).chunk(2, -1)
    return torch.cat([smooth[..., :half], detail[..., :half]], -1)


def spread(place: Tensor, n: int, wavelet: str, like: Tensor) -> tuple[Tensor, Tensor]:
    """Where single coefficients of `synthesised_padded` go: their places [m] → entries [m, taps] of the n and weights, 0 outside."""
    half, _, start = _frame(n, wavelet)
    taps = torch.tensor(filters(wavelet), dtype=like.dtype, device=like.device)
    high = (place >= half).long()
    entry = (2 * (place - half * high) - start)[:, None] + torch.arange(taps.shape[1], device=place.device)
    inside = (entry >= 0) & (entry < n)
    return entry.clamp(0, n - 1), taps[high] * inside


def raised(c: Tensor, wavelet: str, high: bool | int, level: int = 1) -> Tensor:
    """Coefficients of one band alone, [..., n / 2^level] → [..., n]: its own filter once, then level − 1 times the low-pass one."""
    for step in range(level):
        c = doubled(c, filters(wavelet)[0 if step else int(high)])
    return c


def filtered(z: Tensor, sides: tuple[int, int], wavelet: str, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Tokens on a grid of even sides, [..., h · w, d] → the same: `change` acts on their coefficients [..., h, w, d] (LL, LH / HL, HH)."""
    c = change(analysed(analysed(z.unflatten(-2, sides), wavelet, -3), wavelet, -2))
    return synthesised(synthesised(c, wavelet, -3), wavelet, -2).flatten(-3, -2)
