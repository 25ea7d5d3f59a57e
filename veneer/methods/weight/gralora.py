"""GraLoRA: a grid of blocks in the weight, each with low-rank factors of its own (2025, arXiv:2505.20355)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import linear

from veneer.errors import BadValue
from veneer.init import kaiming_uniform, zeros
from veneer.kernels.blocks import block_product
from veneer.maths.factor import nearest_divisors
from veneer.method import AdditiveMethod, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class GraLoRA(AdditiveMethod):
    """ΔW block (q, n) = s · B[q, n·u:(n+1)·u]ᵀ A[n][:, q·u:(q+1)·u]ᵀ, u = r / k, s = alpha / (r + h); y = x (W + ΔW)ᵀ + b

    Pick it where LoRA stops gaining from a higher rank: a k×k grid of blocks reaches rank k·r with LoRA's parameters and
    cost, and an outlying input feature disturbs only its own blocks. k = 1 is LoRA. Not at small ranks: every block has
    rank r / k only; there give part of the budget to hybrid_r, a plain low-rank term B_general A_general of rank h.

    Tensors: A [k, in/k, r], Kaiming-uniform(√5); B [k, r, out/k], zeros; with h > 0 A_general [h, in], Kaiming-uniform(√5),
    and B_general [out, h], zeros: starts as the base.
    """

    r: int = option(32, "rank of the factors of one column of blocks", ge=1)
    alpha: float = option(64.0, "scale numerator, s = alpha / (r + hybrid_r)", gt=0)
    k: int = option(2, "blocks along each side; divides in, out and r", ge=1)
    hybrid_r: int = option(0, "rank h of a plain low-rank term beside the grid", ge=0)
    dropout: float = option(0.0, "dropout on what the factors read, in training", ge=0, lt=1)

    sizes = ("r", "hybrid_r")
    default_targets = "attn.q attn.v attn.qkv cross.q cross.v"
    default_lr = 4e-4
    aliases = {"rank": "r", "gralora_k": "k", "gralora_alpha": "alpha", "gralora_dropout": "dropout", "h": "hybrid_r"}

    def validate(self) -> None:
        if self.r % self.k:
            more = -(-self.r // self.k) * self.k
            raise BadValue(f"GraLoRA: k={self.k} does not divide r={self.r}; choose k = {nearest_divisors(self.k, self.r)}, or r = {more}.")

    def check(self, site: Site) -> None:
        inside, out = site.in_features, site.out_features
        if inside % self.k or out % self.k:
            near = nearest_divisors(self.k, inside, out, self.r)
            raise self.refuse(f"k={self.k} does not divide in={inside} and out={out} {{at}}; choose k = {near}.", site)

    @property
    def scale(self) -> float:
        return self.alpha / (self.r + self.hybrid_r)

    def init(self, site: Site, generator: Generator) -> Params:
        inside, out = site.in_features // self.k, site.out_features // self.k
        p = {"A": kaiming_uniform((self.k, inside, self.r), generator, inside), "B": zeros((self.k, self.r, out))}
        if self.hybrid_r:
            p["A_general"] = kaiming_uniform((self.hybrid_r, site.in_features), generator)
            p["B_general"] = zeros((site.out_features, self.hybrid_r))
        return p

    def grid(self, p: Params) -> tuple[Tensor, Tensor]:
        """s · B by blocks [q, n, u, out/k], and A by blocks [n, in/k, q, u]."""
        return self.scale * p["B"].unflatten(1, (self.k, -1)), p["A"].unflatten(2, (self.k, -1))

    def change(self, p: Params, site: Site) -> Tensor:
        B, A = self.grid(p)
        dense = torch.einsum("qnuo,niqu->qoni", B, A).reshape(site.out_features, site.in_features)
        return dense + self.scale * p["B_general"] @ p["A_general"] if self.hybrid_r else dense

    def low_rank(self, W: Tensor, p: Params, site: Site) -> tuple[Tensor, Tensor]:
        B, _ = self.grid(p)
        L = torch.einsum("qnuo,qm->qonmu", B, torch.eye(self.k).to(B)).reshape(site.out_features, -1)  # [out, k·r]
        R = torch.block_diag(*p["A"].mT)  # [k·r, in]
        if not self.hybrid_r:
            return L, R
        return torch.cat([L, self.scale * p["B_general"]], 1), torch.cat([R, p["A_general"]])

    def delta(self, x: Tensor, p: Params, site: Site) -> Tensor:
        t = block_product(x, p["A"]).unflatten(-1, (self.k, self.k, -1))  # by columns of blocks, then by rows
        y = block_product(t.transpose(-3, -2).flatten(-3), self.scale * p["B"])
        if not self.hybrid_r:
            return y
        return y + linear(linear(x, p["A_general"].to(x.dtype)), (self.scale * p["B_general"]).to(x.dtype))
