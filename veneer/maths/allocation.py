"""Whole numbers over the layers of a model: one for all, one a layer, or one for each group of layers (arXiv:2402.08562)."""

from __future__ import annotations

from typing import TypeAlias

from veneer.errors import BadValue
from veneer.site import Site

Counts: TypeAlias = int | tuple[int, ...]
"""One number for every layer, or one for each of some equal groups of layers, from the bottom."""

SHAPES = ("rectangle", "triangle", "inverted-triangle", "hourglass", "diamond")
"""Shapes over four groups of layers, seen with the last layer on top: a triangle is wide at the first layers."""


def shaped(shape: str, mean: int) -> tuple[int, ...]:
    """The numbers of four groups from the bottom with this mean: 8642 is the triangle of mean 5, 6532 that of mean 4.

    The smallest is 2 where the mean is above 2; below, all are equal.
    """
    most = max(mean - 2, 0)
    least = round(most / 3)
    change = {
        "rectangle": (0, 0, 0, 0),
        "triangle": (most, least, -least, -most),
        "inverted-triangle": (-most, -least, least, most),
        "hourglass": (most, -most, -most, most),
        "diamond": (-most, most, most, -most),
    }[shape]
    return tuple(mean + c for c in change)


def digits(written: str | int, who: str = "") -> tuple[int, ...]:
    """2468 as (2, 4, 6, 8). Raises `BadValue` for anything but digits from 1 to 9."""
    text = str(written)
    if not text or any(c not in "123456789" for c in text):
        raise BadValue(f"{who}: allocation={written!r} is not one of {', '.join(SHAPES)}, nor digits from 1 to 9 such as 2468.")
    return tuple(map(int, text))


def at(counts: Counts, site: Site) -> int:
    """The number at a site's layer. Where groups cannot be equal the upper ones are larger; outside layers it is the mean."""
    if isinstance(counts, int):
        return counts
    if not site.length:
        return round(sum(counts) / len(counts))
    size, larger = divmod(site.length, len(counts))
    smaller = len(counts) - larger  # the lower groups, of `size` layers; the upper ones have one more
    if site.index < size * smaller:
        return counts[site.index // size]
    return counts[smaller + (site.index - size * smaller) // (size + 1)]
