"""Which heads, neurons, modules and ranks stay (Light-PEFT, arXiv:2406.03792)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def strongest(values: Tensor, ratio: float) -> Tensor:
    """A mask like the values of those strictly above their `ratio` quantile (linear interpolation), at least one; all at ratio 0.

    Of equal values the first ones go, so that always the same number stays: n − 1 − ⌊ratio · (n − 1)⌋ of n.
    """
    flat = values.detach().flatten()
    mask = torch.ones(len(flat), dtype=torch.bool)
    if ratio and len(flat):
        gone = min(math.floor(ratio * (len(flat) - 1) + 1e-9) + 1, len(flat) - 1)
        mask[torch.sort(flat.cpu(), stable=True).indices[:gone]] = False
    return mask.view(values.shape)


def kept_heads(m: Tensor, ratio: float, group: int = 1) -> Tensor:
    """A mask [heads]; `group` neighbours that share keys and values stay or go together, by their mean."""
    return strongest(m.view(-1, group).mean(1), ratio).repeat_interleave(group)


def kept_neurons(m: Mapping[str, Tensor], ratio: float, scope: str) -> dict[str, Tensor]:
    """A mask for every layer; with scope "global" all layers' neurons compete, and each layer keeps its best one at least."""
    if not m:
        return {}
    if scope == "layer":
        return {name: strongest(t, ratio) for name, t in m.items()}
    pieces = strongest(torch.cat([t.detach().cpu() for t in m.values()]), ratio).split([len(t) for t in m.values()])
    found = {name: piece.clone() for name, piece in zip(m, pieces)}
    for name, mask in found.items():
        if not mask.any():
            mask[m[name].argmax().cpu()] = True
    return found


def kept_modules(worth: Mapping[str, list[float]], rho_m: float, rho_r: float, scope: str) -> dict[str, Tensor]:
    """The modules that stay, each with a mask over its ranks, [0] where it has none.

    worth: module → its importance, then that of each of its ranks. A module that loses all ranks goes; one always stays.
    """
    stays = strongest(torch.tensor([values[0] for values in worth.values()], dtype=torch.float64), rho_m).tolist()
    ranks = {key: torch.tensor(values[1:], dtype=torch.float64) for (key, values), yes in zip(worth.items(), stays) if yes}
    if scope == "module":
        return {key: strongest(values, rho_r) for key, values in ranks.items()}
    pieces = strongest(torch.cat(list(ranks.values())), rho_r).split([len(values) for values in ranks.values()])
    return {key: piece for key, piece in zip(ranks, pieces) if not len(piece) or piece.any()}
