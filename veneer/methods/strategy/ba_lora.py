"""BA-LoRA: three loss terms that keep the tuned model's logits near the base's, varied and simple (2024, arXiv:2408.04556)."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.method import StrategyMethod
from veneer.option import option
from veneer.strategies.output_regularisers import OutputRegularisers

DEFAULTS = {
    ("v1", "nlu"): (1e-4, 4e-4, 1e-4, 3),
    ("v1", "nlg"): (1e-4, 3e-4, 1e-4, 3),
    ("v2", "nlu"): (0.15, 0.03, 0.03, 5),
    ("v2", "nlg"): (0.025, 0.005, 0.005, 10),
}
"""l1, l2, l3, k by version and task."""


@dataclass(frozen=True)
class BALoRA(StrategyMethod):
    """loss + l1 · L_CR + l2 · L_DR + l3 · L_SVDR, of logits Z and the base's Z_P on the same batch

    Pick it against what a noisy or lopsided base hands on, as in `lora(r=128, start='pissa', targets='attn.* mlp.*') + ba-lora`;
    any method does below it. Not where a step's time counts: the base answers every batch too (no second copy of it is held).

    nlu, Z [N, D]: L_CR = T² · KL(softmax(Z_P / T) ‖ softmax(Z / T)) (v1: squared gap of normalised rows); L_DR = Σ_{i≠j} C_ij² / D,
    C the covariance of the batch; L_SVDR = −Σ_{i≤k} s_i / Σ s_i. nlg, rows of Z the tokens that have labels (v1: all tokens, in L_CR
    summed): L_CR the same; L_DR = −H of the top_k largest logits (v1: of all); L_SVDR = −Σ_{i≤k} s_i / ‖Z‖_F (v1: of Z [N, T · V],
    over Σ s_i). Labels are found among the model's inputs; without them all tokens but padding count.

    Unless the schedule is constant, l1 falls along a cosine to a tenth and l2, l3 rise.

    Tensors: none. In models that predict the next token, rows are those from which a label is predicted.
    """

    version: str = option("v2", "v2: the final losses; v1: the first ones", choices=("v1", "v2"))
    task: str | None = option(None, "nlu (classes) or nlg (tokens); None: by the logits' axes", choices=("nlu", "nlg"))
    l1: float | None = option(None, "weight of L_CR; None: the version's and task's own, like the others", ge=0)
    l2: float | None = option(None, "weight of L_DR", ge=0)
    l3: float | None = option(None, "weight of L_SVDR", ge=0)
    k: int | None = option(None, "leading singular values; None: 3 (v1), 10 (nlg) or 5 (nlu)", ge=1)
    T: float = option(2.0, "temperature of L_CR (v2)", gt=0)
    top_k: int = option(20, "logits of a token that L_DR looks at (v2 nlg)", ge=1)
    shift: bool = option(True, "take a label's row from the token before it; False as the authors' code does")
    schedule: str | None = option(
        None,
        "how l2 and l3 rise: after a fifth of the steps, or from the first on; None: two_phase (v2), constant (v1)",
        choices=("two_phase", "linear", "quadratic", "constant"),
    )
    adaptive: bool = option(False, "less L_CR where the base is uncertain: times 0.1 + 0.9 · (1 − H / ln V)")
    svd: str | None = option(
        None, "v2 nlg: singular values; None: exact up to 4096 columns, else randomised", choices=("exact", "gram", "randomised")
    )
    steps: int | None = option(None, "number of optimiser steps; None: what the training loop says", ge=1)
    seed: int = option(0, "of svd='randomised'", ge=0)

    aliases = {"lambda1": "l1", "lambda2": "l2", "lambda3": "l3", "temperature": "T", "topK": "top_k"}
    limits = {"tokens": "it adds tokens to the model's answers, so the base's do not line up with them"}

    @property
    def plan(self) -> str:
        """The schedule in words."""
        return self.schedule or ("two_phase" if self.version == "v2" else "constant")

    @property
    def off(self) -> bool:
        """Whether no term has a weight."""
        return self.l1 == self.l2 == self.l3 == 0

    def task_of(self, axes: int) -> str:
        """The task, by the number of the logits' axes where none is given."""
        return self.task or ("nlg" if axes == 3 else "nlu")

    def numbers(self, task: str) -> tuple[float, float, float, int]:
        """l1, l2, l3 and k for this task."""
        given = self.l1, self.l2, self.l3, self.k
        return tuple(own if value is None else value for value, own in zip(given, DEFAULTS[self.version, task]))  # type: ignore[return-value]

    def strategy(self) -> OutputRegularisers:
        return OutputRegularisers(self)
