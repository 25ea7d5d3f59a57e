"""Load balance: a loss term that keeps a layer's experts about equally used (2024, arXiv:2402.08562)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.maths.experts import balance
from veneer.strategy import Strategy

if TYPE_CHECKING:
    from veneer.tuned import Tuned


class Balance(Strategy):
    """coefficient · Σ over transformer layers of `veneer.maths.experts.balance`, each over all tokens of all its adapted modules.

    Methods of the class `kind` leave their router logits as the note "router" and say with `picks(site)` how many experts
    a token takes.
    Padding tokens count, as in the authors' code: a layer does not know which they are. Under gradient checkpointing
    the term is that of the first pass and backward's second pass adds none; its gradient needs non-reentrant checkpoints.
    """

    def __init__(self, coefficient: float, kind: type) -> None:
        self.coefficient, self.kind = coefficient, kind
        self.tuned: Tuned | None = None
        self.name = ""

    def start(self, tuned: Tuned, name: str, total_steps: int | None = None) -> None:
        self.tuned, self.name = tuned, name

    def losses(self) -> dict[tuple[int | None, int, int], Tensor]:
        """The balance of every layer in the last training pass, by its depth, number of experts and of picks."""
        found: dict[Any, list[Tensor]] = {}
        for site, method, logits in self.tuned.notes(self.name, "router") if self.tuned is not None else ():
            if isinstance(method, self.kind):
                key = site.depth, logits.shape[-1], method.picks(site)  # type: ignore[attr-defined]
                found.setdefault(key, []).append(logits.flatten(0, -2))
        return {key: balance(torch.cat(rows), key[2]) for key, rows in found.items()}

    def loss_terms(self) -> dict[str, Tensor]:
        each = list(self.losses().values())
        return {"balance": self.coefficient * torch.stack([one.to(each[0].device) for one in each]).sum()} if each else {}
