"""Patch tokens on their grid: low-rank changes that are made on wavelet coefficients of an image, not on single tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.errors import BadValue
from veneer.init import ones
from veneer.maths.wavelet import filtered
from veneer.method import Call, LowRankMethod, Params
from veneer.option import option
from veneer.site import Site

ACTS: dict[str | None, Callable] = {None: lambda c: c, "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


@dataclass(frozen=True, kw_only=True)
class Gridded(LowRankMethod):
    """y = call(x) + L · S⁻¹(g ⊙ act(S(R x))), S the wavelet transform along the two sides of the grid, where `on_grid`

    Without act and gains the transforms cancel and y = call(x) + L R x on the patches. Tensors: with gains g [4], ones, for
    LL, LH, HL, HH (first letter: the rows of the grid; H: high-pass).
    """

    grid: tuple[int, int] | None = option(None, "grid: rows and columns of patches; None: as many of each")
    prefix_tokens: int = option(0, "grid: tokens before the patches, such as the class token", ge=0)
    prefix_update: bool = option(False, "grid: change the prefix tokens too, without wavelets")
    gains: bool = option(False, "grid: train a gain for each band (ours)")
    act: str | None = option(None, "grid: nonlinearity on the r coefficients", choices=("relu", "gelu", "silu", "tanh"))

    on_grid = False  # and `wavelet`: for the method to say
    wavelet = "haar"

    def validate(self) -> None:
        grid = self.grid
        if grid is not None and (not isinstance(grid, tuple) or len(grid) != 2 or any(side < 2 or side % 2 for side in grid)):
            raise BadValue(f"{self.label}: grid={self.grid!r} must be two even numbers, rows and columns of patches, such as (14, 14).")

    @property
    def limits(self) -> Mapping[str, str]:  # type: ignore[override]
        if not self.on_grid:
            return {}
        found = dict.fromkeys(("embedding", "conv2d"), "its tokens must stand on a grid")
        alike = not (self.act or self.gains or (self.prefix_tokens and not self.prefix_update))
        return found if alike else {**found, "merge": "a rule that differs from token to token cannot be a weight"}

    def check(self, site: Site) -> None:
        if self.on_grid and site.kind != "linear":
            raise self.refuse(f"a grid of tokens is what linear layers see, not the {site.kind} {{at}}; choose another form.", site)

    def first_gains(self) -> Params:
        return {"g": ones((4,))} if self.on_grid and self.gains else {}

    def low_rank(self, W: Tensor, p: Params, site: Site) -> tuple[Tensor, Tensor] | None:
        return None if "merge" in self.limits else self.factors(p, site)

    def adds(self, site: Site) -> bool:
        return site.kind == "linear" and "merge" not in self.limits

    def sides(self, tokens: int, site: Site) -> tuple[int, int]:
        """Rows and columns of the patches' grid."""
        patches = tokens - self.prefix_tokens
        h, w = self.grid or (math.isqrt(max(patches, 0)),) * 2
        if h * w != patches or h % 2 or w % 2 or not patches:
            what = f"{tokens} tokens {{at}}, {self.prefix_tokens} of them before the patches, are no grid of {h} × {w} with even sides"
            raise self.refuse(f"{what}; choose grid=(rows, columns) and prefix_tokens to fit, or another form.", site)
        return h, w

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        if not self.on_grid:
            return super().forward(call, x, p, site)
        (L, R), axis = self.factors(p, site), 0 if site.batch_dim else x.ndim - 2  # the tokens' axis
        h, w = self.sides(x.shape[axis], site)
        if "merge" not in self.limits:
            return call.add_low_rank(x, L, R)

        def change(c: Tensor) -> Tensor:
            g = p["g"].view(2, 2) if self.gains else c.new_ones(2, 2)
            return ACTS[self.act](c) * g.repeat_interleave(h // 2, 0).repeat_interleave(w // 2, 1).unsqueeze(-1).to(c.dtype)

        z = F.linear(x, R.to(x.dtype)).movedim(axis, -2)  # features first: the transforms act on tokens only
        first, patches = z[..., : self.prefix_tokens, :], z[..., self.prefix_tokens :, :]
        if self.act or self.gains:
            patches = filtered(patches, (h, w), self.wavelet, change)
        return call(x) + F.linear(torch.cat([first * self.prefix_update, patches], -2), L.to(x.dtype)).movedim(-2, axis)
