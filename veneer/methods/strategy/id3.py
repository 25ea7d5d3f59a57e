"""ID3: unmasks the trained numbers step by step, the best by gradient over size, until a budget is used (2024, arXiv:2408.14470)."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.errors import BadValue, Unsupported
from veneer.method import StrategyMethod
from veneer.option import option
from veneer.strategies.unmasking import Unmasking
from veneer.strategy import Strategy


@dataclass(frozen=True)
class ID3(StrategyMethod):
    """at step t of T: the ⌊B/T⌋ (+1) masked numbers with the largest |grad| / (|theta| + eps)^exp become free; only free ones change

    Pick it when few numbers may differ from the start, as in `full + id3(B=100000)` or `lora(r=32) + id3(B=0.1)`: early steps
    explore, later ones exploit, and a number set free late is moved less often. Not to save memory in training: gradients and
    the optimiser's moments are whole. Moments begin at step 0 for every number, as in the authors' code (a strategy does not
    own the optimiser), so the first steps of a number set free late are longer than the learning rate.

    exp=0 takes the largest gradients, a large exp the smallest numbers (zeros first). Baselines are chosen once, before the first
    step: "smallest" (PaFi), "largest", "random", "fisher" (FISH: mean squared gradients of `samples` calls of the probe of
    `tuned.begin(steps, probe=…)`, which should give the loss of one sample each), "bitfit" (vectors, norms' among them, in order).
    mask="repeat" chooses B numbers anew at every interval; those given up keep their values.

    Tensors: none; a mask for each trained tensor is the strategy's. The task's own head trains outside the budget. Masked numbers
    stay as they are bit for bit, weight decay or not. Clip gradients after `before_step`: before it, masked ones count as well.
    `veneer.tools.sparse` saves only the numbers that changed.
    """

    B: int | float = option(0.01, "how many numbers may change: a count, or (up to 1.0, with a point) a share", gt=0)
    exp: float = option(0.0, "power of the magnitude that gradients are divided by", ge=0)
    eps: float = option(1e-3, "added to magnitudes", ge=0)
    T: int | None = option(None, "number of optimiser steps; None: what the training loop says", ge=1)
    interval: int = option(1, "steps between two choices; with 5, five steps' numbers at once", ge=1)
    score: str = option("d3", "what is chosen by", choices=("d3", "smallest", "largest", "random", "fisher", "bitfit"))
    mask: str | None = option(
        None, "None: increment for d3, static for the baselines, which know nothing else", choices=("increment", "static", "repeat")
    )
    samples: int = option(1024, "calls of the probe for score='fisher'", ge=1)
    seed: int = option(0, "of score='random'", ge=0)

    aliases = {"budget": "B", "max_steps": "T"}
    limits = {"heads": "it trains nothing but the task's head, which is outside the budget"}

    def validate(self) -> None:
        if isinstance(self.B, float) and self.B > 1 and not self.B.is_integer():
            raise BadValue(f"ID3: B={self.B} is neither a count nor a share; give a whole number, or a share up to 1.0.")
        if self.exp and not self.eps:
            raise BadValue(f"ID3: eps=0 divides by zero where a number is zero and exp={self.exp} is not; give eps more than 0.")
        if self.score != "d3" and self.mask not in (None, "static"):
            raise BadValue(f"ID3: mask={self.mask!r} needs score='d3'; score={self.score!r} is chosen once (mask='static').")

    @property
    def growth(self) -> str:
        """How the mask changes: "increment", "static" or "repeat"."""
        return self.mask or ("increment" if self.score == "d3" else "static")

    def budget(self, numbers: int) -> int:
        """B as a count of so many trained numbers; refuses more than there are."""
        if not numbers:
            raise Unsupported(f"ID3: {self.limits['heads']}.")
        if isinstance(self.B, float) and self.B <= 1:
            return max(int(self.B * numbers), 1)
        if numbers < self.B:
            raise BadValue(
                f"ID3: B={self.B} is more than the {numbers} numbers that are trained; choose B from 1 to {numbers}, or a share."
            )
        return int(self.B)

    def strategy(self) -> Strategy:
        return Unmasking(self)
