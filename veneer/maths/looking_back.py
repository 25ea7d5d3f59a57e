"""Which sites of a model handle tokens that must not see later ones."""

from __future__ import annotations

from collections.abc import Sequence

from veneer.site import Site


def decoding(sites: Sequence[Site]) -> set[str]:
    """Names of the sites in blocks with causal attention, and of those outside blocks whose nearest block, best before them, has it."""
    depths = {s.depth for s in sites if s.kind == "attention" and s.causal}
    blocks = [s.depth for s in sites if s.kind == "block"]
    found, nearest = set(), blocks[0] if blocks else None
    for site in sites:
        nearest = nearest if site.depth is None else site.depth
        if nearest in depths and nearest is not None:
            found.add(site.name)
    return found
