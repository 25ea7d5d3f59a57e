"""PYRA: tokens of a picture that are alike merge inside every block, each re-activated before it goes (2024, arXiv:2403.09192)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from veneer.errors import NoMatch
from veneer.init import kaiming_uniform, ones, zeros
from veneer.maths.merging_schedule import Scheduled
from veneer.maths.token_merging import alike, counted, merged, packed, taken, unpacked
from veneer.method import Call, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class PYRA(Scheduled):
    """D = LN(s + t); s′ = s + (s ⊙ 2σ(W_rᵀ D)) ⊙ (2σ(D W_Dᵀ) − 1); t ← (s′ + t) / (size_s + size_t), between attention and FFN

    s are the r tokens of a block whose keys are most like those of others, t their partners, both times the number of patches
    they stand for, their size; attention counts a merged token as often as the tokens it stands for. Every block after the
    merge, in training too, runs on fewer tokens. Pick it beside a method that adapts, as in "lora + pyra", where a vision
    transformer must answer or train faster; its authors find it ahead of plain merging (reactivate=False, ToMe, arXiv:2210.09461).
    Not with learned tokens, nor where inference must be the base's.

    The published schedules for 197 tokens: low is r=16 in 12 blocks, r=8 in 24; high is, in 12 blocks,
    schedule=(40, 34, 30, 24, 18, 14, 10, 8, 4, 4, 3, 3). After the last block every token of the picture stands at
    its old place again, with the values of the one it went into: heads, pooling and segmentation see what they expect.

    Tensors of a block that merges r_l tokens: W_r [r_l, 1], Kaiming-uniform(√5); W_D [1, D], zeros: starts as plain merging;
    ln_w, ln_b [D], ones and zeros.
    """

    reactivate: bool = option(True, "False: plain token merging, nothing to train")
    proportional: bool = option(True, "attention counts merged tokens by their size")

    sizes = ()
    default_lr = 1e-3
    limits = {
        "identity": "merged tokens answer for one another from the start",
        "merge": "it changes the number of tokens, not a weight",
        "weighted": "sequences of other lengths do not add up",
    }

    def select(self, sites: Sequence[Site]) -> list[Site]:
        found = super().select(sites)
        whole = {s.depth for s in sites if s.kind == "norm" and s.role == "norm.mlp"}
        odd = next((s.name for s in found if s.depth not in whole), None)
        if odd is not None:
            raise NoMatch(f"PYRA: the block {odd} has no norm before its feed-forward; it acts on plain vision transformers.")
        return found

    def check_tensors(self, p: Params, site: Site) -> None:
        r = self.gone(site)[site.index]
        if "W_r" in p and len(p["W_r"]) != r:
            raise self.refuse(
                f"W_r was trained to merge {len(p['W_r'])} tokens, and {r} would merge {{at}}; give tokens= as in training.", site
            )

    def init(self, site: Site, generator: Generator) -> Params:
        r, D = self.gone(site)[site.index], site.out_features
        if not r or not self.reactivate:
            return {}
        return {"W_r": kaiming_uniform((1, r), generator).T.clone(), "W_D": zeros((1, D)), "ln_w": ones((D,)), "ln_b": zeros((D,))}

    def merge(self, x: Tensor, size: Tensor, keys: Tensor, r: int, p: Params) -> tuple[Tensor, Tensor]:
        """Tokens x [B, n, D] that stand for size [B, n] of the first ones → [B, n − r, D], and the new row of each [B, n]."""
        pairs = alike(keys, r, self.protected)
        X = x.to(torch.promote_types(x.dtype, torch.float32))
        size = size[..., None].to(X.dtype)
        X = X * size
        s = taken(X, pairs.source)
        if p:
            q = {name: t.to(X.dtype) for name, t in p.items()}
            D = F.layer_norm(s + taken(X, pairs.target), s.shape[-1:], q["ln_w"], q["ln_b"])
            w_c = 2 * torch.sigmoid((D.mT @ q["W_r"]).mT)  # [B, 1, D]: over the r tokens, most alike first
            w_t = 2 * torch.sigmoid(D @ q["W_D"].T) - 1  # [B, r, 1]
            s = s + s * w_c * w_t
        total = merged(size, taken(size, pairs.source), pairs)
        return (merged(X, s, pairs) / total).to(x.dtype), pairs.where

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        if x.ndim != 3:
            raise self.refuse(f"the block {{at}} reads {x.ndim} axes, not [batch, tokens, width].", site)
        gone = self.gone(site)
        before, r = sum(gone[: site.index]), gone[site.index]
        h, where = unpacked(x, before)
        self.allow(r, h.shape[1], site)
        size = counted(where, h.shape[1])
        bias = size.to(h.dtype).log() if before and self.proportional else None
        y, moved = call.between(h, (lambda h, keys: self.merge(h, size, keys, r, p)) if r else None, bias)
        where = where if moved is None else moved.gather(1, where)
        if site.index + 1 == site.length:
            return taken(y, where)
        return packed(y, where) if before + r else y
