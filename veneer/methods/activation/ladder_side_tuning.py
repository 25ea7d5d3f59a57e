"""Ladder side-tuning: a narrow network beside the blocks climbs on what they give, and no gradient enters them (2022, arXiv:2206.06522)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from veneer.errors import BadValue
from veneer.init import kaiming_uniform, ones, zeros
from veneer.maths.image_side import on_images
from veneer.maths.passengers import joined, parted
from veneer.method import Call, Method, Params
from veneer.option import option
from veneer.site import Site, choose


@dataclass(frozen=True)
class LadderSideTuning(Method):
    """g_0 = W_in h_0 + b_in; g_i = S_i(μ_i g_{i−1} + (1 − μ_i) (W_down h_i + b_down)), μ_i = σ(alpha_i / T); h_N + W_up LN(g_N) + b_up

    h_i is what block i gives, without gradient: backward runs through the side network alone, and training keeps nothing of
    the base's activations. Pick it where memory in training is what counts. Not where inference must be free. S_i(g) = g +
    W_2 gelu(W_1 LN(g) + b_1) + b_2, token by token, so masks and caches stay the base's own affair; with heads (images only)
    after g + W_o attention(W_q n, W_k n, W_v n), n = LN(g). The authors' are narrow copies of the base's blocks, pruned from it.
    Blocks in leave_out have no rung (the paper's dropped layers). Methods beside it act, but learn in the last block only; in a
    stack, name it last. Between blocks its state travels as further tokens, so hidden states read there are longer.

    Tensors, w the width, every block: W_down [w, D], b_down [w], alpha [1], ln_w, ln_b [w], W_1 [ratio·w, w], b_1, W_2
    [w, ratio·w], b_2; heads: ln_a_w, ln_a_b [w], W_q, W_k, W_v, W_o [w, w]. First block: W_in [w, D], b_in [w]. Last: ln_up_w,
    ln_up_b [w], W_up [D, w], b_up [D], zeros: starts as the base. The others Kaiming-uniform(√5), biases and alpha zeros.

    Args:
        output: "replace" gives W_up LN(g_N) + b_up alone to what follows the blocks; the authors do, but past the base's last norm.
    """

    w: int | None = option(None, "width of the side network; None: D // reduction", ge=1)
    reduction: float = option(8, "D over the width of the side network", ge=1)
    ratio: int = option(4, "width of the side blocks' feed-forward over w", ge=1)
    heads: int = option(0, "heads of self-attention in the side blocks, for images; 0: none", ge=0)
    T: float = option(0.1, "temperature of the gates", gt=0)
    output: str = option("add", "what the side network's output does", choices=("add", "replace"))

    kinds = ("block",)
    sizes = ("w",)
    default_lr = 3e-3
    default_targets = "block"
    aliases = {"task_reduction_factor": "reduction", "reduction_factor": "reduction", "gate_T": "T"}

    @property
    def limits(self) -> Mapping[str, str]:  # type: ignore[override]
        own = {"merge": "it is a network of its own", "weighted": "two side networks would travel behind the same tokens"}
        return own if self.output == "add" else own | {"identity": "the side network alone gives the output"}

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """Every block, also those without a rung: the side's state passes through."""
        asked = self.targets or self.default_targets
        found = choose(sites, asked, kinds=self.kinds, who=self.label, allow_unmatched=self.targets is None)
        if (stacks := sum(s.index == 0 for s in found)) != 1:
            raise BadValue(f"{self.label}: the side network climbs one stack of blocks, and {asked!r} names {stacks} of them.")
        return on_images(found, sites, self.label) if self.heads else found

    def width(self, site: Site) -> int:
        return max(1, int(site.out_features // self.reduction)) if self.w is None else self.w

    def check(self, site: Site) -> None:
        if self.width(site) > site.out_features:
            raise self.refuse(f"w={self.width(site)} is wider than the stream {{at}}; choose w ≤ {site.out_features}.", site)
        if self.heads and self.width(site) % self.heads:
            raise self.refuse(f"heads={self.heads} does not divide the width {self.width(site)} {{at}}; choose another w or heads.", site)

    def init(self, site: Site, generator: Generator) -> Params:
        D, w = site.out_features, self.width(site)
        f, p = self.ratio * w, {}
        shapes = {"W_in": (w, D)} if site.index == 0 else {}
        if site.depth not in self.leave_out:
            shapes |= {"W_down": (w, D), "W_1": (f, w), "W_2": (w, f)}
            shapes |= {f"W_{name}": (w, w) for name in "qkvo"} if self.heads else {}
            p = {"b_down": zeros((w,)), "alpha": zeros((1,)), "b_1": zeros((f,)), "b_2": zeros((w,))}
            for name in ("ln", "ln_a") if self.heads else ("ln",):
                p |= {f"{name}_w": ones((w,)), f"{name}_b": zeros((w,))}
        p |= {"b_in": zeros((w,))} if site.index == 0 else {}
        if site.index + 1 == site.length:
            up = zeros((D, w)) if self.output == "add" else kaiming_uniform((D, w), generator)
            p |= {"W_up": up, "b_up": zeros((D,)), "ln_up_w": ones((w,)), "ln_up_b": zeros((w,))}
        return p | {name: kaiming_uniform(shape, generator) for name, shape in shapes.items()}

    def block(self, g: Tensor, q: Params) -> Tensor:
        """S(g), [B, T, w] → [B, T, w]."""
        if "W_q" in q:
            n = norm(g, q, "ln_a")
            heads = [F.linear(n, q[f"W_{name}"]).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in "qkv"]
            g = g + F.linear(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2), q["W_o"])
        return g + F.linear(F.gelu(F.linear(norm(g, q, "ln"), q["W_1"], q["b_1"])), q["W_2"], q["b_2"])

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        if x.ndim != 3:
            raise self.refuse(f"the block {{at}} reads {x.ndim} axes, not [batch, tokens, width].", site)
        x = x.transpose(0, 1) if site.batch_dim else x
        h, g = (x.detach(), x) if site.index == 0 else parted(x, self.width(site))
        y = call(h.transpose(0, 1)).transpose(0, 1) if site.batch_dim else call(h)
        q = {name: (torch.sigmoid(t / self.T) if name == "alpha" else t).to(x.dtype) for name, t in p.items()}
        if site.index == 0:
            g = F.linear(h, q["W_in"], q["b_in"])
        if "alpha" in q:
            rung = F.linear(y.detach(), q["W_down"], q["b_down"])
            g = self.block(q["alpha"] * g + (1 - q["alpha"]) * rung, q)
        if site.index + 1 < site.length:
            y = joined(y, g)
        else:
            up = F.linear(norm(g, q, "ln_up"), q["W_up"], q["b_up"])
            y = y + up if self.output == "add" else up
        return y.transpose(0, 1) if site.batch_dim else y


def norm(g: Tensor, q: Params, name: str) -> Tensor:
    return F.layer_norm(g, g.shape[-1:], q[f"{name}_w"], q[f"{name}_b"])
