"""What the parts of an adapter are when it is pruned: masks, modules that may go, and what they are worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from torch import Tensor

from veneer.part import Part

Worth: TypeAlias = dict[str, list[float]]
"""Part → importance of the module, then of each of its ranks."""

FACT = "early_pruning"
"""Name under which an adapter's file keeps its `Worth`."""

MASKS = ("m_attn", "m_ffn")
"""Names of tensors that are masks over heads and over neurons."""


def key_of(part: Part) -> str:
    """A part's name in `Worth`."""
    return f"{part.index}/{part.site.name}"


def masks_of(part: Part) -> list[Tensor]:
    return [t for name, t in part.tensors().items() if name in MASKS]


def is_module(part: Part) -> bool:
    """Whether a part is a trained module that may go: all but masks, the task's head and what changes no single layer's output."""
    return not masks_of(part) and part.site.role != "head" and part.site.kind not in ("parameter", "attention", "block", "model")


def rank_count(part: Part, axes: Mapping[str, int]) -> int:
    """How many ranks a module has; 0 where it has none."""
    return next((part.tensors()[name].shape[axis] for name, axis in axes.items()), 0)
