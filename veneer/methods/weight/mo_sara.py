"""Mo-SARA: sets of trained singular values between frozen singular vectors, mixed for every token (2024, arXiv:2408.03290)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import linear

from veneer.init import normal, zeros
from veneer.kernels.gated import gated
from veneer.maths.spectrum import leading, readable, within
from veneer.method import Call, Method, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class MoSARA(Method):
    """y = x Wᵀ + b + v ⊙ U ((Σ_i g_i lambda_i) ⊙ z), z = V x, g = softmax((z · w_g1) w_g2)

    Pick it for very few trained numbers: only vectors train, so a large m is cheap. Not where inference must be free:
    the mixture depends on the token, except with n = 1, which can be merged. Files hold U and V, which are large.

    Tensors: U [out, k] and V [k, in], frozen, the leading singular vectors of W that hold the share m of the sum of its
    singular values (each column of U has its largest entry positive); lambda [n, k], N(0, 1); w_g1 [k] and w_g2 [n],
    N(0, 1/k), left out for n = 1; v [out], zeros: starts as the base.
    """

    m: float = option(0.5, "share of the sum of singular values that sets k", gt=0, le=1)
    n: int = option(5, "sets of singular values", ge=1)

    kinds = ("linear",)
    frozen = ("U", "V")
    weighs = True
    sizes = ("m", "n")
    default_lr = 2e-3
    default_targets = "attn.q attn.v attn.qkv cross.q cross.v"
    aliases = {"threshold": "m", "num_experts": "n"}

    @property
    def limits(self) -> Mapping[str, str]:  # type: ignore[override]
        return {} if self.n == 1 else {"merge": "the mixture of singular values depends on the token; n=1 can be merged"}

    def init(self, site: Site, generator: Generator) -> Params:
        return {"v": zeros((site.out_features,))}

    def init_from_weight(self, W: Tensor, b: Tensor | None, p: Params, site: Site, generator: Generator) -> Params:
        U, V = leading(readable(self, W, site), self.m)
        k = len(V)
        p = {**p, "U": U, "V": V, "lambda": normal((self.n, k), generator)}
        if self.n == 1:
            return p
        return {**p, "w_g1": normal((k,), generator, k**-0.5), "w_g2": normal((self.n,), generator, k**-0.5)}

    def gates(self, z: Tensor, p: Params) -> Tensor:
        """g [..., n] of z [..., k], in the tensors' dtype."""
        return (linear(z, p["w_g1"].to(z.dtype)[None]).to(p["w_g2"].dtype) * p["w_g2"]).softmax(-1)

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        if self.n == 1:
            return call.add_low_rank(x, *self.factors(p))
        z = linear(x, p["V"].to(x.dtype))  # all that is kept of x, as V is frozen
        return gated(call(x), z, self.gates(z, p), p["lambda"], p["v"][:, None] * p["U"])

    def factors(self, p: Params) -> tuple[Tensor, Tensor]:
        """L [out, k] and R [k, in] of the change for n = 1."""
        return p["v"][:, None] * p["U"] * p["lambda"][0], p["V"]

    def low_rank(self, W: Tensor, p: Params, site: Site) -> tuple[Tensor, Tensor] | None:
        return self.factors(p) if self.n == 1 else None

    def fold(self, W: Tensor, b: Tensor | None, p: Params, site: Site) -> tuple[Tensor, Tensor | None]:
        return (W + torch.matmul(*self.factors(p)).reshape(W.shape), b) if self.n == 1 else super().fold(W, b, p, site)

    def within(self, model: nn.Module, budget: int) -> MoSARA:
        """This method with the largest m that trains at most `budget` parameters of this model; reads its weights."""
        n, more = self.n, self.n > 1
        return within(self, model, budget, lambda site, k: n * k + site.out_features + (k + n) * more)
