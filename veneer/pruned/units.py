"""What of a model can be left out whole: heads of self-attentions and neurons of feed-forward networks, with all that belongs to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from veneer.anatomy.families import HEADS
from veneer.anatomy.tree import plain_class
from veneer.errors import NoMatch, Unsupported
from veneer.forms import is_quantised
from veneer.site import Site


@dataclass(frozen=True)
class Units:
    """The heads of one self-attention, or the neurons of one feed-forward network.

    Args:
        end: the site whose inputs they are, attn.o or mlp.down. feeders: q, k and v, or up and gate: their outputs.
        core: path of the attention module; "" for neurons.
    """

    end: Site
    feeders: tuple[Site, ...]
    core: str = ""

    @property
    def count(self) -> int:
        return self.end.heads if self.core else self.end.in_features

    @property
    def group(self) -> int:
        """How many units can only go together: query heads that share keys and values."""
        return self.end.heads // self.end.kv_heads if self.core else 1

    def columns(self, kept: Tensor) -> Tensor:
        """A mask over the end's inputs, from one over the units."""
        return kept.repeat_interleave(self.end.in_features // self.count)

    def rows(self, feeder: Site, kept: Tensor) -> Tensor:
        """A mask over a feeder's outputs, from one over the units."""
        if not self.core:
            return kept
        heads = feeder.out_features // self.end.head_dim
        return kept.view(heads, -1).any(1).repeat_interleave(self.end.head_dim)


def units_at(model: nn.Module, sites: Sequence[Site], names: Iterable[str]) -> dict[str, Units]:
    """The units that end at these sites.

    Raises:
        NoMatch: no such site. Unsupported: layers that cannot be cut, or that hold more than can be cut with them.
    """
    here = {s.name: s for s in sites}
    found = {}
    for name in names:
        if name not in here or here[name].role not in ("attn.o", "mlp.down"):
            raise NoMatch(f"pruning: this {type(model).__name__} has no output projection or last feed-forward layer {name!r}.")
        end, near = here[name], [s for s in sites if s.depth is not None and s.depth == here[name].depth]
        found[name] = _heads(model, end, near) if end.role == "attn.o" else _neurons(end, near)
        for site in (end, *found[name].feeders):
            _check_layer(model, site)
    return found


def _heads(model: nn.Module, end: Site, near: Sequence[Site]) -> Units:
    fused = any(s.role == "attn.qkv" for s in near)
    layers = [s for role in ("attn.q", "attn.k", "attn.v") for s in near if s.role == role and s.kind == "linear"]
    cores = [s for s in near if s.kind == "attention" and s.role == "attn"]
    if fused or len(layers) != 3 or len(cores) != 1 or sum(s.role == "attn.o" for s in near) != 1:
        why = "its query, key and value rows are interleaved" if fused else "it is not one attention with one query, key and value each"
        raise Unsupported(f"pruning: the heads of {end.name} cannot be told apart: {why}. Leave them whole with rho_a=0.")
    sizes = [end.heads * end.head_dim, end.kv_heads * end.head_dim, end.kv_heads * end.head_dim]
    if [s.out_features for s in layers] != sizes or end.in_features != sizes[0] or not end.head_dim:
        raise Unsupported(
            f"pruning: {end.name} has {end.heads} heads of width {end.head_dim}, and its projections give "
            f"{', '.join(str(s.out_features) for s in layers)} numbers: heads cannot be cut out. Leave them whole with rho_a=0."
        )
    core: Any = model.get_submodule(cores[0].module)
    _check_core(core, cores[0], [end, *layers], near)
    if any(s.rows for s in layers) and not any(isinstance(vars(core).get(name), int) for name in HEADS):
        raise Unsupported(f"pruning: {type(core).__name__} at {end.name} splits its fused projection by the model's configuration.")
    return Units(end, tuple(layers), cores[0].module)


def _check_core(core: nn.Module, at: Site, own: Sequence[Site], near: Sequence[Site]) -> None:
    """Everything an attention module holds must be cut with its heads, or be the same for all heads."""
    same = [s for s in near if s.role == "norm.attn" or (s.role == "norm.qk" and s.out_features == own[0].head_dim)]
    known = {s.module for s in [*own, *same]}
    for name, _ in core.named_parameters(prefix=at.module):
        owner = name.rpartition(".")[0]
        if owner not in known and "veneer" not in name.split("."):
            raise Unsupported(
                f"pruning: {plain_class(core).__name__} holds {name} besides its projections; how that belongs to heads is not known. "
                "Leave heads whole with rho_a=0."
            )


def _neurons(end: Site, near: Sequence[Site]) -> Units:
    layers = tuple(s for s in near if s.role in ("mlp.up", "mlp.gate") and s.kind == "linear")
    ends, ups = sum(s.role == "mlp.down" for s in near), sum(s.role == "mlp.up" for s in layers)
    if ends != 1 or ups != 1 or any(s.out_features != end.in_features for s in layers):
        raise Unsupported(f"pruning: {end.name} is not the end of one feed-forward network with one way in. Leave it whole with rho_f=0.")
    inner = [s.name for s in near if s.role.startswith("norm") and s.out_features == end.in_features != end.out_features]
    if inner:
        raise Unsupported(f"pruning: the norm {inner[0]} reads all neurons of {end.name} together. Leave them whole with rho_f=0.")
    return Units(end, layers)


def _check_layer(model: nn.Module, site: Site) -> None:
    module = model.get_submodule(site.module)
    plain = isinstance(module, nn.Linear) or plain_class(module).__name__ == "Conv1D"
    if (
        site.kind != "linear"
        or site.parameter != "weight"
        or not plain
        or isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    ):
        raise Unsupported(f"pruning: {plain_class(module).__name__} at {site.name} is not a plain linear layer that can be cut.")
    if is_quantised(module):
        raise Unsupported(f"pruning: the weight of {site.name} is stored quantised; load the base in 16 or 32 bit.")
    if "_hf_hook" in module.__dict__ or hasattr(module.weight, "full_tensor"):
        raise Unsupported(f"pruning: {site.name} is offloaded or sharded; load the base whole on one device.")
