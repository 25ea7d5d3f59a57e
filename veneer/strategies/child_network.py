"""Child networks: at every step gradients reach a random part of the trained numbers (2021, arXiv:2109.05687)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from veneer.errors import Unsupported
from veneer.strategies.unmasking import budgeted
from veneer.strategy import Strategy

if TYPE_CHECKING:
    from veneer.methods.strategy.child_tuning import ChildTuning
    from veneer.tuned import Tuned


class ChildNetwork(Strategy):
    """Multiplies gradients by a mask of zeros and 1 / p. The draws depend on the seed and the step alone: processes have the same."""

    def __init__(self, how: ChildTuning) -> None:
        self.how, self.step = how, 0
        self.tensors: dict[str, Tensor] = {}

    def start(self, tuned: Tuned, name: str, total_steps: int | None = None) -> None:
        self.tensors = budgeted(tuned, name)
        if not self.tensors:
            raise Unsupported(f"{self.how.label}: {self.how.limits['heads']}.")

    @torch.no_grad()
    def before_step(self) -> None:
        p, generators = self.how.p, dict[torch.device, Generator]()
        for t in self.tensors.values():
            if t.grad is not None:
                if t.device not in generators:
                    generators[t.device] = Generator(t.device).manual_seed(self.how.seed * 1_000_003 + self.step)
                t.grad.mul_(torch.empty_like(t.grad).bernoulli_(p, generator=generators[t.device])).div_(p)
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
