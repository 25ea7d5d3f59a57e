"""Rank budget: a global number of low-rank triplets that falls in training, the least important masked (2023, arXiv:2303.10512).

Works on every matrix with tensors P [out, r], lambda [r], Q [r, in] (also stacked, [count, …]).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.errors import BadValue
from veneer.strategy import Strategy

if TYPE_CHECKING:
    from veneer.adapt import Tuned

Triplets = dict[str, Tensor]
"""The tensors P, lambda and Q of one matrix, or something of the same shapes."""


@dataclass(frozen=True)
class Budget:
    """How many triplets may live at step t (from 1): b0 until t_i, b_T from T − t_f on, a cubic between."""

    T: int
    t_i: int
    t_f: int
    delta_T: int = 1

    def at(self, t: int, b0: int, bT: int) -> tuple[int, bool]:
        """Budget and whether masking runs at step t."""
        if t <= self.t_i:
            return b0, False
        if t >= self.T - self.t_f:
            return bT, True
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
    """Masks like the scores, False for the lowest ones beyond the budget. Equal scores fall in order, so that no more go than must."""
    flat = torch.cat([s.flatten() for s in scores])
    mask = torch.ones_like(flat, dtype=torch.bool)
    mask[torch.sort(flat, stable=True).indices[: max(len(flat) - budget, 0)]] = False
    return [m.view_as(s) for m, s in zip(mask.split([s.numel() for s in scores]), scores)]


def orthogonality(tensors: Sequence[Triplets]) -> Tensor:
    """Mean over all P and Q of ‖PᵀP − I‖ and ‖QQᵀ − I‖ (Frobenius, not squared)."""
    distances = []
    for p in tensors:
        for gram in (p["P"].mT @ p["P"], p["Q"] @ p["Q"].mT):
            eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
            distances.append(torch.linalg.matrix_norm(gram - eye).flatten())
    return torch.cat(distances).mean()


class RankBudget(Strategy):
    """Scores triplets after every step, and masks lambda to the budget.

    A masked lambda still gets gradients and may come back at the next masking, until step T − t_f fixes the pattern.

    Args:
        budget: schedule for a number of steps. total: that number, if the method says it.
        target: triplets per matrix at the end. beta1, beta2: smoothing. gamma: weight of the orthogonality term.
        score: "smoothed" Ī · Ū, "sensitivity" |w · ∂L/∂w| of this step, or "magnitude" |lambda|.
    """

    def __init__(
        self, budget: Callable[[int], Budget], total: int | None, target: int, beta1: float, beta2: float, gamma: float, score: str
    ) -> None:
        self.budget, self.total, self.target, self.score = budget, total, target, score
        self.beta1, self.beta2, self.gamma = beta1, beta2, gamma
        self.step = 0
        self.matrices: dict[str, Triplets] = {}
        self.I_bar: dict[str, Triplets] = {}
        self.U_bar: dict[str, Triplets] = {}
        self.pattern: dict[str, Tensor] = {}

    def start(self, tuned: Tuned, name: str, total_steps: int | None = None) -> None:
        self.matrices = {site.name: {k: p[k] for k in ("P", "lambda", "Q")} for site, _, p in tuned.entries(name) if "lambda" in p}
        self.total = self.total or total_steps

    def loss_terms(self) -> dict[str, Tensor]:
        return {"orthogonality": self.gamma * orthogonality(list(self.matrices.values()))} if self.gamma else {}

    @torch.no_grad()
    def after_step(self) -> None:
        if self.total is None:
            raise BadValue("The rank budget needs the number of optimiser steps: give T=… to the method or call tuned.begin(total_steps).")
        self.step += 1
        schedule = self.budget(self.total)
        fixed = self.step >= self.total - schedule.t_f
        if self.step < self.total - schedule.t_f:
            self.update_scores()
        b0 = sum(p["lambda"].numel() for p in self.matrices.values())
        rows = sum(p["lambda"].shape[:-1].numel() for p in self.matrices.values())
        budget, mask_now = schedule.at(self.step, b0, rows * self.target)
        if mask_now and not self.pattern:
            masks = dict(zip(self.matrices, kept(self.scores(), budget)))
            self.apply(masks)
            if fixed:  # from here on the pattern stands
                self.pattern, self.I_bar, self.U_bar = masks, {}, {}
        elif self.pattern:
            self.apply(self.pattern)

    def update_scores(self) -> None:
        for name, p in self.matrices.items():
            I_bar, U_bar = self.I_bar.setdefault(name, {}), self.U_bar.setdefault(name, {})
            for key, w in p.items():
                grad = torch.zeros_like(w) if w.grad is None else w.grad
                beta1 = self.beta1 if self.score == "smoothed" else 0.0
                start = torch.zeros_like(w)
                I_bar[key], U_bar[key] = smoothed(I_bar.get(key, start), U_bar.get(key, start), w, grad, beta1, self.beta2)

    def scores(self) -> list[Tensor]:
        """Scores of all triplets, one tensor like lambda a matrix."""
        if self.score == "magnitude" or not self.I_bar:
            return [p["lambda"].abs() for p in self.matrices.values()]
        if self.score == "sensitivity":
            return [triplet_scores(self.I_bar[name]) for name in self.matrices]
        return [triplet_scores({k: i * self.U_bar[name][k] for k, i in self.I_bar[name].items()}) for name in self.matrices]

    def apply(self, masks: dict[str, Tensor]) -> None:
        for name, mask in masks.items():
            self.matrices[name]["lambda"].mul_(mask.to(self.matrices[name]["lambda"]))

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "total": self.total, "I_bar": self.I_bar, "U_bar": self.U_bar, "pattern": self.pattern}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.total = state["step"], state["total"]
        self.I_bar, self.U_bar, self.pattern = state["I_bar"], state["U_bar"], state["pattern"]
