"""Unmasking: which single numbers of an adapter's tensors may change, under a budget (2024, arXiv:2408.14470)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from veneer.errors import BadValue
from veneer.strategies.probing import agreed, undisturbed
from veneer.strategy import Strategy

if TYPE_CHECKING:
    from veneer.methods.strategy.id3 import ID3
    from veneer.tuned import Tuned


def quota(t: int, B: int, T: int, k: int = 1) -> int:
    """How many numbers are free at step t (from 0) of T: ⌊B/T⌋ more at every step, one more in the first B mod T steps, B at the end.

    With an interval k they come every k steps, k steps' worth at once."""
    steps = min((t // k + 1) * k, T)
    return steps * (B // T) + min(steps, B % T)


def d3(theta: Tensor, grad: Tensor, exp: float, eps: float) -> Tensor:
    """|grad| / (|theta| + eps)^exp, in float32 at least."""
    score = grad.to(torch.promote_types(theta.dtype, torch.float32)).abs()
    return score / (theta.to(score.dtype).abs() + eps) ** exp if exp else score


def largest(scores: Tensor, k: int) -> Tensor:
    """Positions of the k largest of a flat tensor, ascending; of equal ones the first."""
    if k >= len(scores):
        return torch.arange(len(scores), device=scores.device)
    if k < 1:
        return torch.empty(0, dtype=torch.long, device=scores.device)
    least = scores.topk(k, sorted=False).values.min()
    taken = scores > least
    ties = (scores == least).nonzero().flatten()
    taken[ties[: k - int(taken.sum())]] = True
    return taken.nonzero().flatten()


def chosen(scores: Iterable[tuple[str, Tensor]], k: int) -> dict[str, Tensor]:
    """Name → flat positions of the k largest over all tensors, of equal ones the first; −inf is never taken.

    One tensor at a time: its own k largest meet the k best so far, so that no list of all scores is built."""
    names: list[str] = []
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for name, score in scores:
        flat = score.flatten()
        at = largest(flat, min(k, int((flat > -torch.inf).sum())))
        new = flat[at], torch.full_like(at, len(names)), at
        names.append(name)
        if best is not None:
            new = tuple(torch.cat([old, more.to(old.device)]) for old, more in zip(best, new))  # type: ignore[assignment]
        keep = largest(new[0], k)
        best = new[0][keep], new[1][keep], new[2][keep]
    return {} if best is None else {name: best[2][best[1] == i] for i, name in enumerate(names)}


def budgeted(tuned: Tuned, name: str) -> dict[str, Tensor]:
    """An adapter's trained tensors by part, site and name, each once. A task's own head is none of them: it trains freely."""
    found: dict[int, tuple[str, Tensor]] = {}
    for part in tuned.adapters[name].parts:
        if not (part.method.trains_heads or part.site.trainable_head):
            for key, t in part.tensors().items():
                if isinstance(t, torch.nn.Parameter):
                    found.setdefault(id(t), (f"{part.index}/{part.site.name}/{key}", t))
    return dict(found.values())


class Unmasking(Strategy):
    """Lets the gradients of free numbers through, and puts back what else the optimiser moved.

    The optimiser owns its moments: they begin at step 0 for every number, with gradients of zero while it is masked. A copy of the
    tensors lives only from `before_step` to `after_step`, when no activations are held; so masked numbers stay as they are bit
    for bit under any optimiser and weight decay, and nothing is kept between steps but the masks.
    """

    def __init__(self, how: ID3) -> None:
        self.how, self.step = how, 0
        self.T: int | None = how.T
        self.B = 0
        self.tuned: Tuned | None = None
        self.tensors: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}

    def start(self, tuned: Tuned, name: str, total_steps: int | None = None) -> None:
        self.tuned, self.tensors = tuned, budgeted(tuned, name)
        self.T = self.how.T or total_steps or self.T
        self.B = self.how.budget(sum(t.numel() for t in self.tensors.values()))
        if self.how.score == "bitfit" and all(t.ndim > 1 for t in self.tensors.values()):
            raise BadValue("ID3: score='bitfit' takes vectors, and every trained tensor is a matrix; choose another score.")
        self.place()

    def place(self) -> None:
        """A mask for every tensor, on its device."""
        for key, t in self.tensors.items():
            mask = self.masks.get(key)
            self.masks[key] = torch.zeros_like(t, dtype=torch.bool) if mask is None else mask.to(t.device)

    @property
    def free(self) -> int:
        """How many numbers may change."""
        return sum(int(mask.sum()) for mask in self.masks.values())

    @torch.no_grad()
    def before_step(self) -> None:
        if (more := self.wanted()) > 0:
            for key, at in chosen(self.scores(), more).items():
                self.masks[key].view(-1)[at.to(self.masks[key].device)] = True
        for key, t in self.tensors.items():
            if t.grad is not None:
                t.grad.masked_fill_(~self.masks[key], 0)
                self.before[key] = t.detach().clone()

    @torch.no_grad()
    def after_step(self) -> None:
        for key, old in self.before.items():
            t = self.tensors[key]
            t.copy_(torch.where(self.masks[key], t, old))
        self.before = {}
        self.step += 1

    def wanted(self) -> int:
        """How many more numbers this step sets free; "repeat" gives the others up first."""
        growth, k = self.how.growth, self.how.interval
        if growth == "static":
            return 0 if self.free else self.B
        if growth == "repeat":
            if self.step % k == 0:
                self.masks = {key: torch.zeros_like(mask) for key, mask in self.masks.items()}
            return self.B - self.free
        if self.T is None:
            raise BadValue("ID3 needs the number of optimiser steps: give T=… or call tuned.begin(total_steps).")
        due = quota(self.step, self.B, self.T, k)
        return due - self.free if self.step % k == 0 else 0

    def scores(self) -> Iterator[tuple[str, Tensor]]:
        """Scores of the masked numbers, tensor by tensor; −inf where they are free already, none for tensors without a gradient."""
        fisher = self.fisher() if self.how.score == "fisher" else {}
        generator = Generator().manual_seed(self.how.seed)
        for key, t in self.tensors.items():
            if t.grad is not None:
                score = fisher[key] if fisher else self.score(t.detach(), t.grad, generator)
                yield key, score.nan_to_num(0.0, posinf=0.0, neginf=-torch.inf).masked_fill_(self.masks[key], -torch.inf)

    def score(self, theta: Tensor, grad: Tensor, generator: Generator) -> Tensor:
        if self.how.score == "d3":
            return d3(theta, grad, self.how.exp, self.how.eps)
        if self.how.score == "random":
            return torch.rand(theta.shape, generator=generator).to(theta.device)
        if self.how.score == "bitfit":
            return torch.full_like(theta, 1.0 if theta.ndim < 2 else -torch.inf)
        return theta.abs() if self.how.score == "largest" else -theta.abs()

    def fisher(self) -> dict[str, Tensor]:
        """The mean square of the loss's gradient over `samples` batches of the probe."""
        if self.probe is None or self.tuned is None:
            raise BadValue(
                "ID3: score='fisher' squares gradients of single samples: call tuned.begin(steps, probe=…) with a function that "
                "gives the loss on a batch of one sample, or choose score='d3'."
            )
        keys, tensors = zip(*((k, t) for k, t in self.tensors.items() if t.grad is not None))
        total = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
        with undisturbed(self.tuned.model), torch.enable_grad():
            for _ in range(self.how.samples):
                for F, g in zip(total, torch.autograd.grad(self.probe(), tensors, allow_unused=True)):
                    if g is not None:
                        F += g.to(F.dtype).square() / self.how.samples
        return {key: agreed(F) for key, F in zip(keys, total)}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "T": self.T, "masks": dict(self.masks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.T = state["step"], state["T"]
        self.masks = {key: mask.bool().clone() for key, mask in state["masks"].items()}
        self.place()
