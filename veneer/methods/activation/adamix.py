"""AdaMix: several bottlenecks in every layer, one drawn at each step of training, their mean at inference (2022, arXiv:2205.12410)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from veneer.init import kaiming_uniform, zeros
from veneer.method import Call, Method, Params
from veneer.option import option
from veneer.site import Site
from veneer.strategies.routing import Routing
from veneer.strategy import Strategy


@dataclass(frozen=True)
class AdaMix(Method):
    """o + W_up[j] act(W_down[i] o + b_down[i]) + b_up[j] after the feed-forward's output o, i and j drawn for each layer at every
    step; in evaluation with the means of W_down, b_down, W_up and b_up in their place

    Pick it where one adapter trains to less than an ensemble would, at one adapter's cost of a step and of inference. Not
    where inference must be free. The authors add a term that keeps the answers of two draws alike; it needs two passes over
    a batch, which a loop of one's own can make, and is not here.

    Tensors: W_down [N, m, D], N copies of one Kaiming-uniform(√5) draw, b_down [N, m], zeros; W_up [N, D, m], b_up [N, D],
    zeros: starts as the base; pick [2], i and j, drawn. What is shared has 1 in the place of N.

    Args:
        share: "up" or "down": one projection for all modules of a layer; "no": N of both.
    """

    N: int = option(4, "modules a layer", ge=1)
    m: int = option(16, "width of the bottleneck", ge=1)
    share: str = option("up", "the projection that all modules of a layer have in common", choices=("up", "down", "no"))
    act: str = option("gelu", "nonlinearity", choices=("gelu", "relu", "silu"))
    seed: int = option(0, "of the draws in training", ge=0)

    kinds = ("linear", "branch")
    sizes = ("m", "N")
    default_lr = 3e-4
    default_targets = "mlp"
    frozen = ("pick",)
    aliases = {"num_experts": "N", "adapter_size": "m", "bottleneck": "m", "non_linearity": "act"}
    limits = {"merge": "it is nonlinear"}

    @property
    def counts(self) -> tuple[int, int]:
        """How many down and how many up projections a layer has."""
        return (1 if self.share == "down" else self.N), (1 if self.share == "up" else self.N)

    def init(self, site: Site, generator: Generator) -> Params:
        D, m, (downs, ups) = site.out_features, self.m, self.counts
        down = kaiming_uniform((m, D), generator).repeat(downs, 1, 1)
        pick = torch.stack([torch.randint(n, (), generator=generator) for n in (downs, ups)])
        return {"W_down": down, "b_down": zeros((downs, m)), "W_up": zeros((ups, D, m)), "b_up": zeros((ups, D)), "pick": pick}

    def check_tensors(self, p: Params, site: Site) -> None:
        pick = p["pick"]
        if pick.dtype != torch.int64 or bool((pick < 0).any() or (pick >= torch.tensor(self.counts, device=pick.device)).any()):
            raise self.refuse(f"pick must name one of {self.counts[0]} and one of {self.counts[1]} projections {{at}}.", site)

    def adapter(self, o: Tensor, p: Params, training: bool) -> Tensor:
        """The bottleneck's output, [..., D] → [..., D]."""

        def one(t: Tensor, side: int) -> Tensor:
            return (t.index_select(0, p["pick"][side : side + 1])[0] if training else t.mean(0)).to(o.dtype)

        u = getattr(F, self.act)(F.linear(o, one(p["W_down"], 0), one(p["b_down"], 0)))
        return F.linear(u, one(p["W_up"], 1), one(p["b_up"], 1))

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        o = call(x)
        return o + self.adapter(o, p, call.training)

    def strategy(self) -> Strategy:
        return Routing(AdaMix, self.seed)
