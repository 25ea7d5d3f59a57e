"""PST: pruning while fine-tuning, with low-rank updates and low-rank scores of the entries to keep (2022, arXiv:2205.11005)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from veneer.errors import BadValue
from veneer.init import kaiming_uniform, normal, zeros
from veneer.maths.order_statistics import smallest
from veneer.method import Params, WeightMethod
from veneer.option import option
from veneer.site import Site
from veneer.strategies.pruning import Pruning
from veneer.strategy import Strategy


@dataclass(frozen=True)
class PST(WeightMethod):
    """W_eff = M ⊙ Wt, Wt = W + beta · U V; M = 0 at the smallest scores S = |Wt| + alpha1 · A B + alpha2 · (R 1ᵀ + 1 Cᵀ)

    Pick it when the model that comes out must itself be sparse: merged, the share `sparsity` of every adapted weight is
    exactly zero, for about 1 % of the trained numbers of pruning with full scores. The pattern is free (no speed without
    sparse kernels). Not for an adapter to be switched on and off. Gradients pass the mask as if S were it (straight
    through), and reach pruned entries too. Weight decay would pull the scores to plain magnitude.

    Tensors: U [out, r1], A [out, r2], N(0, 1); V [r1, in], B [r2, in], R [out], C [in], zeros; pruned [1], whole, not
    trained: how many entries are zero, now. It follows a cubic in training, so the number of steps must be known. While
    it is 0 the layer starts as the base, beyond that as a base pruned by magnitude.

    Args:
        initial_warmup, final_warmup: shares of all steps at initial_sparsity and, at the end, at sparsity.
        start: "normal" as above; "lora": U and A zeros, V and B Kaiming-uniform(√5), which bears larger learning rates.
    """

    weight_rank: int = option(8, "rank r1 of the update", ge=1)
    mask_rank: int = option(8, "rank r2 of the scores", ge=1)
    sparsity: float = option(0.9, "share of zeros in the end", ge=0, lt=1)
    initial_sparsity: float = option(0.0, "share of zeros at the start", ge=0, lt=1)
    beta: float = option(1.0, "scale of the update", gt=0)
    alpha1: float = option(1.0, "weight of the low-rank scores", ge=0)
    alpha2: float = option(1.0, "weight of the scores of rows and columns", ge=0)
    initial_warmup: float = option(0.1, "share of the steps before sparsity grows", ge=0, le=1)
    final_warmup: float = option(0.3, "share of the steps at the final sparsity", ge=0, le=1)
    T: int | None = option(None, "all optimiser steps; None takes what the training loop tells", ge=1)
    start: str = option("normal", "which tensors start at zero", choices=("normal", "lora"))

    frozen = ("pruned",)
    sizes = ("weight_rank", "mask_rank")
    limits = {"gradients": "the mask passes gradients straight through"}
    default_lr = 5e-5
    default_targets = "attn.q attn.k attn.v attn.o attn.qkv cross.q cross.k cross.v cross.o mlp.up mlp.gate mlp.down"
    aliases = {"r": "weight_rank", "rank": "weight_rank", "r1": "weight_rank", "r2": "mask_rank", "final_sparsity": "sparsity"}

    def validate(self) -> None:
        if self.initial_warmup + self.final_warmup > 1:
            what = f"initial_warmup={self.initial_warmup} and final_warmup={self.final_warmup} are shares of all steps"
            raise BadValue(f"PST: {what} and add up to more than 1; choose smaller ones.")

    def init(self, site: Site, generator: Generator) -> Params:
        out, inside = site.out_features, site.in_features
        p: Params = {}
        for left, right, r in (("U", "V", self.weight_rank), ("A", "B", self.mask_rank)):
            if self.start == "lora":
                p |= {left: zeros((out, r)), right: kaiming_uniform((r, inside), generator)}
            else:
                p |= {left: normal((out, r), generator), right: zeros((r, inside))}
        pruned = torch.tensor([int(out * inside * self.initial_sparsity)])
        return {**p, "R": zeros((out,)), "C": zeros((inside,)), "pruned": pruned}

    def scored(self, W: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        """Wt and S, [out, in]."""
        Wt = torch.addmm(W.flatten(1), p["U"], p["V"], alpha=self.beta)
        R, C = p["R"][:, None], p["C"][None]
        left = torch.cat([self.alpha1 * p["A"], self.alpha2 * R, torch.ones_like(R)], 1)  # all scores in one product
        right = torch.cat([p["B"], torch.ones_like(C), self.alpha2 * C])
        return Wt, torch.addmm(Wt.abs(), left, right)

    def mask(self, S: Tensor, p: Params) -> Tensor:
        """M [out, in]: false at exactly `pruned` entries, of equal scores the first ones."""
        return ~smallest(S.detach(), p["pruned"])

    def weight(self, W: Tensor, p: Params, site: Site | None = None) -> Tensor:
        Wt, S = self.scored(W, p)
        M = self.mask(S, p) + (S - S.detach())  # the second term is 0 with the gradient of S
        return (M * Wt).reshape(W.shape)

    def strategy(self) -> Strategy:
        return Pruning(self.T, self.initial_sparsity, self.sparsity, self.initial_warmup, self.final_warmup)
