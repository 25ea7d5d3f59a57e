"""Rank budget: a global number of low-rank triplets that falls in training, the least important masked (2023, arXiv:2303.10512)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.errors import BadValue
from veneer.strategy import Strategy

if TYPE_CHECKING:
    from veneer.tuned import Tuned

Triplets = dict[str, Tensor]
"""P [out, r], lambda [r], Q [r, in] of one matrix (also stacked, [count, …]), or something of the same shapes."""


@dataclass(frozen=True)
class Budget:
    """How many triplets may live at step t (from 1): b0 until t_i, b_T from T − t_f on, a cubic between."""

    T: int
    t_i: int
    t_f: int
    delta_T: int = 1

    def at(self, t: int, b0: int, bT: int) -> tuple[int, bool]:
        """Budget and whether masking runs at step t."""
        if not self.t_i < t < self.T - self.t_f:
            return (b0, False) if t <= self.t_i else (bT, True)
        left = 1 - (t - self.t_i) / (self.T - self.t_f - self.t_i)
        return int(bT + (b0 - bT) * left**3), t % self.delta_T == 0


def smoothed(I_bar: Tensor, U_bar: Tensor, w: Tensor, grad: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """The next Ī and Ū of I = |w · ∂L/∂w|; Ū measures the distance from the new Ī."""
    now = (w * grad).abs()
    I_bar = beta1 * I_bar + (1 - beta1) * now
    return I_bar, beta2 * U_bar + (1 - beta2) * (now - I_bar).abs()


def triplet_scores(s: Triplets) -> Tensor:
    """Scores of entries to scores of triplets [r]: s(lambda_i) + mean of column i of P + mean of row i of Q."""
    return s["lambda"] + s["P"].mean(-2) + s["Q"].mean(-1)


def kept(scores: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Masks like the scores: False for the lowest beyond the budget, equal ones in order, so that no more go than must."""
    flat = torch.cat([s.flatten() for s in scores])
    mask = torch.ones_like(flat, dtype=torch.bool)
    mask[torch.sort(flat, stable=True).indices[: max(len(flat) - budget, 0)]] = False
    return [m.view_as(s) for m, s in zip(mask.split([s.numel() for s in scores]), scores)]


def orthogonality(tensors: Sequence[Triplets]) -> Tensor:
    """Mean over all P and Q of ‖PᵀP − I‖ and ‖QQᵀ − I‖ (Frobenius, not squared)."""
    grams = [gram for p in tensors for gram in (p["P"].mT @ p["P"], p["Q"] @ p["Q"].mT)]
    return torch.cat([torch.linalg.matrix_norm(g - torch.eye(g.shape[-1]).to(g)).flatten() for g in grams]).mean()


class RankBudget(Strategy):
    """Scores triplets after every step and masks lambda to target · matrices triplets at the end.

    A masked lambda still gets gradients and may come back at the next masking, until step T − t_f fixes the pattern.
    """

    def __init__(self, budget: Callable[[int], Budget], T: int | None, target: int, beta1: float, beta2: float, gamma: float) -> None:
        self.budget, self.T, self.target, self.beta1, self.beta2, self.gamma = budget, T, target, beta1, beta2, gamma
        self.step, self.matrices = 0, dict[str, Triplets]()
        self.I_bar, self.U_bar, self.pattern = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()

    def start(self, tuned: Tuned, name: str, total_steps: int | None = None) -> None:
        self.matrices = {site.name: {k: p[k] for k in ("P", "lambda", "Q")} for site, _, p in tuned.entries(name) if "lambda" in p}
        self.T = self.T or total_steps
        if self.T is not None:
            self.budget(self.T)  # refuses now a schedule that does not fit

    def loss_terms(self) -> dict[str, Tensor]:
        return {"orthogonality": self.gamma * orthogonality(list(self.matrices.values()))} if self.gamma else {}

    @torch.no_grad()
    def after_step(self) -> None:
        if self.T is None:
            raise BadValue("AdaLoRA needs the number of optimiser steps: give T=… to the method or call tuned.begin(total_steps).")
        self.step, schedule = self.step + 1, self.budget(self.T)
        fixed = self.step >= self.T - schedule.t_f
        if not fixed:
            self.update()
        scores = [self.scores(name, p) for name, p in self.matrices.items()]
        matrices = sum(s.shape[:-1].numel() for s in scores)
        budget, mask_now = schedule.at(self.step, sum(s.numel() for s in scores), matrices * self.target)
        masks = self.pattern or (dict(zip(self.matrices, kept(scores, budget))) if mask_now else {})
        for name, mask in masks.items():
            self.matrices[name]["lambda"].mul_(mask.to(self.matrices[name]["lambda"]))
        if fixed and not self.pattern:  # from here on the pattern stands
            self.pattern, self.I_bar, self.U_bar = masks, {}, {}

    def update(self) -> None:
        for name, p in self.matrices.items():
            for k, w in p.items():
                key, none = f"{name}/{k}", torch.zeros_like(w)
                grad = none if w.grad is None else w.grad
                old = self.I_bar.get(key, none), self.U_bar.get(key, none)
                self.I_bar[key], self.U_bar[key] = smoothed(*old, w, grad, self.beta1, self.beta2)

    def scores(self, name: str, p: Triplets) -> Tensor:
        """One score a triplet, [r]; the magnitudes before anything was observed."""
        if f"{name}/P" not in self.I_bar:
            return p["lambda"].abs()
        return triplet_scores({k: self.I_bar[f"{name}/{k}"] * self.U_bar[f"{name}/{k}"] for k in p})

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "T": self.T, "I_bar": self.I_bar, "U_bar": self.U_bar, "pattern": self.pattern}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.T = state["step"], state["T"]
        self.I_bar, self.U_bar, self.pattern = state["I_bar"], state["U_bar"], state["pattern"]
