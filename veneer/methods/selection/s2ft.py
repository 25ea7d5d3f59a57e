"""S2FT: some heads and some feed-forward channels of the model trained, as slices of their weights (2024, arXiv:2412.06289)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from veneer.errors import BadValue
from veneer.init import zeros
from veneer.maths.slices import Slices
from veneer.maths.units import blocks, drawn, features, letter, partner, units
from veneer.method import Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class S2FT(Slices):
    """o, down: y = x Wᵀ + b + x[..., I] Vᵀ (W_eff[:, I] = W[:, I] + V); v, up: y[..., I] += x Vᵀ (W_eff[I, :] = W[I, :] + V)

    Pick it for LoRA's cost with updates of full rank on whole heads and channels, and for adapters that are to be fused,
    switched or served side by side: each is a small dense block with its indices, and two on different seeds hardly meet.
    Not for layers outside attention and feed-forward networks. q, k and gate have no slice.

    Tensors: V [out, s] (o, down) or [s, in] (v, up), zeros: starts as the base; I [s], the features of the chosen heads
    (v: key-value heads) or channels, fixed.

    Args:
        v, o, u, d: share of all heads (v, o) or channels (u, d) of a stack of blocks whose values, output, up or down
            projection is trained; 0 leaves those layers out. `targets` can narrow that further. The default shares of o and
            d are one unit at least, in however small a model; any other that comes to none is refused.
        selection: "random" draws out of all blocks together, so that blocks get different numbers and some none. Scores
            choose within each block, in equal shares: the norm of a unit's slice, the mean magnitude of what it puts into
            o or down (batches=… when attaching), both, or the norm of its slice's gradients (batches=… with labels, or loss=…).
    """

    v: float = option(0.0, "share of heads whose value projection is trained", ge=0, le=1)
    o: float = option(0.052, "share of heads whose output projection is trained", ge=0, le=1)
    u: float = option(0.0, "share of channels whose up projection is trained", ge=0, le=1)
    d: float = option(0.02, "share of channels whose down projection is trained", ge=0, le=1)

    sizes = ("d", "o", "u", "v")
    default_lr = 5e-4
    default_targets = "attn.v attn.o cross.v cross.o mlp.up mlp.down"
    aliases = {"v_ratio": "v", "o_ratio": "o", "u_ratio": "u", "d_ratio": "d"}

    def validate(self) -> None:
        if not (self.v or self.o or self.u or self.d):
            raise BadValue("S2FT: v=0, o=0, u=0 and d=0 leave nothing to train; give one of them a share, such as d=0.02.")

    def share(self, site: Site) -> float:
        return getattr(self, letter(site), 0.0)

    def select(self, sites: Sequence[Site]) -> list[Site]:
        chosen = super().select(sites)
        shared = [s for s in chosen if letter(s) and self.share(s)]
        if chosen and not shared:
            shares, roles = ", ".join(f"{k}={getattr(self, k):g}" for k in "voud"), ", ".join(sorted({s.role for s in chosen}))
            raise BadValue(f"S2FT: {shares} train nothing of {roles}; target attn.v, attn.o, mlp.up or mlp.down and give them a share.")
        return [s for s in shared if self.wanted(s)]

    def check(self, site: Site) -> None:
        super().check(site)
        if not letter(site):
            raise self.refuse(f"role {site.role!r} has no slice {{at}}; target attn.v, attn.o, mlp.up or mlp.down.", site)
        self.count(site)

    def count(self, site: Site) -> int:
        """Units chosen out of all blocks of the site's stack."""
        name, share, n = letter(site), self.share(site), units(site)
        if not n or features(site) % n:
            said = f"{n} heads do not divide the {features(site)} features" if n else "the number of heads is not known"
            raise self.refuse(f"{said} {{at}}; choose other targets.", site)
        total = n * len(blocks(site, self.leave_out))
        usual = share == getattr(type(self), name) > 0  # at least one unit, however small the model
        count = int(total * share) or int(usual)
        if not count:
            least = math.ceil(1e4 / total) / 1e4
            what = "heads" if name in "vo" else "channels"
            raise self.refuse(f"{name}={share:g} of {total} {what} is less than one {{at}}; choose {name} ≥ {least:g}.", site)
        return count

    def rows(self, site: Site) -> bool:
        return letter(site) in ("v", "u")

    def width(self, site: Site) -> int:
        return features(site) // units(site)

    def wanted(self, site: Site) -> int:
        if self.selection == "random":
            return len(self.drawn(site))
        among, count = blocks(site, self.leave_out), self.count(site)
        at = among.index(site.index)
        return (at + 1) * count // len(among) - at * count // len(among)

    def drawn(self, site: Site) -> Tensor:
        found = drawn(site, blocks(site, self.leave_out), self.count(site), self.seed)
        return torch.tensor(found, dtype=torch.int64)

    def heard(self, site: Site, sites: Sequence[Site]) -> Site | None:
        return next((s for s in sites if s.role == partner(site) and s.depth == site.depth), None)

    def init(self, site: Site, generator: Generator) -> Params:
        I = self.first(site)
        return {"V": zeros((len(I), site.in_features) if self.rows(site) else (site.out_features, len(I))), "I": I}

    def values(self, p: Params) -> Tensor:
        return p["V"]
