"""Adapters attached while their base is on `meta`: how they come by their values once the base has its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import Unsupported
from veneer.method import Method, Params
from veneer.part import Part, Tensors
from veneer.site import Site
from veneer.slot import Slot
from veneer.source import Source, cast_like, like_of


@dataclass
class Waiting:
    """Tensors held on `meta` and where their values will come from: those of one site, or of one tie group.

    Args:
        module: whose dtype and device they take. keys: their names in the method → in the holder.
    """

    module: nn.Module
    site: Site
    source: Source
    holder: Tensors
    keys: dict[str, str]

    def values(self, like: Tensor) -> Params:
        raise NotImplementedError

    def arrive(self, device: torch.device | None = None) -> None:
        """Gives the tensors that are still on `meta` their values, on the module's device unless told another."""
        held = self.holder.named(self.keys)
        if not any(t.is_meta for t in held.values()):
            return  # somebody has filled them: a state dict, say
        like = like_of(self.module, self.site)
        like = like if device is None else torch.empty(0, dtype=like.dtype, device=device)
        if like.is_meta:
            raise Unsupported(
                f"materialise: {self.site.name} has no weights yet (meta); give the base its weights first, as veneer.fill does."
            )
        with torch.no_grad(), torch.device("cpu"):
            for name, value in self.values(like).items():
                if held[name].is_meta:
                    replace(self.holder, self.keys[name], cast_like(value, like, self.module))


@dataclass
class WaitingShared(Waiting):
    """Tensors that a tie group shares."""

    part: Method
    group: str
    members: Sequence[Site]

    def values(self, like: Tensor) -> Params:
        return self.source.shared(self.part, self.group, self.members)


@dataclass
class WaitingOwn(Waiting):
    """Tensors of one site."""

    part: Part
    slot: Slot

    def values(self, like: Tensor) -> Params:
        method, part = self.part.method, self.part
        shared = {} if part.shared is None else {k: gathered(t) for k, t in part.shared.named(part.shared_keys).items()}
        if not method.reads_weight:
            return self.source.own(method, self.site, self.module, self.slot, like, shared)
        with weights_gathered(self.module, self.site):
            return self.source.own(method, self.site, self.module, self.slot, like, shared)


def gathered(tensor: Any) -> Tensor:
    """The whole of a sharded tensor; every process must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextmanager
def weights_gathered(module: nn.Module, site: Site) -> Iterator[None]:
    """A sharded layer's own parameters whole, for as long as the block runs: one layer's, never the model's."""
    held: Any = module.get_input_embeddings() if site.kind == "model" else module  # type: ignore[operator]
    with ExitStack() as undo:
        for name, parameter in list(held._parameters.items()):
            if hasattr(parameter, "full_tensor"):
                undo.callback(held._parameters.__setitem__, name, parameter)
                held._parameters[name] = nn.Parameter(gathered(parameter), requires_grad=False)
        yield


def replace(module: nn.Module, name: str, value: Tensor) -> None:
    """Puts a whole tensor in the place of a parameter or buffer; of a sharded one, this process's piece."""
    held = module._parameters.get(name)
    if held is None:
        module._buffers[name] = value
        return
    if hasattr(held, "full_tensor"):
        value = sharded_like(held, value[piece_of(held)])
    module._parameters[name] = nn.Parameter(value, requires_grad=held.requires_grad)


def piece_of(held: Any) -> tuple[slice, ...]:
    """Which part of a sharded tensor this process holds."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, start = compute_local_shape_and_global_offset(held.shape, held.device_mesh, held.placements)
    return tuple(slice(at, at + size) for at, size in zip(start, shape))


def sharded_like(held: Any, piece: Tensor) -> Tensor:
    """This process's piece as a sharded tensor; nothing is sent."""
    from torch.distributed.tensor import DTensor

    mesh, placements = held.device_mesh, held.placements
    piece = piece.clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(piece, mesh, placements, run_check=False, shape=held.shape, stride=held.stride())
