"""Child-tuning: gradients reach a part of the numbers only, drawn at every step or chosen once by the data (2021, arXiv:2109.05687)."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.method import StrategyMethod
from veneer.methods.strategy.id3 import ID3
from veneer.option import option
from veneer.strategies.child_network import ChildNetwork
from veneer.strategies.unmasking import Unmasking
from veneer.strategy import Strategy


@dataclass(frozen=True)
class ChildTuning(StrategyMethod):
    """F: grad ← grad ⊙ M / p, M ~ Bernoulli(p) anew at every step; D: M fixed, 1 at the share p with the largest mean squared gradients

    Pick it against overfitting on few examples, with methods that train many numbers, as in `full + child-tuning(p=0.3)`; D where
    the task's own data should say which numbers matter. Not to save memory: gradients and moments are whole.

    F scales what is left by 1 / p, and the optimiser's moments go on moving numbers that are masked at a step. D is
    `id3(B=p, score=fisher)`: it needs `tuned.begin(steps, probe=…)` with the loss of one sample a call, numbers outside the child
    stay as they are bit for bit, weight decay or not (the authors decay them), and nothing is rescaled.

    Tensors: none. The task's own head trains as usual.
    """

    mode: str = option("F", "task-free or by the task's data", choices=("F", "D"))
    p: float = option(0.3, "share of the numbers that gradients reach; 0.2 to 0.4 for F, 0.1 to 0.3 for D in the paper", gt=0, le=1)
    samples: int = option(1024, "calls of the probe for D", ge=1)
    seed: int = option(0, "of the draws of F", ge=0)

    aliases = {"reserve_p": "p"}
    limits = {"heads": "it trains nothing but the task's head, which is outside the budget"}

    def strategy(self) -> Strategy:
        return ChildNetwork(self) if self.mode == "F" else Unmasking(ID3(B=float(self.p), score="fisher", samples=self.samples))
