"""Pruning: how many of each layer's entries are zero, growing in training along a cubic (2022, arXiv:2205.11005)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.errors import BadValue
from veneer.strategy import Strategy

if TYPE_CHECKING:
    from veneer.tuned import Tuned


def sparsity_at(t: int, T: int, first: float, last: float, before: float, after: float) -> float:
    """The share of zeros at step t of T: `first` for the share `before` of all steps, `last` in the share `after`, a cubic between."""
    if t <= before * T:
        return first
    if t > T - after * T:
        return last
    return last + (first - last) * (1 - (t - before * T) / (T - (before + after) * T)) ** 3


@torch.no_grad()
def prune(tuned: Tuned, sparsity: float, name: str | None = None) -> None:
    """Sets how many entries of each layer an adapter's masks make zero, as the schedule does in training."""
    for site, _, p in tuned.entries(name):
        if "pruned" in p:
            p["pruned"].fill_(int(site.out_features * site.in_features * sparsity))


def n_of_m(scores: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """A mask of scores [out, in] with the n largest of every m neighbours in a row, the pattern that some accelerators take."""
    if not 0 < n <= m or scores.shape[-1] % m:
        raise BadValue(f"n_of_m: {n} of {m} does not fit rows of {scores.shape[-1]}; m must divide them and n lie between 1 and m.")
    groups = scores.unflatten(-1, (-1, m))
    best = groups.topk(n, -1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter(-1, best, True).flatten(-2)


class Pruning(Strategy):
    """Sets `pruned`, the number of zeros of every layer, for each next step."""

    def __init__(self, T: int | None, first: float, last: float, before: float, after: float) -> None:
        self.T, self.shape = T, (first, last, before, after)
        self.step = 0
        self.tuned: Tuned | None = None
        self.name = ""

    def start(self, tuned: Tuned, name: str, total_steps: int | None = None) -> None:
        self.tuned, self.name, self.T = tuned, name, self.T or total_steps

    def after_step(self) -> None:
        if self.T is None or self.tuned is None:
            raise BadValue("PST needs the number of optimiser steps: give T=… to the method or call tuned.begin(total_steps).")
        self.step += 1
        prune(self.tuned, sparsity_at(self.step, self.T, *self.shape), self.name)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "T": self.T}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.T = state["step"], state["T"]
