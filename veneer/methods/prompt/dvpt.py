"""DVPT: prompts attend to the image through a gated bottleneck beside every feed-forward (2023, arXiv:2307.09787)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.nn.init import trunc_normal_

from veneer.errors import BadValue, Unsupported
from veneer.init import kaiming_uniform, normal, zeros
from veneer.maths.image_side import on_images
from veneer.maths.patches import attention, led, quick_gelu
from veneer.maths.residual_stream import from_stream
from veneer.method import Call, Method, Params
from veneer.option import option
from veneer.site import Site, choose

TOKENS = ("canonical", "port", "vit")  # forms whose prompts are tokens


@dataclass(frozen=True)
class DVPT(Method):
    """y = x + MLP(LN x) + g · ([softmax(Z_p Z_tᵀ / √r) Z_t ; Z_t] W_uᵀ + b_u),  [Z_p ; Z_t] = Z = QuickGELU(x W_dᵀ + b_d)

    x [L prompts ; class token ; patches] is the stream that enters the feed-forward's norm; the L prompts P0 + P_pos enter
    before the first block and are dropped after the last. Pick it for vision transformers on images far from their
    training (medical ones) at half a percent of the parameters. Not where inference must be free. In windowed models
    only "swin" fits, each window an image of its own.

    Tensors: P0, P_pos [L, D], N(0, 1) and N(0, 1/D). For every `share` consecutive blocks W_d [r, D], b_d [r], W_u [D, r],
    b_u [D], uniform in ±1/√fan_in; g [1], 0, so each module starts at nothing. "segformer", "swin": P [L, D] at each
    block's attention, truncated N(0, 0.02²), in place of P0 and P_pos; "segformer" also g2 [1], 0.

    Args:
        form: "canonical" as above. As released: "vit", prompts are tokens like others, Z W_uᵀ for all of them; "segformer"
            and "swin", no tokens: P̂ = softmax(P hᵀ / √D) h is added to the first L tokens after attention, h the stream
            there and P̂ times g2, or h attention's output and P̂ as it is. "port": canonical with Z = QuickGELU(x) W_dᵀ + b_d,
            scores over √D, no key for the class token. Only "segformer" starts from the base.
    """

    form: str = option("canonical", "what the prompts are", choices=("canonical", "port", "vit", "segformer", "swin"))
    L: int = option(50, "number of prompts; 10 in the authors' segformer and swin", ge=1)
    r: int = option(20, "width of the bottleneck; 10 in the authors' segformer and swin", ge=1)
    share: int = option(3, "consecutive blocks that share one module; 2 in the authors' segformer", ge=1)

    kinds = ("block", "branch")
    sizes = ("r", "L")
    default_targets = "block mlp"
    aliases = {"num_prompts": "L", "latent_dim": "r", "share_layers": "share"}

    @property
    def limits(self) -> dict[str, str]:  # type: ignore[override]
        found = {"merge": "it is nonlinear, and prompts differ from image to image"}
        if self.form in TOKENS:
            found["weighted"] = "prompts of two adapters lengthen the same tokens"
        if self.form != "segformer":
            found["identity"] = "extra tokens change attention from the start" if self.form in TOKENS else "its prompts have no gate"
        return found

    def select(self, sites: Sequence[Site]) -> list[Site]:
        tokens = self.form in TOKENS
        asked = self.targets or ("block mlp" if tokens else "attn mlp")
        found = on_images(choose(sites, asked, kinds=self.kinds, who=self.label, allow_unmatched=self.targets is None), sites, self.label)
        blocks = [s for s in found if s.kind == "block" and tokens]  # every one: prompts of some rows of a batch only pass through all
        if tokens and (stacks := sum(s.index == 0 for s in blocks)) != 1:
            way = "form='swin' or 'segformer'" if stacks else "targets='block mlp'"
            raise BadValue(f"{self.label}: prompt tokens need one stack of blocks to pass, and {asked!r} names {stacks}; choose {way}.")
        kept = [s for s in found if s.kind == "branch" and s.depth not in self.leave_out]
        return [*blocks, *from_stream(kept, sites)]

    def tie(self, site: Site) -> str | None:
        assert site.depth is not None
        if site.kind == "block":
            return f"tokens{site.depth - site.index}"
        return f"attn{site.depth}" if site.role == "attn" else f"mlp{site.depth - site.index % self.share}"

    def init_shared(self, sites: Sequence[Site], generator: Generator) -> Params:
        site, D, r = sites[0], sites[0].out_features, self.r
        if site.kind == "block":
            return {"P0": normal((self.L, D), generator), "P_pos": normal((self.L, D), generator, D**-0.5)}
        if site.role == "attn":
            gate = {"g2": zeros((1,))} if self.form == "segformer" else {}
            return {"P": trunc_normal_(zeros((self.L, D)), 0.0, 0.02, -2.0, 2.0, generator), **gate}
        down = {"W_d": kaiming_uniform((r, D), generator), "b_d": kaiming_uniform((r,), generator, D)}
        return {**down, "W_u": kaiming_uniform((D, r), generator), "b_u": kaiming_uniform((D,), generator, r), "g": zeros((1,))}

    def delta(self, x: Tensor, p: Params) -> Tensor:
        """What is added beside the feed-forward, for the stream x [..., tokens, D]."""
        q = {k: t.to(x.dtype) for k, t in p.items()}
        port = self.form == "port"
        Z = F.linear(quick_gelu(x), q["W_d"], q["b_d"]) if port else quick_gelu(F.linear(x, q["W_d"], q["b_d"]))
        if self.form in ("canonical", "port"):
            if Z.shape[-2] <= self.L:
                raise Unsupported(f"{self.label}: {Z.shape[-2]} tokens hold no L={self.L} prompts: {self.limits['weighted']}.")
            Z_p, Z_t = Z[..., : self.L, :], Z[..., self.L :, :]
            keys = Z_t[..., 1:, :] if port else Z_t
            Z = torch.cat([attention(Z_p, keys, x.shape[-1] if port else self.r) @ keys, Z_t], -2)
        return F.linear(Z, (p["g"] * p["W_u"]).to(x.dtype), (p["g"] * p["b_u"]).to(x.dtype))

    def prompted(self, o: Tensor, x: Tensor, p: Params, site: Site) -> Tensor:
        """Attention's output o with the image's prompts on its first L tokens; x the stream before attention."""
        if o.shape[-2] < self.L:
            raise self.refuse(f"L={self.L} prompts do not fit on the {o.shape[-2]} tokens {{at}}; choose L ≤ {o.shape[-2]}.", site)
        if self.form == "segformer" and o.shape != x.shape:
            raise self.refuse("attention {at} sees windows, not the image; choose form='swin', where each window is one.", site)
        h = o if self.form == "swin" else x + o
        P = attention(p["P"].to(h.dtype), h, h.shape[-1]) @ h
        return torch.cat([o[..., : self.L, :] + p["g2"].to(h.dtype) * P if "g2" in p else o[..., : self.L, :] + P, o[..., self.L :, :]], -2)

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        if site.kind == "block":
            return led(call, x, p["P0"] + p["P_pos"], site)
        o, axis = call(x), 1 - site.batch_dim
        if site.role == "attn":
            return self.prompted(o.movedim(axis, -2), x.movedim(axis, -2), p, site).movedim(-2, axis)
        return o + self.delta(x.movedim(axis, -2), p).movedim(-2, axis)
