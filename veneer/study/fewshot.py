"""What k examples in the prompt cost against an adapter trained on them: FLOPs, storage, memory (arXiv:2205.05638, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass

BYTES = 4
"""Of a token id, a trained number and a cached key or value, as in the paper."""


@dataclass(frozen=True)
class FewShot:
    """Sizes of a model, a data set and a plan. Lengths are means in tokens.

    Args:
        parameters: of the base model.
        trained: numbers of the adapter.
        shots: examples in the prompt. shot: one of them with its answer. query: a question with all of its answers.
        cached: keys' width over all layers: what one token adds to each half of the cache.
        encoder_decoder: every parameter sees half of the tokens then.
        steps, batch: of the training.
    """

    parameters: int
    trained: int
    shots: int
    shot: float
    query: float
    cached: int
    encoder_decoder: bool = False
    steps: int = 1000
    batch: int = 8

    @property
    def per_token(self) -> int:
        """FLOPs of one token through the model."""
        return (1 if self.encoder_decoder else 2) * self.parameters

    @property
    def prompt(self) -> float:
        """Tokens of all shots together."""
        return self.shots * self.shot

    @property
    def icl_flops(self) -> float:
        """FLOPs of one prediction with the shots in front."""
        return self.per_token * (self.prompt + self.query)

    @property
    def tuned_flops(self) -> float:
        """FLOPs of one prediction of the adapted model."""
        return self.per_token * self.query

    @property
    def training_flops(self) -> float:
        return 3 * self.per_token * self.steps * self.batch * self.query

    @property
    def icl_bytes(self) -> float:
        """Storage of a task: the shots' token ids."""
        return BYTES * self.prompt

    @property
    def tuned_bytes(self) -> int:
        """Storage of a task: the adapter."""
        return BYTES * self.trained

    @property
    def cache_bytes(self) -> float:
        """Memory for the shots' keys and values, where they are kept instead of read again."""
        return 2 * BYTES * self.prompt * self.cached

    @property
    def break_even(self) -> float:
        """Predictions after which training has cost less than reading the shots every time."""
        return self.training_flops / (self.icl_flops - self.tuned_flops)
