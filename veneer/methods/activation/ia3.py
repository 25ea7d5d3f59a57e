"""IA3: keys, values and the feed-forward's inner activation are rescaled by trained vectors (2022, arXiv:2205.05638)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from veneer.init import ones
from veneer.kernels.scale_rotate import scale
from veneer.method import ActivationMethod, Call, Params
from veneer.option import option
from veneer.site import Site, matches, tokens_of


@dataclass(frozen=True)
class IA3(ActivationMethod):
    """K′ = l_k ⊙ K, V′ = l_v ⊙ V on outputs; y = W_down (l_ff ⊙ h) on the input of the feed-forward's last projection

    Pick it for few labelled examples, tiny storage per task and batches that mix tasks. Not when the task needs new
    features: it can only rescale what is there.

    Tensors, one vector a site, ones, so training starts from the base: l_k [keys], l_v [values], l_ff [in] on the
    input side, l [out] at any other role. Merged: output side diag(l) W and l ⊙ b; input side W diag(l_ff).

    Args:
        feedforward: the roles or modules whose input is rescaled; all other targets have their output rescaled.
    """

    feedforward: str = option("mlp.down expert.down", "targets rescaled on their input side")

    widens = True
    default_lr = 1e-2
    sizes = ()
    default_targets = "attn.k attn.v cross.k cross.v mlp.down expert.down"
    kinds = ("linear", "conv", "embedding", "norm", "parameter")
    aliases = {"feedforward_modules": "feedforward", "target_modules": "targets"}

    def input_side(self, site: Site) -> bool:
        return any(matches(token, site) for token in tokens_of(self.feedforward))

    def name(self, site: Site) -> str:
        if self.input_side(site):
            return "l_ff"
        return {"k": "l_k", "v": "l_v"}.get(site.role.rsplit(".", 1)[-1], "l")

    def check(self, site: Site) -> None:
        if self.input_side(site) and site.kind not in ("linear", "parameter"):
            raise self.refuse(f"the input side of the {site.kind} {{at}} cannot be rescaled; take it out of feedforward=….", site)

    def init(self, site: Site, generator: Generator) -> Params:
        return {self.name(site): ones((site.in_features if self.input_side(site) else site.out_features,))}

    def activation(self, h: Tensor, p: Params, site: Site) -> Tensor:
        return scale(h, p[self.name(site)])

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        return call(self.activation(x, p, site)) if self.input_side(site) else super().forward(call, x, p, site)

    def fold(self, W: Tensor, b: Tensor | None, p: Params, site: Site) -> tuple[Tensor, Tensor | None]:
        l = p[self.name(site)]
        if self.input_side(site):
            return W * l, b
        return l.reshape(-1, *(1,) * (W.ndim - 1)) * W, None if b is None else l * b
