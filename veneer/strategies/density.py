"""Density: fewer non-zero activations in feed-forward networks, by a loss term, and counted (2024, arXiv:2402.01911)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veneer import anatomy
from veneer.errors import Unsupported
from veneer.maths.density import counted, smooth
from veneer.plan import run
from veneer.pruned.base import prune
from veneer.strategies.activations import Activation, Watch, activations
from veneer.strategies.passes import Lasting, remove, trains
from veneer.strategies.probing import undisturbed
from veneer.strategy import Strategy

if TYPE_CHECKING:
    from veneer.tuned import Tuned


@dataclass(frozen=True)
class Densities:
    """Percent of activations that are not zero, by module in model order; `sides` has the mean over layers, by stack."""

    layers: dict[str, float]
    sides: dict[str, float]

    @property
    def mean(self) -> float:
        """Over all layers."""
        return sum(self.layers.values()) / len(self.layers)


def densities(
    model: nn.Module, batches: Iterable[Any], *, threshold: float = 0.0, padding: bool = False, modules: str | None = None
) -> Densities:
    """Counts a model's activations, adapters and all, in evaluation mode: the mean over samples for every layer, then over layers.

    Zeros are exact ones, of the dtype the model computes in. Where there are none (SiLU) or hardly any (GELU) give a threshold.

    Args:
        batches: inputs of the model. threshold: count |h| > threshold. padding: count padding tokens, as the authors' code does.
        modules: the activation modules' names, where they are not found.
    """
    where = activations(model, modules)
    sums, count = dict.fromkeys((a.module for a in where), 0.0), dict.fromkeys((a.module for a in where), 0)
    watch = Watch(model, where, lambda h, real: counted(h, threshold, real), lambda: True, padding=padding)
    try:
        with undisturbed(model), torch.no_grad():
            for batch in batches:
                run(model, batch)
                for name, found in watch.take().items():
                    sums[name] += sum(float(one.sum()) for one in found)
                    count[name] += sum(len(one) for one in found)
    finally:
        remove(watch.handles)
    layers = {name: 100 * sums[name] / count[name] for name in sums if count[name]}
    return Densities(layers, {side: _mean([layers[a.module] for a in of if a.module in layers]) for side, of in by_side(where).items()})


def _mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)


def by_side(where: Iterable[Activation]) -> dict[str, list[Activation]]:
    """Encoder and decoder apart; a model with one stack has the side ""."""
    found: dict[str, list[Activation]] = {}
    for one in where:
        found.setdefault(one.side, []).append(one)
    return found


@dataclass(frozen=True)
class Smooth:
    """`smooth` with this eps."""

    eps: float

    def __call__(self, h: Tensor, real: Tensor | None) -> Tensor:
        return smooth(h, self.eps, real)


class Density(Strategy):
    """lam · Σ over stacks of the mean over layers and samples of h² / (h² + eps), of the last training pass.

    Under gradient checkpointing it needs non-reentrant checkpoints. Nothing is looked at outside training passes."""

    def __init__(self, lam: float, eps: float, padding: bool, modules: str | None = None) -> None:
        self.lam, self.eps, self.padding, self.modules = lam, eps, padding, modules
        self.where: list[Activation] = []
        self.watch: Watch | None = None
        self.hooks: Lasting | None = None

    def start(self, tuned: Tuned, name: str, total_steps: int | None = None) -> None:
        self.hooks = self.watch = None
        if self.lam:
            self.where = activations(tuned.model, self.modules)
            measure, acts = Smooth(self.eps), partial(trains, tuned, name)
            self.watch = Watch(tuned.model, self.where, measure, acts, padding=self.padding)
            self.hooks = Lasting(self.watch.handles)

    def by_layer(self) -> dict[str, Tensor]:
        """The smooth density of every activation in the last training pass, the mean over its samples, by module; once a pass."""
        if self.watch is None:
            return {}
        passed, found = self.watch.on, self.watch.take()
        if passed and not found:
            raise Unsupported(
                "DEFT: the last pass showed no activation that a gradient reaches. Gradient checkpoints must not be reentrant "
                "(use_reentrant=False), and activation modules must be called."
            )
        return {name: torch.stack([one.mean() for one in seen]).mean() for name, seen in found.items()}

    def loss_terms(self) -> dict[str, Tensor]:
        found = self.by_layer()
        if not found:
            return {}
        device = next(iter(found.values())).device
        sides = [[self.weighted(a, found[a.module]).to(device) for a in of if a.module in found] for of in by_side(self.where).values()]
        return {"density": self.lam * sum(torch.stack(layers).mean() for layers in sides if layers)}  # type: ignore[dict-item]

    def weighted(self, where: Activation, D: Tensor) -> Tensor:
        """A layer's density as it counts in the mean."""
        return D

    def after_step(self) -> None:
        if self.watch is not None:
            self.watch.take()  # a loop that adds no loss terms must not keep the pass's graph


class GatedDensity(Density):
    """lam · mean of a · D over layers, a their network's gate, and mu · mean of a over all gates."""

    def __init__(self, lam: float, mu: float, eps: float, padding: bool) -> None:
        super().__init__(lam, eps, padding)
        self.mu = mu
        self.tuned: Tuned | None = None
        self.name = ""

    def start(self, tuned: Tuned, name: str, total_steps: int | None = None) -> None:
        self.tuned, self.name = tuned, name
        super().start(tuned, name, total_steps)

    def gates(self) -> dict[str, Tensor]:
        return {} if self.tuned is None else gates(self.tuned, self.name)

    def weighted(self, where: Activation, D: Tensor) -> Tensor:
        a = self.gates().get(where.down)
        return D if a is None else D * a.to(D)

    def loss_terms(self) -> dict[str, Tensor]:
        found = list(self.gates().values())
        if not self.mu or not found:
            return super().loss_terms()
        return super().loss_terms() | {"gates": self.mu * torch.stack([a.to(found[0].device) for a in found]).mean()}


def gates(tuned: Tuned, name: str | None = None) -> dict[str, Tensor]:
    """The gate of every feed-forward network that has one, by its last projection's module."""
    found = ((site, method, p) for site, method, p in tuned.entries(name) if method.slug == "ada-deft")
    return {site.module: method.gate(p).squeeze() for site, method, p in found}  # type: ignore[attr-defined]


@torch.no_grad()
def close(tuned: Tuned, tau: float, name: str | None = None) -> list[str]:
    """Closes the gates below tau for good, so that their networks add exactly nothing; the modules of their last projections."""
    shut = [module for module, a in gates(tuned, name).items() if a < tau]
    for site, method, p in tuned.entries(name):
        if method.slug == "ada-deft" and site.module in shut:
            p["theta"].fill_(-torch.inf)
    return shut


def thinned(tuned: Tuned, tau: float = 0.05) -> nn.Module:
    """The plain model with the adapters merged, in place, and one neuron left, which adds nothing, of each network whose gate is below
    tau: it answers as the tuned one after `close(tuned, tau)`, in less time and memory. `tuned` is of no use afterwards.

    Raises `Unsupported` for adapters that cannot be merged."""
    shut = close(tuned, tau)
    sites = [s for s in anatomy.sites(tuned.model) if s.module in shut and s.role == "mlp.down"]
    model = tuned.merge(keep=False).detach()
    prune(model, {s.name: torch.arange(s.in_features) == 0 for s in sites})
    return model
