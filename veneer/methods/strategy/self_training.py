"""Self-training: a slow copy of the trained tensors labels the pictures that have no masks (DACS, 2020, arXiv:2007.08702)."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.method import StrategyMethod
from veneer.option import option
from veneer.strategies.self_labelling import SelfLabelling
from veneer.strategy import Strategy


@dataclass(frozen=True)
class SelfTraining(StrategyMethod):
    """after step k: t ← d · t + (1 − d) · p, d = min(1 − 1/(k + 1), decay); pictures without masks: ŷ = argmax of the model with t

    Pick it for semantic segmentation when there are pictures of the domain that counts, but no masks, as in `lora(r=8) +
    self-training` with `--unlabelled DOMAIN`. Not where none of the classes looks alike in both domains: wrong labels confirm
    themselves. Every such picture gets, before it is learned from, half of the classes of a picture with a mask that is in the
    same batch: their pixels are pasted on it, their labels on ŷ (ClassMix, arXiv:2007.07936). All pixels weigh the same, so
    half as many pictures without masks as with masks make the authors' weight of one half.

    Rows without masks are those whose labels are all `ignored`; batches without such rows pass as they are. Until `start` they
    are left out, unless a batch has no others. The slow copy labels in evaluation mode and is no part of the saved adapter.

    Tensors: none. t, like the trained tensors p, starts from them and is the strategy's.
    """

    decay: float = option(0.99, "how much of the slow copy stays at a step, at most", ge=0, lt=1)
    start: float = option(0.2, "share of the steps before pictures without masks are used", ge=0, lt=1)
    ignored: int = option(255, "label of pixels that do not count")
    seed: int = option(0, "of what is pasted where", ge=0)

    def strategy(self) -> Strategy:
        return SelfLabelling(self)
