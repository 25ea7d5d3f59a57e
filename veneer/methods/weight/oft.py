"""OFT: a layer's input turned block by block by trained orthogonal matrices (2023, arXiv:2306.07280)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from veneer.init import zeros
from veneer.kernels.blocks import turned_by_blocks
from veneer.kernels.recomputed import recomputed
from veneer.maths.factor import divisors
from veneer.maths.rotation import Rotation, cayley, neumann, width
from veneer.method import Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class OFT(Rotation):
    """W_eff = W Rᵀ, R = blockdiag(R_1 … R_N), R_i = I + 2A + … + 2A^(t−2) + A^(t−1), A = U − Uᵀ; y = (x R) Wᵀ + b

    Pick it where the pretrained geometry should stay: angles between a layer's neurons hardly move, so large learning
    rates forget little. It costs a product of block size k per input feature. Not where the change must be able to
    scale or to add directions: a rotation cannot. On embedding tables it turns the vectors.

    Tensors: Q [N, k(k−1)/2] ([1, …] with block_share), zeros: starts as the base; row i is the strict upper triangle
    of U_i, row by row. N = in / k.

    Args:
        use_cayley_neumann: False gives R_i = (I − A)(I + A)⁻¹, exactly orthogonal. The series (OFTv2,
            arXiv:2506.19847) approximates the inverse of that, so an adapter trained one way means nothing the other way.
        coft: keep every R_i near I: A_i is scaled back where ‖A_i‖ > eps / √(rows of Q), which gradients do not see.
    """

    k: int = option(32, "block size; must divide what is turned", ge=2)
    r: int = option(0, "number of blocks, in place of their size; 0: by size", ge=0)
    block_share: bool = option(False, "one block for the whole layer")
    use_cayley_neumann: bool = option(True, "a series in place of the inverse")
    num_cayley_neumann_terms: int = option(5, "terms t of the series; 3 counts as 4", ge=2)
    coft: bool = option(False, "keep the rotation within eps of the identity")
    eps: float = option(6e-5, "coft: the largest distance", gt=0)
    block_dropout: float = option(0.0, "share of blocks left out in training", ge=0, lt=1)

    sizes = ("k",)
    default_lr = 4e-4
    default_targets = "attn.q attn.v attn.qkv cross.q cross.v"
    aliases = {"oft_block_size": "k", "module_dropout": "block_dropout"}

    @property
    def limits(self) -> Mapping[str, str]:  # type: ignore[override]
        return {"gradients": "they pass the projection of coft as if it were not there"} if self.coft else {}

    def check(self, site: Site) -> None:
        size, name, value = width(site), "r" if self.r else "k", self.r or self.k
        legal = [d for d in divisors(size) if (size // d if self.r else d) > 1]  # blocks of one feature cannot turn
        if value not in legal:
            near = [str(d) for d in (*[d for d in legal if d < value][-1:], *[d for d in legal if d > value][:1])]
            choose = f"choose {name} = {' or '.join(near)}" if near else "choose other targets"
            raise self.refuse(f"{name}={value} does not cut the {size} features {{at}} into equal blocks; {choose}.", site)

    def block(self, site: Site) -> int:
        """The block size here."""
        return width(site) // self.r if self.r else self.k

    def init(self, site: Site, generator: Generator) -> Params:
        k = self.block(site)
        return {"Q": zeros((1 if self.block_share else width(site) // k, k * (k - 1) // 2))}

    def blocks(self, Q: Tensor, k: int) -> Tensor:
        """R − I by blocks [rows of Q, k, k]."""
        row, column = torch.triu_indices(k, k, 1, device=Q.device)
        U = Q.new_zeros(len(Q), k * k).index_copy(1, row * k + column, Q).unflatten(1, (k, k))
        A = U - U.mT
        if self.coft:
            length = torch.linalg.matrix_norm(A.detach(), keepdim=True)
            A = A + A.detach() * ((self.eps / math.sqrt(len(Q)) / length).clamp_max(1) - 1)
        return neumann(A, self.num_cayley_neumann_terms) if self.use_cayley_neumann else cayley(A)

    def pieces(self, p: Params, site: Site, training: bool = False) -> Params:
        k = self.block(site)
        C = recomputed(p["Q"], lambda Q, _: self.blocks(Q, k), {})  # of the series nothing is kept but Q
        N = width(site) // k
        if training and int(self.block_dropout * N):
            C = C * (torch.randperm(N, device=C.device) >= int(self.block_dropout * N))[:, None, None]
        return {"C": C}

    def turned(self, x: Tensor, pieces: Params, back: bool = False) -> Tensor:
        C = pieces["C"].to(x.dtype)
        return turned_by_blocks(x, C.mT if back else C)
