"""Gradual magnitude pruning: the smallest weights of every matrix become zero along a cubic (2017, arXiv:1710.01878).

Used from any training loop: construct it over the weights, call `after_step` after every optimiser step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import BadValue
from veneer.strategies.pruning import sparsity_at
from veneer.strategy import Strategy


@dataclass(frozen=True)
class Goal:
    """What a weight ends at: a share of zeros, or, with m, n of every m consecutive inputs of a row kept."""

    S: float
    n: int = 0
    m: int = 0

    @classmethod
    def of(cls, text: str | float) -> Goal:
        """ "0.75" → that share of zeros; "2:4" → 2 of every 4 inputs kept. Raises `BadValue` with what is legal."""
        pair = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", str(text))
        if pair:
            n, m = int(pair[1]), int(pair[2])
            if not 1 <= n <= m:
                raise BadValue(f"n:m = {text}: n must be at least 1 and at most m = {m}.")
            return cls(1 - n / m, n, m)
        try:
            S = float(text)
        except ValueError:
            raise BadValue(f"{text!r} is not a sparsity; give a number of at least 0 and less than 1, or n:m such as 2:4.") from None
        if not 0 <= S < 1:
            raise BadValue(f"S={S:g} is not a sparsity; it must be at least 0 and less than 1 (the share of zeros), or n:m such as 2:4.")
        return cls(S)

    @property
    def pattern(self) -> str:
        """ "2:4", or "unstructured"."""
        return f"{self.n}:{self.m}" if self.m else "unstructured"

    def check(self, name: str, weight: Tensor) -> None:
        """Raises `BadValue` if this weight cannot end so: nothing would survive, or m does not divide its inputs."""
        count = weight.numel()
        if round(count * (1 - self.S)) < 1:
            raise BadValue(f"S={self.S:g} leaves none of the {count} entries of {name}; choose S of at most {1 - 1 / count:.12g}.")
        inputs = count // weight.shape[0]
        if self.m and inputs % self.m:
            legal = [m for m in range(self.n, inputs + 1) if inputs % m == 0]
            near = sorted(sorted(legal, key=lambda m: abs(m - self.m))[:3])
            raise BadValue(
                f"n:m = {self.pattern}: m={self.m} does not divide the {inputs} inputs of {name}; m must divide them, such as m = "
                f"{', '.join(map(str, near))}."
            )


def table_sparsity(S: float) -> float:
    """1 − √(1 − S): tables of a model made wider by √(1/(1 − S)) then hold as many non-zeros for each token as before."""
    return 1 - math.sqrt(1 - S)


def prunable(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(matrices, tables) of a model by name: its weights of two or more axes, and its embedding and output tables.

    Biases, norms and tables of relative positions stay dense. A weight that stands in several places is listed once; one
    that is held as [in, out] (GPT-2's) is seen transposed, so that inputs are last.
    """
    ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    table_ids = {id(p) for e in ends if e is not None for p in e.parameters()}
    table_ids |= {id(e.weight) for e in model.modules() if isinstance(e, nn.Embedding)}
    found = {name: p for name, p in model.named_parameters() if p.ndim > 1 and "relative" not in name and "rel_embedding" not in name}
    turned = {id(e.weight) for e in model.modules() if type(e).__name__ == "Conv1D"}
    matrices = {k: p.detach().T if id(p) in turned else p for k, p in found.items() if id(p) not in table_ids}
    return matrices, {k: p for k, p in found.items() if id(p) in table_ids}


def largest(scores: Tensor, k: int) -> Tensor:
    """A mask of the k largest entries; of equal ones those of lower flat index."""
    flat = scores.flatten()
    if k >= flat.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(flat.numel() - k + 1).values
    above, equal = flat > threshold, flat == threshold
    return (above | (equal & (equal.cumsum(0) <= k - above.sum()))).view_as(scores)


