"""SARA: a product in SVD form whose rank each layer takes from the singular values of its frozen weight (2024, arXiv:2408.03290)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from veneer.init import kaiming_uniform, zeros
from veneer.maths.spectrum import rank_of, readable, within
from veneer.maths.starts import truncated_svd
from veneer.method import LowRankMethod, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class SARA(LowRankMethod):
    """W_eff = W + U diag(lambda) V, k = the smallest rank with S_1 + … + S_k ≥ m · ΣS, S the singular values of W

    Pick it where layers differ in what they need and no steps are to be spent on finding out, as AdaLoRA does. The
    number of trained parameters follows from m and the weights: `within` finds m for a budget. Not for stacked experts,
    whose ranks would differ.

    Tensors: U [out, k] and V [k, in], Kaiming-uniform(√5); lambda [k], zeros: starts as the base.

    Args:
        m: share of the sum of the singular values (not of their squares) that the rank holds.
        vectors: "svd" starts U and V as the leading singular vectors of W; they are trained as well.
    """

    m: float = option(0.01, "share of the sum of singular values that sets the rank", gt=0, le=1)
    vectors: str = option("random", "first values of U and V", choices=("random", "svd"))

    weighs = True
    sizes = ("m",)
    default_targets = "attn.q attn.v attn.qkv cross.q cross.v"
    aliases = {"threshold": "m", "init": "vectors"}

    def check(self, site: Site) -> None:
        if site.count:
            raise self.refuse("stacked matrices {at} would each have another rank; choose other targets.", site)

    def init_from_weight(self, W: Tensor, b: Tensor | None, p: Params, site: Site, generator: Generator) -> Params:
        W = readable(self, W, site)
        k = rank_of(torch.linalg.svdvals(W), self.m)
        if self.vectors == "svd":
            U, _, V = truncated_svd(W, k)
        else:
            U, V = kaiming_uniform((W.shape[0], k), generator), kaiming_uniform((k, W.shape[1]), generator)
        return {**p, "U": U, "lambda": zeros((k,)), "V": V}

    def factors(self, p: Params, site: Site | None = None) -> tuple[Tensor, Tensor]:
        return p["U"] * p["lambda"], p["V"]

    def within(self, model: nn.Module, budget: int) -> SARA:
        """This method with the largest m that trains at most `budget` parameters of this model; reads its weights."""
        return within(self, model, budget, lambda site, k: k * (site.out_features + site.in_features + 1))
