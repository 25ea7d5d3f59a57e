"""Where a face lies: the crop that brings five landmarks to fixed places, and the crop around a box (2023, arXiv:2307.01426).

Points are (x, y) in pixels, whose centres are whole numbers. No torch: pictures are prepared by processes that do without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

Point: TypeAlias = tuple[float, float]
Affine: TypeAlias = tuple[tuple[float, float, float], tuple[float, float, float]]

PLACES = ((30.2946, 51.6963), (65.5318, 51.5014), (48.0252, 71.7366), (33.5493, 92.3655), (62.7299, 92.2041))
"""Left eye, right eye, nose, left and right corner of the mouth on a grid of 96 × 112, widened to 112 × 112 by `SHIFT`."""
GRID, SHIFT = 112.0, 8.0
MARGIN = 1.3
"""How much wider the crop is than the grid, or than a box."""


def targets(res: int = 256, margin: float = MARGIN) -> list[Point]:
    """Where the five landmarks are to lie in a crop of res × res pixels."""

    def placed(value: float) -> float:
        return (value * res / GRID + (margin - 1) / 2 * res) / margin

    return [(placed(x + SHIFT), placed(y)) for x, y in PLACES]


def similarity(points: Sequence[Point], goals: Sequence[Point]) -> Affine:
    """The rotation, one scale and shift that bring the points nearest to the goals in least squares, as [2, 3].

    As complex numbers w ≈ a z + b: a is the regression coefficient. Raises `ValueError` if all points are one.
    """
    z, w = [complex(*p) for p in points], [complex(*g) for g in goals]
    middle, goal = sum(z) / len(z), sum(w) / len(w)
    spread = sum(abs(p - middle) ** 2 for p in z)
    if spread == 0:
        raise ValueError("all points are one")
    a = sum((p - middle).conjugate() * (g - goal) for p, g in zip(z, w)) / spread
    b = goal - a * middle
    return (a.real, -a.imag, b.real), (a.imag, a.real, b.imag)


def inverse(M: Affine) -> Affine:
    """The similarity that undoes M."""
    a, b = complex(M[0][0], M[1][0]), complex(M[0][2], M[1][2])
    c, d = 1 / a, -b / a
    return (c.real, -c.imag, d.real), (c.imag, c.real, d.imag)


def around(box: Sequence[float], margin: float = MARGIN) -> tuple[int, int, int, int]:
    """The square around the middle of a box (left, top, right, bottom), wider than its longer side by the margin."""
    left, top, right, bottom = box
    half = margin * max(right - left, bottom - top) / 2
    x, y = (left + right) / 2, (top + bottom) / 2
    side = max(1, round(2 * half))
    corner = (round(x - side / 2), round(y - side / 2))
    return (*corner, corner[0] + side, corner[1] + side)


def frames(count: int, wanted: int = 32) -> list[int]:
    """Which frames of a video of `count` to take: evenly spaced from the first to the last, each once."""
    if count <= wanted:
        return list(range(count))
    return [round(i * (count - 1) / (wanted - 1)) for i in range(wanted)] if wanted > 1 else [0]
