"""Mona: a bottleneck with convolutions of three sizes over the grid of patches, after every sub-layer (2024, arXiv:2408.08345)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from veneer.errors import BadValue
from veneer.init import kaiming_uniform, ones, zeros
from veneer.maths.image_side import on_images
from veneer.maths.residual_stream import from_stream
from veneer.method import Call, Method, Params
from veneer.option import option
from veneer.site import Site

SIZES = (3, 5, 7)
MOST_PREFIX = 8
"""Class tokens and registers that a sequence may begin with, when the grid is not given."""


@dataclass(frozen=True)
class Mona(Method):
    """h + U gelu(z + mix z), z = u + (w3 ∗ u + w5 ∗ u + w7 ∗ u) / 3, u = D (s1 ⊙ LN h + s2 ⊙ h), h the stream after a sub-layer

    Pick it for dense pictures, detection and segmentation above all, where its authors pass full fine-tuning at a twentieth
    of the parameters. Not on text, nor where inference must be free.

    The filters are depthwise on the grid of patches; tokens before the patches (class token, registers) get the rest only. h is
    the sum of what enters a sub-layer and what it gives, without the layer scale that some models have behind it.

    Tensors: down_w [m, D], down_b; w3, w5, w7 [m, 1, k, k], b3, b5, b7 [m]; mix_w [m, m], mix_b; up_w [D, m], up_b; ln_w, ln_b,
    s1, s2 [D]. Weights Kaiming-uniform(√5), biases zeros, s1 = 1e-6, s2 = 1; up_w zeros, so that it starts as the base (the
    authors start it at random).

    Args:
        grid: None: the largest square that leaves at most eight tokens before it.
        dropout: the authors train with 0.1.
    """

    m: int = option(64, "width of the bottleneck", ge=1)
    grid: tuple[int, int] | None = option(None, "rows and columns of patches; None: as many of each")
    dropout: float = option(0.0, "dropout after the nonlinearity, in training", ge=0, lt=1)

    kinds = ("branch",)
    sizes = ("m",)
    default_targets = "attn mlp"
    aliases = {"bottleneck": "m", "adapter_dim": "m"}
    limits = {"merge": "it is nonlinear"}

    def validate(self) -> None:
        grid = self.grid
        if grid is not None and (not isinstance(grid, tuple) or len(grid) != 2 or min(grid) < 1):
            raise BadValue(f"{self.label}: grid={grid!r} must be two numbers, rows and columns of patches, such as (14, 14).")

    def views(self, sites: Sequence[Site]) -> list[Site]:
        return from_stream([s for s in sites if s.kind == "branch"], sites)

    def select(self, sites: Sequence[Site]) -> list[Site]:
        return from_stream(on_images(super().select(sites), sites, self.label), sites)

    def init(self, site: Site, generator: Generator) -> Params:
        m, D = self.m, site.out_features
        p = {"down_w": kaiming_uniform((m, D), generator), "down_b": zeros((m,))}
        for k in SIZES:
            p |= {f"w{k}": kaiming_uniform((m, k * k), generator).view(m, 1, k, k), f"b{k}": zeros((m,))}
        p |= {"mix_w": kaiming_uniform((m, m), generator), "mix_b": zeros((m,)), "up_w": zeros((D, m)), "up_b": zeros((D,))}
        return p | {"ln_w": ones((D,)), "ln_b": zeros((D,)), "s1": ones((D,)) * 1e-6, "s2": ones((D,))}

    def sides(self, tokens: int, site: Site) -> tuple[int, int]:
        """Rows and columns of the patches' grid."""
        if self.grid is not None:
            sides = self.grid
        else:
            sides = (math.isqrt(tokens),) * 2
        if not 0 <= tokens - sides[0] * sides[1] <= MOST_PREFIX or tokens < 1:
            what = f"{tokens} tokens {{at}} are no grid of {sides[0]} × {sides[1]} patches with at most {MOST_PREFIX} tokens before it"
            raise self.refuse(f"{what}; choose grid=(rows, columns).", site)
        return sides

    def filtered(self, u: Tensor, q: Params) -> Tensor:
        """u [B, h, w, m] plus the mean of the three filters, which is one filter of the largest size."""
        w = torch.stack([F.pad(q[f"w{k}"], (SIZES[-1] // 2 - k // 2,) * 4) for k in SIZES]).mean(0)
        b = torch.stack([q[f"b{k}"] for k in SIZES]).mean(0)
        return u + F.conv2d(u.movedim(-1, 1), w, b, padding=SIZES[-1] // 2, groups=self.m).movedim(1, -1)

    def change(self, h: Tensor, p: Params, site: Site, training: bool) -> Tensor:
        """What is added to h [B, T, D], or to a map [B, rows, columns, D]."""
        q = {name: t.to(h.dtype) for name, t in p.items()}
        u = F.linear(q["s1"] * F.layer_norm(h, h.shape[-1:], q["ln_w"], q["ln_b"]) + q["s2"] * h, q["down_w"], q["down_b"])
        if h.ndim == 4:
            z = self.filtered(u, q)
        else:
            rows, columns = self.sides(h.shape[1], site)
            first, patches = u.split([h.shape[1] - rows * columns, rows * columns], 1)
            z = torch.cat([first, self.filtered(patches.unflatten(1, (rows, columns)), q).flatten(1, 2)], 1)
        z = F.gelu(z + F.linear(z, q["mix_w"], q["mix_b"]))
        return F.linear(F.dropout(z, self.dropout, training), q["up_w"], q["up_b"])

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        o = call(x)
        h = (x + o).transpose(0, 1) if site.batch_dim else x + o
        f = self.change(h, p, site, call.training)
        return o + (f.transpose(0, 1) if site.batch_dim else f)
