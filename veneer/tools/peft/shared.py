"""Methods that scale random matrices which all layers share: PEFT's VERA and RANDLORA."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from veneer.errors import BadFile, Unsupported
from veneer.method import Params
from veneer.site import Site
from veneer.tools.peft.given import Given, Piece
from veneer.tools.peft.layered import WAY, Kept, Layered, Places
from veneer.tools.peft.taken import Grouped, Taken

Drawn = Callable[[Any, Sequence[Site]], Params]
"""The matrices of a method at these sites."""


def first_ones(t: Tensor, like: Tensor) -> Tensor:
    """The first entries along every axis, as many as another tensor has."""
    return t[tuple(slice(n) for n in like.shape)] if t.ndim == like.ndim else t


@dataclass(frozen=True)
class Shared(Layered):
    """A layered method whose matrices A and B stand once in the file, or come again from a seed.

    Args:
        draw: the matrices as PEFT draws them, at least as large as ours.
        paired: the matrices that make PEFT compute what our method computes at these places.
    """

    draw: Drawn = lambda method, sites: method.init_shared(sites, Generator())
    paired: Callable[[Places, Params], Params] = lambda at, p: p

    def slot(self, name: str) -> str:
        return f"{self.kind.lower()}_{name}"

    def read(self, given: Given) -> Piece:
        piece = super().read(given)
        method: Any = piece.method
        sites, held = [site for _, site, _ in piece.at], given.modules.get("", {})
        own = method.init_shared(sites, Generator())
        if given.config.get("save_projection", True) or self.slot("A") in held:
            self.take_copies(given, [self.slot(name) for name in own])
            for slot, like in ((self.slot(name), t) for name, t in own.items()):
                held.update({slot: first_ones(held[slot], like)} if slot in held else {})
            found = {name: given.need("", self.slot(name), tuple(t.shape)) for name, t in own.items()}
        else:
            warnings.warn(
                f"{given.folder}: save_projection=False, so the matrices that all layers share are drawn again, as PEFT draws them on "
                "a machine with bfloat16; an adapter made elsewhere may answer otherwise.",
                stacklevel=3,
            )
            found = {name: first_ones(t, own[name]) for name, t in self.draw(method, sites).items()}
        given.own_fixed |= any(not torch.equal(t.to(own[name].dtype), own[name]) for name, t in found.items())
        piece.shared = {str(method.tie(sites[0])): found}
        return piece

    @staticmethod
    def take_copies(given: Given, names: Sequence[str]) -> None:
        """Takes out what some versions write at every module, too: the same matrices."""
        whole = given.modules.get("", {})
        for path, slots in given.modules.items():
            if path and all(name in slots for name in names):
                if not all(name in whole and torch.equal(slots.pop(name), whole[name]) for name in names):
                    raise BadFile(f"{given.folder}: the matrices at {path} are others than those that all layers share.")
                given.copies.append(path)

    def write(self, taken: Taken, groups: Grouped) -> None:
        super().write(taken, groups)
        at = {path: (parts[0].method, taken.places.whole(path)) for path, parts in groups.items()}
        first = next(iter(groups.values()))[0]
        p = self.paired(at, {name: t for name, t in first.tensors().items() if name in first.shared_keys})
        if not taken.config["save_projection"]:
            return
        copies = [path for path in taken.tuned.adapters[taken.name].facts.get("peft_copies") or () if path in groups]
        for name, t in self.draw(first.method, [site for _, site in at.values()]).items():
            whole = t.to(p[name]) if torch.equal(first_ones(t, p[name]).to(p[name]), p[name]) else torch.zeros_like(t, dtype=p[name].dtype)
            whole[tuple(slice(n) for n in p[name].shape)] = p[name]  # what PEFT holds beyond that it never reads
            taken.tensors[f"base_model.{self.slot(name)}"] = whole
            for path in copies:
                taken.put(path, self.slot(name), whole)


def kept_projection(at: Places, before: Mapping[str, Any]) -> dict[str, Any]:
    return {"save_projection": before.get("save_projection", True)}


def drawn_by_randlora(method: Any, sites: Sequence[Site]) -> Params:
    """A [r, 1, least] and B [most, n, r] as PEFT draws them from `projection_prng_key`, in bfloat16 unless sparse.

    `least` and `most` are of the largest input and the largest output, of whichever layers they are."""
    least, most = sorted((max(s.in_features for s in sites), max(s.out_features for s in sites)))
    own, n = Generator().manual_seed(method.seed), -(-least // method.r)
    if method.bases == "uniform":
        A, *B = (
            torch.empty(shape, dtype=torch.bfloat16).uniform_(-(shape[-1] ** -0.5), shape[-1] ** -0.5, generator=own)
            for shape in ((method.r, 1, least), *[(most, 1, method.r)] * n)
        )
        found = {"A": A, "B": torch.cat(B, 1)}
    else:
        s = 3 if method.bases == "sparse" else math.sqrt(least)
        drawn = {name: torch.rand(shape, generator=own) for name, shape in (("A", (method.r, 1, least)), ("B", (most, n, method.r)))}
        found = {name: (t > 1 - 1 / (2 * s)).float() - (t < 1 / (2 * s)).float() for name, t in drawn.items()}
    return {name: (t / t.std()).float() for name, t in found.items()}


def bases_of(config: Mapping[str, Any]) -> dict[str, Any]:
    bases = "very_sparse" if config.get("very_sparse") else "sparse" if config.get("sparse") else "uniform"
    return {"bases": bases, "form": "peft"}


def theirs_of_randlora(at: Places, before: Mapping[str, Any]) -> dict[str, Any] | None:
    kinds = {(method.bases, method.form) for method, _ in at.values()}
    if len(kinds) > 1:
        return None
    bases, form = kinds.pop()
    projection = kept_projection(at, before) if form == "peft" else {"save_projection": True}
    return {**projection, "sparse": bases == "sparse", "very_sparse": bases == "very_sparse"}


def paired_by_randlora(at: Places, p: Params) -> Params:
    """The bases with their columns in the order in which PEFT meets them; that order depends on the number of bases."""
    if next(iter(at.values()))[0].form == "peft":
        return p
    numbers = {-(-min(site.in_features, site.out_features) // method.r) for method, site in at.values()}
    if len(numbers) > 1:
        raise Unsupported(
            "PEFT's RANDLORA pairs bases with other scales than the paper does. Its file can make up for that where all layers have "
            f"one number of bases, here they have {', '.join(map(str, sorted(numbers)))}; train with randlora(form='peft'). {WAY}"
        )
    B = p["B"][:, : numbers.pop()]
    return {**p, "B": B.mT.reshape(B.shape)}


SHARED = (
    Shared(
        "VERA", "vera", (Kept("vera_lambda_d", "lambda_d"), Kept("vera_lambda_b", "lambda_b")),
        options={"r": "r", "projection_prng_key": "seed", "vera_dropout": "dropout", "d_initial": "d_initial"},
        theirs=kept_projection, transposed=True,
    ),
    Shared(
        "RANDLORA", "randlora", (Kept("randlora_lambda", "lambda"), Kept("randlora_gamma", "gamma")),
        options={"r": "r", "projection_prng_key": "seed", "randlora_dropout": "dropout", "randlora_alpha": "alpha"},
        ours=bases_of, theirs=theirs_of_randlora, transposed=True, draw=drawn_by_randlora, paired=paired_by_randlora,
    ),
)  # fmt: skip
"""As they stand in PEFT's format."""
