"""What is held where: the tensors of an adapter at one place, and one method at one site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from veneer.method import Method, Params
from veneer.seam import Seam
from veneer.site import Site

LAYERS = ("linear", "conv", "embedding", "norm")
"""Kinds of sites that are layers with a weight of their own."""


Respond: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(output of the layer below, adapted output) → what stands for the adapted output: damps a change, or only looks at it."""

Others: TypeAlias = Callable[[Any, Tensor, Sequence[str]], dict[str, Tensor]]
"""(the layer below, its input, names of adapters) → the layer's output with each of those that act there."""


class Tensors(nn.Module):
    """The tensors of one adapter at one place (a layer, or the root for shared ones)."""

    def hold(self, name: str, tensor: Tensor, trained: bool) -> str:
        """Registers a tensor under the name (made unique) and returns the name it got."""
        key, n = name.replace(".", "_"), 1
        while key in self._parameters or key in self._buffers:
            n += 1
            key = f"{name.replace('.', '_')}_{n}"
        if trained:
            self.register_parameter(key, nn.Parameter(tensor))
        else:
            self.register_buffer(key, tensor)
        return key

    def named(self, keys: Mapping[str, str]) -> Params:
        """The tensors by their names in the method."""
        out = {}
        for name, key in keys.items():
            tensor = self._parameters.get(key)
            out[name] = tensor if tensor is not None else self._buffers[key]
        return out  # type: ignore[return-value]


class Part:
    """One method at one site: its place in the stack, and where its tensors are held."""

    def __init__(
        self,
        index: int,
        method: Method,
        site: Site,
        held: Tensors,
        keys: dict[str, str],
        shared: Tensors | None,
        shared_keys: dict[str, str],
    ):
        self.index, self.method, self.site = index, method, site
        self.held, self.keys, self.shared, self.shared_keys = held, keys, shared, shared_keys
        self.notes: dict[str, Tensor] = {}
        """What the method left of the last forward pass for its strategy."""
        self.readers: list[Part] = []
        """Parts that read the same input as this one, itself among them; none if it is alone."""
        self.seam: Seam | None = None
        """Where the method enters a block, if it does."""
        self.others: Others | None = None
        """What other adapters make of the layer, for a method that mixes them."""
        self.respond: Respond | None = None
        """What a strategy makes of the change here, for as long as it is set."""

    def __getstate__(self) -> dict[str, Any]:
        """Without the notes: they belong to one pass, and tensors inside a graph cannot be copied. Nor what a strategy set."""
        return {**self.__dict__, "notes": {}, "respond": None}

    def tensors(self) -> Params:
        p = self.held.named(self.keys)
        if self.shared is not None and self.shared_keys:
            p.update(self.shared.named(self.shared_keys))
        return p

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The method's fold; for stacked matrices, once per matrix."""
        if not self.site.count:
            return self.method.fold(W, b, self.tensors(), self.site)
        axes = {name: 0 if name in self.keys else None for name in self.tensors()}
        folded = torch.vmap(lambda w, p: self.method.fold(w, None, p, self.site)[0], in_dims=(0, axes))
        return folded(W, self.tensors()), b


@contextmanager
def responding(parts: Sequence[Part], respond: Respond) -> Iterator[None]:
    """These parts' changes made into something else, inside the `with` block."""
    before = [part.respond for part in parts]
    for part in parts:
        part.respond = respond
    try:
        yield
    finally:
        for part, old in zip(parts, before):
            part.respond = old


def compute_dtype(W: Tensor) -> torch.dtype:
    """Half-precision weights are worked on in float32."""
    return torch.float32 if W.dtype in (torch.float16, torch.bfloat16) or not W.is_floating_point() else W.dtype


def add_fold(
    new_W: Tensor, new_b: Tensor | None, W: Tensor, b: Tensor | None, rows: tuple[int, int] | None, chain: list[Part], weight: float
) -> tuple[Tensor, Tensor | None]:
    """Adds weight · (folded − frozen) for one row range; with weight 1 on untouched rows, the fold itself."""
    at = slice(None) if rows is None else slice(*rows)
    stacked = bool(chain[0].site.count)
    own_W = W[:, at] if stacked else W[at]
    own_b = None if b is None else b[at]
    folded_W, folded_b = own_W, own_b
    for part in chain:
        folded_W, folded_b = part.fold(folded_W, folded_b)
    if folded_W is not own_W:
        now = new_W[:, at] if stacked else new_W[at]
        change = folded_W if weight == 1.0 and new_W is W else now + weight * (folded_W - own_W)
        new_W = change if rows is None else placed(new_W, change, rows, 1 if stacked else 0)
    if folded_b is not None and folded_b is not own_b:
        whole = torch.zeros(W.shape[0], dtype=folded_b.dtype, device=folded_b.device) if new_b is None else new_b
        old = 0 if own_b is None else own_b
        change = folded_b if weight == 1.0 and new_b is b else whole[at] + weight * (folded_b - old)
        new_b = change if rows is None else placed(whole, change, rows, 0)
    return new_W, new_b


def placed(whole: Tensor, piece: Tensor, rows: tuple[int, int], axis: int) -> Tensor:
    """`whole` with `piece` in place of its rows."""
    before, _, after = whole.split([rows[0], rows[1] - rows[0], whole.shape[axis] - rows[1]], axis)
    return torch.cat([before, piece, after], axis)
