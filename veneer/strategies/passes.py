"""Passes: what goes through a model in training, for strategies that look at it through hooks.

A hook must not hold its strategy: strategies go when their adapter is removed, and their hooks with them (`Lasting`). A model may
be copied between two passes: hooks are methods of objects that are copied along, without what they keep of a pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from veneer.tuned import Tuned


class Lasting:
    """Hooks that last as long as this does: a strategy holds it, and what the hooks call does not."""

    def __init__(self, handles: Sequence[RemovableHandle]) -> None:
        self.handles = handles

    def __del__(self) -> None:
        remove(self.handles)


def remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def trains(tuned: Tuned, name: str) -> bool:
    """Whether the pass that runs now is one that the adapter learns from."""
    acts = tuned.route.enabled and name in tuned.active
    return acts and tuned.model.training and torch.is_grad_enabled()


def named_inputs(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a model was called with, by its arguments' names."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return {**dict(zip(names, args)), **kwargs}


def mask_in(inputs: Mapping[str, Any], name: str) -> Tensor | None:
    """A mask [rows, tokens] among a model's inputs, if there is one."""
    found = inputs.get(name)
    return found if isinstance(found, Tensor) and found.ndim == 2 else None
