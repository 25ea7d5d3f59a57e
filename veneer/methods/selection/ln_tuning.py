"""LN-tuning: only gain and shift of the normalisation layers are trained (2022, arXiv:2211.08682)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from veneer.init import ones, zeros
from veneer.method import KEEP, Call, Params, SelectionMethod
from veneer.site import Site


@dataclass(frozen=True)
class LNTuning(SelectionMethod):
    """y = x̂ ⊙ gamma + beta with gamma and beta trained, x̂ the normalised input; everything else stays frozen

    Pick it for shifts in feature statistics (a new domain or modality) and little data, at some 0.03 % of the
    parameters and no cost at inference. Not when the task needs new features in the feed-forward layers.

    Tensors: gamma [d], beta [d] (LayerNorm; RMSNorm has gamma only), copied from the base, so training starts there.
    A part of the norms is chosen with targets, such as "norm.attn".
    """

    default_lr = 3e-3
    sizes = ()
    default_targets = "norm"
    kinds = ("norm",)

    def init(self, site: Site, generator: Generator) -> Params:
        return {"gamma": ones((site.out_features,)), "beta": zeros((site.out_features,))}

    def init_from_weight(self, W: Tensor, b: Tensor | None, p: Params, site: Site, generator: Generator) -> Params:
        return {"gamma": W.clone()} if b is None else {"gamma": W.clone(), "beta": b.clone()}

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        return call.apply(x, weight=p["gamma"], bias=p.get("beta", KEEP))

    def fold(self, W: Tensor, b: Tensor | None, p: Params, site: Site) -> tuple[Tensor, Tensor | None]:
        return p["gamma"], p.get("beta", b)
