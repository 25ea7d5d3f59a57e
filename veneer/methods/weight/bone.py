"""Bone: one small block, added to every shard of a weight or steered by it (2024, arXiv:2409.15371)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import linear, pad

from veneer.init import zeros
from veneer.maths.factor import nearest_divisors
from veneer.method import AdditiveMethod, Call, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class Bone(AdditiveMethod):
    """W_eff = W + [Dᵀ Dᵀ …] cut to in columns; structure="bat": W_eff,ij = W_ij + W_ij D + D for every r × r block of W

    Pick bone for speed and memory: cheaper than LoRA at equal count, as its input side only adds up groups of r
    features. Pick bat where convergence matters more than the step's time: each block is guided by the frozen one, and
    the change can be of full rank. Not with LoRA's learning rate: D acts on sums of in / r features.

    Tensors: D, zeros, so training starts from the base: bone [r, out]; bat [out/r, r, r], or [in/r, r, r] with share="col".

    Args:
        structure: "bone" is the name's later meaning, "bat" that of the paper's first version.
        share: bat: the blocks of one row of blocks have a D in common ("row"), or those of one column ("col"). Col runs
            without building a weight and on packed layers; a row's weight is built anew in every pass.
    """

    r: int = option(64, "features in a group, or size of a block", ge=1)
    structure: str = option("bone", "add the block, or steer it by the weight", choices=("bone", "bat"))
    share: str = option("row", "bat: which blocks share a D", choices=("row", "col"))

    default_targets = "attn.q attn.k attn.v attn.o attn.qkv cross.q cross.k cross.v cross.o mlp.up mlp.gate mlp.down"
    default_lr = 2e-5
    aliases = {"rank": "r", "variant": "structure"}

    def check(self, site: Site) -> None:
        out, inside = site.out_features, site.in_features
        if self.structure == "bat" and (out % self.r or inside % self.r):
            legal = nearest_divisors(self.r, out, inside)
            raise self.refuse(f"r={self.r} does not divide out={out} and in={inside} {{at}}, as bat must; choose r = {legal}.", site)
        if self.r > inside:
            raise self.refuse(f"r={self.r} is larger than in={inside} {{at}}; choose r ≤ {inside}.", site)

    def init(self, site: Site, generator: Generator) -> Params:
        if self.structure == "bone":
            return {"D": zeros((self.r, site.out_features))}
        return {"D": zeros(((site.out_features if self.share == "row" else site.in_features) // self.r, self.r, self.r))}

    def group_sum(self, x: Tensor) -> Tensor:
        """S(x) [..., r]: the sum of consecutive groups of r features; a last, shorter group counts as ending in zeros."""
        whole = x.shape[-1] // self.r * self.r
        S = x[..., :whole].unflatten(-1, (-1, self.r)).sum(-2)
        return S if whole == x.shape[-1] else S + pad(x[..., whole:], (0, whole + self.r - x.shape[-1]))

    def factors(self, p: Params, site: Site) -> tuple[Tensor, Tensor]:
        """L = Dᵀ [out, r] and R = [I I …] [r, in], for bone; D may be given for a part of the outputs, then repeated."""
        D, groups = p["D"], -(-site.in_features // self.r)
        return D.T.repeat(site.out_features // D.shape[1], 1), torch.eye(self.r).to(D).repeat(1, groups)[:, : site.in_features]

    def change(self, p: Params, site: Site) -> Tensor:
        D, groups = p["D"], -(-site.in_features // self.r)
        return D.T.repeat(site.out_features // D.shape[1], groups)[:, : site.in_features]

    def delta(self, x: Tensor, p: Params, site: Site) -> Tensor:
        t = linear(self.group_sum(x), p["D"].T.to(x.dtype))  # autograd keeps S(x), not x
        copies = site.out_features // t.shape[-1]
        return t if copies == 1 else t.repeat(*(1,) * (t.ndim - 1), copies)

    def adds(self, site: Site) -> bool:
        return self.structure == "bone" and site.kind == "linear" and not self.dropout

    def low_rank(self, W: Tensor, p: Params, site: Site) -> tuple[Tensor, Tensor] | None:
        return self.factors(p, site) if self.structure == "bone" else None

    def weight(self, W: Tensor, p: Params, site: Site | None = None) -> Tensor:
        if self.structure == "bone":
            return super().weight(W, p, site)
        D, blocks = p["D"], W.reshape(W.shape[0] // self.r, self.r, -1, self.r)  # [i, row, j, column]
        if self.share == "row":
            return (blocks + torch.einsum("iajb,ibc->iajc", blocks, D) + D[:, :, None]).reshape(W.shape)
        return (blocks + torch.einsum("iajb,jbc->iajc", blocks, D) + D.transpose(0, 1)).reshape(W.shape)

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        if self.structure == "bone" and site.kind == "embedding":
            return call.add_low_rank(x, *self.factors(p, site))  # the dense change would be as large as the table
        if self.structure == "bone" or site.kind != "linear":
            return super().forward(call, x, p, site)
        if self.share == "row":
            return call.rebuild(x, lambda W, p: self.weight(W, p, site), p)
        # W_eff = (W + J)(I + D) − J for block-diagonal D and J with an I in every block: the frozen layer reads x + D x
        groups = x.reshape(-1, site.in_features // self.r, self.r).transpose(0, 1)  # [j, tokens, r], a view
        Dx = torch.bmm(groups, p["D"].mT.to(x.dtype)).transpose(0, 1).reshape(x.shape)
        y = call(x + Dx)
        return (y.unflatten(-1, (-1, self.r)) + self.group_sum(Dx)[..., None, :]).flatten(-2)
