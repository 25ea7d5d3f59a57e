"""Rein: after every block patches attend to learned tokens, through maps that all blocks share (2023, arXiv:2312.04265)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from veneer.errors import BadValue
from veneer.init import kaiming_uniform, ones, uniform, zeros
from veneer.maths.image_side import on_images
from veneer.maths.patches import attention, on_patches
from veneer.method import Call, Method, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class Rein(Method):
    """f ← f + s · (W_f (S_{1:} (T_{1:} W_Tᵀ + b_T) + f) + b_f), S = softmax(f Tᵀ / √D), T = A B, for the patches f after a block

    Pick it for dense prediction on frozen vision transformers under domain shift. Not for small budgets: the two maps that
    all blocks share hold 2 D² numbers. Token 0 is a sink: it takes attention and gives nothing. Tokens before the patches stay.

    Tensors, each block: A [m, r], B [r, D], or with r=None T [m, D], uniform in ±√(6 / (3·patch² + √(D·r))). Shared by
    blocks of equal width: W_T, W_f [D, D], b_T, b_f [D], Kaiming-uniform(√5), biases uniform in ±1/√D; s []. With
    exact_start W_f and b_f are zero and s is 1, so training starts from the base. With `query` also W_Q [query, D],
    W_M [query, 3·query], b_Q, b_M [query], which only `queries` reads.

    Args:
        query: make object queries from the tokens for a decoder of one's own, which calls `queries`.
    """

    m: int = option(100, "number of tokens, the sink among them", ge=2)
    r: int | None = option(16, "rank of the tokens; None: trained as they are", ge=1)
    exact_start: bool = option(True, "start exactly from the base; False: near it, with s = 0.001, as the authors")
    prefix_tokens: int = option(1, "tokens before the patches, such as the class token", ge=0)
    patch: int = option(16, "side of a patch in pixels", ge=1)
    query: int = option(0, "width of object queries made from the tokens; 0: none", ge=0)

    kinds = ("block",)
    sizes = ("r", "m")
    default_targets = "block"
    aliases = {"token_length": "m", "lora_dim": "r", "patch_size": "patch", "query_dims": "query", "zero_mlp_delta_f": "exact_start"}

    @property
    def limits(self) -> dict[str, str]:  # type: ignore[override]
        near = {} if self.exact_start else {"identity": "W_f starts at random numbers and s at 0.001"}
        return {"merge": "patches attend to tokens; no weight does", **near}

    def select(self, sites: Sequence[Site]) -> list[Site]:
        return on_images(super().select(sites), sites, self.label)

    def check(self, site: Site) -> None:
        least = min(self.m, site.out_features)
        if self.r is not None and self.r > least:
            raise self.refuse(f"r={self.r} is larger than min(m, width)={least} {{at}}; choose r ≤ {least}, or None.", site)

    def tie(self, site: Site) -> str | None:
        return f"width{site.out_features}"

    def init(self, site: Site, generator: Generator) -> Params:
        D, r = site.out_features, self.r
        bound = (6 / (3 * self.patch**2 + (D * (r or D)) ** 0.5)) ** 0.5
        if r is None:
            return {"T": uniform((self.m, D), generator, bound)}
        return {"A": uniform((self.m, r), generator, bound), "B": uniform((r, D), generator, bound)}

    def init_shared(self, sites: Sequence[Site], generator: Generator) -> Params:
        D, q = sites[0].out_features, self.query
        sizes = {"T": (D, D), "f": (D, D), **({"Q": (q, D), "M": (q, 3 * q)} if q else {})}
        p = {}
        for name, (out, inside) in sizes.items():
            p[f"W_{name}"] = kaiming_uniform((out, inside), generator)
            p[f"b_{name}"] = kaiming_uniform((out,), generator, inside)
        if self.exact_start:
            p |= {"W_f": zeros((D, D)), "b_f": zeros((D,))}
        return {**p, "s": ones(()) * (1.0 if self.exact_start else 1e-3)}

    def tokens(self, p: Params) -> Tensor:
        return p["T"] if self.r is None else p["A"] @ p["B"]

    def delta(self, f: Tensor, p: Params) -> Tensor:
        """The change of the patches f [..., D], scaled."""
        T = self.tokens(p)
        S = attention(f, T.to(f.dtype), f.shape[-1])[..., 1:]
        W_f, b_f = p["s"] * p["W_f"], p["s"] * p["b_f"]
        V = F.linear(F.linear(T[1:], p["W_T"], p["b_T"]), W_f)  # W_f on the few tokens, not on what each patch takes of them
        return F.linear(f, W_f.to(f.dtype), b_f.to(f.dtype)) + S @ V.to(f.dtype)

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        return on_patches(call(x), self.prefix_tokens, self, site, lambda f: self.delta(f, p))

    def queries(self, blocks: Sequence[Params]) -> Tensor:
        """Object queries [m, query] for a decoder, from the tensors of all blocks: `[p for _, _, p in tuned.entries()]`."""
        if not self.query:
            raise BadValue(f"{self.label}: query=0 makes no object queries; choose query=256, say.")
        Q = torch.stack([F.linear(self.tokens(p), p["W_Q"], p["b_Q"]) for p in blocks])  # [blocks, m, query]
        statistics = torch.stack([Q.amax(0), Q.mean(0), Q[-1]], -1).flatten(-2)
        return F.linear(statistics, blocks[0]["W_M"], blocks[0]["b_M"])
