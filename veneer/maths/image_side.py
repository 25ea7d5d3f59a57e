"""The image side of a model: which of its blocks read pictures and not words."""

from __future__ import annotations

from collections.abc import Sequence

from veneer.errors import BadValue
from veneer.site import Site


def on_images(found: Sequence[Site], sites: Sequence[Site], who: str) -> list[Site]:
    """Those of the sites found whose path is at least as near to a patch embedding as to a word embedding.

    Raises `BadValue` for a model that has words and no pictures; one that has neither is taken as it is.
    """
    images = [s.name for s in sites if s.role == "embed.patch"]
    words = [s.name for s in sites if s.role == "embed.token"]
    if words and not images:
        raise BadValue(f"{who}: this model reads tokens, not images; use prompt-tuning, prefix-tuning or bottleneck-adapter.")
    return [s for s in found if nearness(s.name, images) >= nearness(s.name, words)]


def nearness(name: str, others: Sequence[str]) -> int:
    """The longest run of leading path components that `name` shares with any of the others."""
    parts, best = name.split("."), 0
    for other in others:
        pairs = [a == b for a, b in zip(parts, other.split("."))]
        best = max(best, pairs.index(False) if False in pairs else len(pairs))
    return best
