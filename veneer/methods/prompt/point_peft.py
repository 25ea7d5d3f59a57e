"""Point-PEFT: prompts from a memory of the training clouds, and tokens that talk with their neighbours (2023, arXiv:2310.03059)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.nn.init import trunc_normal_

from veneer.init import zeros
from veneer.maths.image_side import on_images
from veneer.maths.local_groups import Neighbourly
from veneer.maths.memory_bank import FIRST, Remembering
from veneer.maths.told import COORDINATES
from veneer.maths.whole_stack import encoder_of, encoders, first_of_one
from veneer.method import Call, Params
from veneer.option import option
from veneer.site import Site, choose


@dataclass(frozen=True)
class PointPEFT(Neighbourly, Remembering):
    """x ← block([cls ; P + R(prior) ; x]), MLP's o + ffn · A_ffn(o);  x_n ← x_n + propagate · Σ_s w_ns pooled_s;  x ← x + A_geo(x)

    prior [L, D]: the cloud's feature (maximum over the frozen encoder's tokens), the mean of the K = L − 2 training clouds' features
    nearest to it, and these. pooled_s = GELU(BN(max U_s)) + centre · x_s, U_s = x + attention(LN_g x) among the k tokens nearest to
    centre s; w_ns by inverse squared distance. A(z) = W_u q(W_d z + b_d) + b_u, q = QuickGELU; R(z) = z + A(z). Pick it for point
    clouds, 3 to 5 % of the parameters; not where inference must be free: the encoder runs twice. Models without point centres use
    the patches' grid. The authors add "bitfit(targets='attn.o mlp.up mlp.down norm.attn norm.mlp') +
    ln-tuning(targets='norm.final') + full(targets='cls_token cls_position')".

    Tensors: blocks: A_geo.W_d [m, D], .W_u [D, m], .b_d, .b_u, Xavier-uniform, biases N(0, 1e-6²); BN.w, BN.b [D]; the first D_p
    also P [L, D], truncated N(0, 0.02²), R.* like A_geo.* with b for m. Feed-forwards: A_ffn.*. Shared: SA.qkv [3·inner, D],
    SA.o [D, inner], SA.b, LN_g.w, LN_g.b [D], p_cor [L, 3], the prompts' places. Not trained: BN.mean, BN.var; bank [clouds, D].
    """

    ffn: float = option(0.7, "factor of the adapter behind the feed-forward")

    kinds = ("block", "branch", "norm")
    sizes = ("m", "L")
    frozen = ("BN.mean", "BN.var", "bank")
    default_lr = 2e-3
    default_targets = "block mlp"
    batches_wanted = 1000
    limits = {
        "identity": "extra tokens and adapters change the output from the start",
        "merge": "tokens talk with their neighbours, which no weight does",
        "weighted": "prompts of two adapters lengthen the same tokens",
    }

    def views(self, sites: Sequence[Site]) -> list[Site]:
        return encoders(sites)

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """Every block, also one left out, as the prior passes through."""
        asked = self.targets or self.default_targets
        found = choose(sites, asked, kinds=("block", "branch"), who=self.label, allow_unmatched=self.targets is None)
        found = [s for s in on_images(found, sites, self.label) if s.kind == "block" or s.depth not in self.leave_out]
        first = first_of_one(found, self.label)
        return [*encoder_of(first, sites, self.label, "choose prior=False"), *found] if self.calibrates else found

    def observe(self, state: Any, x: Tensor, site: Site) -> Any:
        if site.kind == "block" and site.depth is not None:
            n = self.prompts(site)
            self.fits(x.shape[1] - self.class_token + n, n, site)
        return super().observe(state, x, site)

    def tie(self, site: Site) -> str | None:
        return "geometry" if site.kind == "block" and site.depth is not None else None

    def init(self, site: Site, generator: Generator) -> Params:
        D = site.out_features
        if site.kind == "branch":
            return self.bottleneck("A_ffn", D, self.m, generator)
        if site.kind == "norm" or site.depth is None or site.depth in self.leave_out:
            return {}
        p = self.geometry(D, generator)
        if self.prompts(site):
            p["P"] = trunc_normal_(zeros((self.L, D)), 0.0, 0.02, -2.0, 2.0, generator)
            p |= self.bottleneck("R", D, self.b, generator) if self.prior else {}
        return p

    def init_shared(self, sites: Sequence[Site], generator: Generator) -> Params:
        p = self.shared(sites[0].out_features, generator)
        if any(self.prompts(s) for s in sites if s.depth not in self.leave_out):
            p["p_cor"] = trunc_normal_(zeros((self.L, 3)), 0.0, 0.02, -2.0, 2.0, generator)
        return p

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        if site.kind == "norm":
            return self.noted(call(x), p, call.training)
        if site.depth is None:
            return self.twice(call, x)
        if FIRST.on:
            return call(x)
        if site.kind == "branch":
            o = call(x)
            return o + self.ffn * self.adapter(o, p, "A_ffn", call.training)
        carried = self.prompts(site) if self.prior else 0
        x, z = x[:, : x.shape[1] - carried], x[:, x.shape[1] - carried :]  # the prior travels behind the tokens
        y = call(x) if site.depth in self.leave_out else self.block(call, x, z, p, site)
        return torch.cat([y, z], 1) if carried and site.index + 1 < site.length and self.prompts(site, 1) else y

    def block(self, call: Call, x: Tensor, z: Tensor, p: Params, site: Site) -> Tensor:
        """The block's tokens [batch, tokens, D], for the prior z [batch, L, D] ([batch, 0, D]: none)."""
        c, n = int(self.class_token), self.prompts(site)
        if n:
            P = F.dropout(p["P"], self.dropout, call.training).to(x.dtype).expand(len(x), -1, -1)
            P = P + z + self.adapter(z, p, "R", call.training) if z.shape[1] else P
            x = torch.cat([x[:, :c], P, x[:, c:]], 1)
        y, xyz = COORDINATES.listen(call, x)
        y = self.adapted(y, xyz, n, p, call, site)
        return torch.cat([y[:, :c], y[:, c + n :]], 1)
