"""MiSS: Bone with dropout, and with a block that repeats along the outputs, too (2024, arXiv:2409.15371)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator

from veneer.errors import BadValue
from veneer.init import zeros
from veneer.maths.factor import nearest_divisors
from veneer.method import Params
from veneer.methods.weight.bone import Bone
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class MiSS(Bone):
    """W_eff = W + [Dᵀ Dᵀ …] cut to in columns, Dᵀ itself out / mini_r copies of a block on top of one another

    Pick it as Bone, where dropout or still fewer parameters are wanted: r · mini_r a layer, whatever its width. Not
    where outputs mini_r apart should change differently.

    Tensors: D [r, mini_r], zeros, so training starts from the base; mini_r = out unless given. structure="bat" as in Bone.
    """

    mini_r: int | None = option(None, "size of the block along the outputs; None: out", ge=1)
    dropout: float = option(0.0, "dropout on what the block reads, in training; not for bat", ge=0, lt=1)

    sizes = ("r", "mini_r")
    aliases = {"rank": "r", "variant": "structure", "miss_dropout": "dropout"}

    def validate(self) -> None:
        if self.structure == "bat" and (self.dropout or self.mini_r is not None):
            given = f"dropout={self.dropout}" if self.dropout else f"mini_r={self.mini_r}"
            raise BadValue(f"MiSS: {given} goes with structure='bone', not with 'bat', whose change reads the weight.")

    def check(self, site: Site) -> None:
        super().check(site)
        if self.mini_r is not None and site.out_features % self.mini_r:
            legal = nearest_divisors(self.mini_r, site.out_features)
            raise self.refuse(f"mini_r={self.mini_r} does not divide out={site.out_features} {{at}}; choose mini_r = {legal}.", site)

    def init(self, site: Site, generator: Generator) -> Params:
        return super().init(site, generator) if self.mini_r is None else {"D": zeros((self.r, self.mini_r))}
