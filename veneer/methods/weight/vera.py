"""VeRA: two random matrices that all layers share, scaled by trained vectors (2024, arXiv:2310.11454)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Generator, Tensor

from veneer.init import kaiming_uniform, zeros
from veneer.kernels.eager import eager
from veneer.kernels.scaled import scaled_random
from veneer.method import Call, LowRankMethod, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class VeRA(LowRankMethod):
    """W_eff = W + diag(lambda_b) B diag(lambda_d) A; y = x W_effᵀ + b

    Pick it for ten times fewer parameters than LoRA and small files: A and B come from a seed. Not for speed or the
    smallest memory: with so few trained numbers a rank of some hundreds is needed, and computed.

    Tensors: lambda_d [r], d_initial; lambda_b [out], zeros: starts as the base. Fixed and shared by all sites, of the
    size of the largest ones: A [r, in_max], B [out_max, r], Kaiming-uniform with gain √2; each layer reads their first
    `in` columns and `out` rows.

    Args:
        d_initial: the smaller, the more slowly lambda_b sets out; 0.1 and 1e-7 are in use.
    """

    r: int = option(256, "rank of the shared matrices", ge=1)
    d_initial: float = option(0.1, "first value of lambda_d", gt=0)
    dropout: float = option(0.0, "dropout on the input of A, in training", ge=0, lt=1)
    seed: int = option(0, "of A and B", ge=0)

    fixed = ("A", "B")
    default_targets = "attn.q attn.v attn.qkv cross.q cross.v"
    default_lr = 4e-3
    aliases = {"rank": "r", "vera_dropout": "dropout", "projection_prng_key": "seed"}

    def init(self, site: Site, generator: Generator) -> Params:
        return {"lambda_d": zeros((self.r,)) + self.d_initial, "lambda_b": zeros((site.out_features,))}

    def init_shared(self, sites: Sequence[Site], generator: Generator) -> Params:
        own = Generator().manual_seed(self.seed)
        inside, out = max(s.in_features for s in sites), max(s.out_features for s in sites)
        A = kaiming_uniform((self.r, inside), own, gain=6**0.5)  # √2 for the gain, √3 from standard deviation to bound
        return {"A": A, "B": kaiming_uniform((out, self.r), own, gain=6**0.5)}

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        if site.kind != "linear" or (self.dropout and call.training) or not eager(x):
            return super().forward(call, x, p, site)
        lambda_b, lambda_d = p["lambda_b"], p["lambda_d"]
        t = call.inner(x, p["A"][: len(lambda_d), : site.in_features])
        y = scaled_random(t, lambda_d, p["B"][: len(lambda_b), : len(lambda_d)], lambda_b)
        return call.plus(x, y, fresh=True)

    def adds(self, site: Site) -> bool:
        return site.kind == "linear" and not self.dropout

    def factors(self, p: Params, site: Site | None = None) -> tuple[Tensor, Tensor]:
        lambda_b, lambda_d = p["lambda_b"], p["lambda_d"]
        B = p["B"][: len(lambda_b), : len(lambda_d)]
        A = p["A"][: len(lambda_d), : None if site is None else site.in_features]
        return B * (lambda_b[:, None] * lambda_d), A
