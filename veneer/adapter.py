"""An attached adapter: its parts, its numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from veneer.method import Method
from veneer.part import Part
from veneer.site import Site
from veneer.strategy import Strategy

if TYPE_CHECKING:
    from veneer.waiting import Waiting


@dataclass
class Adapter:
    """A method attached under a name."""

    name: str
    method: Method
    parts: list[Part]
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    strategies: list[Strategy] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """Training facts that are saved with it."""
    waiting: list[Waiting] = field(default_factory=list)
    """Tensors that get their values when the base gets its weights."""

    @property
    def sites(self) -> list[Site]:
        return [p.site for p in self.parts]

    def trained(self) -> dict[int, nn.Parameter]:
        """Its parameters, each once, by id."""
        return {id(t): t for part in self.parts for t in part.tensors().values() if isinstance(t, nn.Parameter)}


@dataclass(frozen=True)
class Summary:
    """What is attached, in numbers; `str` gives one line."""

    spec: str
    trained: int
    total: int
    sites: int
    roles: dict[str, int]

    @property
    def percent(self) -> float:
        return 100.0 * self.trained / max(self.total, 1)

    def __str__(self) -> str:
        roles = ", ".join(f"{n}× {role}" for role, n in self.roles.items())
        return f"{self.spec}: {self.trained:,} trained of {self.total:,} ({self.percent:.3f} %), {self.sites} sites ({roles})"
