"""Ring penalty: keeps tensor-ring matrices near the identity, or near rotations, at the cost of their cores (2025, arXiv:2501.08727)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from veneer.maths.tensor_ring import from_identity, from_orthogonal
from veneer.strategy import Strategy

if TYPE_CHECKING:
    from veneer.tuned import Tuned


class RingPenalty(Strategy):
    """Adds weight · Σ ‖T − Id‖² ("identity") or weight · Σ ‖TᵀT − Id‖² ("orthogonal") over all transforms T, tied ones once.

    A transform's cores are a method's tensors A1, A2 …
    """

    def __init__(self, slug: str, form: str, weight: float) -> None:
        self.slug, self.form, self.weight = slug, form, weight
        self.rings: list[list[Tensor]] = []

    def start(self, tuned: Tuned, name: str, total_steps: int | None = None) -> None:
        rings = [[t for key, t in p.items() if key.startswith("A")] for _, method, p in tuned.entries(name) if method.slug == self.slug]
        self.rings = list({id(cores[0]): cores for cores in rings}.values())

    def loss_terms(self) -> dict[str, Tensor]:
        distance = from_identity if self.form == "identity" else from_orthogonal
        return {"transform": self.weight * sum(distance(cores) for cores in self.rings)}  # type: ignore[dict-item]
