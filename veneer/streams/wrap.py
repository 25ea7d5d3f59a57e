"""Making the blocks of a model reversible, and ordinary again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from veneer import anatomy
from veneer.errors import BadValue, Mismatch, Unsupported
from veneer.layer import adapt, slot_of
from veneer.site import Site
from veneer.streams.chain import Chain, Link
from veneer.streams.halves import Halves
from veneer.streams.scheme import Scheme
from veneer.streams.stream import CHILD, Stream
from veneer.tuned import Tuned, tuned_of


class Reversible:
    """A model whose blocks are reversible. Made by `reversible`; `tuned.reversible` finds it again."""

    def __init__(self, tuned: Tuned, scheme: Scheme) -> None:
        self.tuned, self.scheme = tuned, scheme
        self.chains: list[Chain] = []
        self.blocks: list[str] = []
        self.error: float | None = None
        """Largest relative error of a rebuilt input so far; None before any backward."""
        self._warned = False

    @property
    def cached(self) -> bool:
        """Whether the same network runs with its activations kept, by ordinary autograd: to compare with."""
        return any(chain.cached for chain in self.chains)

    @cached.setter
    def cached(self, value: bool) -> None:
        for chain in self.chains:
            chain.cached = value

    def report(self, error: float) -> None:
        self.error = error if self.error is None else max(self.error, error)
        if not error <= self.scheme.tolerance and not self._warned:
            self._warned = True
            warnings.warn(
                f"reversible: an input was rebuilt with a relative error of {error:.2g}, so gradients below it are wrong. Give anchors "
                f"(the streams are kept after every so many blocks), fewer layers, or a larger lambda or beta than {self.scheme.shares}.",
                stacklevel=2,
            )

    def undo(self) -> nn.Module:
        """Makes the blocks ordinary again and returns the model.

        Raises:
            Unsupported: an adapter acts on the streams; take it off first, or everything with `detach`.
        """
        for name, adapter in self.tuned.adapters.items():
            if any(part.site.role == "stream" for part in adapter.parts):
                raise Unsupported(f"reversible: the adapter {name!r} acts on the streams; call remove({name!r}) first, or detach().")
        for path in self.blocks:
            slot: Any = self.tuned.model.get_submodule(path)._modules["veneer"]
            slot.whole = None
            slot._modules.pop(CHILD, None)
        self.tuned.reversible = None
        return self.tuned.model

    def __repr__(self) -> str:
        return f"Reversible({self.scheme.spec}, {len(self.blocks)} blocks in {len(self.chains)} stack{'s' * (len(self.chains) > 1)})"


def reversible(model: nn.Module | Tuned, variant: str = "meft1", **options: Any) -> Reversible:
    """Makes a model's blocks a reversible network of two streams, in place: training keeps one pair of streams, not activations.

    The blocks run their own code, with any adapter attached in them, before or after. With meft1 and meft2 there is a further place
    beside every block, the role `stream`, where an adapter stands alone: it is trained as G (meft1) or F (meft2). The network is not
    the pretrained one but begins near it. With every adapter disabled the base runs as it was; `detach` makes all of it ordinary.

    Args:
        model: a model, or what is attached to one.
        variant: "meft1", "meft2" or "meft3", also with options: "meft1(anchors=4)".
        options: see `veneer.streams.scheme.Scheme`; lambda is written `lambda_` here.

    Raises:
        UnknownName, BadValue: a variant or option that does not exist, or a value out of range.
        Unsupported: a model without repeated blocks, or blocks that cannot be reversible, by name.

    Source: MEFT (arXiv:2306.00477). What a block gives besides hidden states carries no gradient.
    """
    scheme = Scheme.of(variant, options)
    tuned = model if isinstance(model, Tuned) else tuned_of(model)
    if tuned.reversible is not None:
        raise Unsupported(f"reversible: the model is {tuned.reversible.scheme.spec} already; call undo() or detach() first.")
    if tuned.route.merged:
        raise Unsupported("reversible: adapters are merged into the base; call unmerge() first.")
    sites = anatomy.sites(tuned.model)
    stacks = _stacks(sites, scheme, tuned.model)
    cut = {s.name: Halves(tuned.model, s, sites) for stack in stacks for s in stack if scheme.variant == "meft3"}
    made = Reversible(tuned, scheme)
    slot_of(tuned.model, tuned.route).tuned = tuned
    for stack in stacks:
        chain = Chain(scheme, made.report)
        for place, site in enumerate(stack):
            _link(made, chain, site, place, len(stack), sites, cut.get(site.name))
        made.chains.append(chain)
    tuned.reversible = made
    return made


def _link(made: Reversible, chain: Chain, site: Site, place: int, length: int, sites: Sequence[Site], halves: Halves | None) -> None:
    """Puts a block into its chain."""
    tuned = made.tuned
    module = tuned.model.get_submodule(site.module)
    for branch in (s for s in sites if s.kind == "branch" and s.depth == site.depth):
        tuned._places._leave_fast_path(branch)
    slot = adapt(module, tuned.route, ())
    slot.batch_dim = site.batch_dim
    stream = None
    if halves is None:
        like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
        stream = Stream(site.out_features, like)
        slot.add_module(CHILD, stream)
    post = any(s.kind == "branch" and s.post for s in sites if s.depth == site.depth)
    slot.whole = Link(chain, tuned.route, site.name, place, place + 1 == length, post, stream, halves)
    made.blocks.append(site.module)


def _stacks(sites: Sequence[Site], scheme: Scheme, model: nn.Module) -> list[list[Site]]:
    """The blocks that are to be reversible, by stack."""
    stacks: list[list[Site]] = []
    for site in (s for s in sites if s.kind == "block"):
        if site.index == 0:
            stacks.append([])
        stacks[-1].append(site)
    if not stacks:
        raise Unsupported(f"reversible: {type(model).__name__} has no repeated blocks.")
    longest = max(len(stack) for stack in stacks)
    if scheme.layers is not None and scheme.layers > longest:
        raise BadValue(f"reversible: layers={scheme.layers} is more than the {longest} blocks there are; choose at most {longest}.")
    for path, module in model.named_modules():
        if (share := getattr(module, "layerdrop", 0.0)) and any(s.module.startswith(f"{path}.") for s in sites if s.kind == "block"):
            raise Unsupported(
                f"reversible: {path} leaves blocks out at random (layerdrop={share}), which backward cannot follow; set it to 0."
            )
    return [stack[-scheme.layers :] if scheme.layers else stack for stack in stacks]


# -- files ------------------------------------------------------------------------------------------------------


def facts(tuned: Tuned) -> dict[str, Any]:
    """What an adapter's file says about the network it was trained in."""
    return {} if tuned.reversible is None else {"reversible": tuned.reversible.scheme.spec}


def fit(tuned: Tuned, about: Mapping[str, Any], folder: Any) -> None:
    """Makes a model reversible as an adapter's file says. Raises `Mismatch` if it is so in another way already."""
    wanted, have = about.get("reversible"), tuned.reversible
    if have is not None and have.scheme.spec != wanted:
        other = f"trained as {wanted}" if wanted else "trained in the ordinary network"
        raise Mismatch(f"{folder}: {other}, and this model is {have.scheme.spec}; load it into a model of its own.")
    if wanted and have is None:
        if tuned.adapters:
            raise Mismatch(f"{folder}: trained as {wanted}, and other adapters act in this model's ordinary network; load it anew.")
        reversible(tuned, str(wanted))
