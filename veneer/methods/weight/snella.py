"""SNELLA: SNELL with a mixed kernel, and layers that compete for the entries that may change (2025, arXiv:2510.24037)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from veneer.errors import BadValue
from veneer.init import ones, zeros
from veneer.kernels.kernelised import Rule
from veneer.maths.competition import Competing, piecewise, squared
from veneer.maths.order_statistics import Pieces, quantile
from veneer.method import Params
from veneer.option import option
from veneer.site import Site
from veneer.strategies.entry_budget import EntryBudget, Schedule
from veneer.strategy import Strategy


@dataclass(frozen=True)
class SNELLA(Competing):
    """W_eff = W + gate(K), K = D + alpha · softmax_o(D / gamma) + beta, D[o, i] = 0.1 ‖B_1[o] − A_1[i]‖ − 0.1 ‖B_2[o] − A_2[i]‖

    The gate is SNELL's: K |K| where |K| is above its s-quantile, else 0, with a share s of each layer's own. Pick it
    instead of SNELL when one s for all layers is too blunt: layers win entries of a falling global budget by the
    sensitivity and uncertainty of their A and B. The number of steps must be known. Not for very short trainings.

    Tensors: A [in, r] and B [out, r], uniform in ±1/√(n r / 2), n = in and out: a start close to the base but not at
    it; alpha, gamma, beta [1]: 1, 1, 0; s [1], not trained: init_thres, then what the budget leaves the layer.

    Args:
        variant: "mixk": no gate, no budget: ΔW = K.
        T, epochs: shares are set anew T / epochs steps apart, of T steps in all; None takes what the training loop tells.
        init_warmup, final_warmup, mask_interval: in such epochs: before the budget falls, at its end, between two settings.
        metric: "ipt": smoothed |w · gradient| times its uncertainty; "mag": |w| in place of |w · gradient|.
        dropout, drop_path: 0.1 in the authors' runs; 0 here, so that training is exact unless asked.
    """

    r: int = option(32, "columns of A and B, over both pieces", ge=2)
    target_ratio: float = option(0.8, "share of all entries that stay unchanged in the end", ge=0, lt=1)
    init_thres: float = option(0.0, "that share at the start, in every layer", ge=0, lt=1)
    variant: str = option("snella", "with gate and budget, or the mixed kernel alone", choices=("snella", "mixk"))
    T: int | None = option(None, "all optimiser steps", ge=1)
    epochs: int = option(100, "parts that the steps are divided into", ge=1)
    init_warmup: int = option(0, "epochs before the budget falls", ge=0)
    final_warmup: int = option(0, "epochs at the end with the last budget", ge=0)
    mask_interval: int = option(1, "epochs between two settings", ge=1)
    beta1: float = option(0.85, "smoothing of the sensitivity", gt=0, lt=1)
    beta2: float = option(0.85, "smoothing of its uncertainty", gt=0, lt=1)
    metric: str = option("ipt", "what counts as importance", choices=("ipt", "mag"))

    frozen = ("s",)
    default_targets = "attn.q attn.k attn.v attn.o attn.qkv cross.q cross.k cross.v cross.o mlp.up mlp.gate mlp.down"
    aliases = {"rank": "r", "low_rank_dim": "r", "total_step": "T", "alloc_epoch": "epochs"}

    @property
    def limits(self) -> Mapping[str, str]:  # type: ignore[override]
        start = {"identity": "the kernel of its random first matrices is small but not zero"}
        return start if self.variant == "mixk" else {**start, "gradients": "threshold and gate count as constants"}

    def validate(self) -> None:
        if self.r % 2:
            raise BadValue(f"SNELLA: r={self.r} is odd and cannot be cut into two pieces; choose r = {self.r + 1}.")
        if self.init_warmup + self.final_warmup >= self.epochs:
            what = f"init_warmup={self.init_warmup} and final_warmup={self.final_warmup} leave none of {self.epochs} epochs"
            raise BadValue(f"SNELLA: {what} for the budget to fall in; choose more epochs or shorter warm-ups.")

    def init(self, site: Site, generator: Generator) -> Params:
        p = {**self.thin(site, generator, self.r, 2), "alpha": ones((1,)), "gamma": ones((1,)), "beta": zeros((1,))}
        return p if self.variant == "mixk" else {**p, "s": zeros((1,)) + self.init_thres}

    @staticmethod
    def matrix(p: Params) -> Tensor:
        """K [out, in]."""
        D, gamma = piecewise(p["B"], p["A"], (0.1, -0.1)), p["gamma"]
        apart = torch.where(gamma.abs() < 1e-3, torch.copysign(torch.full_like(gamma, 1e-3), gamma), gamma)
        gamma = gamma + (apart - gamma).detach()  # it may cross zero in training, where it divides
        return D + p["alpha"] * torch.softmax(D / gamma, 0) + p["beta"]

    def rule(self, p: Params) -> Rule:
        if self.variant == "mixk":
            return Rule(self.matrix, lambda pieces, n, like: None, lambda K, t: K)

        def threshold(pieces: Pieces, n: int, like: Tensor) -> Tensor:
            return quantile(lambda: (K.abs() for K in pieces()), n, p["s"], like)

        return Rule(self.matrix, threshold, squared)  # type: ignore[arg-type]

    def strategy(self) -> Strategy | None:
        if self.variant == "mixk":
            return None
        schedule = Schedule(self.epochs, self.init_thres, self.target_ratio, self.init_warmup, self.final_warmup, self.mask_interval)
        return EntryBudget(self.slug, schedule, self.T, self.beta1, self.beta2, self.metric)
