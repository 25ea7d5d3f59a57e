"""ADA-DEFT: DEFT with a learned gate for every feed-forward network; closed ones are left out (2024, arXiv:2402.01911)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from veneer.errors import Unsupported
from veneer.init import ones
from veneer.method import OutputMethod, Params
from veneer.option import option
from veneer.site import Site
from veneer.strategies.density import GatedDensity

OPEN = 3.0


@dataclass(frozen=True)
class AdaDEFT(OutputMethod):
    """y = a · (x Wᵀ + b) at mlp.down, a = sigmoid(theta) / sigmoid(3), with lam · mean of a · D + mu · mean of a in the loss

    Pick it when a model of many layers should run faster on any hardware, as in `lora(r=8) + ada-deft`: it comes last, and
    `veneer.strategies.density.thinned(tuned, tau)` then gives a plain model without the networks whose gates have fallen below tau.
    Not for few layers, each of which is needed. The gate's form and loss are this library's: the paper only says that each layer
    has a learned weight and that networks of little weight are skipped.

    Tensors: theta [1] a network, 3.0: a = 1 exactly, at most 1.05, so training starts from the base. D is `deft`'s.

    Args:
        lr_ratio: theta moves by about the learning rate a step and has to fall from 3 to about −3.
    """

    lam: float = option(1.0, "weight of the gated density in the loss", ge=0)
    mu: float = option(0.1, "weight of the mean gate in the loss", ge=0)
    eps: float = option(1e-7, "square of the size below which units are pulled to zero", gt=0)
    padding: bool = option(False, "count padding tokens as well, as the authors' code does")
    lr_ratio: float = option(10.0, "learning rate of theta over that of the rest", gt=0)

    default_targets = "mlp.down"
    kinds = ("linear",)
    sizes = ()
    turns_bias = True
    aliases = {"lambda": "lam", "epsilon": "eps"}
    limits = {"activations": "the model has no feed-forward network whose activation can be seen as a module"}

    def select(self, sites: Sequence[Site]) -> list[Site]:
        if self.targets is None and not any(s.role == "mlp.down" and s.kind in self.kinds for s in sites):
            raise Unsupported(f"ADA-DEFT: {self.limits['activations']}.")
        return super().select(sites)

    def check(self, site: Site) -> None:
        if site.role != "mlp.down":
            raise self.refuse(f"a gate acts on what a feed-forward network gives, mlp.down, not on the {site.role} {{at}}.", site)

    def init(self, site: Site, generator: Generator) -> Params:
        return {"theta": OPEN * ones((1,))}

    def gate(self, p: Params) -> Tensor:
        """a [1]; exactly 1 at the start."""
        return torch.sigmoid(p["theta"]) / torch.sigmoid(torch.full_like(p["theta"], OPEN))

    def turn(self, h: Tensor, p: Params, site: Site) -> Tensor:
        return h * self.gate(p)

    def lr_ratios(self) -> dict[str, float]:
        return {} if self.lr_ratio == 1 else {"theta": self.lr_ratio}

    def strategy(self) -> GatedDensity:
        return GatedDensity(self.lam, self.mu, self.eps, self.padding)
