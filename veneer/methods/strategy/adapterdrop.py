"""AdapterDrop: at every step the lowest layers, a random number of them, train without their adapters (2020, arXiv:2010.11918)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from veneer.method import StrategyMethod
from veneer.option import option
from veneer.strategies.layer_dropping import LayerDropping
from veneer.strategy import Strategy


@dataclass(frozen=True)
class AdapterDrop(StrategyMethod):
    """before each step: n ~ U{0, …, most}; the adapters of the n lowest layers answer as if they were not there, and do not train

    Pick it with any method that has tensors in every layer, as in `bottleneck-adapter + adapterdrop`, when inference is to
    leave out lower layers, as many as time allows: one training gives adapters that bear it. Backward ends at the lowest layer
    that is left. For a number of layers known beforehand give the method itself leave_out=(0, 1, 2). In evaluation all
    adapters act; `lower(tuned, n)` of `veneer.strategies.layer_dropping` leaves out the n lowest layers.

    Tensors: none. Tensors outside the blocks act and train at every step.
    """

    most: int | None = option(None, "the largest number of layers left out at a step; None: all but the last", ge=0)
    seed: int = option(0, "of the draws", ge=0)

    @property
    def limits(self) -> Mapping[str, str]:  # type: ignore[override]
        return {
            "layers": "its tensors do not lie in several layers, so there are no lower ones to leave out",
            "attention": "it adds keys and values and changes no layer's output, so it cannot be silenced there",
            "parameter": "its weight is read from outside the layer, so it cannot be silenced there",
            "between": "what it adds travels from block to block, so no block can do without it",
        }

    def strategy(self) -> Strategy:
        return LayerDropping(self)
