"""UniPELT: prefix, LoRA and bottleneck adapter in every layer, each behind a learned gate on its input (2021, arXiv:2110.07577)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor
from torch.nn.functional import linear

from veneer.init import kaiming_uniform, normal, zeros
from veneer.method import Call, Params, PromptMethod
from veneer.methods.activation.bottleneck_adapter import BottleneckAdapter
from veneer.methods.prompt.prefix_tuning import PrefixTuning
from veneer.option import option
from veneer.site import Site, choose


@dataclass(frozen=True)
class UniPELT(PromptMethod):
    """G(h) = mean_t σ(h_t gate_wᵀ + gate_b): x Wᵀ + G(x) · x Aᵀ Bᵀ on q and v; [G(x) PK ; K], [G(x) PV ; V]; o + G(h) · f(h) after the FFN

    Pick it when it is unclear which kind of method suits a task, mainly with few examples. Not where the model must start as
    the base, be merged, or run at its bare speed. arXiv:2405.05493 is "prompt-tuning(length=10, start=uniform) + unipelt";
    "unipelt + unipelt" stacks several sets, "unipelt(modules=ap) + ia3" has IA3 in LoRA's place.

    Tensors: LoRA A [r, in], Kaiming-uniform(√5), B [out, r], zeros; the gate replaces alpha/r. Prefix as in `prefix-tuning`,
    by a shared network (mid) or flat. Adapter as `bottleneck-adapter(variant=pfeiffer, start=bert)` (relu; in post-norm blocks
    it reads the normalised sum). Gates gate_w [1, D], N(0, 0.02²), gate_b [1], zeros: near 1/2.

    In causal models a mean over the sequence would tell tokens of later ones: there gates are of one token each, and the
    prefix's is σ(gate_b) for all. Elsewhere the mean is over all positions, padding included, as published.
    """

    modules: str = option("apl", "a adapter, p prefix, l LoRA; the paper has apl and ap", choices=("apl", "ap", "al", "pl", "a", "p", "l"))
    length: int = option(10, "number of learned keys and values a layer", ge=1)
    mid: int | None = option(512, "width of the network that makes them; None trains them directly", ge=1)
    m: int | None = option(None, "width of the adapter's bottleneck; None: D // 16", ge=1)
    r: int = option(8, "rank of LoRA", ge=1)
    gated: bool = option(True, "False: all gates are 1")
    shift_positions: bool | None = option(None, "start the text behind the prefix; None: in decoders")

    default_lr = 5e-4
    default_targets = "attn attn.q attn.v attn.qkv"
    sizes = ("r", "m", "length")
    kinds = ("linear", "norm", "branch", "attention")
    aliases = {"P": "length", "prefix_length": "length", "bottleneck": "m", "rank": "r"}
    limits = {
        "identity": "learned keys take attention from the start, and the adapter starts near zero",
        "merge": "its gates depend on the input",
    }

    @cached_property
    def prefix(self) -> PrefixTuning:
        return PrefixTuning(length=self.length, mid=self.mid)

    @cached_property
    def adapter(self) -> BottleneckAdapter:
        return BottleneckAdapter(variant="pfeiffer", m=self.m, start="bert", leave_out=self.leave_out)

    @property
    def gates(self) -> bool:
        return self.gated

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """Attention first: the network that makes keys and values counts its layers from 0."""
        kinds = self.kinds if self.targets else ("attention", "linear")
        found = choose(sites, self.targets or self.default_targets, kinds=kinds, who=self.label, allow_unmatched=not self.targets)
        found += self.adapter.select(sites) if "a" in self.modules and not self.targets else []
        return sorted((s for s in found if self.acts(s)), key=lambda s: s.kind != "attention")

    def acts(self, site: Site) -> bool:
        """Whether one of the chosen modules belongs at this site."""
        letter = {"attention": "p", "linear": "l"}.get(site.kind, "a")
        return letter in self.modules and (site.kind != "branch" or site.role == "mlp") and site.depth not in self.leave_out

    def check(self, site: Site) -> None:
        if site.kind in ("norm", "branch"):
            self.adapter.check(site)

    def tie(self, site: Site) -> str | None:
        return "all" if site.kind == "attention" else None

    def init(self, site: Site, generator: Generator) -> Params:
        D, attention = site.in_features, site.kind == "attention"
        if site.kind == "linear":
            p = {"A": kaiming_uniform((self.r, D), generator), "B": zeros((site.out_features, self.r))}
        else:
            p = (self.prefix if attention else self.adapter).init(site, generator)
        if self.gated:
            p["gate_b"] = zeros((1,))
            if not (attention and site.causal):
                p["gate_w"] = normal((1, site.heads * site.head_dim if attention else D), generator, 0.02)
        return p

    def init_shared(self, sites: Sequence[Site], generator: Generator) -> Params:
        return self.prefix.init_shared(sites, generator)

    def gate(self, x: Tensor, p: Params, site: Site) -> Tensor:
        """G [B, 1, 1] of what a module reads; [B, T, 1] in causal models; for a causal prefix σ(gate_b) for every row."""
        if "gate_w" not in p:
            return torch.sigmoid(p["gate_b"]).expand(x.shape[site.batch_dim], 1, 1)
        w, b = p["gate_w"].to(x.dtype), p["gate_b"].to(x.dtype)
        opened = torch.sigmoid(linear(x, w, b).to(p["gate_w"].dtype))
        places = [axis for axis in range(x.ndim - 1) if axis != site.batch_dim]
        return opened.mean(places, keepdim=True) if places and not site.causal else opened

    def keys_values(self, p: Params, site: Site) -> tuple[Tensor, Tensor]:
        return self.prefix.keys_values(p, site)

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        h = call(x)
        if site.kind == "linear":
            change = linear(linear(x, p["A"].to(x.dtype)), p["B"].to(x.dtype))
            return h + (self.gate(x, p, site).to(x.dtype) * change if self.gated else change)
        f = self.adapter.f(h, p, call.training)
        f = self.gate(h, p, site).to(h.dtype) * f if self.gated else f
        return call(x + f) if site.kind == "norm" else h + f  # a norm's x is the sum o + a: LN(o + G f(LN(o + a)) + a)
