"""SVG text: scales, ticks, marks and labels that do not run over each other. Every string from data goes through `esc`."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

CHAR = 6.3
"""Assumed width of a character at the label size, in SVG units (a little too wide on purpose)."""
LINE = 14
"""Height of a line of labels, in SVG units."""


def esc(text: object) -> str:
    """Text made safe for element content and attribute values."""
    return html.escape(str(text), quote=True)


def number(x: float) -> str:
    """A coordinate: two digits are enough, no trailing zeros."""
    return f"{x:.2f}".rstrip("0").rstrip(".")


@dataclass(frozen=True)
class Scale:
    """Maps data values to SVG units, linear or logarithmic."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._inner(self.low), self._inner(self.high)
        part = (self._inner(value) - low) / ((high - low) or 1.0)
        return self.start + part * (self.stop - self.start)

    def _inner(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value

    def ticks(self, about: int = 5) -> list[float]:
        return log_ticks(self.low, self.high, about) if self.log else linear_ticks(self.low, self.high, about)


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values between low and high, 1, 2 or 5 times a power of ten apart."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / max(about, 1)))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(math.log(span / s / about)))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Powers of ten between low and high; with 2 and 5 in between while there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [m * 10.0**e for e in range(first, last + 1) for m in factors]
        ticks = [t for t in ticks if low * 0.999 <= t <= high * 1.001]
        if len(ticks) >= 3:
            every = math.ceil(len(ticks) / (about + 2))
            return ticks[::every]
    return ticks if len(ticks) > 1 else linear_ticks(low, high, 3)


def padded(values: Sequence[float], *, log: bool = False, part: float = 0.08) -> tuple[float, float]:
    """Ends of an axis that shows all values with some air around."""
    known = [v for v in values if v is not None and math.isfinite(v) and (v > 0 or not log)]
    if not known:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = min(known), max(known)
    if log:
        a, b = math.log10(low), math.log10(high)
        air = max((b - a) * part, 0.12)
        return 10 ** (a - air), 10 ** (b + air)
    air = (high - low) * part or abs(high) * 0.05 or 0.5
    return low - air, high + air


def shape(kind: int, x: float, y: float, r: float) -> str:
    """A mark of about equal area whatever its kind: circle, square, triangle, diamond, cross, inverted triangle, hexagon."""
    corners = {
        1: [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
        2: [(0, -1.2), (1.1, 0.75), (-1.1, 0.75)],
        3: [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
        4: [(-0.4, -1.1), (0.4, -1.1), (0.4, -0.4), (1.1, -0.4), (1.1, 0.4), (0.4, 0.4),
            (0.4, 1.1), (-0.4, 1.1), (-0.4, 0.4), (-1.1, 0.4), (-1.1, -0.4), (-0.4, -0.4)],
        5: [(0, 1.2), (1.1, -0.75), (-1.1, -0.75)],
        6: [(-1.1, 0), (-0.55, -0.95), (0.55, -0.95), (1.1, 0), (0.55, 0.95), (-0.55, 0.95)],
    }.get(kind % 7)  # fmt: skip
    if corners is None:
        return f'<circle cx="{number(x)}" cy="{number(y)}" r="{number(r)}"/>'
    points = " ".join(f"{number(x + r * a)},{number(y + r * b)}" for a, b in corners)
    return f'<polygon points="{points}"/>'


@dataclass
class Labels:
    """Places labels beside points where nothing is in the way, and leaves them out where they do not fit."""

    left: float
    top: float
    right: float
    bottom: float
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)

    def block(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """Keeps labels out of a box."""
        self.taken.append((x0, y0, x1, y1))

    def place(self, text: str, x: float, y: float, gap: float) -> tuple[float, float, str] | None:
        """(x, baseline y, text-anchor) of a free place around the point, or None."""
        width = CHAR * len(text)
        spots = [
            (x + gap, y + 4, "start", x + gap), (x - gap, y + 4, "end", x - gap - width),
            (x + gap, y - gap + 2, "start", x + gap), (x + gap, y + gap + 8, "start", x + gap),
            (x - gap, y - gap + 2, "end", x - gap - width), (x - gap, y + gap + 8, "end", x - gap - width),
            (x, y - gap - 3, "middle", x - width / 2), (x, y + gap + 11, "middle", x - width / 2),
        ]  # fmt: skip
        for tx, ty, anchor, x0 in spots:
            box = (x0, ty - LINE + 3, x0 + width, ty + 3)
            if self._free(box):
                self.block(*box)
                return tx, ty, anchor
        return None

    def _free(self, box: tuple[float, float, float, float]) -> bool:
        x0, y0, x1, y1 = box
        inside = x0 >= self.left and x1 <= self.right and y0 >= self.top and y1 <= self.bottom
        return inside and all(x1 <= a or x0 >= c or y1 <= b or y0 >= d for a, b, c, d in self.taken)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, at least `gap` apart where the room allows, in the given order."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    placed = [0.0] * len(wanted)
    floor = low
    for i in order:
        placed[i] = max(wanted[i], floor)
        floor = placed[i] + gap
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed
