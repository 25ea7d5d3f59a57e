"""RED: one scale and one bias vector edit what leaves every feed-forward network (2024, arXiv:2402.15179)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Generator, Tensor

from veneer.init import ones, zeros
from veneer.method import ActivationMethod, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class RED(ActivationMethod):
    """h′ = l_scaling ⊙ h + l_bias on the feed-forward's output h; merged: W_eff = diag(l_scaling) W, b_eff = l_scaling ⊙ b + l_bias

    Pick it when storage per task must be tiny: 2 d numbers a layer, nothing to choose. Not with a usual learning rate: it
    wants 10 to 100 times LoRA's. Other places by targets: "attn.o", "attn.o mlp.down", "attn.q attn.k attn.v attn.o mlp.down"
    (RED++), and in post-norm blocks "norm.mlp" after the residual. Merged into a layer without bias, it gives it one.

    Tensors: l_scaling [d], ones; l_bias [d], zeros: starts as the base. form="ln" also ln_w [d], ones, and ln_b [d], zeros.
    Norms without a shift (RMSNorm) get no l_bias, so that the change can be merged.
    """

    form: str = option("all", "scale and bias, one of them, or both and a new LayerNorm", choices=("all", "scaling", "bias", "ln"))

    default_lr = 5e-3
    sizes = ()
    default_targets = "mlp.down"
    aliases = {"layer_type": "form"}

    @property
    def limits(self) -> dict[str, str]:  # type: ignore[override]
        normed = {"merge": "a new norm follows the edit", "identity": "a new norm follows the edit"}
        return normed if self.form == "ln" else {}

    def init(self, site: Site, generator: Generator) -> Params:
        d = (site.out_features,)
        p = {} if self.form == "bias" else {"l_scaling": ones(d)}
        p |= {} if self.form == "scaling" else {"l_bias": zeros(d)}
        return {**p, "ln_w": ones(d), "ln_b": zeros(d)} if self.form == "ln" else p

    def init_from_weight(self, W: Tensor, b: Tensor | None, p: Params, site: Site, generator: Generator) -> Params:
        return {k: t for k, t in p.items() if k != "l_bias"} if site.kind == "norm" and b is None and self.form != "ln" else p

    def activation(self, h: Tensor, p: Params, site: Site) -> Tensor:
        y = p["l_scaling"] * h if "l_scaling" in p else h
        y = y + p["l_bias"] if "l_bias" in p else y
        return F.layer_norm(y, y.shape[-1:], p["ln_w"], p["ln_b"]) if self.form == "ln" else y

    def fold(self, W: Tensor, b: Tensor | None, p: Params, site: Site) -> tuple[Tensor, Tensor | None]:
        l, shift = p.get("l_scaling"), p.get("l_bias")
        if self.form == "ln":
            return super().fold(W, b, p, site)
        if l is not None:
            W, b = l.reshape(-1, *(1,) * (W.ndim - 1)) * W, None if b is None else l * b
        if shift is None:
            return W, b
        if site.kind == "embedding":  # a table has no bias, but every row is a whole output
            return W + shift[:, None], b
        return W, shift if b is None else b + shift
