"""Patch tokens among others: where they stand, their grid, prompts that lead them, and attention between the two."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from veneer.method import Call, Method
from veneer.site import Site


def on_patches(y: Tensor, prefix: int, method: Method, site: Site, change: Callable[[Tensor], Tensor]) -> Tensor:
    """y with change(f) added to its patches f [batch, patches, D]; the `prefix` tokens before them stay."""
    if y.ndim != 3:
        raise method.refuse(f"what comes out {{at}} is of shape {tuple(y.shape)}, and no patch tokens; choose another method.", site)
    axis = 1 - site.batch_dim
    first, f = y.narrow(axis, 0, prefix), y.narrow(axis, prefix, y.shape[axis] - prefix)
    return torch.cat([first, f + change(f.movedim(axis, -2)).movedim(-2, axis)], axis)


def sides(patches: int, grid: tuple[int, int] | None, method: Method, site: Site) -> tuple[int, int]:
    """Rows and columns of the patches' grid; without a given one, as many of each."""
    h, w = grid or (math.isqrt(patches),) * 2
    if h * w != patches:
        what = f"{patches} patches {{at}} are no grid of {h} × {w}"
        raise method.refuse(f"{what}; choose grid=(rows, columns) and prefix_tokens to fit.", site)
    return h, w


def attention(queries: Tensor, keys: Tensor, width: int) -> Tensor:
    """softmax(queries keysᵀ / √width) [..., queries, keys], in float32 at least and then in the queries' dtype."""
    scores = queries @ keys.transpose(-2, -1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return (scores.to(wide) / width**0.5).softmax(-1).to(queries.dtype)


def led(call: Call, x: Tensor, P: Tensor, site: Site) -> Tensor:
    """One block of a stack whose tokens are led by the prompts P [L, D]: put in front before the first, taken away after the last."""
    axis = 1 - site.batch_dim
    if site.index == 0:
        rows = P.to(x.dtype).expand(x.shape[site.batch_dim], *P.shape)
        x = torch.cat([rows.movedim(0, site.batch_dim), x], axis)
    y = call(x)
    return y.narrow(axis, len(P), y.shape[axis] - len(P)) if site.index + 1 == site.length else y


def quick_gelu(z: Tensor) -> Tensor:
    """z σ(1.702 z)."""
    return z * torch.sigmoid(1.702 * z)
