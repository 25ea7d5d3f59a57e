"""IST: at each step only some layers' adapters train, drawn by an importance learned on the way (2024, arXiv:2410.11772)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from veneer.method import StrategyMethod
from veneer.option import option
from veneer.strategies.layer_sampling import LayerSampling
from veneer.strategy import Strategy


@dataclass(frozen=True)
class IST(StrategyMethod):
    """before each step: N_u · L layers train, drawn by sigmoid(−I); every T_u steps: I_i += mu · (exp(−l_k) − mean) · p_i (1 − p_i)

    Pick it with any method that has tensors in every layer, as in `lora(r=8) + ist`, when memory or time of a step counts:
    layers below the lowest one drawn keep nothing for backward, and three quarters of the gradients do not exist. With
    scored=False layers are drawn uniformly (RST): no extra passes, no probe. Not for methods whose tensors all layers share.

    l_k is the task loss, in evaluation mode, with the adapters of candidate k's layers damped to beta times their effect; I is
    large for layers that can be damped. Scoring needs `tuned.begin(steps, probe=…)`; where the probe has a method `again`
    that gives the loss on the batch it gave last, all candidates see one batch, else each sees its own.

    Tensors: none. I [layers], zeros at first, is the strategy's. Tensors outside the blocks, and those that several layers
    share, train at every step. Under DistributedDataParallel give find_unused_parameters=True: every process draws the same.
    """

    N_u: float = option(0.25, "share of the layers that train at a step (one layer at least)", gt=0, le=1)
    N_v: float = option(0.5, "share of the layers that a candidate damps (one layer at least)", gt=0, le=1)
    K: int = option(3, "candidates in a round of scoring; fewer where there are not so many sets of layers", ge=1)
    T_u: int = option(10, "optimiser steps between rounds of scoring", ge=1)
    beta: float = option(0.25, "what is left of a damped adapter's effect", ge=0)
    mu: float = option(10.0, "learning rate of the scores", gt=0)
    scored: bool = option(True, "learn the layers' importance; without it they are drawn uniformly (RST)")
    seed: int = option(0, "of the draws", ge=0)

    @property
    def limits(self) -> Mapping[str, str]:  # type: ignore[override]
        layered = {
            "layers": "none of its tensors lies in a layer, so there is nothing to choose from",
            "shared": "layers share every tensor it trains, so none can be left out alone",
        }
        effect = "so its effect cannot be damped to score layers"
        damped = {
            "attention": f"it adds keys and values and changes no layer's output, {effect}",
            "between": f"it lengthens what blocks hand on, {effect}",
            "parameter": f"its weight is read from outside the layer, {effect}",
        }
        return layered | damped if self.scored else layered

    def strategy(self) -> Strategy:
        return LayerSampling(self)
