"""Routing by lot: at every step a new draw says which of a layer's modules train (2022, arXiv:2205.12410)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from veneer.strategy import Strategy

if TYPE_CHECKING:
    from veneer.tuned import Tuned


class Routing(Strategy):
    """Draws the tensor `pick` of every site anew after an optimiser step, alike on all processes.

    Its methods are of the class `kind`; their `counts` say below which number each place of `pick` stays.
    """

    def __init__(self, kind: type, seed: int) -> None:
        self.kind = kind
        self.generator = Generator().manual_seed(seed)
        self.picks: list[tuple[Tensor, tuple[int, ...]]] = []

    def start(self, tuned: Tuned, name: str, total_steps: int | None = None) -> None:
        self.picks = [(p["pick"], method.counts) for _, method, p in tuned.entries(name) if isinstance(method, self.kind)]  # type: ignore[attr-defined]

    def after_step(self) -> None:
        for pick, counts in self.picks:
            drawn = [int(torch.randint(n, (), generator=self.generator)) for n in counts]
            pick.copy_(torch.tensor(drawn))

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
