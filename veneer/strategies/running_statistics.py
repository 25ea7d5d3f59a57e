"""Running mean and variance of a batch norm inside a method: moved after every step towards those of its last pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from veneer.strategy import Strategy

if TYPE_CHECKING:
    from veneer.tuned import Tuned

NOTE = "statistics"
"""Under this key the method leaves mean and variance [2, D] of a training pass; its tensors BN.mean, BN.var follow them."""


class RunningStatistics(Strategy):
    """new = (1 − momentum) · old + momentum · seen, as in torch's own batch norm."""

    def __init__(self, momentum: float = 0.1) -> None:
        self.momentum = momentum

    def start(self, tuned: Tuned, name: str, total_steps: int | None = None) -> None:
        self.parts = tuned.adapters[name].parts

    def after_step(self) -> None:
        for part in self.parts:
            if NOTE in part.notes:
                p = part.tensors()
                for key, seen in zip(("BN.mean", "BN.var"), part.notes[NOTE]):
                    p[key].lerp_(seen.to(p[key].dtype), self.momentum)
