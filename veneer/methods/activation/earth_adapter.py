"""Earth-Adapter: bottlenecks for all, low and high spatial frequencies after a block, mixed for each patch (2025, arXiv:2504.06220)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from veneer.errors import BadValue
from veneer.init import kaiming_uniform, normal, ones, zeros
from veneer.maths.frequency import cut_off, low_pass
from veneer.maths.image_side import on_images
from veneer.maths.patches import on_patches, sides
from veneer.method import Call, Method, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class EarthAdapter(Method):
    """F ← F + alpha · (w_1 Ad_spatial(F) + w_2 Ad_low(F_low) + w_3 Ad_high(F − F_low)), w = softmax(F W_rᵀ + b_r)

    F are the patches after a block, F_low their low frequencies on the grid, Ad(z) = ReLU(z W_dᵀ + b_d) W_uᵀ + b_u. Blocks
    without frequency experts: F ← F + alpha · Ad_spatial(F). Pick it for dense prediction on images whose features carry
    high-frequency artifacts (remote sensing). Not where patches stand on no grid, or inference must be free.

    Tensors, names with "spatial." and, at frequency blocks, "low." and "high." in front: W_d [m, D], W_u [D, m],
    Kaiming-uniform(√5); b_d [m], b_u [D], uniform in ±1/√fan_in; W_r [3, D], b_r [3], uniform in ±1/√D; alpha [], 0.1.
    With exact_start W_u and b_u are zero, so training starts from the base. With t also T [patches, t], N(0, 0.02²), which
    the spatial expert reads beside F.

    Args:
        frequency: the authors use the first or last 3 or 6 of 24 blocks.
        rho: F_low holds the frequencies −c … c − 1 of both axes, c = ⌊rho · the grid's shorter side / 2⌋.
    """

    m: int = option(32, "width of each bottleneck", ge=1)
    frequency: int | None = option(None, "so many last blocks have frequency experts; negative: first ones; None: an eighth of them")
    rho: float = option(0.3, "share of each axis' frequencies that is low", gt=0, le=1)
    exact_start: bool = option(True, "start exactly from the base; False: as the authors, with random W_u")
    prefix_tokens: int = option(1, "tokens before the patches, such as the class token and registers", ge=0)
    grid: tuple[int, int] | None = option(None, "rows and columns of patches; None: as many of each")
    t: int = option(0, "width of a learned input to the spatial expert, one for each patch of the grid", ge=0)

    kinds = ("block",)
    sizes = ("m",)
    default_targets = "block"
    aliases = {"dim": "m", "adapter_dim": "m", "cutoff_ratio": "rho", "token_length": "t"}

    @property
    def limits(self) -> dict[str, str]:  # type: ignore[override]
        near = {} if self.exact_start else {"identity": "W_u starts at random numbers"}
        return {"merge": "it is nonlinear", **near}

    def validate(self) -> None:
        grid = self.grid
        if grid is not None and (not isinstance(grid, tuple) or len(grid) != 2 or any(type(n) is not int or n < 1 for n in grid)):
            raise BadValue(f"{self.label}: grid={grid!r} must be two whole numbers, rows and columns of patches, such as (32, 32).")
        if self.t and grid is None:
            raise BadValue(f"{self.label}: t={self.t} needs the number of patches; give grid=(rows, columns), or t=0.")

    def select(self, sites: Sequence[Site]) -> list[Site]:
        return on_images(super().select(sites), sites, self.label)

    def check(self, site: Site) -> None:
        n = abs(self.frequency or 0)
        if n > site.length:
            raise self.refuse(
                f"frequency={self.frequency} is more than the {site.length} blocks {{at}}; choose at most ±{site.length}.", site
            )

    def experts(self, site: Site) -> tuple[str, ...]:
        n = site.length // 8 if self.frequency is None else self.frequency
        mixed = site.index < -n if n < 0 else site.index >= site.length - n and n > 0
        return ("spatial", "low", "high") if mixed else ("spatial",)

    def init(self, site: Site, generator: Generator) -> Params:
        p, m, D, names = {}, self.m, site.out_features, self.experts(site)
        for name in names:
            inside = D + (self.t if name == "spatial" else 0)
            W_u, b_u = kaiming_uniform((D, m), generator), kaiming_uniform((D,), generator, m)
            p[f"{name}.W_d"], p[f"{name}.b_d"] = kaiming_uniform((m, inside), generator), kaiming_uniform((m,), generator, inside)
            p[f"{name}.W_u"], p[f"{name}.b_u"] = (zeros((D, m)), zeros((D,))) if self.exact_start else (W_u, b_u)
        if len(names) > 1:
            p |= {"W_r": kaiming_uniform((3, D), generator), "b_r": kaiming_uniform((3,), generator, D)}
        if self.t and self.grid:
            p["T"] = normal((self.grid[0] * self.grid[1], self.t), generator, 0.02)
        return {**p, "alpha": ones(()) * 0.1}

    def delta(self, f: Tensor, p: Params, site: Site) -> Tensor:
        """The change of the patches f [..., patches, D]. The filter acts on the grid and W_d on channels, so W_d comes first."""
        names, m, D = self.experts(site), self.m, f.shape[-1]
        q = {name: tensor.to(f.dtype) for name, tensor in p.items()}
        W_u = (p["alpha"] * torch.cat([p[f"{n}.W_u"] for n in names], 1)).to(f.dtype)
        b_u = (p["alpha"] * torch.stack([p[f"{n}.b_u"] for n in names])).to(f.dtype)
        shift = torch.cat([q[f"{n}.b_d"] for n in names])
        if self.t:
            sides(f.shape[-2], self.grid, self, site)
            shift = shift + F.pad(F.linear(q["T"], q["spatial.W_d"][:, D:]), (0, shift.numel() - m))
        u = F.linear(f, torch.cat([q[f"{n}.W_d"][:, :D] for n in names]))
        if len(names) == 1:
            return F.linear(F.relu(u + shift), W_u, b_u[0])
        grid = sides(f.shape[-2], self.grid, self, site)
        low, smooth = low_pass(u[..., m:], grid, cut_off(grid, self.rho, self, site)).to(f.dtype).chunk(2, -1)
        u = F.relu(torch.cat([u[..., :m], low, u[..., 2 * m :] - smooth], -1) + shift)
        w = self.router(f, p)
        return F.linear((u.unflatten(-1, (3, m)) * w.unsqueeze(-1)).flatten(-2), W_u) + w @ b_u

    def router(self, f: Tensor, p: Params) -> Tensor:
        """w [..., patches, 3]: spatial, low, high."""
        logits = F.linear(f, p["W_r"].to(f.dtype), p["b_r"].to(f.dtype))
        return logits.to(torch.promote_types(f.dtype, torch.float32)).softmax(-1).to(f.dtype)

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        return on_patches(call(x), self.prefix_tokens, self, site, lambda f: self.delta(f, p, site))
