"""SSF: every channel of a layer's output is scaled and shifted by trained vectors (2022, arXiv:2210.08823)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from veneer.init import normal, ones, zeros
from veneer.kernels.scale_rotate import scale
from veneer.method import ActivationMethod, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class SSF(ActivationMethod):
    """y = gamma ⊙ h + beta for the output h of a layer; merged: W_eff = diag(gamma) W, b_eff = gamma ⊙ b + beta

    Pick it when inference must cost nothing and some hundred to some thousand examples are there. Not when training
    memory is tight: it acts after every layer and norm, and each output is kept for the gradient of gamma.

    Tensors: gamma [out], beta [out]. Ones and zeros, the exact start; with exact_start=False N(1, 0.02²) and
    N(0, 0.02²), as released: near the base, not equal to it. Norms without a shift (RMSNorm) get gamma only, so that
    the change can be merged.
    """

    exact_start: bool = option(True, "start equal to the base; False draws the released N(1, 0.02²), N(0, 0.02²)")

    widens = True
    default_lr = 1e-2
    sizes = ()
    default_targets = (
        "embed.patch attn.q attn.k attn.v attn.o attn.qkv cross.q cross.k cross.v cross.o mlp.up mlp.gate mlp.down "
        "norm.attn norm.cross norm.mlp norm.embed norm.final norm.other"
    )

    @property
    def limits(self) -> dict[str, str]:  # type: ignore[override]
        return {} if self.exact_start else {"identity": "the released start is random around the base"}

    def init(self, site: Site, generator: Generator) -> Params:
        shape = (site.out_features,)
        if self.exact_start:
            return {"gamma": ones(shape), "beta": zeros(shape)}
        return {"gamma": normal(shape, generator, 0.02, 1.0), "beta": normal(shape, generator, 0.02)}

    def init_from_weight(self, W: Tensor, b: Tensor | None, p: Params, site: Site, generator: Generator) -> Params:
        return {"gamma": p["gamma"]} if site.kind == "norm" and b is None else p

    def activation(self, h: Tensor, p: Params, site: Site) -> Tensor:
        return scale(h, p["gamma"], p.get("beta"))

    def fold(self, W: Tensor, b: Tensor | None, p: Params, site: Site) -> tuple[Tensor, Tensor | None]:
        gamma, beta = p["gamma"], p.get("beta")
        W = gamma.reshape(-1, *(1,) * (W.ndim - 1)) * W
        if beta is None:
            return W, None if b is None else gamma * b
        if site.kind == "embedding":  # a table has no bias, but every row is a whole output
            return W + beta[:, None], b
        return W, beta if b is None else gamma * b + beta
