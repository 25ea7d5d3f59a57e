"""LoRA-FA: LoRA whose projection down stays as drawn, so that training keeps r numbers of a token (2023, arXiv:2308.03303)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from veneer.init import kaiming_uniform, zeros
from veneer.maths.units import drawing
from veneer.method import LowRankMethod, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class LoRAFA(LowRankMethod):
    """W_eff = W + s · B A, s = alpha / r, A random and frozen; y = x W_effᵀ + b

    Pick it where activations fill the memory: for the gradient of B only A xᵀ is kept, r numbers a token instead of the whole
    input. Half of LoRA's parameters at the same rank; the change of all layers' inputs stays in r random directions, so take a
    larger rank. Not where LoRA fits into memory anyway.

    Tensors: A [r, in], Kaiming-uniform(√5) from `seed`, not stored; B [out, r], zeros: starts as the base.

    """

    r: int = option(16, "rank of the update", ge=1)
    alpha: float | None = option(None, "scale numerator; None means r", gt=0)
    seed: int = option(0, "seed of the frozen projections", ge=0)

    fixed = ("A",)
    sizes = ("r",)
    default_lr = 2e-3
    default_targets = "attn.q attn.v attn.qkv cross.q cross.v"
    aliases = {"rank": "r", "lora_alpha": "alpha"}

    def init(self, site: Site, generator: Generator) -> Params:
        own = drawing(self.seed, site.depth, site.role)  # names may differ by a prefix
        return {"A": kaiming_uniform((self.r, site.in_features), own), "B": zeros((site.out_features, self.r))}

    def factors(self, p: Params, site: Site | None = None) -> tuple[Tensor, Tensor]:
        return (1.0 if self.alpha is None else self.alpha / self.r) * p["B"], p["A"]
