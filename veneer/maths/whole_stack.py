"""A stack of blocks, and the encoder that runs it and the norm behind it, tokens in, tokens out, as one site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from veneer.errors import BadValue
from veneer.site import Site


def first_of_one(found: Sequence[Site], who: str) -> Site:
    """The first block among these sites. Raises `BadValue` if they are of no stack of blocks, or of several."""
    firsts = [s for s in found if s.kind == "block" and s.index == 0]
    if len(firsts) != 1:
        raise BadValue(f"{who}: its tokens pass through one stack of blocks, and the targets name {len(firsts)}; choose others.")
    return firsts[0]


def encoders(sites: Sequence[Site]) -> list[Site]:
    """One site of kind block, without a depth, for the module around every stack of blocks."""
    firsts = [s for s in sites if s.kind == "block" and s.index == 0 and s.depth is not None]
    return [replace(s, name=f"stack.{_around(s)}", module=_around(s), depth=None, index=0, length=0) for s in firsts]


def encoder_of(block: Site, sites: Sequence[Site], who: str, instead: str) -> tuple[Site, Site]:
    """The encoder that runs this block, and its last norm.

    Raises `BadValue` where that module does more than run blocks and a norm: it embeds its input, or leaves the norm to others.
    """
    around = _around(block)
    norm = next((s for s in sites if s.role == "norm.final" and s.module.rpartition(".")[0] == around), None)
    embeds = any(s.role.startswith("embed.") and s.module.startswith(f"{around}.".lstrip(".")) for s in sites)
    if norm is None or embeds:
        why = "also embeds its input" if embeds else "has no norm behind them"
        raise BadValue(
            f"{who}: the features of the frozen model come from a pass through its encoder alone, and {around or 'the model'}, which "
            f"runs the blocks, {why}; {instead}."
        )
    return next(s for s in encoders(sites) if s.module == around), norm


def _around(block: Site) -> str:
    """Path of the module that holds the list of blocks."""
    return block.module.rpartition(".")[0].rpartition(".")[0]
