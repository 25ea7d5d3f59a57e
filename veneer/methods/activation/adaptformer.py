"""AdaptFormer: a bottleneck beside the feed-forward that reads the residual stream itself (2022, arXiv:2205.13535)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Generator, Tensor

from veneer.init import kaiming_uniform, ones, zeros
from veneer.maths.residual_stream import from_stream
from veneer.method import Call, Method, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class AdaptFormer(Method):
    """y = h + MLP(LN h) + s · (ReLU(h W_downᵀ + b_down) W_upᵀ + b_up), h the stream that enters the feed-forward's norm

    Pick it as the adapter baseline on vision transformers: it stays stable when the bottleneck grows. Not where inference
    must be free. It reads h and not LN h, which is what bottleneck-adapter's "parallel" does; in blocks that normalise the
    sum instead, h is what the feed-forward reads.

    Tensors: W_down [m, D], Kaiming-uniform(√5); W_up [D, m], b_down [m], b_up [D], zeros: starts as the base. Options: s [],
    trained, from 1; ln_w, ln_b [D], ones and zeros.

    Args:
        sequential: after the feed-forward o instead of beside it: y = h + o + s · up(ReLU(down o)).
        dropout: the authors train with 0.1.
    """

    m: int = option(64, "width of the bottleneck", ge=1)
    s: float | None = option(None, "scale of the output; None: 0.1, or 1 where it is trained")
    learned_s: bool = option(False, "train the scale")
    norm: str = option("none", "a norm of its own on the adapter's input or output", choices=("none", "in", "out"))
    dropout: float = option(0.0, "dropout after the nonlinearity, in training", ge=0, lt=1)
    sequential: bool = option(False, "after the feed-forward, not beside it")

    kinds = ("branch",)
    sizes = ("m",)
    default_targets = "mlp"
    aliases = {"bottleneck": "m", "ffn_num": "m", "d_hat": "m", "adapter_scalar": "s", "adapter_layernorm_option": "norm"}
    limits = {"merge": "it is nonlinear"}

    def views(self, sites: Sequence[Site]) -> list[Site]:
        return from_stream([s for s in sites if s.kind == "branch"], sites)

    def select(self, sites: Sequence[Site]) -> list[Site]:
        return from_stream(super().select(sites), sites)

    def check(self, site: Site) -> None:
        if self.m >= site.out_features:
            warnings.warn(f"{self.label}: m={self.m} is no bottleneck for {site.out_features} channels.", stacklevel=2)

    @property
    def scale(self) -> float:
        return (1.0 if self.learned_s else 0.1) if self.s is None else self.s

    def init(self, site: Site, generator: Generator) -> Params:
        m, D = self.m, site.out_features
        p = {"W_down": kaiming_uniform((m, D), generator), "b_down": zeros((m,)), "W_up": zeros((D, m)), "b_up": zeros((D,))}
        if self.learned_s:
            p["s"] = ones(()) * self.scale
        return p if self.norm == "none" else {**p, "ln_w": ones((D,)), "ln_b": zeros((D,))}

    def adapter(self, h: Tensor, p: Params, training: bool) -> Tensor:
        """The bottleneck's output, scaled, [..., D] → [..., D]."""
        s, out = p.get("s", self.scale), self.norm == "out"
        up = {k: (p[k] if out else s * p[k]).to(h.dtype) for k in ("W_up", "b_up")}
        ln_w, ln_b = (p[k].to(h.dtype) if k in p else None for k in ("ln_w", "ln_b"))
        if self.norm == "in":
            h = F.layer_norm(h, h.shape[-1:], ln_w, ln_b)
        u = F.dropout(F.relu(F.linear(h, p["W_down"].to(h.dtype), p["b_down"].to(h.dtype))), self.dropout, training)
        a = F.linear(u, up["W_up"], up["b_up"])
        return F.layer_norm((s * a).to(h.dtype), a.shape[-1:], ln_w, ln_b) if out else a

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        o = call(x)
        return o + self.adapter(o if self.sequential else x, p, call.training)
