"""Direct preference optimisation: better and worse answers to one prompt, without a reward model (2023, arXiv:2305.18290)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
CHUNK = 256
"""Positions whose log-probabilities over the vocabulary are held at a time."""


def answer_logp(logits: Tensor, labels: Tensor, *, aligned: bool = False) -> Tensor:
    """Summed log-probability of every row's answer [batch], in float32 at least.

    Args:
        logits: [batch, length, words]. labels: [batch, length], -100 where nothing is counted.
        aligned: logits and labels stand at the same positions (encoder-decoders); else logits tell the next token.
    """
    if not aligned:
        logits, labels = logits[:, :-1], labels[:, 1:]
    exact = torch.promote_types(logits.dtype, torch.float32)
    sums = []
    for part, told in zip(logits.split(CHUNK, 1), labels.split(CHUNK, 1)):
        lost = F.cross_entropy(part.to(exact).flatten(0, 1), told.flatten(), ignore_index=IGNORED, reduction="none")
        sums.append(-lost.view(told.shape).sum(1))
    return torch.stack(sums).sum(0)


def advantage(policy: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> Tensor:
    """h [batch]: how much more the policy prefers the better answer than the reference does; pairs are (better, worse)."""
    return (policy[0] - policy[1]) - (reference[0] - reference[1])


def preference_loss(h: Tensor, beta: float = 0.1, label_smoothing: float = 0.0, ipo: bool = False) -> Tensor:
    """Loss of every pair [batch]: −(1 − ε) log σ(βh) − ε log σ(−βh), or (h − 1/2β)²."""
    if ipo:
        return (h - 1 / (2 * beta)).square()
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)


def rewards(policy: Tensor, reference: Tensor, beta: float = 0.1) -> Tensor:
    """β (log π − log π_ref) of answers [batch]."""
    return beta * (policy - reference)
