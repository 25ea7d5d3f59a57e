"""A teacher that follows its student: running means of everything that is trained; what is frozen both share (2021, arXiv:2104.14294)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from veneer.maths.self_supervision import moved_centre, sharpened, sinkhorn
from veneer.strategy import Strategy
from veneer.tuned import Tuned

MOMENTUM = 0.992
TEMPERATURES = (0.04, 0.07)
WARM = 0.3
"""Share of the steps in which the temperature rises."""
STILL = 0.01
"""Share of the steps in which the prototypes do not move, as in the first of DINO's hundred epochs."""


class Teacher(Strategy):
    """The student's trained tensors, averaged: t ← m t + (1 − m) s after every step, m from 0.992 to 1 along a cosine.

    Args:
        still: name of the head's last layer, which stands still at first.
        centring: what keeps the teacher from saying one thing of everything: "centre", a running mean that is taken off, or "sinkhorn".
    """

    def __init__(self, still: str, centring: str = "centre") -> None:
        self.still, self.centring = still, centring
        self.student: dict[str, nn.Parameter] = {}
        self.copies: dict[str, Tensor] = {}
        self.centres: dict[str, Tensor] = {}
        self.step, self.total = 0, 1

    def start(self, tuned: Tuned, name: str, total_steps: int | None = None) -> None:
        self.student = dict(tuned.named_parameters(name))
        self.copies = {key: p.detach().clone() for key, p in self.student.items()}
        self.step, self.total = 0, max(1, total_steps or 1)

    def before_step(self) -> None:
        if self.step < STILL * self.total:
            for name, p in self.student.items():
                if name.startswith(f"{self.still}/"):
                    p.grad = None

    def after_step(self) -> None:
        self.step += 1
        rest = (1 - MOMENTUM) * (math.cos(math.pi * min(1.0, self.step / self.total)) + 1) / 2
        for name, p in self.student.items():
            self.copies[name].lerp_(p.detach(), rest)

    @property
    def tau(self) -> float:
        first, last = TEMPERATURES
        return first + (last - first) * min(1.0, self.step / (WARM * self.total))

    @contextmanager
    def acting(self, model: nn.Module) -> Iterator[None]:
        """The teacher's tensors in the student's place, in evaluation mode and without gradients, inside the `with` block."""
        modes = [(m, m.training) for m in model.modules()]
        self._swap()
        model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._swap()
            for module, mode in modes:
                module.training = mode

    def _swap(self) -> None:
        for name, p in self.student.items():
            p.data, self.copies[name] = self.copies[name], p.data

    def answers(self, key: str, logits: Tensor, learn: bool) -> Tensor:
        """Sharpened probabilities [..., K] for logits; in training the centre of this key then moves."""
        if self.centring == "sinkhorn":
            return sinkhorn(logits.flatten(0, -2), self.tau).view_as(logits)
        centre = self.centres.get(key)
        centre = logits.new_zeros(logits.shape[-1]) if centre is None else centre.to(logits)
        found = sharpened(logits, centre, self.tau)
        if learn:
            self.centres[key] = moved_centre(centre, logits).detach()
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"copies": self.copies, "centres": self.centres, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.copies = {name: t.to(self.student[name]) for name, t in state["copies"].items()}
        self.centres, self.step = dict(state["centres"]), state["step"]
