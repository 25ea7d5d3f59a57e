"""ExPLoRA: some whole blocks and all norms are trained, all other blocks at query and value by LoRA (2024, arXiv:2406.10973)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Generator, Tensor

from veneer.errors import BadValue
from veneer.method import WEIGHTS, Call, Method, Params, SelectionMethod
from veneer.methods.selection.full import Full
from veneer.methods.weight.lora import LoRA
from veneer.option import option
from veneer.site import Site, choose


@dataclass(frozen=True)
class ExPLoRA(SelectionMethod):
    """Blocks in U: y = x weightᵀ + bias, both trained, norms of all blocks too; elsewhere W_eff = W + (alpha / r) · B A at q and v

    Pick it to go on with a model's self-supervised training on unlabelled pictures of another domain (`veneer train --task
    self-supervised-images`), then merge, and train lora(r=8) or a probe on what is labelled. Not for small budgets.

    Tensors: in blocks of U and at norms those of `full`, weight and bias, copied from the base; at query and value of the
    other blocks those of `lora`, A [r, in] and B [out, r]: starts as the base.

    Args:
        U: numbers of the blocks that are trained whole, from 1; None: the last one. "[L]" and "[1, L]" are the authors'.
        targets: where LoRA goes in the other blocks.
    """

    r: int = option(64, "rank of LoRA in the other blocks", ge=1)
    alpha: float | None = option(None, "scale numerator; None means r", gt=0)
    U: tuple[int, ...] | None = option(None, "blocks that are trained whole, from 1; None: the last", ge=1)

    default_lr = 5e-4
    default_targets = "attn.q attn.v attn.qkv"
    kinds = (*WEIGHTS, "norm")
    aliases = {"rank": "r", "lora_alpha": "alpha", "unfreeze": "U"}

    @cached_property
    def lora(self) -> LoRA:
        return LoRA(r=self.r, alpha=self.alpha)

    @cached_property
    def full(self) -> Full:
        return Full()

    def whole(self, site: Site) -> bool:
        """Whether this site's block is trained whole."""
        return site.depth is not None and site.index + 1 in (self.U or (site.length,))

    def at(self, site: Site) -> Method:
        """The one of the two that acts at this site."""
        return self.full if self.whole(site) or site.kind == "norm" else self.lora

    def select(self, sites: Sequence[Site]) -> list[Site]:
        most = max((s.length for s in sites), default=0)
        if wrong := [n for n in self.U or () if n > most]:
            raise BadValue(f"{self.label}: U={self.U} names the block {wrong[0]}, and there are {most}; choose from 1 to {most}.")
        kinds = tuple(k for k in self.kinds if k != "norm")
        asked = self.targets or self.default_targets
        found = {s.name for s in choose(sites, asked, kinds=kinds, who=self.label, allow_unmatched=self.targets is None)}
        found |= {s.name for s in sites if s.kind == "norm" or (self.whole(s) and s.kind in kinds)}
        return [s for s in sites if s.name in found and s.kind in self.kinds and (s.depth is None or s.depth not in self.leave_out)]

    def check(self, site: Site) -> None:
        self.at(site).check(site)

    def init(self, site: Site, generator: Generator) -> Params:
        return self.at(site).init(site, generator)

    def init_from_weight(self, W: Tensor, b: Tensor | None, p: Params, site: Site, generator: Generator) -> Params:
        return self.full.init_from_weight(W, b, p, site, generator) if "weight" in p else p

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        return (self.full if "weight" in p else self.lora).forward(call, x, p, site)

    def fold(self, W: Tensor, b: Tensor | None, p: Params, site: Site) -> tuple[Tensor, Tensor | None]:
        return (self.full if "weight" in p else self.lora).fold(W, b, p, site)

    def weight(self, W: Tensor, p: Params, site: Site | None = None) -> Tensor:
        return self.fold(W, None, p, site or Site.bare(W))[0]

    def low_rank(self, W: Tensor, p: Params, site: Site) -> tuple[Tensor, Tensor] | None:
        return None if "weight" in p else self.lora.low_rank(W, p, site)

    def delta(self, x: Tensor, p: Params, site: Site) -> Tensor:
        """What LoRA adds to the layer's output, [..., in] → [..., out]; asked where `adds` holds."""
        return self.lora.delta(x, p, site)

    def adds(self, site: Site) -> bool:
        return self.at(site).adds(site)
