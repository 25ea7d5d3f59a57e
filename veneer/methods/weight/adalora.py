"""AdaLoRA: a product in SVD form whose rank moves, in training, to the layers that need it (2023, arXiv:2303.10512)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from veneer.errors import BadValue
from veneer.init import normal, zeros
from veneer.method import LowRankMethod, Params
from veneer.option import option
from veneer.site import Site
from veneer.strategies.rank_budget import Budget, RankBudget
from veneer.strategy import Strategy


@dataclass(frozen=True)
class AdaLoRA(LowRankMethod):
    """W_eff = W + s · P diag(lambda) Q, s = alpha / (init_r + 1e-5); y = x W_effᵀ + b

    Pick it when the budget is small and layers differ a lot in what they need. The rank budget falls from init_r to
    target_r per matrix while the least important triplets are masked, so the number of steps must be known. Not for
    very short trainings: LoRA is simpler and as good there.

    Tensors: P [out, r] and Q [r, in], N(0, 0.02²); lambda [r], zeros: starts as the base. r = init_r throughout;
    masked triplets have lambda = 0.

    Args:
        t_i, t_f: steps of warm-up and of the final phase; None means a tenth and three tenths of all steps.
        T: all optimiser steps; None takes the number the training loop tells.
        gamma: weight of the orthogonality term, mean over P and Q of ‖PᵀP − I‖ (not squared, as in the authors' code).
    """

    target_r: int = option(8, "average rank at the end", ge=1)
    init_r: int = option(12, "rank at the start", ge=1)
    alpha: float = option(16.0, "scale numerator; 0 or less means the initial rank")
    dropout: float = option(0.0, "dropout on the input of Q, in training", ge=0, lt=1)
    beta1: float = option(0.85, "smoothing of the sensitivity", gt=0, lt=1)
    beta2: float = option(0.85, "smoothing of its uncertainty", gt=0, lt=1)
    gamma: float = option(0.1, "weight of the orthogonality term", ge=0)
    t_i: int | None = option(None, "steps before the budget falls", ge=0)
    t_f: int | None = option(None, "steps at the end with the ranks fixed", ge=0)
    delta_T: int = option(1, "steps between two maskings", ge=1)
    T: int | None = option(None, "all optimiser steps", ge=1)

    sizes = ("init_r", "target_r")
    default_targets = "attn.q attn.k attn.v attn.o attn.qkv cross.q cross.k cross.v cross.o mlp.up mlp.gate mlp.down"
    aliases = {
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "r": "init_r",
        "orth_reg_weight": "gamma",
        "tinit": "t_i",
        "tfinal": "t_f",
        "deltaT": "delta_T",
        "total_step": "T",
    }

    def validate(self) -> None:
        if self.target_r > self.init_r:
            raise BadValue(f"AdaLoRA: target_r={self.target_r} is larger than init_r={self.init_r}; the budget can only fall.")
        if self.T is not None:
            self.budget(self.T)

    @property
    def scale(self) -> float:
        return (self.alpha if self.alpha > 0 else self.init_r) / (self.init_r + 1e-5)

    def budget(self, total: int) -> Budget:
        """The schedule for this many steps. Raises `BadValue` if warm-up and final phase leave no room."""
        t_i = total // 10 if self.t_i is None else self.t_i
        t_f = 3 * total // 10 if self.t_f is None else self.t_f
        if t_i >= total - t_f:
            raise BadValue(f"AdaLoRA: t_i={t_i} and t_f={t_f} leave no step of T={total} to lower the ranks in; choose t_i < T − t_f.")
        return Budget(total, t_i, t_f, self.delta_T)

    def init(self, site: Site, generator: Generator) -> Params:
        r = self.init_r
        return {
            "P": normal((site.out_features, r), generator, 0.02),
            "lambda": zeros((r,)),
            "Q": normal((r, site.in_features), generator, 0.02),
        }

    def factors(self, p: Params, site: Site | None = None) -> tuple[Tensor, Tensor]:
        return p["P"] * (self.scale * p["lambda"]), p["Q"]

    def strategy(self) -> Strategy:
        return RankBudget(self.budget, self.T, self.target_r, self.beta1, self.beta2, self.gamma)
