"""Sub-layers seen from the residual stream: a branch that begins before the norm of its sub-layer, not behind it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from veneer.site import Site

AFTER = {"attn": r"post_(self_)?att", "cross": r"post_cross", "mlp": r"post_(feed_?forward|mlp|ffn)"}
"""Names of norms that act on a sub-layer's output, by its role: they read no stream."""


def from_stream(branches: Sequence[Site], sites: Sequence[Site]) -> list[Site]:
    """The branches with the input of their norm as their input: the stream. Where none comes before, as they are.

    They get names of their own, as a method may read the same sub-layer from behind its norm. Blocks with one norm for
    attention and feed-forward read that one's input.
    """
    norms: dict[tuple[int | None, str], str] = {}
    for site in sites:
        role = site.role.removeprefix("norm.")
        if site.kind == "norm" and not site.post and not re.match(AFTER.get(role, "$"), site.module.rpartition(".")[2]):
            norms.setdefault((site.depth, role), site.module)
    return [replace(b, name=f"stream.{b.name}", entry=_before(b, norms)) for b in branches]


def _before(branch: Site, norms: dict[tuple[int | None, str], str]) -> str:
    if branch.post:
        return branch.entry
    return norms.get((branch.depth, branch.role)) or norms.get((branch.depth, "attn")) or branch.entry
