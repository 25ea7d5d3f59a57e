"""HRA: a layer's input mirrored in a few trained planes, one after another (2024, arXiv:2405.17484)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

from veneer.init import kaiming_uniform
from veneer.maths.rotation import Rotation, identity, width
from veneer.method import Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class HRA(Rotation):
    """W_eff = W H, H = (I − 2 u_1 u_1ᵀ) … (I − 2 u_r u_rᵀ), u_i = column / ‖column‖; y = x W_effᵀ + b

    Pick it for a rotation at LoRA's price: exactly orthogonal, two thin products, half of LoRA's numbers at the same r.
    Not where the change must scale or add directions. On embedding tables it turns the vectors.

    Tensors: u [in, r], Kaiming-uniform over r/2, columns equal in pairs: two equal mirrors undo each other, so an even r
    starts as the base, to rounding. An odd r starts with r random mirrors.

    Args:
        apply_GS: orthogonalise the columns first: H = I − 2 QQᵀ. No such H is near I, so the columns start unpaired
            and training does not start from the base.
    """

    r: int = option(8, "number of mirrors; even to start as the base", ge=1)
    apply_GS: bool = option(False, "mirrors at right angles to each other")

    default_lr = 2e-3
    default_targets = "attn.q attn.v attn.qkv cross.q cross.v"
    aliases = {"rank": "r"}

    @property
    def limits(self) -> Mapping[str, str]:  # type: ignore[override]
        if self.apply_GS:
            return {"identity": "mirrors at right angles never undo each other"}
        return {"identity": "an odd number of mirrors cannot undo each other"} if self.r % 2 else {}

    def check(self, site: Site) -> None:
        if self.apply_GS and self.r > width(site):
            raise self.refuse(f"apply_GS needs r ≤ {width(site)} features, not r={self.r}, {{at}}; lower r.", site)

    def init(self, site: Site, generator: Generator) -> Params:
        if self.limits:
            return {"u": kaiming_uniform((width(site), self.r), generator)}
        return {"u": kaiming_uniform((width(site), self.r // 2), generator).repeat_interleave(2, dim=1)}

    def pieces(self, p: Params, site: Site, training: bool = False) -> Params:
        """V [in, r] and K [r, in] with H = (I − V K)ᵀ: the r mirrors as one product, K = S⁻¹ Vᵀ with S from VᵀV alone."""
        V = p["u"] / torch.linalg.vector_norm(p["u"], dim=0)
        gram = V.mT @ V
        if self.apply_GS:  # QQᵀ is the projector on the columns, whichever way they are orthogonalised
            return {"V": V, "K": torch.linalg.solve(gram / 2, V.mT)}
        S = gram.tril(-1) + identity(gram) / 2
        K = torch.linalg.solve_triangular(S, V.mT, upper=False)
        one, two = V[:, ::2], V[:, 1::2]
        # a k₁ + b k₂ = a (k₁ + k₂) + (b − a) k₂: what near pairs cancel is cancelled here, not in x's dtype
        V = torch.cat([one, two - one[:, : self.r // 2]], 1)
        return {"V": V, "K": torch.cat([K[::2] + pad(K[1::2], (0, 0, 0, self.r % 2)), K[1::2]])}

    def turned(self, x: Tensor, pieces: Params, back: bool = False) -> Tensor:
        V, K = pieces["V"].to(x.dtype), pieces["K"].to(x.dtype)
        return x - ((x @ K.mT) @ V.mT if back else (x @ V) @ K)
