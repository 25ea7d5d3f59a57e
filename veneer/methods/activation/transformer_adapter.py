"""Transformer adapter: a narrow transformer after a block, sub-layer or norm, its output added (2025, arXiv:2506.21298)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Generator, Tensor

from veneer.errors import BadValue
from veneer.init import kaiming_uniform, ones, zeros
from veneer.maths.factor import nearest_divisors
from veneer.maths.looking_back import decoding
from veneer.method import Call, Method, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class TransformerAdapter(Method):
    """y ← y + up_w h + up_b, from h = down_w y + down_b, then `blocks` times h ← h + MHA(LN h), h ← h + FFN(LN h)

    FFN(z) = ffn_2 GELU(ffn_1 z), `ratio`·m channels between the two. Pick it where what comes later depends on what came long
    before (form and motifs in music). Not where inference must be free, nor where a bottleneck of single places suffices.
    Padding is looked at like any token. In decoders say causal=True, and generate with use_cache=False: tokens that are not
    handed in again are not seen.

    Tensors, D channels, width m: down_w [m, D], up_w [D, m], zeros: starts as the base; for each of n = `blocks`: qkv_w
    [n, 3m, m], o_w [n, m, m], ffn_1_w [n, ratio·m, m], ffn_2_w [n, m, ratio·m]; all but up_w Kaiming-uniform(√5). Biases
    down_b [m], up_b [D], qkv_b [n, 3m], o_b [n, m], ffn_1_b [n, ratio·m], ffn_2_b [n, m], zeros. Norms ln_1_w, ln_1_b, ln_2_w,
    ln_2_b [n, m], ones and zeros.

    Args:
        m: None means D // reduction.
        dims: at blocks, sub-layers and norms 0 means tokens, channels last; 1, 2, 3: maps with channels at axis 1 and so many axes
            behind, whose places are the tokens. Convolutions have their own.
    """

    m: int | None = option(None, "width of the small transformer; None: D // reduction", ge=1)
    reduction: int = option(8, "channels over the width of the small transformer", ge=1)
    heads: int = option(4, "attention heads; they divide m", ge=1)
    blocks: int = option(1, "attention and feed-forward, so many times", ge=1)
    ratio: int = option(2, "channels inside the feed-forward over m", ge=1)
    dims: int = option(0, "axes of the maps; 0: tokens", ge=0, le=3)
    causal: bool = option(False, "tokens see earlier ones only: for decoders")
    dropout: float = option(0.0, "dropout before the sum, in training", ge=0, lt=1)

    kinds = ("block", "branch", "norm", "conv")
    sizes = ("m",)
    default_targets = "block"
    default_lr = 5e-4
    aliases = {"k": "m", "bottleneck": "m", "reduction_factor": "reduction", "num_heads": "heads", "num_blocks": "blocks"}
    limits = {"merge": "it is nonlinear"}

    def validate(self) -> None:
        if self.m is not None and self.m % self.heads:
            legal = nearest_divisors(self.heads, self.m)
            raise BadValue(f"{self.label}: heads={self.heads} does not divide m={self.m}; choose heads = {legal}.")

    def select(self, sites: Sequence[Site]) -> list[Site]:
        found = super().select(sites)
        decoders = set() if self.causal else decoding(sites)
        if ahead := next((s for s in found if s.name in decoders), None):
            raise self.refuse("it would look at later tokens {at}, in a decoder; choose causal=True.", ahead)
        return found

    def check(self, site: Site) -> None:
        m = self.width(site)
        if m % self.heads:
            legal = nearest_divisors(self.heads, m)
            raise self.refuse(f"heads={self.heads} does not divide m={m} {{at}}; choose heads = {legal}, or another m.", site)
        if self.causal and self.axes(site):
            raise self.refuse("causal=True is for tokens in their order, not for maps, {at}; choose dims=0 or other targets.", site)

    def axes(self, site: Site) -> int:
        return len(site.kernel) if site.kind == "conv" else self.dims

    def width(self, site: Site) -> int:
        return max(1, site.out_features // self.reduction) if self.m is None else self.m

    def init(self, site: Site, generator: Generator) -> Params:
        D, m, n = site.out_features, self.width(site), self.blocks
        shapes = {"qkv": (3 * m, m), "o": (m, m), "ffn_1": (self.ratio * m, m), "ffn_2": (m, self.ratio * m)}
        p = {"down_w": kaiming_uniform((m, D), generator), "down_b": zeros((m,)), "up_w": zeros((D, m)), "up_b": zeros((D,))}
        for name, (out, inside) in shapes.items():
            p |= {f"{name}_w": kaiming_uniform((n, out, inside), generator), f"{name}_b": zeros((n, out))}
        for name in ("ln_1", "ln_2"):
            p |= {f"{name}_w": ones((n, m)), f"{name}_b": zeros((n, m))}
        return p

    def core(self, h: Tensor, q: Params) -> Tensor:
        """The small transformer on [rows, tokens, m]."""
        for i in range(self.blocks):
            t = {name: tensor[i] for name, tensor in q.items() if not name.startswith(("down", "up"))}
            a = F.layer_norm(h, h.shape[-1:], t["ln_1_w"], t["ln_1_b"])
            a = F.linear(a, t["qkv_w"], t["qkv_b"]).unflatten(-1, (3, self.heads, -1))  # [rows, tokens, 3, heads, m / heads]
            query, key, value = a.movedim((2, 3), (0, 2))
            a = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
            h = h + F.linear(a.transpose(1, 2).flatten(2), t["o_w"], t["o_b"])
            a = F.gelu(F.linear(F.layer_norm(h, h.shape[-1:], t["ln_2_w"], t["ln_2_b"]), t["ffn_1_w"], t["ffn_1_b"]))
            h = h + F.linear(a, t["ffn_2_w"], t["ffn_2_b"])
        return h

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        y, axes = call(x), self.axes(site)
        if y.ndim != (axes + 2 if axes else 3) or y.shape[1 if axes else 2] != site.out_features:
            way = f"dims={y.ndim - 2}" if not axes and y.ndim > 3 else "dims=0, where tokens come out, or other targets"
            raise self.refuse(f"dims={axes} does not fit what comes out {{at}}, of shape {tuple(y.shape)}; choose {way}.", site)
        tokens = y.flatten(2).transpose(1, 2) if axes else y.movedim(site.batch_dim, 0)
        q = {name: t.to(y.dtype) for name, t in p.items()}
        h = self.core(F.linear(tokens, q["down_w"], q["down_b"]), q)
        change = F.dropout(F.linear(h, q["up_w"], q["up_b"]), self.dropout, call.training)
        return y + (change.transpose(1, 2).reshape(y.shape) if axes else change.movedim(0, site.batch_dim))
