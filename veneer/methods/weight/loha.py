"""LoHa: the entry-wise product of two low-rank matrices, of rank r² at twice LoRA's parameters (2021, arXiv:2108.06098)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import linear

from veneer.init import kaiming_uniform, zeros
from veneer.maths.row_dropout import RowDropped
from veneer.method import Call, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class LoHa(RowDropped):
    """W_eff = W + s · (w1_a w1_b) ⊙ (w2_a w2_b), s = alpha / r; y = x W_effᵀ + b

    Pick it when LoRA's rank is what limits it: the change has rank up to r² for the parameters of a LoRA of rank 2 r.
    Not for speed: it costs as much as a LoRA of rank r², or a dense weight gradient where that is cheaper. Known from
    FedPara and from image generation (LyCORIS, arXiv:2309.14859).

    Tensors: w1_a, w2_a [out, r] and w1_b [r, in], Kaiming-uniform(√5); w2_b [r, in], zeros: starts as the base.
    Convolutions: in counts the kernel.
    """

    r: int = option(8, "rank of each of the two products", ge=1)
    alpha: float | None = option(None, "scale numerator; None means r", gt=0)

    default_targets = "attn.q attn.v attn.qkv cross.q cross.v"
    default_lr = 2e-3
    aliases = {"rank": "r"}

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.r

    def init(self, site: Site, generator: Generator) -> Params:
        a, b = (site.out_features, self.r), (self.r, site.in_features)
        first = {"w1_a": kaiming_uniform(a, generator), "w1_b": kaiming_uniform(b, generator)}
        return {**first, "w2_a": kaiming_uniform(a, generator), "w2_b": zeros(b)}

    def change(self, p: Params, site: Site) -> Tensor:
        return self.scale * (p["w1_a"] @ p["w1_b"]) * (p["w2_a"] @ p["w2_b"])

    def factors(self, p: Params) -> tuple[Tensor, Tensor]:
        """L [out, r²], R [r², in] with L R = ΔW: row-wise and column-wise Khatri–Rao products of the four factors."""
        L = self.scale * p["w1_a"][:, :, None] * p["w2_a"][:, None]
        return L.flatten(1), (p["w1_b"][:, None] * p["w2_b"][None]).flatten(0, 1)

    def low_rank(self, W: Tensor, p: Params, site: Site) -> tuple[Tensor, Tensor] | None:
        thin = self.r**2 * (site.in_features + site.out_features) < site.in_features * site.out_features
        return self.factors(p) if thin else None

    def thin(self, x: Tensor, site: Site) -> bool:
        """Whether the factors of rank r² cost less here than the dense ΔW, counted in multiplications.

        The dense form has two products of rank r, four more of them and the weight's gradient in training.
        """
        thin, dense = self.r**2 * (site.in_features + site.out_features), site.in_features * site.out_features
        if site.kind != "linear":  # a table is built whole either way; one kernel is cheaper than two
            return site.kind == "embedding" and thin < 2 * self.r * dense
        tokens = x.numel() // site.in_features
        if torch.is_grad_enabled():
            return 3 * tokens * thin < (8 * self.r + tokens) * dense
        return tokens * thin < 2 * self.r * dense

    def delta(self, x: Tensor, p: Params, site: Site) -> Tensor:
        if not self.thin(x, site):
            return linear(x, self.change(p, site).to(x.dtype))
        L, R = self.factors(p)
        return linear(linear(x, R.to(x.dtype)), L.to(x.dtype))

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        m = self.rows_kept(call, p, site)
        return self.with_factors(call, x, *self.factors(p), m) if self.thin(x, site) else self.with_dense(call, x, p, site, m)
