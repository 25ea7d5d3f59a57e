"""How far generated sounds are from real ones, from embeddings or class scores that an audio model gave of each clip.

FAD is `frechet` on VGGish embeddings (128 numbers a frame), FD on PANNs' (2048 a clip); KL and the inception score read PANNs'
527 class scores (arXiv:2506.21298). The arrays may come from any model; numbers compare only within one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from veneer.errors import BadValue

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

EPS = 1e-6


def frechet(generated: ArrayLike, reference: ArrayLike) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½) of two sets of embeddings [clips, features]; covariances over features, n − 1.

    The sets may differ in size. Raises `BadValue` for fewer than 2 rows, unequal widths or numbers that are not finite.
    """
    (a, b) = _pair(generated, reference, least=2)
    first, second = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    root = _root(first)
    # Σ₁ Σ₂ and Σ₁^½ Σ₂ Σ₁^½ have the same eigenvalues, and the latter is symmetric: no complex roots
    shared = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * shared)


def kl_softmax(generated: ArrayLike, reference: ArrayLike) -> float:
    """Mean over clips of Σ ref log(ref / (gen + 1e-6)), softmax of class scores [clips, classes]; row i of both is one clip."""
    gen, ref = (_softmax(x) for x in _paired(generated, reference))
    return float((ref * np.log(ref / (gen + EPS))).sum(1).mean())


def kl_sigmoid(generated: ArrayLike, reference: ArrayLike) -> float:
    """The same with independent classes: only the terms of their presence, so it can be negative."""
    gen, ref = (1 / (1 + np.exp(-x)) for x in _paired(generated, reference))
    return float((ref * np.log(ref / (gen + EPS))).sum(1).mean())


def inception_score(scores: ArrayLike, splits: int = 10) -> tuple[float, float]:
    """exp of the mean divergence of each clip's classes from those of all clips: mean and deviation over `splits` parts in order.

    Raises `BadValue` for more parts than clips.
    """
    logits = _array(scores, "the class scores")
    if not 1 <= splits <= len(logits):
        raise BadValue(f"splits={splits} does not cut {len(logits)} clips into parts; choose 1 to {len(logits)}.")
    p, n = _softmax(logits), len(logits)
    parts = [p[n * i // splits : n * (i + 1) // splits] for i in range(splits)]
    found = [float(np.exp((x * (np.log(x) - np.log(x.mean(0)))).sum(1).mean())) for x in parts]
    return float(np.mean(found)), float(np.std(found))


def _root(S: NDArray) -> NDArray:
    """The symmetric square root of a covariance."""
    values, vectors = np.linalg.eigh(S)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def _softmax(x: NDArray) -> NDArray:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def _array(values: ArrayLike, what: str, least: int = 1) -> NDArray:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 2 or len(found) < least or not np.isfinite(found).all():
        raise BadValue(f"{what} must be finite numbers [clips, features] of at least {least} clips; their shape is {list(found.shape)}.")
    return found


def _pair(generated: ArrayLike, reference: ArrayLike, least: int = 1) -> tuple[NDArray, NDArray]:
    a, b = _array(generated, "the generated set", least), _array(reference, "the reference set", least)
    if a.shape[1] != b.shape[1]:
        raise BadValue(f"The sets have {a.shape[1]} and {b.shape[1]} features; both must come from the same model.")
    return a, b


def _paired(generated: ArrayLike, reference: ArrayLike) -> tuple[NDArray, NDArray]:
    a, b = _pair(generated, reference)
    if len(a) != len(b):
        raise BadValue(f"{len(a)} generated and {len(b)} reference clips cannot be paired; give the same clips in the same order.")
    return a, b
