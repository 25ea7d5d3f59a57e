"""How well scores tell fakes from real pictures: AUROC, average precision, equal error rate, balanced accuracy.

Written out, because a bootstrap takes each a thousand times; the tests hold them against scikit-learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from veneer.tasks.metric import Metric, bootstrap

if TYPE_CHECKING:
    import numpy as np


def by_group(scores: np.ndarray, fake: np.ndarray, groups: Sequence[str] | None) -> np.ndarray:
    """Rows (score, is fake) of single pictures, or of their groups (the frames of a video), whose score is the mean: [n, 2]."""
    import numpy as np

    both = np.stack([scores, fake], 1).astype(np.float64)
    if groups is None:
        return both
    _, which = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.zeros((which.max() + 1, 2))
    np.add.at(sums, which, both)
    return sums / np.bincount(which)[:, None]


def detection(rows: np.ndarray) -> dict[str, Metric]:
    """All four with their bootstrap intervals, from rows (score, is fake) [n, 2]; scores above ½ count as fake."""
    wanted = {"ap": average_precision, "auroc": auroc, "eer": equal_error_rate, "balanced_accuracy": balanced_accuracy}
    return {name: bootstrap(statistic, rows) for name, statistic in wanted.items()}


def curve(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many real ones and how many fakes score at least as much as each threshold, from none to all: two rising counts."""
    import numpy as np

    order = rows[(-rows[:, 0]).argsort(kind="stable")]
    last = np.flatnonzero(np.append(order[1:, 0] != order[:-1, 0], True))  # equal scores fall together
    fakes = order[:, 1].cumsum()[last]
    return np.append(0.0, last + 1 - fakes), np.append(0.0, fakes)


def auroc(rows: np.ndarray) -> float:
    """Share of pairs of a fake and a real one in which the fake scores higher; not a number where a class is missing."""
    import numpy as np

    accused, found = curve(rows)
    return float(np.trapezoid(found, accused)) / (accused[-1] * found[-1]) if accused[-1] and found[-1] else float("nan")


def average_precision(rows: np.ndarray) -> float:
    """Precision at every threshold, weighted by the share of fakes that it adds."""
    import numpy as np

    accused, found = curve(rows)
    return float((np.diff(found) * found[1:] / (found[1:] + accused[1:])).sum() / found[-1]) if found[-1] else float("nan")


def equal_error_rate(rows: np.ndarray) -> float:
    """The error at the threshold that misses as large a share of the fakes as it wrongly accuses of the real ones."""
    import numpy as np

    accused, found = curve(rows)
    if not accused[-1] or not found[-1]:
        return float("nan")
    wrong, missed = accused / accused[-1], 1 - found / found[-1]
    gap = wrong - missed  # rises from −1 to 1
    at = int(np.argmax(gap >= 0))
    share = gap[at] / (gap[at] - gap[at - 1])
    return float(wrong[at] - share * (wrong[at] - wrong[at - 1]))


def balanced_accuracy(rows: np.ndarray) -> float:
    """Mean of the shares of fakes and of real ones that are called so; not a number where a class is missing."""
    called, fake = rows[:, 0] > 0.5, rows[:, 1] == 1
    return float((called[fake].mean() + (~called[~fake]).mean()) / 2) if fake.any() and not fake.all() else float("nan")
