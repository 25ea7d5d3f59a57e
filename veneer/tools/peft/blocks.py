"""Methods whose change is made of equal blocks: PEFT's C3A, GRALORA and MISS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.errors import Unsupported
from veneer.method import Method, Params
from veneer.part import Part
from veneer.site import Site
from veneer.tools.peft.layered import Kept, Layered, Places, by_rows


def structure(config: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT says by the start which form of MiSS it is; bat has no dropout there, whatever the config says."""
    start = config.get("init_weights", True)
    if start == "bat":
        return {"structure": "bat", "dropout": 0.0}
    return {"mini_r": config.get("mini_r") or 1} if start == "mini" else {}


def start_of_miss(at: Places, before: Mapping[str, Any]) -> dict[str, Any] | None:
    forms = {(method.structure, method.share, method.mini_r) for method, _ in at.values()}
    if len(forms) > 1:
        return None
    form, share, mini_r = forms.pop()
    if form == "bat" and share == "col":
        raise Unsupported(
            "PEFT's MISS has bat only with blocks shared along rows, this adapter shares them along columns; "
            "train with miss(structure='bat', share='row'), or save it in veneer's own format."
        )
    if form == "bat":
        return {"init_weights": "bat", "miss_dropout": before.get("miss_dropout", 0.0)}
    if mini_r is not None:
        return {"init_weights": "mini", "mini_r": mini_r}
    return {"init_weights": before.get("init_weights", True)}


def joined_miss(parts: Sequence[Part], site: Site) -> tuple[Method, Params] | None:
    """Row ranges side by side; a block that repeats along a range's outputs cannot be one that repeats along all."""
    method: Any = parts[0].method
    if method.mini_r is not None or (method.structure == "bat" and method.share == "col"):
        return None
    return by_rows(parts, site, {"D": 0.0}, axis=0 if method.structure == "bat" else 1)


BLOCKS = (
    Layered(
        "C3A", "c3a", (Kept("c3a_kernel", "w"),), options={"block_size": "b"}, patterns={"b": "block_size_pattern"}, anchored=False,
        join=lambda parts, site: by_rows(parts, site, {"w": 0.0}),
    ),
    Layered(
        "GRALORA", "gralora",
        (
            Kept("gralora_A", "A"), Kept("gralora_B", "B"),
            Kept("gralora_A_general.weight", "A_general"), Kept("gralora_B_general.weight", "B_general"),
        ),
        options={"r": "r", "alpha": "alpha", "gralora_k": "k", "hybrid_r": "hybrid_r", "gralora_dropout": "dropout"}, transposed=True,
    ),
    Layered(
        "MISS", "miss", (Kept("miss_block", "D"),), options={"r": "r", "miss_dropout": "dropout"}, ours=structure, theirs=start_of_miss,
        join=joined_miss,
    ),
)  # fmt: skip
"""As they stand in PEFT's format."""
