"""Methods that turn what a layer reads, or what it gives: PEFT's OFT, BOFT, HRA and ROAD."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from veneer.errors import Unsupported
from veneer.maths.factor import divisors
from veneer.maths.rotation import width
from veneer.site import Site
from veneer.tools.peft.layered import Kept, Layered, Places, by_rows
from veneer.tools.peft.names import CONFIG

FOLLOWED, SERIES = "0.21.2", (0, 18)
"""The version whose OFT this is; the first one with its series."""


def against_conv(site: Site, layer: nn.Module) -> str:
    """PEFT runs these convolutions itself, by the first entries of kernel, stride and padding alone."""
    if site.kind != "conv":
        return ""
    same = all(len(set(values)) == 1 for values in (site.kernel, layer.stride, layer.padding))  # type: ignore[arg-type]
    if len(site.kernel) == 2 and same and site.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros":  # type: ignore[arg-type]
        return ""
    return "no square 2-d convolution in one group without dilation"


def against_patches(site: Site, layer: nn.Module) -> str:
    """PEFT's OFT adds up the overlapping patches it has turned, which is no change of the weight."""
    if site.kind == "conv" and math.prod(site.kernel) > 1:
        return "a convolution over more than one pixel"
    return against_conv(site, layer)


def block_of_oft(method: Any, slots: Mapping[str, Tensor], site: Site) -> dict[str, Any]:
    """The block size k from k(k − 1)/2 columns: PEFT moves a size that does not divide to the nearest that does."""
    Q = slots.get("oft_R.weight", slots.get("oft_embedding_R.weight"))
    k = 0 if Q is None else (1 + math.isqrt(1 + 8 * Q.shape[-1])) // 2
    return {} if k in (0, method.block(site)) else {"k": k, "r": 0}


def oft_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Block size or number of blocks. PEFT before 0.18, which wrote no version, had another series."""
    if config.get("use_cayley_neumann") and tuple(map(int, re.findall(r"\d+", str(config.get("peft_version")))[:2])) < SERIES:
        raise Unsupported(
            f"{CONFIG} sets use_cayley_neumann, and PEFT {config.get('peft_version') or 'before 0.18'} had another series than today's, "
            "which is not computed here. Merge the adapter into the base with that version, or train anew."
        )
    return {"k": config["oft_block_size"]} if config.get("oft_block_size") else {"r": config.get("r") or 0}


def oft_size(at: Places, before: Mapping[str, Any]) -> dict[str, Any] | None:
    """`oft_block_size`, or the number of blocks r: what it was loaded with, if PEFT makes the same of it again."""
    sizes = [(width(site), method.block(site)) for method, site in at.values()]
    known = [(int(before.get("oft_block_size") or 0), int(before.get("r") or 0))] if before.get("oft_block_size") or before.get("r") else []
    for k, r in known + [(block, 0) for _, block in sizes] + [(0, size // block) for size, block in sizes]:
        if all(block == (nearest_divisor(size, k) if k else size // nearest_divisor(size, r)) for size, block in sizes):
            return {"oft_block_size": k, "r": r, "peft_version": before.get("peft_version", FOLLOWED)}
    return None


def nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of `size` that PEFT takes for one that is wanted; the smaller of two that are as near."""
    return min(divisors(size), key=lambda d: (abs(d - wanted), d))


def blocks_of_boft(method: Any, slots: Mapping[str, Tensor], site: Site) -> dict[str, Any]:
    """Block size and number of factors: PEFT without its CUDA kernel makes one factor whatever the config says."""
    R = slots.get("boft_R")
    return {} if R is None or R.ndim != 4 else {"k": R.shape[-1], "m": R.shape[0]}


def boft_size(at: Places, before: Mapping[str, Any]) -> dict[str, Any] | None:
    """`boft_block_size`, or the number of blocks where that is what the layers have in common."""
    sizes, numbers = {method.k for method, _ in at.values()}, {width(site) // method.k for method, site in at.values()}
    factors = {method.m for method, _ in at.values()}
    if len(factors) > 1 or min(len(sizes), len(numbers)) > 1:
        return None
    by_number = len(sizes) > 1 or numbers == {before.get("boft_block_num")}
    how = {"boft_block_size": 0, "boft_block_num": numbers.pop()} if by_number else {"boft_block_size": sizes.pop(), "boft_block_num": 0}
    return {**how, "boft_n_butterfly_factor": factors.pop()}


ROTATIONS = (
    Layered(
        "OFT", "oft",
        (Kept("oft_R.weight", "Q", kinds=("linear", "conv")), Kept("oft_embedding_R.weight", "Q", kinds=("embedding",))),
        options={
            **{same: same for same in ("block_share", "use_cayley_neumann", "num_cayley_neumann_terms", "coft", "eps")},
            "module_dropout": "block_dropout",
        },
        ours=oft_of, sized=block_of_oft, theirs=oft_size, kinds=("linear", "conv", "embedding"), unfit=against_patches,
    ),
    Layered(
        "BOFT", "boft",
        (
            Kept("boft_R", "R"), Kept("boft_s", "s", kinds=("linear",)),
            Kept("boft_s", "s", lambda t, site: t.mT, lambda t, site: t.mT, kinds=("conv",)),
        ),
        sized=blocks_of_boft, theirs=boft_size, training=("boft_dropout",), kinds=("linear", "conv"), unfit=against_conv,
    ),
    Layered(
        "HRA", "hra", (Kept("hra_u", "u"),), options={"r": "r", "apply_GS": "apply_GS"}, kinds=("linear", "conv"), unfit=against_conv,
    ),
    Layered(
        "ROAD", "road", (Kept("road_theta", "theta"), Kept("road_alpha", "alpha")),
        options={"variant": "variant", "group_size": "group_size"}, biases=False,
        join=lambda parts, site: by_rows(parts, site, {"theta": 0.0, "alpha": 1.0}),
    ),
)  # fmt: skip
"""As they stand in PEFT's format."""
