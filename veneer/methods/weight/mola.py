"""MoLA: several LoRA experts a layer, of which each token takes a few, and more of them in higher layers (2024, arXiv:2402.08562)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import dropout, linear

from veneer.errors import BadValue
from veneer.init import kaiming_uniform, zeros
from veneer.kernels.gated import gated
from veneer.maths.allocation import SHAPES, Counts, at, digits, shaped
from veneer.maths.experts import gates
from veneer.method import Call, Method, Params
from veneer.option import option
from veneer.site import Site
from veneer.strategies.balance import Balance
from veneer.strategy import Strategy


@dataclass(frozen=True)
class MoLA(Method):
    """y = x Wᵀ + b + Σ_e g_e · s · B_e A_e x, g = the K largest of softmax(W_r x), divided by their sum, s = alpha / r

    Pick it where one LoRA has too little room and the answer may cost a little more per token. Not where inference must
    be free: the change depends on the token. All experts are computed, as one product with the stacked A and one with
    the stacked B, which costs what a LoRA of rank N r costs. Router and experts are each module's own.

    Tensors: A [N, r, in] and W_r [N, in], Kaiming-uniform(√5); B [N, out, r], zeros: starts as the base.

    Args:
        N: experts a layer; a tuple gives one number for each group of layers from the bottom (or for each layer).
        allocation: how a single N is spread over four groups of layers with N as the mean: "rectangle" 5555, "triangle"
            8642, "inverted-triangle" 2468, "hourglass" 8228, "diamond" 2882; or such digits themselves. Layers that are
            left over go to the upper groups.
        K: experts a token takes, also a tuple; with K = 1 the gate is 1, and only the balance term trains the router.
        dropout: one mask for all experts of a module.
    """

    N: int | tuple[int, ...] = option(5, "experts a layer", ge=1)
    K: int | tuple[int, ...] = option(2, "experts a token takes", ge=1)
    r: int | tuple[int, ...] = option(8, "rank of one expert", ge=1)
    alpha: float | None = option(None, "scale numerator; None means r; 2 r in the authors' runs", gt=0)
    dropout: float = option(0.0, "dropout on what the experts read, in training", ge=0, lt=1)
    allocation: str | int = option("inverted-triangle", "shape of N over the layers, or one digit for each group of layers")
    balance: float = option(1e-3, "weight of the load-balance term; 0: none", ge=0)

    kinds = ("linear",)
    sizes = ("r", "N")
    default_lr = 3e-4
    default_targets = "attn.q attn.k attn.v attn.o attn.qkv cross.q cross.k cross.v cross.o mlp.up mlp.gate mlp.down"
    aliases = {"num_experts": "N", "top_k": "K", "rank": "r", "lora_alpha": "alpha", "lora_dropout": "dropout"}
    limits = {"merge": "which experts act depends on the token"}

    def validate(self) -> None:
        if self.allocation not in SHAPES:
            digits(self.allocation, self.label)
        if self.allocation != "inverted-triangle" and (isinstance(self.N, tuple) or (self.allocation not in SHAPES and self.N != 5)):
            raise BadValue(
                f"MoLA: N={self.N!r} and allocation={self.allocation!r} both say how many experts a layer has; give one of them."
            )

    def check(self, site: Site) -> None:
        named = isinstance(self.N, int) and self.allocation in SHAPES
        for name, value in (("N", 1 if named else self.counts), ("K", self.K), ("r", self.r)):
            if isinstance(value, tuple) and 0 < site.length < len(value):
                raise self.refuse(
                    f"{name} gives {len(value)} numbers for the {site.length} layers {{at}}; give {site.length} or fewer.", site
                )
        if self.picks(site) > self.experts(site):
            raise self.refuse(f"K={self.picks(site)} is larger than N={self.experts(site)} {{at}}; choose K ≤ {self.experts(site)}.", site)

    @property
    def counts(self) -> Counts:
        """Experts by groups of layers."""
        if isinstance(self.N, tuple):
            return self.N
        return shaped(str(self.allocation), self.N) if self.allocation in SHAPES else digits(self.allocation)

    def experts(self, site: Site) -> int:
        """N at this site."""
        return at(self.counts, site)

    def picks(self, site: Site) -> int:
        """K at this site."""
        return at(self.K, site)

    def init(self, site: Site, generator: Generator) -> Params:
        N, r, out, inside = self.experts(site), at(self.r, site), site.out_features, site.in_features
        A, W_r = kaiming_uniform((N, r, inside), generator), kaiming_uniform((N, inside), generator)
        return {"A": A, "B": zeros((N, out, r)), "W_r": W_r}

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        A, B = p["A"], p["B"]
        N, r = A.shape[:2]
        logits = linear(x, p["W_r"].to(x.dtype))
        call.note("router", logits)
        t = linear(dropout(x, self.dropout, call.training), A.flatten(0, 1).to(x.dtype))  # all experts, [..., N r]
        s = (r if self.alpha is None else self.alpha) / r
        each = torch.eye(N, device=t.device).repeat_interleave(r, 1)  # [N, N r]: an expert's gate for all of its coordinates
        return gated(call(x), t, gates(logits, self.picks(site)), each, s * B.transpose(0, 1).flatten(1))

    def strategy(self) -> Strategy | None:
        return Balance(self.balance, MoLA) if self.balance else None
