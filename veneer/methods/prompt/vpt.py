"""VPT: learned tokens among the patches of a vision transformer, at its first or at every block (2022, arXiv:2203.12119)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import dropout

from veneer.errors import BadValue
from veneer.init import normal, uniform
from veneer.maths.image_side import on_images
from veneer.maths.residual_stream import from_stream
from veneer.method import Call, Params, PromptMethod
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class VPT(PromptMethod):
    """deep: block i reads [cls ; P_i ; patches] and its prompt rows are dropped; shallow: [cls ; P0 ; patches] throughout

    Pick it as the standard prompt baseline on vision transformers, deep by default. Not where tokens must keep a grid
    inside the blocks (windowed models), and not when inference must cost nothing.

    Tensors: P0 [length, D] at the first block; deep: P_deep [length, D] at each later one (the paper's stack of L − 1).
    Uniform in ±√(6 / (3·patch² + D)). No start equals the base. Prompts carry no position and stand after the first
    token; blocks of deep drop them again, shallow drops them after the last block, so heads see the usual sequence.

    Args:
        patch: side of a patch in pixels; it sets the range of the start.
        inside: the prompts P [length, D], N(0, 1), are what attention reads in their place: they enter behind its norm, and
            leave with the block, also the first block's (deep=False) (arXiv:2310.01825). One such set a block.
    """

    length: int = option(10, "number of prompts", ge=1)
    deep: bool = option(True, "new prompts at every block; False: at the first block only")
    dropout: float = option(0.0, "dropout on the prompts, in training", ge=0, lt=1)
    patch: int = option(16, "side of a patch in pixels", ge=1)
    inside: bool = option(False, "behind attention's norm, for each block alone")

    default_lr = 1e-2
    sizes = ("length",)
    default_targets = "block"
    kinds = ("block",)
    aliases = {"p": "length", "num_tokens": "length"}

    @property
    def limits(self) -> dict[str, str]:  # type: ignore[override]
        always = {
            "identity": "extra tokens change attention from the start",
            "merge": "tokens are added between blocks; no weight holds them",
        }
        if self.inside:
            return always | {"weighted": "the prompts of two adapters stand in the same rows behind the norm"}
        ragged = {} if self.deep else {"weighted": "the prompts of two shallow adapters lengthen the same tokens"}
        return always | ragged

    def validate(self) -> None:
        if not self.deep and self.leave_out and not self.inside:
            raise BadValue("VPT: shallow prompts pass through every block; leave_out goes with deep=True only.")

    def select(self, sites: Sequence[Site]) -> list[Site]:
        found = on_images(super().select(sites), sites, self.label)
        if not self.inside:
            return found
        blocks = [s for s in found if self.deep or s.index == 0]
        attention = [s for s in sites if s.kind == "branch" and s.role == "attn" and s.depth in {b.depth for b in blocks}]
        before = {s.entry for s in from_stream(attention, sites)}
        return [*blocks, *(s for s in sites if s.kind == "norm" and s.module in before)]

    def tie(self, site: Site) -> str | None:
        return f"block{site.depth}" if self.inside else super().tie(site)

    def init(self, site: Site, generator: Generator) -> Params:
        if self.inside or not (self.deep or site.index == 0):
            return {}
        bound = (6 / (3 * self.patch**2 + site.in_features)) ** 0.5
        return {"P0" if site.index == 0 else "P_deep": uniform((self.length, site.in_features), generator, bound)}

    def init_shared(self, sites: Sequence[Site], generator: Generator) -> Params:
        return {"P": normal((self.length, sites[0].in_features), generator)} if self.inside else {}

    def inserted(self, x: Tensor, P: Tensor, site: Site, instead: int = 0) -> Tensor:
        """Tokens with P [length, D] behind the first, in place of the `instead` ones that stand there."""
        axis = 1 - site.batch_dim
        sizes = list(x.shape)
        sizes[axis] = self.length
        rows = P.to(x.dtype).unsqueeze(site.batch_dim).expand(sizes)
        return torch.cat([x.narrow(axis, 0, 1), rows, x.narrow(axis, 1 + instead, x.shape[axis] - 1 - instead)], axis)

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        if site.kind == "norm":
            return self.inserted(call(x), dropout(p["P"], self.dropout, call.training), site, instead=self.length)
        for P in p.values():  # one at most
            x = self.inserted(x, dropout(P, self.dropout, call.training), site)
        y, axis, n = call(x), 1 - site.batch_dim, self.length
        if not self.deep and not self.inside and site.index + 1 < site.length:
            return y
        return torch.cat([y.narrow(axis, 0, 1), y.narrow(axis, 1 + n, y.shape[axis] - 1 - n)], axis)
