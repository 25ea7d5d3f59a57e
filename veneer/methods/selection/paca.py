"""PaCA: some input columns of every weight trained, so that backward keeps these inputs alone (2025, arXiv:2503.01905)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from veneer.init import zeros
from veneer.maths.slices import Slices
from veneer.maths.units import drawing
from veneer.method import Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class PaCA(Slices):
    """W_eff[:, I] = s · P, s = alpha / r, W_eff = W elsewhere; y = x Wᵀ + x[..., I] (s · P − W[:, I])ᵀ + b

    Pick it where the memory of activations or the time of a step counts: r numbers a token are kept for backward, however
    wide the input, and no second thin product follows the first. About half of LoRA's count at the same r. The base, in
    16, 32 or 4 bits, is left as it is. Not where inputs are few and outputs many.

    Tensors: P [out, r] = W[:, I] / s: starts as the base; W_I [out, r] = W[:, I], frozen; I [r], fixed, different from
    layer to layer. form="difference": Delta [out, r], zeros, in place of P and W_I: W_eff[:, I] = W[:, I] + s · Delta.

    Args:
        alpha: with Adam, s multiplies the learning rate and does nothing else; the paper's runs have s = 4.
        form: both train the same under Adam, but weight decay draws the columns to zero, or Delta to the base.
        selection: scores of columns: their norm, the mean magnitude of their inputs (batches=… when attaching), both, or the
            norm of their gradients (batches=… with labels, or loss=…).
    """

    r: int = option(8, "number of columns", ge=1)
    alpha: float | None = option(None, "scale numerator; None means r (scale 1)", gt=0)
    form: str = option("columns", "what is trained: the columns, or their difference to the base", choices=("columns", "difference"))

    frozen = ("I", "W_I")
    default_lr = 5e-4
    default_targets = "attn.q attn.k attn.v attn.o attn.qkv cross.q cross.k cross.v cross.o mlp.up mlp.gate mlp.down mixer.in mixer.out"
    aliases = {"rank": "r"}

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.r

    @property
    def reads_weight(self) -> bool:
        return self.form == "columns" or super().reads_weight

    def check(self, site: Site) -> None:
        super().check(site)
        if self.r > site.in_features:
            raise self.refuse(f"r={self.r} is more than the {site.in_features} columns {{at}}; choose r ≤ {site.in_features}.", site)

    def wanted(self, site: Site) -> int:
        return self.r

    def drawn(self, site: Site) -> Tensor:
        # by depth and own name, which a model with another prefix shares, not by whole name
        generator = drawing(self.seed, site.depth, site.name.rpartition(".")[2])
        return torch.randperm(site.in_features, generator=generator, device="cpu")[: self.r]

    def init(self, site: Site, generator: Generator) -> Params:
        V = zeros((site.out_features, self.r))
        own = {"P": V, "W_I": V.clone()} if self.form == "columns" else {"Delta": V}
        return {**own, "I": self.first(site)}

    def init_from_weight(self, W: Tensor, b: Tensor | None, p: Params, site: Site, generator: Generator) -> Params:
        p = super().init_from_weight(W, b, p, site, generator)
        if self.form == "difference":
            return p
        columns = W.index_select(1, p["I"])
        return {**p, "P": columns / self.scale, "W_I": columns}

    def values(self, p: Params) -> Tensor:
        if "Delta" in p:
            return self.scale * p["Delta"]
        return self.scale * (p["P"] - p["W_I"] / self.scale)  # at the start P is that very quotient: exactly zero for any s
