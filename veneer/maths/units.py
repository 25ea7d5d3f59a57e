"""Heads and channels: what ties the weights of a block's attention and feed-forward layers, and drawing some out of all blocks."""

from __future__ import annotations

import zlib
from collections.abc import Collection
from functools import lru_cache
from typing import Any

import torch
from torch import Generator

from veneer.site import Site

_LETTERS = {
    "attn": {"v": "v", "o": "o"},
    "cross": {"v": "v", "o": "o"},
    "mlp": {"up": "u", "down": "d"},
    "expert": {"up": "u", "down": "d"},
}


def letter(site: Site) -> str:
    """v, o, u or d for a site on the outer sides of a block's heads (v, o) or channels (u, d); "" for others."""
    parent, _, own = site.role.partition(".")
    return _LETTERS.get(parent, {}).get(own, "")


def features(site: Site) -> int:
    """Features on the side of the weight where its units lie: outputs of v and u, inputs of o and d."""
    return site.out_features if letter(site) in ("v", "u") else site.in_features


def units(site: Site) -> int:
    """Key-value heads of v, heads of o (0 where they are not known), channels of u and d."""
    return {"v": site.kv_heads, "o": site.heads}.get(letter(site), features(site))


def partner(site: Site) -> str:
    """The role of the layer that reads what flows through a site's units: its own for o and d."""
    return site.role.partition(".")[0] + (".o" if letter(site) in ("v", "o") else ".down")


def blocks(site: Site, leave_out: Collection[int] = ()) -> list[int]:
    """Indices of the blocks of a site's stack, without those at depths left out."""
    start = (site.depth or 0) - site.index
    return [i for i in range(site.length or 1) if start + i not in leave_out]


def drawing(*words: Any) -> Generator:
    """A generator seeded by these words, the same everywhere."""
    return Generator().manual_seed(zlib.crc32("/".join(map(str, words)).encode()))


@lru_cache(64)
def _first(words: tuple, total: int, count: int) -> tuple[int, ...]:
    return tuple(torch.randperm(total, generator=drawing(*words), device="cpu")[:count].sort().values.tolist())


def drawn(site: Site, among: list[int], count: int, seed: int) -> list[int]:
    """Units of this site among `count` that are drawn out of the units of all these blocks together, blocks being alike."""
    n, start = units(site), (site.depth or 0) - site.index
    low = among.index(site.index) * n
    return [i - low for i in _first((seed, site.role, site.side, start), n * len(among), count) if low <= i < low + n]
