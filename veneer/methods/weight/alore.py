"""ALoRE: a linear module of Kronecker-mixed low-rank experts in front of a frozen layer, merged into it (2024, arXiv:2412.08341)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import dropout, linear

from veneer.errors import BadValue
from veneer.init import normal, uniform, zeros
from veneer.maths.factor import nearest_divisors
from veneer.method import Call, InputMethod, Params
from veneer.option import option
from veneer.site import Site

TOGETHER = ("attn.q attn.k attn.v attn.qkv", "cross.k cross.v", "mlp.up mlp.gate", "expert.up expert.gate")
"""Roles whose layers in one block read the same input, and so sit behind one module."""


@dataclass(frozen=True)
class ALoRE(InputMethod):
    """W_eff = W (I + s · M), M = Σ_i S_i ⊗ (P_i Q_i), or M = (Σ_i T_i ⊗ U_i)(Σ_i S_i ⊗ D_i) with form="phm"

    Pick it for vision transformers at a small budget: n experts of rank r, mixed over n blocks of features, give one
    change of rank up to n² r for every layer behind a norm. Not where inputs have no common norm, nor beyond linear
    maps. The published abstract does not fix the formula: this one meets its words and its count of parameters.

    Tensors, one module for all layers that read the same input (q, k, v of a block; up, gate): S [n, n, n],
    N(0, 1/n); Q [n, r, d/n], Xavier; P [n, d/n, r], zeros: starts as the base. phm: S, T [n, n, n], D [n, h/n, d/n]
    Xavier, U [n, d/n, h/n] zeros. There are no biases.

    Args:
        share_S: one S (and T) for all modules; every layer then has a P and Q (or D and U) of its own.
    """

    n: int = option(4, "experts, and blocks of features they are mixed over", ge=1)
    r: int = option(4, "rank of an expert", ge=1)
    s: float = option(1.0, "scale of the module", gt=0)
    form: str = option("experts", "the sum of experts, or two Kronecker-sum maps through a bottleneck", choices=("experts", "phm"))
    h: int = option(16, "width of phm's bottleneck", ge=1)
    share_S: bool = option(False, "one S for all modules")
    dropout: float = option(0.0, "dropout inside the module, in training; linear layers only", ge=0, lt=1)

    sizes = ("r", "h", "n")
    default_targets = "attn.q attn.k attn.v attn.qkv mlp.up mlp.gate"
    aliases = {"rank": "r", "experts": "n", "scale": "s", "bottleneck": "h"}

    def validate(self) -> None:
        if self.form == "phm" and self.h % self.n:
            raise BadValue(f"ALoRE: n={self.n} does not divide h={self.h}; choose n = {nearest_divisors(self.n, self.h)}, or another h.")

    def check(self, site: Site) -> None:
        d = site.in_features
        if d % self.n:
            raise self.refuse(f"n={self.n} does not divide in={d} {{at}}; choose n = {nearest_divisors(self.n, d)}.", site)
        if self.dropout and site.kind != "linear":
            raise self.refuse(f"dropout={self.dropout} is for linear layers, not for the {site.kind} {{at}}.", site)

    def tie(self, site: Site) -> str | None:
        if self.share_S:
            return "all"
        group = next((roles for roles in TOGETHER if site.role in roles.split()), None)
        return site.name if group is None or site.depth is None else f"{site.depth}.{group.split()[0]}"

    def init(self, site: Site, generator: Generator) -> Params:
        return {k: t for k, t in self.module(site.in_features, generator).items() if k not in "ST"} if self.share_S else {}

    def init_shared(self, sites: Sequence[Site], generator: Generator) -> Params:
        made, d = self.module(sites[0].in_features, generator), sites[0].in_features
        for other in (s for s in sites if s.in_features != d and not self.share_S):
            what = f"{sites[0].name} and {other.name} share a module but read {d} and {other.in_features} features"
            raise BadValue(f"ALoRE: {what}; choose share_S=True or other targets.")
        return {k: t for k, t in made.items() if k in "ST"} if self.share_S else made

    def module(self, d: int, generator: Generator) -> Params:
        """First tensors of a module on d features."""
        n, p, phm = self.n, d // self.n, self.form == "phm"
        inside = self.h // n if phm else self.r
        mixing = {name: normal((n, n, n), generator, n**-0.5) for name in ("ST" if phm else "S")}
        down, up = uniform((n, inside, p), generator, math.sqrt(6 / (inside + p))), zeros((n, p, inside))
        return mixing | dict(zip("DU" if phm else "QP", (down, up)))

    def steps(self, p: Params, back: bool) -> list[Tensor]:
        """What x meets on its way to x Mᵀ (or, back, to x M): a map [n, ·, d/n] in, one or two mixings, a map out."""
        down, *mixings, up = (p["D"], p["S"], p["T"], p["U"].mT) if "U" in p else (p["Q"], p["S"], p["P"].mT)
        return [up, *(S.mT for S in reversed(mixings)), down] if back else [down, *mixings, up]

    def inside(self, x: Tensor, steps: Sequence[Tensor], drop: float = 0.0) -> Tensor:
        """x [..., d] before the last map: [..., n, n · r], blocks of features and, in each, experts."""
        first, *mixings, _ = (t.to(x.dtype) for t in steps)
        t = linear(x.unflatten(-1, (self.n, -1)), first.flatten(0, 1)).unflatten(-1, (self.n, -1))  # [..., block, expert, r]
        if len(mixings) == 2:  # the sum over experts is the bottleneck
            t = torch.einsum("iac,...cir->...ar", mixings[0], t)
            return torch.einsum("iac,...cr->...air", mixings[1], dropout(t, drop)).flatten(-2)
        return torch.einsum("iac,...cir->...air", mixings[0], dropout(t, drop)).flatten(-2)

    def mix(self, x: Tensor, p: Params, back: bool = False, drop: float = 0.0) -> Tensor:
        """s · x Mᵀ, or s · x M; M is never formed."""
        steps = self.steps(p, back)
        return self.s * (self.inside(x, steps, drop) @ steps[-1].flatten(0, 1).to(x.dtype)).flatten(-2)

    def turn(self, x: Tensor, p: Params, site: Site, drop: float = 0.0) -> Tensor:
        return x + self.mix(x, p, drop=drop)

    def weight(self, W: Tensor, p: Params, site: Site | None = None) -> Tensor:
        return W + self.mix(W.flatten(1), p, back=True).reshape(W.shape)

    def low_rank(self, W: Tensor, p: Params, site: Site) -> tuple[Tensor, Tensor] | None:
        """Of rank n² r (phm: n h): what W is before the last map, and that map for each block; None where not thinner than W."""
        steps = self.steps(p, back=True)
        L, R = self.s * self.inside(W.flatten(1), steps).flatten(1), torch.kron(torch.eye(self.n).to(W), steps[-1].flatten(0, 1).to(W))
        return (L, R) if L.shape[1] * (len(L) + R.shape[1]) < W.numel() else None

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        drop = self.dropout if call.training else 0.0
        return call(self.turn(x, p, site, drop)) if site.kind == "linear" else super().forward(call, x, p, site)
