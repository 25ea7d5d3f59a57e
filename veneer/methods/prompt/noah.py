"""NOAH: prompts, LoRA and an adapter in every block of a vision transformer, each of a size to be searched (2022, arXiv:2206.04673)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Generator, Tensor

from veneer.errors import BadValue
from veneer.maths.image_side import on_images
from veneer.method import Call, Method, Params, PromptMethod
from veneer.methods.activation.bottleneck_adapter import BottleneckAdapter
from veneer.methods.prompt.vpt import VPT
from veneer.methods.weight.lora import LoRA
from veneer.option import option
from veneer.site import Site, choose


@dataclass(frozen=True)
class NOAH(PromptMethod):
    """block([cls ; P ; patches]) with W + B A on queries and values, and o + up gelu(down o) after the feed-forward

    Pick it when it is unclear which kind of method suits a vision task: the authors train the union once, with random sizes, and
    search the best sizes of every block. Sizes of single blocks are overrides here, and 0 leaves a module out, as in
    attach(model, "noah", overrides={"layers.0.": {"length": 0, "r": 4}}). Not where the model must start as the base.

    Tensors: those of vpt (deep) at blocks, of lora at queries and values, of bottleneck-adapter (zero_up) after feed-forwards.

    Args:
        targets: prompts go by "block", LoRA by projections such as "attn.q", the adapter by "mlp".
    """

    length: int = option(8, "prompts of a block; 0: none", ge=0)
    r: int = option(8, "rank of LoRA; 0: none", ge=0)
    m: int = option(8, "width of the adapter's bottleneck; 0: none", ge=0)
    patch: int = option(16, "side of a patch in pixels", ge=1)

    default_lr = 1e-3
    sizes = ("r", "m", "length")
    default_targets = "block attn.q attn.v attn.qkv mlp"
    kinds = ("block", "linear", "branch")
    aliases = {"num_tokens": "length", "rank": "r", "lora_dim": "r", "bottleneck": "m", "adapter_dim": "m", "visual_prompt_dim": "length"}
    limits = {
        "identity": "extra tokens change attention from the start",
        "merge": "tokens are added between blocks; no weight holds them",
    }

    def validate(self) -> None:
        if not (self.length or self.r or self.m):
            raise BadValue("NOAH: length, r and m are all 0; give one of them a size of at least 1.")

    @cached_property
    def by_kind(self) -> dict[str, Method]:
        """Kind of site → the method that acts there; none where its size is 0."""
        found: dict[str, Method] = {}
        if self.length:
            found["block"] = VPT(length=self.length, patch=self.patch)
        if self.r:
            found["linear"] = LoRA(r=self.r)
        if self.m:
            found["branch"] = BottleneckAdapter(m=self.m)
        return found

    def select(self, sites: Sequence[Site]) -> list[Site]:
        asked = self.targets or self.default_targets
        found = choose(sites, asked, kinds=self.kinds, who=self.label, allow_unmatched=self.targets is None)
        if any(s.kind == "block" for s in found):  # LoRA and the adapter alone may act on text
            found = on_images(found, sites, self.label)
        return [s for s in found if (s.kind != "branch" or s.role == "mlp") and s.depth not in self.leave_out]

    def check(self, site: Site) -> None:
        if site.kind in self.by_kind:
            self.by_kind[site.kind].check(site)

    def init(self, site: Site, generator: Generator) -> Params:
        return self.by_kind[site.kind].init(site, generator) if site.kind in self.by_kind else {}

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        return self.by_kind[site.kind].forward(call, x, p, site) if p else call(x)