def largest_of_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """A mask of the n largest of every m consecutive inputs of each row; of equal ones the first."""
    groups = scores.reshape(-1, m)
    best = torch.sort(groups, dim=-1, descending=True, stable=True).indices[:, :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter(-1, best, True).view_as(scores)


@torch.no_grad()
def mask_at(weight: Tensor, goal: Goal, S: float, iterative: bool = False) -> Tensor:
    """What stays of a weight while its sparsity is S on the way to its goal.

    Unstructured: the round(n (1 − S)) largest. n:m: in each group the ⌈m (1 − S)⌉ largest; or `iterative`: the entries of the
    final pattern, and the largest of the others as many as S lets stay.
    """
    size = weight.detach().abs()
    if not goal.m:
        return largest(size, round(weight.numel() * (1 - S)))
    if not iterative:
        return largest_of_groups(size, max(goal.n, math.ceil(goal.m * (1 - S) - 1e-9)), goal.m)
    final = largest_of_groups(size, goal.n, goal.m)
    return largest(torch.where(final, torch.inf, size), max(round(weight.numel() * (1 - S)), weight.numel() * goal.n // goal.m))


class GradualPruning(Strategy):
    """Dense for the share `before` of all steps, cubic to the goals until the share `after` is left, then with fixed masks.

    Pruned weights are zero after every step. They come back only where the mask is drawn anew, every `every` steps of the
    cubic part, and they are among the largest by then.

    Args:
        weights: by name, with `goals` of the same names. Raises `BadValue` where they do not fit.
        steps: of the run; `start` may bring it instead.
        every: steps between masks; a hundredth of the run, at most 100, unless given.
        iterative: n:m entry by entry instead of group by group, see `mask_at`.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        goals: Mapping[str, Goal],
        steps: int | None = None,
        *,
        before: float = 0.25,
        after: float = 0.25,
        every: int | None = None,
        iterative: bool = False,
    ) -> None:
        for name, goal in goals.items():
            goal.check(name, weights[name])
        self.weights, self.goals = {name: weights[name] for name in goals}, dict(goals)
        self.steps, self.before, self.after, self.every, self.iterative = steps, before, after, every, iterative
        self.step, self.fixed = 0, False
        self.masks: dict[str, Tensor] = {}

    @classmethod
    def of(cls, model: nn.Module, goal: Goal, steps: int | None = None, tables: str = "auto", **settings: Any) -> GradualPruning:
        """Every matrix of a model to the same goal; embedding and output tables to `table_sparsity` ("auto") or "dense"."""
        matrices, others = prunable(model)
        goals = dict.fromkeys(matrices, goal)
        if tables == "auto":
            goals |= dict.fromkeys(others, Goal(table_sparsity(goal.S)))
        return cls({**matrices, **others}, goals, steps, **settings)

    def start(self, tuned: Any = None, name: str = "", total_steps: int | None = None) -> None:
        self.steps = self.steps or total_steps

    @torch.no_grad()
    def after_step(self) -> None:
        if self.steps is None:
            raise BadValue("Gradual pruning needs the number of optimiser steps: give steps=… or call start(total_steps=…).")
        self.step += 1
        ended = self.step >= self.steps - math.floor(self.after * self.steps)
        if ended and not self.fixed:
            self.fixed, self.masks = True, self.drawn(1.0)
        elif not ended and self.step > self.before * self.steps and self.step % (self.every or min(100, self.steps // 100) or 1) == 0:
            self.masks = self.drawn(sparsity_at(self.step, self.steps, 0.0, 1.0, self.before, self.after))
        for name, mask in self.masks.items():
            self.weights[name].mul_(mask)

    def drawn(self, part: float) -> dict[str, Tensor]:
        """Masks for this part of the way to every goal."""
        return {k: mask_at(w, self.goals[k], part * self.goals[k].S, self.iterative) for k, w in self.weights.items() if self.goals[k].S}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "steps": self.steps, "fixed": self.fixed, "masks": self.masks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.steps, self.fixed = state["step"], state["steps"], state["fixed"]
        self.masks = {k: mask.to(self.weights[k].device) for k, mask in state["masks"].items()}
