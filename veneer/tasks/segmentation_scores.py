"""Metrics of segmented pictures, for domains that were trained on and for others, with intervals over pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from veneer.tasks import confusion
from veneer.tasks.metric import RESAMPLES, Measured, Metric

SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean_iou": lambda t: confusion.mean(confusion.iou(t)),
    "mean_f1": lambda t: confusion.mean(confusion.f1(t)),
    "pixel_accuracy": confusion.accuracy,
    "mean_accuracy": lambda t: confusion.mean(confusion.recall(t)),
}
IN_DOMAINS = ("mean_iou", "mean_f1", "pixel_accuracy")


def measured(tallies: np.ndarray, domains: Sequence[str], sources: Sequence[str], labels: Sequence[str]) -> Measured:
    """Metrics of pictures from their tallies [n, 3, classes] (`confusion.tallies`).

    The metrics without a domain's name are those of the pictures from domains that were not trained on, if there are such
    among these, else of all. "iou/CLASS" is a class's IoU there, left out for a class that is nowhere. Intervals are
    percentiles over pictures drawn again.
    """
    own, known = np.array(domains), set(sources)
    unseen = ~np.isin(own, list(known))
    headline = tallies[unseen] if unseen.any() else tallies
    draws = _drawn(headline)
    metrics = {name: _metric(score, headline, draws) for name, score in SCORES.items()}
    for domain in dict.fromkeys(domains) if len(set(domains)) > 1 else ():
        rows = tallies[own == domain]
        again = _drawn(rows)
        metrics |= {f"{domain}/{name}": _metric(SCORES[name], rows, again) for name in IN_DOMAINS}
    for i, label in enumerate(labels):
        one = _metric(lambda t, i=i: confusion.iou(t)[..., i], headline, draws)  # type: ignore[misc]
        if not np.isnan(one.value):
            metrics[f"iou/{label}"] = one
    return Measured(metrics)


def table(tallies: np.ndarray, domains: Sequence[str], labels: Sequence[str]) -> list[list[str]]:
    """Lines of a CSV file: domain, class, iou, f1, accuracy, pixels; values of classes that are nowhere are empty."""
    rows = [["domain", "class", "iou", "f1", "accuracy", "pixels"]]
    for domain in dict.fromkeys(domains):
        total = tallies[np.array(domains) == domain].sum(0)
        columns = [confusion.iou(total), confusion.f1(total), confusion.recall(total)]
        for i, label in enumerate(labels):
            shown = ["" if np.isnan(c[i]) else f"{c[i]:.4f}" for c in columns]
            rows.append([_quoted(domain), _quoted(label), *shown, str(int(total[1, i]))])
    return rows


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"' if set(name) & set(',"\n') else name


def _drawn(rows: np.ndarray) -> np.ndarray:
    """Tallies of as many pictures, drawn again and again: [resamples, 3, classes]."""
    n = len(rows)
    times = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(np.float64)
    return (times @ rows.reshape(n, -1).astype(np.float64)).reshape(RESAMPLES, *rows.shape[1:])


def _metric(score: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, draws: np.ndarray) -> Metric:
    values = score(draws)
    values = values[np.isfinite(values)]
    low, high = np.quantile(values, [0.025, 0.975]) if len(values) else (np.nan, np.nan)
    return Metric(float(score(rows.astype(np.float64).sum(0))), float(low), float(high), len(rows))
