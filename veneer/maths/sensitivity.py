"""Sensitivity: the entries of a model whose training would lower the loss most, and where a module is the better buy (arXiv:2303.08566)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.errors import BadValue
from veneer.maths.entries import Entries
from veneer.method import Method, Params, replaced
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class Candidate:
    """One tensor whose entries may be trained.

    Args:
        score: sensitivities of its entries, [n]. cost: numbers that are trained in the entries' place once `least` or more
            of them are marked; 0: whatever the marks are; n + 1: never.
    """

    score: Tensor
    cost: int
    least: int

    @property
    def size(self) -> int:
        return len(self.score)


def ranked(candidates: Sequence[Candidate], most: Sequence[int]) -> tuple[Tensor, Tensor]:
    """One ranking of the largest scores of all tensors, `most[i]` of tensor i: whose each is and the how-manieth of its tensor.

    Of equal scores those of the earlier tensor come first.
    """
    best = [c.score.topk(k).values.cpu() for c, k in zip(candidates, most)]
    order = torch.cat(best).sort(descending=True, stable=True).indices
    owner = torch.arange(len(best)).repeat_interleave(torch.tensor([len(b) for b in best]))
    return owner[order], torch.cat([torch.arange(1, len(b) + 1) for b in best])[order]


def most_sensitive(candidates: Sequence[Candidate], tau: int, who: str) -> list[int]:
    """How many of the tau largest scores each tensor holds; those that are trained in any case are not asked."""
    total = sum(c.size for c in candidates if c.least)
    if tau > total:
        raise BadValue(f"{who}: tau={tau} is more than the {total} entries of the chosen layers; choose tau ≤ {total}.")
    owner, _ = ranked(candidates, [min(c.size, tau) if c.least else 0 for c in candidates])
    return torch.bincount(owner[:tau], minlength=len(candidates)).tolist()


def within(candidates: Sequence[Candidate], budget: int, only: bool, who: str) -> list[int]:
    """How many marks each tensor holds for the tau that trains as many numbers as may be, `budget` at most.

    Marks beyond those that buy a module change nothing and are not counted. With `only`, single entries are not trained.
    """
    owner, number = ranked(candidates, [min(c.size, c.least) for c in candidates])
    least, cost = (torch.tensor([getattr(c, name) for c in candidates])[owner] for name in ("least", "cost"))
    single = torch.zeros_like(number) if only else torch.ones_like(number)
    fixed = sum(c.cost for c in candidates if not c.least)
    total = fixed + torch.where(number < least, single, cost - (number - 1) * single).cumsum(0)  # for tau = 1, 2 …
    legal = total[total > fixed]
    if not len(legal) or not int(legal.min()) <= budget <= int(legal.max()):
        range_ = f"{int(legal.min())} … {int(legal.max())}" if len(legal) else f"no budget but the {fixed} that are always trained"
        raise BadValue(f"{who}: {budget} numbers cannot be trained in the chosen layers; their legal budgets are {range_}.")
    end = int((total == legal[legal <= budget].max()).nonzero()[-1]) + 1
    return torch.bincount(owner[:end], minlength=len(candidates)).tolist()


@dataclass(frozen=True, kw_only=True)
class Sensitive(Entries):
    """Decides on data, for a budget, which matrices get a module and which entries of the other tensors are trained. Give `cost`."""

    budget: int | float = option(0.005, "numbers to train, or below 1 their share of all in the chosen layers", gt=0)
    alpha: float = option(10.0, "a matrix gets a module at 1/alpha of the module's numbers", gt=0)
    beta: float = option(5.0, "a vector is trained whole at 1/beta of its numbers", gt=0)
    structured_vector: bool = option(True, "train vectors with many marks whole")
    structured_only: bool = option(False, "train no single entries")
    tau: int | None = option(None, "number of marks, in place of a budget", ge=1)
    structured: bool = option(False, "decided: the matrix has a module")

    reads_gradients = True

    def cost(self, site: Site, inside: int) -> int | None:
        """Numbers of the module for a matrix [out, inside]; None where there is none."""
        raise NotImplementedError

    @property
    def decided(self) -> bool:
        return self.structured or self.entries + self.bias_entries > 0

    def validate(self) -> None:
        if self.budget >= 1 and self.budget != int(self.budget):
            raise BadValue(f"{self.label}: budget={self.budget} must be a whole number of parameters, or a share below 1.")

    def check(self, site: Site) -> None:
        if site.count:
            raise self.refuse("stacked matrices cannot each have entries of their own {at}; choose other targets.", site)

    def observe_gradient(self, state: Any, name: str, grad: Tensor, site: Site) -> Any:
        self.check(site)
        square = grad.reshape(site.out_features, -1).to(torch.promote_types(grad.dtype, torch.float32)).square()
        seen = state or {}
        return seen | {name: seen[name].add_(square) if name in seen else square}

    def candidate(self, score: Tensor, site: Site) -> Candidate:
        """One tensor of a site by its scores [out, inside]: vectors have one column."""
        n, inside = score.numel(), score.shape[1]
        cost = n if inside == 1 else self.cost(site, inside)
        least = math.inf if cost is None else cost / self.alpha
        if inside == 1:
            least = n / self.beta if self.structured_vector else math.inf
        if not bool(score.isfinite().all()):
            raise self.refuse("the gradients {at} are not finite; look at the model and the batches.", site)
        always = inside == 1 and site.kind == "parameter" and site.depth is None  # a class token
        return Candidate(score.flatten(), cost or n, 0 if always else max(1, math.ceil(min(least, n + 1))))

    def settle(self, states: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, tuple[Method, Params] | None]:
        keys = [(site, name) for site in sites for name in states.get(site.name) or ()]
        if not keys:
            raise BadValue(f"{self.label}: no gradient reached the chosen layers; give one batch at least whose loss depends on them.")
        found = [self.candidate(states[site.name][name], site) for site, name in keys]
        if self.tau is not None:
            marks = most_sensitive(found, self.tau, self.label)
        else:
            budget = int(self.budget if self.budget >= 1 else self.budget * sum(c.size for c in found))
            marks = within(found, budget, self.structured_only, self.label)
        changes: dict[str, dict[str, Any]] = {site.name: {} for site in sites}
        tensors: dict[str, Params] = {site.name: {} for site in sites}
        for (site, name), one, n in zip(keys, found, marks):
            inside = states[site.name][name].shape[1]
            if n >= one.least and inside > 1:
                changes[site.name]["structured"] = True
                continue
            n = one.size if n >= one.least else 0 if self.structured_only else n
            at = torch.arange(n) if n == one.size else one.score.topk(n).indices.cpu()
            if n and name == "bias":
                changes[site.name]["bias_entries"], tensors[site.name]["bias_indices"] = n, at.sort().values
            elif n:
                places = self.positions(at, inside)
                changes[site.name] |= {"entries": n, "columns": len(places["columns"])}
                tensors[site.name] |= places
        none = {"structured": False, "entries": 0, "columns": 0, "bias_entries": 0}
        return {name: (replaced(self, none | own), tensors[name]) if own else None for name, own in changes.items()}
