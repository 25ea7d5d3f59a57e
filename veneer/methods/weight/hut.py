"""HUT: the frozen weight, entry by entry, times a mask from two thin matrices (2024, arXiv:2409.13501)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import Generator, Tensor

from veneer.errors import BadValue
from veneer.init import kaiming_uniform, zeros
from veneer.method import Call, Params, WeightMethod
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class HUT(WeightMethod):
    """W_eff = W ⊙ (1 + s · M_A M_B), or W ⊙ (M_A M_B) with form="product"; y = x W_effᵀ + b

    Pick it for a multiplicative change of full rank at LoRA's count: zeros of W stay zeros, so pruned weights stay
    pruned, and what forms the weight does not grow with the tokens. Not for layers that start at zero, where nothing
    can move, nor for the tightest memory: for r > 1 backward makes a dense weight gradient. The paper's abstract leaves
    open which form it trains; both are here. A product of rank r + 1 contains the offset of rank r.

    Tensors: M_A [out, r], zeros; M_B [r, in], Kaiming-uniform(√5): starts as the base. Product: the first column of M_A
    and the first row of M_B are ones: the base too. Weight decay pulls a product towards zero, an offset to the base.
    """

    r: int = option(8, "rank of the mask", ge=1)
    form: str = option("offset", "the mask: one plus a product, or the product", choices=("offset", "product"))
    s: float = option(1.0, "scale of an offset", gt=0)

    default_targets = "attn.q attn.v attn.qkv cross.q cross.v"
    aliases = {"rank": "r", "scale": "s"}

    def validate(self) -> None:
        if self.form == "product" and self.s != 1:
            raise BadValue(f"HUT: s={self.s} scales an offset; form='product' would start away from the base with it; leave s=1.")

    def init(self, site: Site, generator: Generator) -> Params:
        M_A, M_B = zeros((site.out_features, self.r)), kaiming_uniform((self.r, site.in_features), generator)
        if self.form == "product":
            M_A[:, 0] = M_B[0] = 1
        return {"M_A": M_A, "M_B": M_B}

    def init_from_weight(self, W: Tensor, b: Tensor | None, p: Params, site: Site, generator: Generator) -> Params:
        if not W.is_meta and not W.any():
            warnings.warn(f"HUT: the weight of {site.name} is all zeros, and zeros cannot move; choose other targets.", stacklevel=2)
        return p

    def weight(self, W: Tensor, p: Params, site: Site | None = None) -> Tensor:
        M = p["M_A"] @ p["M_B"]
        return W * (1 + self.s * M if self.form == "offset" else M).reshape(W.shape)

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        if self.r > 1 or site.kind != "linear":
            return super().forward(call, x, p, site)
        # W ⊙ (a cᵀ) = diag(a) W diag(c): no weight is built, and none has a gradient; the bias is not masked
        a, b, h = p["M_A"][:, 0], call.bias(), call((x * p["M_B"][0]).to(x.dtype))
        if self.form == "product":
            return a * h if b is None else a * h + (1 - a) * b
        return call(x) + self.s * a * (h if b is None else h - b)
