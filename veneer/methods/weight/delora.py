"""DeLoRA: a low-rank change of bounded length, whose strength is trained apart from its directions (2025, arXiv:2503.18225)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.linalg import vector_norm

from veneer.init import kaiming_uniform, zeros
from veneer.method import LowRankMethod, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class DeLoRA(LowRankMethod):
    """W_eff = W + B diag(lambda / (r ‖A_i‖ ‖B^i‖)) A diag(w_n), norms at least 1e-4; y = x W_effᵀ + b

    Pick it where training must not drift: the change relative to the lengths w_n of W's columns, ΔW diag(w_n)⁻¹, is never
    longer than lambda, whatever the learning rate. Not where the first steps must be small: B's direction counts, not its
    length, so the change is near its full length as soon as B is not zero.

    Tensors: A [r, in], Kaiming-uniform(√5); B [out, r], zeros; lambda [1], lambda_initial: starts as the base. Frozen:
    w_n [in], the column norms of W.

    Args:
        lambda_initial: W itself has the relative length √in, so that 15 would be the larger part of a narrow layer: None
            means 15, but at most 0.6 √in (15 from 625 inputs on).
    """

    r: int = option(8, "rank of the update", ge=1)
    lambda_initial: float | None = option(None, "first value of lambda, the bound of the relative change; None: 15, less if narrow", gt=0)

    frozen = ("w_n",)
    default_targets = "attn.q attn.v attn.qkv cross.q cross.v"
    aliases = {"rank": "r", "delora_lambda": "lambda_initial"}

    def init(self, site: Site, generator: Generator) -> Params:
        most = min(15.0, 0.6 * site.in_features**0.5) if self.lambda_initial is None else self.lambda_initial
        A, B = kaiming_uniform((self.r, site.in_features), generator), zeros((site.out_features, self.r))
        return {"A": A, "B": B, "lambda": zeros((1,)) + most, "w_n": zeros((site.in_features,))}

    def init_from_weight(self, W: Tensor, b: Tensor | None, p: Params, site: Site, generator: Generator) -> Params:
        W = W.flatten(1)
        return {**p, "w_n": vector_norm(W.to(torch.promote_types(W.dtype, torch.float32)), dim=0)}

    def factors(self, p: Params, site: Site | None = None) -> tuple[Tensor, Tensor]:
        A, B = p["A"], p["B"]
        lengths = vector_norm(A, dim=1).clamp_min(1e-4) * vector_norm(B, dim=0).clamp_min(1e-4)
        return B * (p["lambda"] / (self.r * lengths)), A * p["w_n"]
