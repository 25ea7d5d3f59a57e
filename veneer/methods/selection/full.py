"""Full fine-tuning: every weight and bias of the base is trained, as a copy (no paper: the upper end of every comparison)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from veneer.init import zeros
from veneer.method import KEEP, Call, Params, SelectionMethod
from veneer.site import Site


@dataclass(frozen=True)
class Full(SelectionMethod):
    """y = x weightᵀ + bias with weight and bias trained

    Pick it as the upper end of a comparison, or when memory and storage do not matter. Not to save either: it holds a
    second copy of everything it trains, so that the base can be switched back.

    Tensors: weight [out, in] (tables [dim, vocabulary], convolutions [out, in/groups · kernel], norms [d]),
    bias [out] where there is one; copied from the base, so training starts there. A matrix that embedding and head
    share is trained as two.
    """

    default_lr = 2e-5
    sizes = ()
    default_targets = ".*"

    def init(self, site: Site, generator: Generator) -> Params:
        shape = (site.out_features,) if site.kind == "norm" else (site.out_features, site.in_features)
        return {"weight": zeros(shape), "bias": zeros((site.out_features,))}

    def init_from_weight(self, W: Tensor, b: Tensor | None, p: Params, site: Site, generator: Generator) -> Params:
        own = {"weight": W.flatten(1).clone() if W.ndim > 1 else W.clone()}
        return own if b is None else {**own, "bias": b.clone()}

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        weight = p["weight"].reshape(call.weight().shape) if site.kind == "conv" else p["weight"]
        return call.apply(x, weight=weight, bias=p.get("bias", KEEP))

    def fold(self, W: Tensor, b: Tensor | None, p: Params, site: Site) -> tuple[Tensor, Tensor | None]:
        return p["weight"].reshape(W.shape), p.get("bias", b)
