"""BitFit: only the bias vectors of the base are trained (2021, arXiv:2106.10199)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from veneer.init import zeros
from veneer.method import Call, Params, SelectionMethod
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class BitFit(SelectionMethod):
    """y = x Wᵀ + b with b trained; norms: y = x̂ ⊙ gain + beta with beta trained; every W and gain stays frozen

    Pick it as the smallest baseline that changes no shape and costs nothing at inference; a learning rate near 1e-3.
    Not for models without biases (Llama and its relatives): there is little or nothing to train.

    Tensors: b [out] of a layer, beta [d] of a norm, copied from the base, so training starts there. Sites without a
    bias get none, unless create=True gives them zeros. A part of the biases is chosen with targets, such as
    "attn.q mlp.up" for query and first feed-forward biases.
    """

    create: bool = option(False, "give layers without a bias one, starting at zero")

    default_lr = 2e-3
    sizes = ()
    default_targets = (
        "attn.q attn.k attn.v attn.o attn.qkv cross.q cross.k cross.v cross.o mlp.up mlp.gate mlp.down "
        "mixer.in mixer.out conv embed.patch norm pooler other"
    )
    kinds = ("linear", "conv", "norm")
    limits = {"embedding": "an embedding table has no bias"}

    def init(self, site: Site, generator: Generator) -> Params:
        return {"beta" if site.kind == "norm" else "b": zeros((site.out_features,))}

    def init_from_weight(self, W: Tensor, b: Tensor | None, p: Params, site: Site, generator: Generator) -> Params:
        if b is not None:
            return {name: b.clone() for name in p}
        return p if self.create and site.kind != "norm" else {}

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        for bias in p.values():  # one at most; the weight is not read
            return call.apply(x, bias=bias)
        return call(x)

    def fold(self, W: Tensor, b: Tensor | None, p: Params, site: Site) -> tuple[Tensor, Tensor | None]:
        return W, next(iter(p.values()), b)
