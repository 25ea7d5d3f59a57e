"""Strategies: what happens around training steps. They do not own the loop; two calls from any loop drive them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from veneer.tuned import Tuned


class Strategy:
    """Extra losses, budgets, masks, schedules.

    The loop calls, once per optimiser step: backward → `before_step` → optimiser step → `after_step` → zero_grad.
    State that must survive an interruption goes into `state_dict`.
    """

    probe: Callable[[], Tensor] | None = None
    """The task loss on another training batch, where the loop offers one (`tuned.begin(steps, probe=…)`); set before `start`.
    The strategy chooses mode and gradients: call it under `torch.no_grad()` where it wants no graph."""

    def start(self, tuned: Tuned, name: str, total_steps: int | None = None) -> None:
        """Called when training begins: the adapter's name and, where known, the number of optimiser steps."""

    def loss_terms(self) -> dict[str, Tensor]:
        """Terms to add to the task loss in training, by name."""
        return {}

    def before_step(self) -> None:
        """After backward, before the optimiser's step: gradients are there."""

    def after_step(self) -> None:
        """After the optimiser's step, before gradients are cleared."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and tensors that resume the strategy."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
