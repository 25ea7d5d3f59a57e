"""A method under test: the models it acts on, its adapters made visible, and what it declares impossible."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny import SUBJECTS, Subject, dtype_of, loss, moved
from torch import Tensor, nn

import veneer
from veneer import anatomy, registry
from veneer.errors import BadValue, NoMatch, Unsupported
from veneer.method import Method, replaced
from veneer.site import Site
from veneer.tuned import Tuned

HOMES = ("llama", "bert", "vit", "convnet", "gpt2", "encoder", "points")
"""Where a method is at home: the first model that its default targets fit."""


@dataclass(frozen=True)
class Layer:
    """A kind of layer to try every method on: the model, the targets there (each for itself), and the kind of site it takes.

    `instead`: the targets for methods that are at home in attention only.
    """

    subject: str
    targets: tuple[str, ...]
    kind: str
    instead: str = ""

    def targets_for(self, slug: str) -> tuple[str, ...]:
        if not self.instead:
            return self.targets
        try:
            fitted(slug, self.subject, self.targets[0])
        except NoMatch:
            return (self.instead,)
        return self.targets


LAYER_KINDS = {
    "linear": Layer("vit", ("attn.q attn.v mlp.down",), "linear", "attn.q attn.v"),
    "conv1d": Layer("gpt2", ("attn.q attn.v mlp.down",), "linear", "attn.q attn.v"),
    "conv2d": Layer("convnet", ("conv1", "conv2"), "conv"),
    "embedding": Layer("bert", ("embed.token",), "embedding"),
    "mha": Layer("encoder", ("attn.q attn.v attn.o",), "linear"),
}


@dataclass
class Case:
    """One method on one model.

    Args:
        slug: the method. subject: the model family; by default the method's home. targets: by default its own.
        seed: of the inputs and of the numbers that `stir` puts into adapters.
    """

    slug: str
    seed: int = 0
    subject: Subject = None  # type: ignore[assignment]
    targets: str | None = None
    method: Method = field(init=False)

    def __post_init__(self) -> None:
        if self.subject is None:
            self.subject = SUBJECTS[home(self.slug)]
        self.method = fitted(self.slug, self.subject.name, self.targets)

    @classmethod
    def of(cls, spec: str, seed: int, subject: str) -> Case:
        """A method with these hyper-parameters, as they are, on a model family."""
        method = veneer.parse(spec)
        case = cls(method.slug, seed)  # at home first: with its defaults it may not fit the model
        case.subject, case.method = SUBJECTS[subject], method
        return case

    @property
    def card(self) -> registry.Card:
        return registry.card(self.slug)

    def base(self, dtype: torch.dtype = torch.float64, depth: int = 2) -> nn.Module:
        return self.subject.build(dtype, depth)

    def attach(self, model: nn.Module, name: str = "default", seed: int = 0, method: Method | None = None) -> Tuned:
        """The method (or another one) without the model's own head, as it starts; with data if that is what it starts from."""
        return attach(model, method or self.method, self.subject, name, seed, self.seed)

    def tuned(self, name: str = "default", model: nn.Module | None = None, method: Method | None = None, size: float = 0.15) -> Tuned:
        """An adapter whose effect shows: on a fresh model (or a given one), trained tensors moved by random numbers."""
        model = self.base() if model is None else model
        tuned = self.attach(model, name, seed=self.seed, method=method)
        stir(tuned, name, self.seed + sum(map(ord, name)), size)
        return tuned

    def answers(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return self.subject.answers(model, self.seed)

    def batch(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        return self.subject.batch(self.seed, dtype)


def attach(model: nn.Module, method: Method, subject: Subject, name: str = "default", seed: int = 0, data: int = 0) -> Tuned:
    """Attaches a method without the model's own head, showing it a batch and a loss if it starts from them."""
    asks = any(part.calibrates or part.reads_gradients for part in method.parts)
    batches = [subject.batch(data, dtype_of(model))] if asks else None
    return veneer.attach(model, method, name, seed=seed, head=False, batches=batches, loss=loss)


def stir(tuned: Tuned, name: str, seed: int, size: float = 0.15) -> None:
    """Moves every trained tensor of an adapter, so that its effect shows."""
    moved(tuned, seed, size, name)


@functools.cache
def sites_of(subject: str) -> tuple[Site, ...]:
    return tuple(anatomy.sites(SUBJECTS[subject].build()))


@functools.cache
def fitted(slug: str, subject: str, targets: str | None = None) -> Method:
    """The method with default hyper-parameters; whole numbers that do not fit such a small model are halved until they do."""
    method = registry.method(slug)
    if targets is not None:
        method = replaced(method, {"targets": targets})
    while True:
        try:
            chosen = method.select(sites_of(subject))
        except BadValue as refused:
            raise NoMatch(str(refused)) from None
        try:
            for site in chosen:
                method.check(site)
            attach(SUBJECTS[subject].build(), method, SUBJECTS[subject])
            return method
        except BadValue as refused:
            smaller = halved(method)
            if smaller == method:
                raise refused
            method = smaller


def halved(method: Method) -> Method:
    options = {o.name: o for o in registry.card(method.slug).options}
    changes: dict[str, Any] = {}
    for name, option in options.items():
        value = getattr(method, name)
        if type(value) is int and value // 2 >= option.limits.get("ge", 1):
            changes[name] = value // 2
    return replaced(method, changes) if changes else method


@functools.cache
def home(slug: str) -> str:
    """The first model family that the method's default targets fit."""
    for name in HOMES:
        try:
            fitted(slug, name)
        except (NoMatch, Unsupported):
            continue
        return name
    raise AssertionError(f"{slug} attaches to none of the models of this suite: {', '.join(HOMES)}")


def partners(case: Case) -> Iterator[Method]:
    """Methods of other families that attach to the case's model: the ones to stack it with."""
    for card in registry.methods():
        if card.family in (case.card.family, "strategy") or registry.load(card.slug).trains_heads:
            continue
        try:
            yield fitted(card.slug, case.subject.name)
        except (NoMatch, Unsupported):
            continue


def kinds_in_words(kinds: Sequence[str]) -> str:
    return ", ".join(kinds[:-1]) + (" and " if len(kinds) > 1 else "") + kinds[-1]
