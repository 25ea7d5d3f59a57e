"""Sparse coefficients: few of the shared rank-one changes in each layer (2023, arXiv:2309.11756)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.strategy import Strategy

if TYPE_CHECKING:
    from veneer.tuned import Tuned


def shrunk(s: Tensor, by: float) -> Tensor:
    """sign(s) · max(|s| − by, 0): the proximal step of by · ‖s‖₁."""
    return s.sign() * (s.abs() - by).clamp_min(0)


def cut(s: Tensor, tau: float) -> Tensor:
    """s with zeros where |s| ≤ tau."""
    return torch.where(s.abs() > tau, s, 0)


def coefficients(tuned: Tuned, name: str | None = None) -> dict[str, Tensor]:
    """The s of every site whose change is B diag(s) A, by the site's name."""
    return {site.name: p["s"] for site, _, p in tuned.entries(name) if {"A", "B", "s"} <= p.keys()}


@torch.no_grad()
def prune(tuned: Tuned, name: str | None = None, tau: float = 0.0) -> dict[str, int]:
    """Sets an adapter's coefficients s to zero where |s| ≤ tau; how many each site keeps, its rank, by name."""
    found = coefficients(tuned, name)
    for s in found.values():
        s.copy_(cut(s, tau))
    return {name: int(s.count_nonzero()) for name, s in found.items()}


class Sparsity(Strategy):
    """lam · Σ over sites of ‖s‖₁, once a step; or, with prox, prox taken off every |s| after each step instead.

    tau: coefficients this small or smaller are zero after the last step, where the loop tells how many there are;
    else call `prune` after training.
    """

    def __init__(self, lam: float, prox: float, tau: float) -> None:
        self.lam, self.prox, self.tau = lam, prox, tau
        self.tuned: Tuned | None = None
        self.name, self.step, self.total = "", 0, 0

    def start(self, tuned: Tuned, name: str, total_steps: int | None = None) -> None:
        self.tuned, self.name, self.total = tuned, name, total_steps or self.total

    def held(self) -> list[Tensor]:
        return list(coefficients(self.tuned, self.name).values()) if self.tuned is not None else []

    def loss_terms(self) -> dict[str, Tensor]:
        found = self.held()
        if self.prox or not self.lam or not found:
            return {}
        return {"sparsity": self.lam * torch.stack([s.abs().sum().to(found[0].device) for s in found]).sum()}

    @torch.no_grad()
    def after_step(self) -> None:
        self.step += 1
        last = self.step == self.total
        for s in self.held() if self.prox or last else ():
            s.copy_(cut(shrunk(s, self.prox), self.tau if last else 0.0))

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.total = state["step"], state["total"]
