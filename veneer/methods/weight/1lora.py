"""1LoRA: the sum of a layer's inputs times one trained vector (2025, arXiv:2503.08333)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Generator, Tensor

from veneer.init import normal, zeros
from veneer.method import LowRankMethod, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class OneLoRA(LowRankMethod):
    """W_eff = W + b 1ᵀ; y = x W_effᵀ + bias + b · Σ_i x_i (compression="random": W + b aᵀ)

    Pick it for the smallest budgets and the least memory, spread over all linear layers: as many numbers as biases have,
    but the change depends on the input, and one number a token is all that is kept for backward. The paper gains a little
    more with trained norms beside it ("1lora + ln-tuning"). Not behind a norm without gain and bias, whose outputs sum to
    zero: there it learns nothing. The sum grows with the width and is not divided by it, so learning rates that suit
    LoRA may be too high.

    Tensors: b [out], zeros: starts as the base. With compression="random" a fixed a [width of the widest layer], N(0, 1),
    of which every layer reads the first `in` numbers.
    """

    compression: str = option("sum", "what inputs are compressed by: their sum, or a fixed random vector", choices=("sum", "random"))
    seed: int = option(0, "of the random vector", ge=0)

    sizes = ()
    fixed = ("a",)
    default_targets = (
        "attn.q attn.k attn.v attn.o attn.qkv cross.q cross.k cross.v cross.o mlp.up mlp.gate mlp.down "
        "expert.up expert.gate expert.down mixer.in mixer.out"
    )
    default_lr = 1e-4

    def init(self, site: Site, generator: Generator) -> Params:
        return {"b": zeros((site.out_features,))}

    def init_shared(self, sites: Sequence[Site], generator: Generator) -> Params:
        if self.compression == "sum":
            return {}
        return {"a": normal((max(s.in_features for s in sites),), Generator().manual_seed(self.seed))}

    def factors(self, p: Params, site: Site | None = None) -> tuple[Tensor, Tensor]:
        b = p["b"][:, None]
        if "a" in p:
            return b, p["a"][None, : None if site is None else site.in_features]
        assert site is not None, "the number of ones is the site's"
        return b, b.new_ones(1, site.in_features)  # not trained: x is not kept, only its sums
