"""DoRA: a trained length for every row of the weight, and a low-rank change of its direction (2024, arXiv:2402.09353)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import dropout, linear

from veneer.init import kaiming_uniform, normal, zeros
from veneer.method import Call, Params, WeightMethod
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class DoRA(WeightMethod):
    """W_eff = diag(m / n) · V, V = W + s · B A, n = ‖rows of V‖; y = x W_effᵀ + b

    Pick it where LoRA's quality at low rank is not enough: half the rank often does. It costs a row norm per step and
    one more saved [tokens, out] tensor than LoRA. Not for the tightest memory.

    Tensors: A [r, in], Kaiming-uniform(√5); B [out, r], zeros; m [out], the row norms of W: starts as the base.
    Embedding tables [vocabulary, dim]: A zeros, B N(0, 1), m [dim]. A row of zeros keeps m / n = 1.

    Args:
        exact_norm: differentiate n too. By default it counts as a constant, as in the paper: less memory, same quality.
        magnitude_only: no A and B: W_eff = diag(m / ‖W‖) W.
    """

    r: int = option(8, "rank of the change of direction", ge=1)
    alpha: float | None = option(None, "scale numerator, s = alpha / r; None means r", gt=0)
    dropout: float = option(0.0, "dropout on what the change reads, in training", ge=0, lt=1)
    rslora: bool = option(False, "scale by alpha/√r instead of alpha/r")
    exact_norm: bool = option(False, "let gradients through the row norms")
    magnitude_only: bool = option(False, "train the row lengths alone")

    default_targets = "attn.q attn.v attn.qkv cross.q cross.v"
    aliases = {"rank": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora"}

    @property
    def limits(self) -> Mapping[str, str]:  # type: ignore[override]
        return {} if self.exact_norm else {"gradients": "row norms count as constants, as in the paper, unless exact_norm=True"}

    @property
    def scale(self) -> float:
        return (self.r if self.alpha is None else self.alpha) / (self.r**0.5 if self.rslora else self.r)

    def init(self, site: Site, generator: Generator) -> Params:
        m = {"m": zeros((site.out_features,))}
        if self.magnitude_only:
            return m
        A, B = (self.r, site.in_features), (site.out_features, self.r)
        if site.kind == "embedding":
            return {"A": zeros(A), "B": normal(B, generator), **m}
        return {"A": kaiming_uniform(A, generator), "B": zeros(B), **m}

    def init_from_weight(self, W: Tensor, b: Tensor | None, p: Params, site: Site, generator: Generator) -> Params:
        return {**p, "m": self.row_norm(W, {})}

    def row_norm(self, W: Tensor, p: Params) -> Tensor:
        """n [out] from Gram matrices: ‖w + s·bA‖² = ‖w‖² + 2s·b·(A wᵀ) + s²·b (A Aᵀ) bᵀ, without forming B A."""
        W = W.flatten(1)
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        square = torch.linalg.vector_norm(W, dim=1) ** 2
        if "A" in p:
            A, B = p["A"].to(W.dtype), self.scale * p["B"].to(W.dtype)
            square = (square + 2 * (B * (W @ A.T)).sum(1) + ((B @ (A @ A.T)) * B).sum(1)).clamp_min(0)
        return torch.where(square > 0, square, 1).sqrt() * (square > 0)  # the root of 0 has no gradient

    def gain(self, W: Tensor, p: Params) -> Tensor:
        """m / n [out]; 1 for rows of zeros."""
        with torch.set_grad_enabled(self.exact_norm and torch.is_grad_enabled()):
            n = self.row_norm(W, p)
        return torch.where(n > 0, p["m"] / torch.where(n > 0, n, 1), 1)

    def weight(self, W: Tensor, p: Params, site: Site | None = None) -> Tensor:
        V = W if self.magnitude_only else W + (self.scale * p["B"] @ p["A"]).reshape(W.shape)
        return self.gain(W, p).reshape(-1, *(1,) * (W.ndim - 1)) * V

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        c, b = self.gain(call.weight(), p), call.bias()
        drops = bool(self.dropout) and call.training and x.is_floating_point()
        if site.kind == "linear" and not drops and not self.magnitude_only:
            return call.gain_low_rank(x, self.scale * p["B"], p["A"], c)
        wide = (-1, *(1,) * len(site.kernel))  # channels are axis 1 of a convolution's output, the last axis elsewhere
        c, rest = c.reshape(wide), None if b is None else (b * (1 - c)).reshape(wide)  # the bias is not rescaled
        if not drops or self.magnitude_only:
            h = c * (call(x) if self.magnitude_only else call.add_low_rank(x, self.scale * p["B"], p["A"]))
            return h if rest is None else h + rest
        L, R = self.scale * p["B"], p["A"]
        z = dropout(x, self.dropout)  # the frozen term reads x, everything else what dropout left of it
        h = call.apply(z, bias=None)
        t = call.add_low_rank(z, L, R) - call(z) if site.kernel else linear(linear(z, R.to(z.dtype)), L.to(z.dtype))
        return call(x) + (c - 1) * h + c * t
