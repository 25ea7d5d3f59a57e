"""VPT: learned tokens among the patches of a vision transformer, at its first or at every block (2022, arXiv:2203.12119)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import dropout

from veneer.errors import BadValue
from veneer.init import uniform
from veneer.maths.image_side import on_images
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
    """

    length: int = option(10, "number of prompts", ge=1)
    deep: bool = option(True, "new prompts at every block; False: at the first block only")
    dropout: float = option(0.0, "dropout on the prompts, in training", ge=0, lt=1)
    patch: int = option(16, "side of a patch in pixels", ge=1)

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
        ragged = {} if self.deep else {"weighted": "the prompts of two shallow adapters lengthen the same tokens"}
        return always | ragged

    def validate(self) -> None:
        if not self.deep and self.leave_out:
            raise BadValue("VPT: shallow prompts pass through every block; leave_out goes with deep=True only.")

    def select(self, sites: Sequence[Site]) -> list[Site]:
        return on_images(super().select(sites), sites, self.label)

    def init(self, site: Site, generator: Generator) -> Params:
        name = "P0" if site.index == 0 else "P_deep"
        bound = (6 / (3 * self.patch**2 + site.in_features)) ** 0.5
        return {name: uniform((self.length, site.in_features), generator, bound)} if self.deep or site.index == 0 else {}

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        axis, n = 1 - site.batch_dim, self.length
        for P in p.values():  # one at most
            P = dropout(P, self.dropout, call.training).to(x.dtype).unsqueeze(site.batch_dim)
            sizes = [x.shape[0], x.shape[1], x.shape[2]]
            sizes[axis] = n
            x = torch.cat([x.narrow(axis, 0, 1), P.expand(sizes), x.narrow(axis, 1, x.shape[axis] - 1)], axis)
        y = call(x)
        if not self.deep and site.index + 1 < site.length:
            return y
        return torch.cat([y.narrow(axis, 0, 1), y.narrow(axis, 1 + n, y.shape[axis] - 1 - n)], axis)
