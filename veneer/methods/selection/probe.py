"""Linear probe: only the task's head is trained on frozen features (no paper: the lower end of every comparison)."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.methods.selection.full import Full


@dataclass(frozen=True)
class Probe(Full):
    """logits = features weightᵀ + bias with weight and bias of the head trained; the backbone stays frozen

    Pick it as the lower end of a comparison, or for the cheapest training there is. Not when the base's features do
    not already separate the classes.

    Tensors: weight [classes, in], bias [classes], copied from the head the model has.
    """

    default_lr = 5e-3
    default_targets = "head"
    trains_heads = True
