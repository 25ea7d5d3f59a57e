"""Counts of trained parameters in closed form, as the methods' cards give them: the second opinion on `init`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from veneer.site import Site

Formula = Callable[[Any, Sequence[Site]], int]


def _low_rank(m: Any, sites: Sequence[Site]) -> int:
    return sum(m.r * (s.in_features + s.out_features) for s in sites)


def _groups(m: Any, sites: Sequence[Site]) -> int:
    return sum(2 * m.r * width for width in {s.role: s.in_features for s in sites}.values())


def _bottlenecks(m: Any, sites: Sequence[Site]) -> int:
    width = {s.name: max(1, int(s.out_features // m.reduction)) if m.m is None else m.m for s in sites}
    return sum(2 * width[s.name] * s.out_features + width[s.name] + s.out_features for s in sites)


def _rescaled(m: Any, sites: Sequence[Site]) -> int:
    return sum(s.in_features if s.role == "mlp.down" else s.out_features for s in sites)


FORMULAS: dict[str, Formula] = {
    "lora": _low_rank,
    "dora": lambda m, sites: _low_rank(m, sites) + sum(s.out_features for s in sites),
    "adalora": lambda m, sites: sum(m.init_r * (s.in_features + s.out_features + 1) for s in sites),
    "wegeft": _groups,
    "bottleneck-adapter": _bottlenecks,
    "ia3": _rescaled,
    "prompt-tuning": lambda m, sites: m.length * sites[0].in_features,
    "prefix-tuning": lambda m, sites: sum(2 * m.length * s.kv_heads * s.head_dim for s in sites),
    "vpt": lambda m, sites: len(sites) * m.length * sites[0].in_features,
}
