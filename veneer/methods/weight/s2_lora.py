"""S2-LoRA: one pair of low-rank factors for all layers of a shape, and sparse coefficients for each (2023, arXiv:2309.11756)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Generator, Tensor
from torch.nn.functional import normalize

from veneer.errors import BadValue
from veneer.init import kaiming_uniform, normal, zeros
from veneer.method import LowRankMethod, Params
from veneer.option import option
from veneer.site import Site
from veneer.strategies.sparsity import Sparsity
from veneer.strategy import Strategy


@dataclass(frozen=True)
class S2LoRA(LowRankMethod):
    """W_eff = W + c · B diag(s) A, c = alpha / r; loss = task loss + lam · Σ over layers of ‖s‖₁

    Pick it for little data and very few numbers per layer: every layer draws its change from the same r rank-one
    matrices. Not where layers need changes of their own. A and B get the summed gradient of all layers: choose a smaller
    learning rate than LoRA's. The L1 term is on s alone, and A and B could grow to make up for it: unit=True or weight
    decay (which spares s, a vector) prevents that.

    Tensors, one pair per group: A [r, in], B [out, r], N(0, 0.02²); of each layer s [r], zeros: starts as the base.

    Args:
        lam: gradient of the L1 term by each |s|: a weight of the mean of all |s| divided by their number. Adam rarely
            gives exact zeros with it; prox does.
        prox: threshold of a proximal step, learning rate · lam, taken in place of the L1 term.
        groups: "shape": one pair for every [out, in] there is; "all": one pair, all layers must have the same shape.
        unit: rows of A and columns of B count at unit length, so that |s| is the size of its rank-one change.
    """

    r: int = option(32, "number of shared rank-one changes", ge=1)
    alpha: float | None = option(None, "scale numerator; None means r (scale 1)", gt=0)
    lam: float = option(1e-6, "weight of the L1 term on s; 0: none", ge=0)
    prox: float = option(0.0, "taken off every |s| after each step instead of the L1 term; 0: the term", ge=0)
    tau: float = option(0.0, "after training |s| up to this becomes 0", ge=0)
    dropout: float = option(0.0, "dropout on the input of A, in training", ge=0, lt=1)
    groups: str = option("shape", "which layers share A and B", choices=("shape", "all"))
    start: str = option("gaussian", "first values of A and B", choices=("gaussian", "kaiming"))
    unit: bool = option(False, "hold rows of A and columns of B at unit length")

    default_lr = 5e-4
    default_targets = "attn.q attn.k attn.v attn.o attn.qkv cross.q cross.k cross.v cross.o"
    aliases = {"rank": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "lambda": "lam", "init": "start"}

    def tie(self, site: Site) -> str | None:
        return "all" if self.groups == "all" else f"{site.out_features}x{site.in_features}"

    def init(self, site: Site, generator: Generator) -> Params:
        return {"s": zeros((self.r,))}

    def init_shared(self, sites: Sequence[Site], generator: Generator) -> Params:
        first, shape = sites[0], (sites[0].out_features, sites[0].in_features)
        for site in sites:
            if (site.out_features, site.in_features) != shape:
                there = f"{first.name} is {list(shape)} and {site.name} is [{site.out_features}, {site.in_features}]"
                raise BadValue(f"S2LoRA: {there}, and groups='all' shares one pair; choose groups='shape' or other targets.")
        A, B = (self.r, shape[1]), (shape[0], self.r)
        if self.start == "kaiming":
            return {"A": kaiming_uniform(A, generator), "B": kaiming_uniform(B, generator)}
        return {"A": normal(A, generator, 0.02), "B": normal(B, generator, 0.02)}

    def factors(self, p: Params, site: Site | None = None) -> tuple[Tensor, Tensor]:
        A, B = (normalize(p["A"], dim=1), normalize(p["B"], dim=0)) if self.unit else (p["A"], p["B"])
        return B * (p["s"] if self.alpha is None else self.alpha / self.r * p["s"]), A

    def strategy(self) -> Strategy | None:
        return Sparsity(self.lam, self.prox, self.tau) if self.lam or self.prox or self.tau else None
