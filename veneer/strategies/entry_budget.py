"""Entry budget: a falling number of weight entries that may change, won by the layers that matter (2025, arXiv:2510.24037)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.errors import BadValue
from veneer.strategies.rank_budget import smoothed
from veneer.strategy import Strategy

if TYPE_CHECKING:
    from veneer.tuned import Tuned


@dataclass(frozen=True)
class Schedule:
    """How many of n entries may change in epoch e (from 0).

    (1 − first) n at the start, (1 − last) n in the last `after` epochs and one, a cubic between; shares stand still until
    epoch `before`, and where `interval` does not divide the epoch.
    """

    epochs: int
    first: float
    last: float
    before: int = 0
    after: int = 0
    interval: int = 1

    def at(self, e: int, n: int) -> int | None:
        """The budget, or None where shares are not set anew."""
        v0, vT = (1 - self.first) * n, (1 - self.last) * n
        if e <= self.before:
            return None
        if e > self.epochs - self.after:
            return int(vT)
        left = 1 - (e - self.before) / (self.epochs - self.after - self.before)
        return math.floor(vT + (v0 - vT) * left**3) if e % self.interval == 0 else None


def normalised(scores: Sequence[float]) -> list[float]:
    """Shares of one; equal ones where nothing tells the layers apart."""
    total = math.fsum(scores)
    return [q / total for q in scores] if total > 0 and math.isfinite(total) else [1 / len(scores)] * len(scores)


def allotted(volume: int, shares: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Whole entries for each layer: its share of the volume, at most its size; what does not fit goes to those with room."""
    a = [float(min(n, math.floor(volume * q))) for q, n in zip(shares, sizes)]
    for _ in sizes:  # every round fills a layer or is the last
        left, room = volume - math.fsum(a), [i for i, n in enumerate(sizes) if a[i] < n]
        if left <= 0 or not room:
            break
        for i, q in zip(room, normalised([shares[i] for i in room])):
            a[i] = min(float(sizes[i]), a[i] + left * q)
    return [math.floor(each) for each in a]


class EntryBudget(Strategy):
    """Scores A and B of every layer after every step and sets the layers' s, the share that stays unchanged, once an epoch."""

    def __init__(self, slug: str, schedule: Schedule, T: int | None, beta1: float, beta2: float, metric: str = "ipt") -> None:
        self.slug, self.schedule, self.T, self.beta1, self.beta2, self.metric = slug, schedule, T, beta1, beta2, metric
        self.step, self.sizes, self.layers = 0, dict[str, int](), dict[str, dict[str, Tensor]]()
        self.I_bar, self.U_bar = dict[str, Tensor](), dict[str, Tensor]()

    def start(self, tuned: Tuned, name: str, total_steps: int | None = None) -> None:
        found = [(site, p) for site, method, p in tuned.entries(name) if method.slug == self.slug]
        self.layers = {site.name: {k: p[k] for k in ("A", "B", "s")} for site, p in found}
        self.sizes = {site.name: site.out_features * site.in_features for site, _ in found}
        self.T = self.T or total_steps

    @torch.no_grad()
    def after_step(self) -> None:
        if self.T is None:
            raise BadValue("SNELLA needs the number of optimiser steps: give T=… to the method or call tuned.begin(total_steps).")
        self.step += 1
        self.update()
        last, now = ((step * self.schedule.epochs // self.T) for step in (self.step - 1, self.step))
        if self.step < self.T and now > last:  # the next step begins an epoch
            self.set(last, now)

    def update(self) -> None:
        for name, p in self.layers.items():
            for k in ("A", "B"):
                w, key = p[k], f"{name}/{k}"
                grad = torch.zeros_like(w) if w.grad is None else w.grad.nan_to_num(0.0)
                old = [(bar[key] if key in bar else torch.zeros_like(w)).to(w.device) for bar in (self.I_bar, self.U_bar)]
                by = torch.ones_like(w) if self.metric == "mag" else grad
                self.I_bar[key], self.U_bar[key] = smoothed(old[0], old[1], w, by, self.beta1, self.beta2)

    def shares(self) -> list[float]:
        """Each layer's share of the budget, one for every matrix of a stack."""
        scores: list[float] = []
        for name in self.layers:
            means = [(self.I_bar[f"{name}/{k}"] * self.U_bar[f"{name}/{k}"]).mean((-2, -1)) for k in ("A", "B")]
            scores += (means[0] + means[1]).flatten().tolist()
        return normalised(scores)

    def set(self, last: int, now: int) -> None:
        """Shares for epoch `now`, the one before it being `last`: where steps are few, epochs are left out."""
        sizes = [self.sizes[name] for name, p in self.layers.items() for _ in range(p["s"].numel())]
        budgets = [self.schedule.at(e, sum(sizes)) for e in range(last + 1, now + 1)]
        volume = next((v for v in reversed(budgets) if v is not None), None)
        if volume is None:
            return
        ratios = iter([1 - a / n for a, n in zip(allotted(volume, self.shares(), sizes), sizes)])
        for p in self.layers.values():
            p["s"].copy_(torch.tensor([next(ratios) for _ in range(p["s"].numel())]).view_as(p["s"]))

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "T": self.T, "I_bar": dict(self.I_bar), "U_bar": dict(self.U_bar)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.T = state["step"], state["T"]
        self.I_bar, self.U_bar = dict(state["I_bar"]), dict(state["U_bar"])
