"""MELoRA: a mini adapter for every block of features, together a low-rank change of higher rank (2024, arXiv:2402.17263)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

from veneer.errors import BadValue
from veneer.init import kaiming_uniform, zeros
from veneer.kernels.blocks import block_product
from veneer.maths.factor import nearest_divisors
from veneer.method import AdditiveMethod, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class MELoRA(AdditiveMethod):
    """W_eff = W + blockdiag(s_0 B0 A0, …, s_{n−1} B{n−1} A{n−1}), s_i = alpha_i / r_i; y = x W_effᵀ + b

    Pick it for a higher rank at LoRA's cost: n mini adapters of rank r reach rank n·r with the parameters of one LoRA of
    rank r. n = 1 is LoRA. Not where every output must see every input: block i of the outputs is changed by block i of
    the inputs alone. Blocks are runs of neighbouring features, so the order of features matters.

    Tensors: A0, A1 … [r_i, in/n], Kaiming-uniform(√5); B0, B1 … [out/n, r_i], zeros: starts as the base.

    Args:
        r: one rank for all, or a tuple of n, in the order of the blocks.
        alpha: likewise. Below it stands the rank of the mini adapter, not of all: alpha = 16 and r = 1 make 16.
    """

    r: int | tuple[int, ...] = option(8, "rank of every mini adapter, or one for each", ge=1)
    n: int = option(2, "mini adapters a layer; divides its input and output features", ge=1)
    alpha: float | tuple[float, ...] = option(16.0, "scale numerator of every mini adapter, or one for each", gt=0)
    dropout: float = option(0.0, "dropout on what the mini adapters read, in training", ge=0, lt=1)

    default_targets = "attn.q attn.v attn.qkv cross.q cross.v"
    default_lr = 4e-4
    kinds = ("linear", "parameter")
    aliases = {"rank": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "num_mini": "n"}

    def validate(self) -> None:
        for name, given in (("r", self.r), ("alpha", self.alpha)):
            if isinstance(given, tuple) and len(given) != self.n:
                raise BadValue(f"MELoRA: {name}={given!r} does not fit n={self.n} mini adapters; give one number for all, or {self.n}.")

    def check(self, site: Site) -> None:
        inside, out = site.in_features, site.out_features
        if inside % self.n or out % self.n:
            near = nearest_divisors(self.n, inside, out)
            raise self.refuse(f"n={self.n} does not divide in={inside} and out={out} {{at}}; choose n = {near}.", site)

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.r if isinstance(self.r, tuple) else (self.r,) * self.n

    @property
    def scales(self) -> list[float]:
        alphas = self.alpha if isinstance(self.alpha, tuple) else (self.alpha,) * self.n
        return [alpha / r for alpha, r in zip(alphas, self.ranks)]

    def init(self, site: Site, generator: Generator) -> Params:
        p: Params = {}
        for i, r in enumerate(self.ranks):
            p[f"A{i}"] = kaiming_uniform((r, site.in_features // self.n), generator)
            p[f"B{i}"] = zeros((site.out_features // self.n, r))
        return p

    def minis(self, p: Params) -> tuple[list[Tensor], list[Tensor]]:
        """Every s_i B_i and every A_i."""
        return [s * p[f"B{i}"] for i, s in enumerate(self.scales)], [p[f"A{i}"] for i in range(self.n)]

    def change(self, p: Params, site: Site) -> Tensor:
        return torch.block_diag(*(B @ A for B, A in zip(*self.minis(p))))

    def low_rank(self, W: Tensor, p: Params, site: Site) -> tuple[Tensor, Tensor]:
        B, A = self.minis(p)
        return torch.block_diag(*B), torch.block_diag(*A)

    def delta(self, x: Tensor, p: Params, site: Site) -> Tensor:
        B, A = self.minis(p)
        r = max(self.ranks)  # smaller ranks are filled up with zeros, so that all blocks go in two batched products
        L = torch.stack([pad(b, (0, r - b.shape[1])) for b in B])  # [n, out/n, r]
        R = torch.stack([pad(a, (0, 0, 0, r - len(a))) for a in A])  # [n, r, in/n]
        return block_product(block_product(x, R.mT), L.mT)
