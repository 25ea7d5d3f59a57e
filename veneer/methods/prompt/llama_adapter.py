"""LLaMA-Adapter: learned tokens in the topmost layers, whose attention is added through gates that start shut (2023, arXiv:2303.16199)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from veneer.init import normal, zeros
from veneer.method import Params, PromptMethod
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class LlamaAdapter(PromptMethod):
    """o = softmax(q Kᵀ / √d_head + mask) V + g ⊙ softmax(q (P W_kᵀ)ᵀ / √d_head) (P W_vᵀ), head by head

    The learned tokens P pass through the layer's own frozen projections; they carry no position, and every token of the text
    sees them. Their softmax is one of its own, so that with g = 0 the model starts as the base. Pick it to teach a decoder to
    follow instructions at little cost and without disturbing it early on, where prefix tuning would. Not where the first layers
    must change, nor where inference must be free.

    Tensors of each of the topmost layers: P [length, D], N(0, 1); g [heads], zeros: the gates learn first.

    Args:
        layers: the paper takes 30 of 32; models with fewer layers take all.
    """

    length: int = option(10, "number of learned tokens a layer", ge=1)
    layers: int = option(30, "how many of the topmost layers have them", ge=1)

    shift_positions = False
    stands_beside = True
    default_lr = 9e-3
    sizes = ("length", "layers")
    default_targets = "attn"
    kinds = ("attention",)
    aliases = {"adapter_len": "length", "adapter_layers": "layers", "K": "length", "L": "layers"}
    limits = {"merge": "its tokens are added to attention; no weight holds them"}

    def views(self, sites: Sequence[Site]) -> list[Site]:
        """Attention modules, told the width that their key projection reads."""
        widths = {s.depth: s.in_features for s in sites if s.role in ("attn.k", "attn.qkv") and s.kind == "linear"}
        return [replace(s, in_features=widths[s.depth]) for s in sites if s.kind == "attention" and s.role == "attn" and s.depth in widths]

    def select(self, sites: Sequence[Site]) -> list[Site]:
        return [s for s in super().select(self.views(sites)) if s.index >= s.length - self.layers]

    def init(self, site: Site, generator: Generator) -> Params:
        return {"P": normal((self.length, site.in_features), generator), "g": zeros((site.heads,))}

    def tokens(self, p: Params, site: Site) -> Tensor:
        return p["P"]

    def beside(self, q: Tensor, keys: Tensor, values: Tensor, p: Params, site: Site) -> Tensor:
        times = q.shape[1] // keys.shape[1]  # query heads that share a key head
        keys, values = (t.repeat_interleave(times, 1).transpose(0, 1) for t in (keys, values))  # [heads, P, d]
        scores = (q @ keys.to(q.dtype).mT).to(torch.promote_types(q.dtype, torch.float32))
        return p["g"].to(q.dtype)[:, None, None] * (scores.softmax(-1).to(q.dtype) @ values.to(q.dtype))
