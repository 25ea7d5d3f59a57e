"""MAM: learned keys and values in attention together with a scaled adapter beside every feed-forward network (2021, arXiv:2110.04366)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Generator, Tensor

from veneer.method import Call, Method, Params, PromptMethod
from veneer.methods.activation.bottleneck_adapter import BottleneckAdapter
from veneer.methods.prompt.prefix_tuning import PrefixTuning
from veneer.option import option
from veneer.site import Site, choose


@dataclass(frozen=True)
class MAM(PromptMethod):
    """softmax(q [PK ; K]ᵀ / √d_head) [PV ; V] in attention; o + s · (relu(x down_wᵀ + down_b) up_wᵀ + up_b) beside o = FFN(x)

    Pick it for the quality of full fine-tuning in hard tasks with many examples, at some percent of the parameters: a short
    prefix steers attention, most numbers go to the feed-forward. Not for tiny budgets, nor where inference must be free.

    Tensors: at attention those of `prefix-tuning`, at the feed-forward those of `bottleneck-adapter(variant=parallel)`, with
    their first values: up_w starts at zero, keys and values at N(0, 0.02²).

    Args:
        mid: the authors make keys and values by a shared network of width 800.
        targets: attention goes by "attn" and "cross", the adapter's place by "mlp".
    """

    length: int = option(30, "number of learned keys and values a layer", ge=1)
    mid: int | None = option(None, "width of the network that makes them; None trains them directly", ge=1)
    m: int = option(512, "width of the adapter's bottleneck", ge=1)
    s: float = option(4.0, "scale of the adapter's output", gt=0)
    dropout: float = option(0.0, "dropout after the adapter's nonlinearity, in training", ge=0, lt=1)
    shift_positions: bool | None = option(None, "start the text behind the prefix; None: in decoders")

    default_lr = 1e-3
    sizes = ("m", "length")
    default_targets = "attn mlp"
    kinds = ("attention", "branch")
    aliases = {"P": "length", "prefix_length": "length", "bottleneck": "m", "scaling": "s", "num_virtual_tokens": "length"}
    limits = {
        "identity": "learned keys take attention from the start",
        "merge": "keys and values are added to attention; no weight holds them",
    }

    @cached_property
    def prefix(self) -> PrefixTuning:
        return PrefixTuning(length=self.length, mid=self.mid)

    @cached_property
    def adapter(self) -> BottleneckAdapter:
        return BottleneckAdapter(variant="parallel", m=self.m, s=self.s, dropout=self.dropout)

    def at(self, site: Site) -> Method:
        """The one of the two that acts at this site."""
        return self.prefix if site.kind == "attention" else self.adapter

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """Attention first: the network that makes keys and values counts its layers from 0."""
        found = choose(sites, self.targets or self.default_targets, kinds=self.kinds, who=self.label, allow_unmatched=self.targets is None)
        found = [s for s in found if (s.kind == "attention" or s.role == "mlp") and s.depth not in self.leave_out]
        return sorted(found, key=lambda s: s.kind != "attention")

    def tie(self, site: Site) -> str | None:
        return "all" if site.kind == "attention" else None

    def check(self, site: Site) -> None:
        self.at(site).check(site)

    def init(self, site: Site, generator: Generator) -> Params:
        return self.at(site).init(site, generator)

    def init_shared(self, sites: Sequence[Site], generator: Generator) -> Params:
        return self.prefix.init_shared(sites, generator)

    def keys_values(self, p: Params, site: Site) -> tuple[Tensor, Tensor]:
        return self.prefix.keys_values(p, site)

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        return self.adapter.forward(call, x, p, site)
