"""Metrics of segmented patches, pooled over their labelled pixels, with intervals over patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from veneer.tasks import confusion
from veneer.tasks.legend import IGNORED
from veneer.tasks.metric import Measured, Metric, bootstrap

MEANS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean_f1": lambda t: confusion.mean(confusion.f1(t)),
    "mean_iou": lambda t: confusion.mean(confusion.iou(t)),
    "mean_accuracy": lambda t: confusion.mean(confusion.recall(t)),
    "pixel_accuracy": confusion.accuracy,
}
EACH = {"f1": confusion.f1, "accuracy": confusion.recall}


def measured(predicted: np.ndarray, truths: Sequence[np.ndarray], labels: Sequence[str]) -> Measured:
    """Metrics from class indices, predicted [patches, height, width] and true; "f1/CLASS" and "accuracy/CLASS" besides.

    A class's IoU is F1 / (2 − F1). Classes that are neither there nor predicted are left out.
    """
    tallies = np.stack(
        [confusion.tallies(confusion.count(true, found, len(labels), IGNORED)) for true, found in zip(truths, predicted.astype(np.int64))]
    )
    metrics = {name: _metric(score, tallies) for name, score in MEANS.items()}
    for i, label in enumerate(labels):
        for name, score in EACH.items():
            one = _metric(lambda t, score=score, i=i: score(t)[..., i], tallies)  # type: ignore[misc]
            if not np.isnan(one.value):
                metrics[f"{name}/{label}"] = one
    return Measured(metrics)


def _metric(score: Callable[[np.ndarray], np.ndarray], tallies: np.ndarray) -> Metric:
    return bootstrap(lambda rows: float(score(rows.sum(0))), tallies)
