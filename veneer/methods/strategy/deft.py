"""DEFT: a loss term that drives the activations of feed-forward networks to zero (2024, arXiv:2402.01911)."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.method import StrategyMethod
from veneer.option import option
from veneer.strategies.density import Density
from veneer.strategy import Strategy


@dataclass(frozen=True)
class DEFT(StrategyMethod):
    """loss + lam · mean over samples and layers of D, D = mean over tokens and units of h² / (h² + eps)

    Pick it with any method, as in `lora(r=8) + deft`, when the tuned model runs where zero activations are skipped, or to see
    how sparse a task lets it be. Not for speed on ordinary hardware: `ada-deft` leaves out whole networks there.

    h is what the activation function gives, before it is multiplied in a gated network. Encoder and decoder each have
    their mean, and the two are added. The slope of D is largest at |h| = √(eps / 3), about 1 / √eps: with the default, right for
    ReLU, only units near 2e-4 are moved, so clip gradients; GELU and SiLU, which are hardly ever zero, want eps of 0.01 to 20.
    `veneer.strategies.density.densities` counts what is left, exactly or above a threshold.

    Tensors: none. Every training pass is looked at; evaluation is not touched. Prompts' own tokens make masks of padding
    not fit: all tokens count then.
    """

    lam: float = option(1.0, "weight of the density in the loss", ge=0)
    eps: float = option(1e-7, "square of the size below which units are pulled to zero", gt=0)
    padding: bool = option(False, "count padding tokens as well, as the authors' code does")
    modules: str | None = option(None, "names of the activation modules, where they are not found")

    aliases = {"lambda": "lam", "epsilon": "eps"}
    limits = {"activations": "the model has no feed-forward network whose activation can be seen as a module"}

    def strategy(self) -> Strategy:
        return Density(self.lam, self.eps, self.padding, self.modules)
