"""Which class was taken for which: counts of labelled points (pixels, fields, rows) and the metrics that follow from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from veneer.errors import BadValue

Labels = np.ndarray | Sequence[int]


class Confusion:
    """Counts [classes, classes]: rows are the true classes, columns the predicted ones. Add batches, then read the metrics.

    A class that is neither in the truth nor in the predictions has no IoU and no F1, one that is not in the truth no
    accuracy: they are nan, and the means leave them out.

    Args:
        names: the classes, in the order of their indices.
        ignored: label of points that do not count, such as 255; None: every point counts.
    """

    def __init__(self, names: Sequence[str], ignored: int | None = None) -> None:
        if not names:
            raise BadValue("Confusion: there are no classes to count; give at least one name.")
        self.names, self.ignored = tuple(names), ignored
        self.counts = np.zeros((len(names), len(names)), np.int64)

    def add(self, truth: Labels, predicted: Labels) -> Confusion:
        """Counts more points, arrays of indices of equal shape. Raises `BadValue` for other shapes and for unknown indices."""
        self.counts += count(truth, predicted, len(self.names), self.ignored)
        return self

    @property
    def points(self) -> int:
        """How many points were counted."""
        return int(self.counts.sum())

    @property
    def tallies(self) -> np.ndarray:
        """Points of each class that are right, true and predicted, [3, classes]."""
        return tallies(self.counts)

    @property
    def iou(self) -> np.ndarray:
        """Intersection over union of each class, [classes]."""
        return iou(self.tallies)

    @property
    def f1(self) -> np.ndarray:
        """Harmonic mean of precision and recall of each class, [classes]."""
        return f1(self.tallies)

    @property
    def recall(self) -> np.ndarray:
        """Accuracy of each class: the share of its points that were found, [classes]."""
        return recall(self.tallies)

    def means(self) -> dict[str, float]:
        """accuracy (of all points), mean_iou, mean_f1 and mean_accuracy (over the classes)."""
        return {
            "accuracy": float(accuracy(self.tallies)),
            "mean_iou": float(mean(self.iou)),
            "mean_f1": float(mean(self.f1)),
            "mean_accuracy": float(mean(self.recall)),
        }

    def per_class(self) -> dict[str, dict[str, float]]:
        """iou, f1 and accuracy of each class by its name; nan where there is nothing to measure."""
        columns = {"iou": self.iou, "f1": self.f1, "accuracy": self.recall}
        return {name: {what: float(values[i]) for what, values in columns.items()} for i, name in enumerate(self.names)}


def count(truth: Labels, predicted: Labels, classes: int, ignored: int | None = None) -> np.ndarray:
    """Points of true class i that were taken for class j, [classes, classes], from two arrays of indices of equal shape.

    Raises `BadValue` for arrays of different shape and for indices outside 0 … classes − 1 (`ignored` in the truth is fine).
    """
    true, found = np.asarray(truth), np.asarray(predicted)
    if true.shape != found.shape:
        raise BadValue(f"The truth has the shape {list(true.shape)}, the predictions {list(found.shape)}; they must be equal.")
    kept = np.ones(true.shape, bool) if ignored is None else true != ignored
    true, found = true[kept].astype(np.int64), found[kept].astype(np.int64)
    for what, values in (("truth", true), ("predictions", found)):
        if values.size and not 0 <= values.min() <= values.max() < classes:
            wrong = int(values.max() if values.max() >= classes else values.min())
            raise BadValue(f"The {what} hold the index {wrong}, but there are {classes} classes (0 … {classes - 1}); ignored is {ignored}.")
    return np.bincount(classes * true + found, minlength=classes**2).reshape(classes, classes)


def tallies(counts: np.ndarray) -> np.ndarray:
    """Points of each class that are right, true and predicted, [..., 3, classes], from counts [..., classes, classes].

    They add up like counts, are smaller where there are many classes, and are all that the metrics below need.
    """
    return np.stack([np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1), counts.sum(-2)], -2)


def iou(tallies: np.ndarray) -> np.ndarray:
    """Intersection over union [..., classes] from tallies [..., 3, classes]; nan for a class that is nowhere."""
    hits, true, found = np.moveaxis(tallies, -2, 0)
    return _share(hits, true + found - hits)


def f1(tallies: np.ndarray) -> np.ndarray:
    """2 hits / (true + predicted) of each class [..., classes]; nan for a class that is nowhere."""
    hits, true, found = np.moveaxis(tallies, -2, 0)
    return _share(2 * hits, true + found)


def recall(tallies: np.ndarray) -> np.ndarray:
    """hits / true of each class [..., classes]; nan for a class that the truth lacks."""
    hits, true, _ = np.moveaxis(tallies, -2, 0)
    return _share(hits, true)


def accuracy(tallies: np.ndarray) -> np.ndarray:
    """Share of all points that are right [...]; nan without points."""
    hits, true, _ = np.moveaxis(tallies, -2, 0)
    return _share(hits.sum(-1), true.sum(-1))


def mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not nan; nan if all is."""
    return _share(np.nansum(values, -1), (~np.isnan(values)).sum(-1))


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)
