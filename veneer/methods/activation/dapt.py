"""DAPT: bottlenecks scaled token by token beside every feed-forward, whose mean becomes a new prompt token (2024, arXiv:2403.01439)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from veneer.errors import BadValue
from veneer.init import kaiming_uniform, normal, ones, zeros
from veneer.kernels.scale_rotate import scale
from veneer.maths.image_side import on_images
from veneer.maths.told import Told
from veneer.maths.whole_stack import first_of_one
from veneer.method import Call, Method, Params
from veneer.option import option
from veneer.site import Site, choose

BESIDE = Told()
"""What the adapter of the block that runs now gave."""


@dataclass(frozen=True)
class DAPT(Method):
    """y = x + MLP(u) + D(u), D(u) = ReLU(v W_sᵀ + b_s) ⊙ (GELU(v W_dᵀ + b_d) W_uᵀ + b_u), v = LN(u);  [cls ; T(mean GELU(D(u))) ; rest]

    u is what the feed-forward reads. Every block leaves its prompt behind the class token, so the sequence grows by one. T(h) =
    gamma ⊙ h + beta, and the same follows the tokeniser's last layer, both norms, every projection of a block and the last norm.
    Pick it for point clouds on frozen transformers, with some 5 % of the parameters and two thirds of full training's memory. Not
    where inference must be free. The authors also train the class token: "dapt + full(targets='cls_token cls_position')".

    Tensors: at each feed-forward ln_w, ln_b [D], ones, zeros; W_s [1, D], W_d [r, D], Kaiming-uniform(√5); b_s [1], b_d [r],
    W_u [D, r], b_u [D], zeros. At blocks (the prompt's) and layers gamma, beta [out], N(1, 0.02²), N(0, 0.02²).

    Args:
        exact_start: prompts are zeros then, but still take attention.
        keep: leave them in the last block's output, for heads that read them; such rows share no batch with rows of the base.
    """

    r: int = option(64, "width of the bottleneck; 72 on ModelNet40", ge=1)
    dropout: float = option(0.0, "dropout after GELU, in training; 0.2 and 0.5 on ScanObjectNN", ge=0, lt=1)
    exact_start: bool = option(False, "start the scales and shifts at one and zero")
    keep: bool = option(False, "leave the prompts in the last block's output")

    kinds = ("block", "branch", "linear", "norm", "conv")
    sizes = ("r",)
    default_lr = 2e-3
    default_targets = "block mlp embed.patch norm.attn attn.q attn.k attn.v attn.qkv attn.o norm.mlp mlp.up mlp.down norm.final"
    limits = {
        "identity": "extra tokens change attention from the start",
        "merge": "it is nonlinear, and prompts differ from cloud to cloud",
        "weighted": "prompts of two adapters lengthen the same tokens",
    }

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """Every block, also one left out, as prompts pass through; of the tokeniser the last layer."""
        asked = self.targets or self.default_targets
        found = choose(sites, asked, kinds=self.kinds, who=self.label, allow_unmatched=self.targets is None)
        if any(s.kind == "block" for s in found):
            found = on_images(found, sites, self.label)
            first_of_one(found, self.label)
            if not any(s.kind == "branch" for s in found):
                raise BadValue(f"{self.label}: prompts come from adapters beside feed-forwards; choose targets='block mlp', or no blocks.")
        last = next((s for s in reversed(found) if s.role == "embed.patch"), None)
        found = [s for s in found if s.role != "embed.patch" or s is last]
        return [s for s in found if s.kind == "block" or s.depth is None or s.depth not in self.leave_out]

    def check(self, site: Site) -> None:
        if site.batch_dim:
            raise self.refuse("its tokens must come as [batch, tokens, width] {at}, not tokens first.", site)

    def makes(self, site: Site, index: int) -> bool:
        """Whether the block at this index of the site's stack makes a prompt that is read."""
        first = (site.depth or 0) - site.index
        return first + index not in self.leave_out and (self.keep or index + 1 < site.length)

    def init(self, site: Site, generator: Generator) -> Params:
        D, r = site.out_features, self.r
        if site.kind == "branch":
            down = {"W_s": kaiming_uniform((1, D), generator), "W_d": kaiming_uniform((r, D), generator)}
            flat = {"b_s": zeros((1,)), "b_d": zeros((r,)), "W_u": zeros((D, r)), "b_u": zeros((D,))}
            return {"ln_w": ones((D,)), "ln_b": zeros((D,)), **down, **flat}
        if site.kind == "block" and not self.makes(site, site.index):
            return {}
        std = 0.0 if self.exact_start else 0.02
        return {"gamma": normal((D,), generator, std, 1.0), "beta": normal((D,), generator, std)}

    def adapter(self, u: Tensor, p: Params, training: bool = False) -> tuple[Tensor, Tensor]:
        """D(u) [..., D] and its scale [..., 1] for the tokens u."""
        q = {name: t.to(u.dtype) for name, t in p.items()}
        v = F.layer_norm(u, u.shape[-1:], q["ln_w"], q["ln_b"])
        s = F.relu(F.linear(v, q["W_s"], q["b_s"]))
        inner = F.dropout(F.gelu(F.linear(v, q["W_d"], q["b_d"])), self.dropout, training)
        return s * F.linear(inner, q["W_u"], q["b_u"]), s

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        if site.kind == "branch":
            a, _ = self.adapter(x, p, call.training)
            BESIDE.tell(a)
            return call(x) + a
        if site.kind == "block":
            return self.prompted(call, x, p, site)
        h = call(x)
        if site.kind == "conv":  # channels are axis 1 there
            return scale(h.movedim(1, -1), p["gamma"], p["beta"]).movedim(-1, 1)
        return scale(h, p["gamma"], p["beta"])

    def prompted(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        """The block's tokens with its own prompt behind the first; without all prompts behind the last block, unless they are kept."""
        y, a = BESIDE.listen(call, x)
        if p and a is not None:
            prompt = scale(F.gelu(a).mean(1, keepdim=True), p["gamma"], p["beta"])
            y = torch.cat([y[:, :1], prompt.to(y.dtype), y[:, 1:]], 1)
        if site.index + 1 == site.length and not self.keep:
            made = sum(self.makes(site, i) for i in range(site.index))
            y = torch.cat([y[:, :1], y[:, 1 + made :]], 1)
        return y
