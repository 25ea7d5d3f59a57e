"""Bottleneck adapter: a small two-layer network after, or beside, every sub-layer (2019, arXiv:1902.00751)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.init import trunc_normal_

from veneer.errors import BadValue
from veneer.init import kaiming_uniform, ones, zeros
from veneer.method import ActivationMethod, Call, Params
from veneer.option import option
from veneer.site import Site, choose

ACTS: dict[str, Callable] = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": nn.GELU("tanh"), "silu": F.silu, "tanh": F.tanh}


@dataclass(frozen=True)
class BottleneckAdapter(ActivationMethod):
    """f(h) = s · (act(h down_wᵀ + down_b) up_wᵀ + up_b); o + f(o) after a sub-layer's output o, or o + f(x) beside it

    Pick it for a strong nonlinear adapter, "parallel" first; "houlsby + ln-tuning" is Houlsby's. Not where inference must be free.

    Tensors: down_w [m, D], Kaiming-uniform(√5); up_w [D, m], zeros: starts as the base; down_b [m], up_b [D], zeros. Near
    the base: start="bert", both N(0, 0.02²); "houlsby", both truncated N(0, 0.001²). Options: s [] or [D]; ln_w, ln_b [D].

    Args:
        variant: "houlsby" after attention and feed-forward (targets="attn mlp cross": cross-attention too); "pfeiffer"
            (arXiv:2005.00247) after the feed-forward, post-norm as LN(o + f(LN(o + a)) + a); "parallel" (arXiv:2110.04366) beside it.
    """

    variant: str = option("houlsby", "place and form", choices=("houlsby", "pfeiffer", "parallel"))
    m: int | None = option(None, "width of the bottleneck; None: D // reduction", ge=1)
    reduction: float = option(16, "D over the width of the bottleneck", gt=0)
    act: str | None = option(None, "nonlinearity; None: the variant's own", choices=("relu", "gelu", "gelu_tanh", "silu", "tanh"))
    s: float | None = option(None, "scale of the output; None: 4 beside a sub-layer, 1 after it")
    learned_s: str = option("no", "train the scale: one number or one per channel", choices=("no", "scalar", "channel"))
    norm: str = option("none", "a norm of its own on the adapter's input or output", choices=("none", "in", "out"))
    dropout: float = option(0.0, "dropout after the nonlinearity, in training", ge=0, lt=1)
    start: str = option("zero_up", "first values", choices=("zero_up", "bert", "houlsby"))
    kinds = ("linear", "norm", "branch")
    sizes = ("m",)
    aliases = {"bottleneck": "m", "reduction_factor": "reduction", "non_linearity": "act", "scaling": "s", "init": "start"}
    limits = {"merge": "it is nonlinear"}

    def validate(self) -> None:
        if self.s == 0:
            raise BadValue("BottleneckAdapter: s=0 switches it off; the default is 4 for parallel and 1 otherwise.")

    def select(self, sites: Sequence[Site]) -> list[Site]:
        own = {"houlsby": "attn mlp", "pfeiffer": "norm.mlp mlp", "parallel": "mlp"}[self.variant]
        kinds = ("branch",) if self.variant == "parallel" else self.kinds
        found = choose(sites, self.targets or own, kinds=kinds, who=self.label, allow_unmatched=self.targets is None)
        if self.targets is None:  # after the feed-forward: through its norm where that norm reads the sum, else directly
            post = {s.depth for s in found if s.kind == "norm" and s.post}
            found = [s for s in found if (s.post if s.kind == "norm" else s.depth not in post)]
        return [s for s in found if s.depth is None or s.depth not in self.leave_out]

    def check(self, site: Site) -> None:
        if site.kind == "norm" and not site.post:
            raise self.refuse("the norm {at} does not read a sub-layer's output plus its residual; choose the role mlp.", site)
        if self.width(site) >= site.out_features:
            warnings.warn(f"{self.label}: m={self.width(site)} is no bottleneck for {site.out_features} channels.", stacklevel=2)

    def width(self, site: Site) -> int:
        return max(1, int(site.out_features // self.reduction)) if self.m is None else self.m

    def init(self, site: Site, generator: Generator) -> Params:
        D, m = site.out_features, self.width(site)
        down, up = kaiming_uniform((m, D), generator), zeros((D, m))
        if self.start != "zero_up":
            std, cut = (0.02, 1.0) if self.start == "bert" else (1e-3, 2e-3)
            down, up = (trunc_normal_(t, 0.0, std, -cut, cut, generator) for t in (down, up))
        p = {"down_w": down, "down_b": zeros((m,)), "up_w": up, "up_b": zeros((D,))}
        if self.learned_s != "no":
            p["s"] = ones(() if self.learned_s == "scalar" else (D,)) * self.scale
        return p if self.norm == "none" else {**p, "ln_w": ones((D,)), "ln_b": zeros((D,))}

    @property
    def scale(self) -> float:
        return (4.0 if self.variant == "parallel" else 1.0) if self.s is None else self.s

    def f(self, h: Tensor, p: Params, training: bool) -> Tensor:
        """The adapter's network, [..., D] → [..., D]."""
        q = {name: t.to(h.dtype) for name, t in p.items()}
        act = ACTS[self.act or ("gelu_tanh" if self.variant == "houlsby" else "relu")]
        if self.norm == "in":
            h = F.layer_norm(h, h.shape[-1:], q["ln_w"], q["ln_b"])
        u = F.linear(F.dropout(act(F.linear(h, q["down_w"], q["down_b"])), self.dropout, training), q["up_w"], q["up_b"])
        u = u * q.get("s", self.scale)
        return F.layer_norm(u, u.shape[-1:], q["ln_w"], q["ln_b"]) if self.norm == "out" else u

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        if site.kind == "norm":  # x is the sum o + a: LN(o + f(LN(o + a)) + a)
            return call(x + self.f(call(x), p, call.training))
        o = call(x)
        return o + self.f(x if self.variant == "parallel" else o, p, call.training)
