"""Architectures that no installed library has."""

from __future__ import annotations

import importlib
from typing import Any

NAMED = {
    "TSViTForSemanticSegmentation": "veneer.models.tsvit",
    "TSViTModel": "veneer.models.tsvit",
    "PointMAEForPointCloudClassification": "veneer.models.point_mae",
    "PointMAEModel": "veneer.models.point_mae",
    "ImageTokensForCaptioning": "veneer.models.captioner",
    "SphereForImageClassification": "veneer.models.sphere_classifier",
}
"""Classes that a saved configuration may name → the module that makes them known to transformers' Auto classes."""


def register() -> None:
    """Makes all of them known to transformers' Auto classes."""
    for module in set(NAMED.values()):
        importlib.import_module(module)


def architecture(name: str) -> Any:
    """The class of this name, or None if it is none of ours."""
    return getattr(importlib.import_module(NAMED[name]), name) if name in NAMED else None
