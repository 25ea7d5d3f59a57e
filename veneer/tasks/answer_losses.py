"""Losses over the answers one may choose from, and their ranking: the T-Few recipe (2022, arXiv:2205.05638).

Scores are log-probabilities of answer tokens, [rows, answers, tokens]; a mask of the same shape says which tokens there are.
An answer without tokens does not exist. The right answer of every row stands first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_scores(logits: Tensor, labels: Tensor, ignored: int = -100) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the answers' tokens and their mask from a causal model's logits.

    Args:
        logits: [rows · answers, tokens, words]; further positions in front (soft prompts) are passed over.
        labels: [rows, answers, tokens]: the token at its own position, `ignored` where it bears no loss.
    """
    wanted = labels.flatten(0, 1)[:, 1:]
    here = logits[:, -labels.shape[-1] :][:, :-1]
    mask = wanted != ignored
    known = here[mask].float().log_softmax(-1)  # of answer tokens only: all positions may not fit
    scores = known.new_zeros(mask.shape).masked_scatter(mask, known.gather(-1, wanted[mask][:, None]).squeeze(-1))
    shape = (*labels.shape[:2], -1)
    return scores.view(shape), mask.view(shape)


def likelihood(scores: Tensor, mask: Tensor) -> Tensor:
    """L_LM: minus the mean log-probability of the right answers' tokens, over all of them in the batch."""
    return -(scores * mask)[:, 0].sum() / mask[:, 0].sum().clamp(min=1)


def unlikelihood(scores: Tensor, mask: Tensor, eps: float = 0.01) -> Tensor:
    """L_UL: minus the mean of log(1 − p + eps) over the tokens of wrong answers; eps=0 is the paper's formula, 0.01 the released one."""
    wrong = mask.clone()
    wrong[:, 0] = False
    terms = torch.log(eps - torch.expm1(scores.masked_fill(~wrong, -1.0)))  # 1 − p without cancellation
    return -(terms * wrong).sum() / wrong.sum().clamp(min=1)


def mean_scores(scores: Tensor, mask: Tensor) -> Tensor:
    """beta [rows, answers]: the mean log-probability of every answer; −∞ for those that do not exist. The largest is the prediction."""
    count = mask.sum(-1)
    return ((scores * mask).sum(-1) / count.clamp(min=1)).masked_fill(count == 0, -torch.inf)


def length_normalised(scores: Tensor, mask: Tensor) -> Tensor:
    """L_LN: cross-entropy of the right answer among all, with beta as logits, mean over rows."""
    return -mean_scores(scores, mask).log_softmax(-1)[:, 0].mean()


def t_few(logits: Tensor, labels: Tensor, **_: object) -> Tensor:
    """L_LM + L_UL + L_LN, as a loss function of a transformers model: labels [rows, answers, tokens]."""
    scores, mask = token_scores(logits, labels)
    return likelihood(scores, mask) + unlikelihood(scores, mask) + length_normalised(scores, mask)
