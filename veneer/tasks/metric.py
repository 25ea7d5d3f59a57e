"""A measured number with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

Z95 = 1.959963984540054
RESAMPLES = 1000


@dataclass(frozen=True)
class Metric:
    """A value, its 95 % interval and the number of examples it was measured on."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Measured:
    """What an evaluation gives: metrics by name, and for answers that are right or wrong, which ones are right."""

    metrics: dict[str, Metric]
    correct: list[bool] | None = None


def proportion(right: int, n: int) -> Metric:
    """Share of right answers with Wilson's interval (Wilson 1927), which also holds near 0 and 1."""
    if n == 0:
        return Metric(math.nan, 0.0, 1.0, 0)
    share, z2 = right / n, Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return Metric(share, 0.0 if right == 0 else middle - reach, 1.0 if right == n else middle + reach, n)


def bootstrap(statistic: Callable[[np.ndarray], float], rows: Sequence | np.ndarray, seed: int = 0) -> Metric:
    """A statistic of the examples' rows [n, …] with its percentile bootstrap interval (1000 resamples, fixed seed)."""
    import numpy as np

    data = np.asarray(rows, dtype=np.float64)
    n = len(data)
    if n == 0:
        return Metric(math.nan, -math.inf, math.inf, 0)
    draw = np.random.default_rng(seed)
    values = np.array([statistic(data[draw.integers(0, n, n)]) for _ in range(RESAMPLES)])
    values = values[np.isfinite(values)]
    low, high = np.quantile(values, [0.025, 0.975]) if len(values) else (math.nan, math.nan)
    return Metric(float(statistic(data)), float(low), float(high), n)
