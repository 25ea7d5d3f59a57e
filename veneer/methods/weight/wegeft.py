"""WeGeFT: a weight change generated from the frozen weight by two thin maps that many layers share (2025, arXiv:2312.00700)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import dropout, linear

from veneer.errors import BadValue, Unsupported
from veneer.init import kaiming_uniform, zeros
from veneer.kernels.low_rank import edit_low_rank
from veneer.method import Call, Params, WeightMethod
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class WeGeFT(WeightMethod):
    """W_eff = W + s · (W phiᵀ) psi = W (I + s · phiᵀ psi), s = alpha / r; y = (x + s (x psiᵀ) phi) Wᵀ + b

    Pick it for LoRA's speed and memory with 10 to 50 times fewer parameters: one pair serves all layers of a kind.
    Not where a large budget is free. transform="output" (ours): W_eff = (I + s phiᵀ psi) W with both [r, out].

    Tensors, one pair per tie group: phi [r, in], zeros; psi [r, in], Kaiming-uniform(√5) (or the other way round): the base.
    """

    r: int = option(64, "rank of the generator", ge=1)
    alpha: float | None = option(None, "scale numerator; None means r; 2 r in the authors' runs", gt=0)
    dropout: float = option(0.0, "dropout on the weight the generator reads, in training", ge=0, lt=1)
    start: str = option("psi_random", "which of the two maps starts random", choices=("psi_random", "phi_random"))
    share: str = option("type", "one pair for all layers of a role, for all, or for each", choices=("type", "all", "none"))
    transform: str = option("input", "side of the layer that is edited", choices=("input", "output"))
    positions: tuple[int, int] | None = option(None, "(k, l): edit the first k and last l tokens only, never merged; None: all")
    default_lr = 2e-3
    default_targets = "attn.q attn.v attn.qkv cross.q cross.v"
    aliases = {"init": "start", "transform_dim": "transform", "rank": "r"}

    def validate(self) -> None:
        where = self.positions
        if where is not None and (len(where) != 2 or min(where) < 0 or sum(where) < 1 or self.dropout):
            raise BadValue(f"WeGeFT: positions={where!r} must be two counts of tokens, such as (4, 4), without dropout on the weight.")

    @property
    def scale(self) -> float:
        return (self.r if self.alpha is None else self.alpha) / self.r

    @property
    def limits(self) -> Mapping[str, str]:  # type: ignore[override]
        features = ("merge", "embedding", "conv2d")
        return {} if self.positions is None else dict.fromkeys(features, "only some token positions are edited, which no weight can do")

    def check(self, site: Site) -> None:
        if self.positions is not None and site.kind != "linear":
            raise self.refuse(f"positions are for linear layers, not for the {site.kind} {{at}}.", site)

    def tie(self, site: Site) -> str | None:
        kind = site.role if site.role != "other" else f"other.{site.name.rsplit('.', 1)[-1]}"  # without a role: by name
        return {"type": kind, "all": "all", "none": None}[self.share]

    def init(self, site: Site, generator: Generator) -> Params:
        return self.init_shared([site], generator) if self.share == "none" else {}

    def init_shared(self, sites: Sequence[Site], generator: Generator) -> Params:
        (first, width), *rest = [(s.name, s.in_features if self.transform == "input" else s.out_features) for s in sites]
        for name, other in (pair for pair in rest if pair[1] != width):
            what = f"{first} and {name} share a pair but have {width} and {other} {self.transform} features"
            raise BadValue(f"WeGeFT: {what}; choose share='none' or other targets.")
        pair = kaiming_uniform((self.r, width), generator), zeros((self.r, width))
        return dict(zip(("psi", "phi") if self.start == "psi_random" else ("phi", "psi"), pair))

    def low_rank(self, W: Tensor, p: Params, site: Site | None = None) -> tuple[Tensor, Tensor]:
        phi, psi, W = self.scale * p["phi"], p["psi"], W.flatten(1).to(p["phi"].dtype)
        return (W @ phi.T, psi) if self.transform == "input" else (phi.T, psi @ W)

    def weight(self, W: Tensor, p: Params, site: Site | None = None) -> Tensor:
        if self.positions is not None:
            raise Unsupported(f"WeGeFT: {self.limits['merge']}.")
        return W + torch.matmul(*self.low_rank(W, p)).reshape(W.shape)

    def edit(self, h: Tensor, p: Params, site: Site) -> Tensor:
        """s (h psiᵀ) phi, at the chosen tokens."""
        change = linear(linear(h, p["psi"].to(h.dtype)), (self.scale * p["phi"].T).to(h.dtype))
        if self.positions is not None:
            axis = 0 if site.batch_dim else h.ndim - 2  # the tokens'
            at = torch.arange(h.shape[axis], device=h.device)
            at = (at < self.positions[0]) | (at >= len(at) - self.positions[1])
            change = change * at.reshape(-1, *(1,) * (h.ndim - 1 - axis))
        return change

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        plain = site.kind == "linear" and not self.dropout
        if plain and self.transform == "output":  # the bias is not edited
            y, b = call(x), call.bias()
            return y + self.edit(y if b is None else y - b.to(y.dtype), p, site)
        if plain and self.positions is None and site.rows is None:  # no weight is read, nothing of its size is made
            return call(edit_low_rank(x, self.scale * p["phi"].T, p["psi"]))
        if plain and self.positions is not None:
            return call(x + self.edit(x, p, site))
        return call.add_low_rank(x, *self.low_rank(dropout(call.weight(), self.dropout, call.training), p))
