"""Numbers as people read them; one form for the terminal, the report and the pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NONE = "–"


def count(n: float | None) -> str:
    """52224 → "52,224"."""
    return NONE if n is None else f"{n:,.0f}"


def short_count(n: float | None) -> str:
    """52224 → "52 k", for axes."""
    if n is None:
        return NONE
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(n) >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.3g}"


def share(part: float | None, whole: float | None) -> str:
    """Part of a whole in per cent, two significant digits: "0.23 %"."""
    if part is None or not whole:
        return NONE
    percent = 100 * part / whole
    if percent == 0:
        return "0 %"
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"


def size(n: float | None) -> str:
    """Bytes → "212 kB", "1.4 GB"."""
    if n is None:
        return NONE
    if n < 1000:
        return f"{n:.0f} B"
    for power, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= power:
            value = n / power
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    raise AssertionError(n)


def seconds(s: float | None) -> str:
    """ "0.4 s", "41 s", "2 min 3 s", "1 h 5 min"."""
    if s is None:
        return NONE
    if s < 10:
        return f"{s:.1f} s"
    if s < 120:
        return f"{s:.0f} s"
    minutes = round(s) // 60
    return f"{minutes} min {round(s) % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def metric_value(value: float | None, metric: Mapping[str, Any]) -> str:
    """A value of the study's metric: "79.6 %" for fractions, else four significant digits."""
    if value is None:
        return NONE
    return f"{100 * value:.1f} %" if metric.get("fraction") else f"{value:.4g}"


def interval(low: float | None, high: float | None, metric: Mapping[str, Any]) -> str:
    """ "77.8–81.3 %"."""
    if low is None or high is None:
        return NONE
    return f"{100 * low:.1f}–{100 * high:.1f} %" if metric.get("fraction") else f"{low:.4g}–{high:.4g}"
