"""Where an adapter's first tensors come from, in which dtype and on which device they live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor, nn

from veneer.calls import Frozen
from veneer.forms import form_of
from veneer.method import Method, Params
from veneer.part import LAYERS, compute_dtype
from veneer.site import Site
from veneer.slot import Slot


class Source:
    """Where the tensors of a new adapter's part come from."""

    def shared(self, part: Method, group: str, members: Sequence[Site]) -> Params:
        """Tensors shared by a tie group."""
        raise NotImplementedError

    def own(self, method: Method, site: Site, module: nn.Module, slot: Slot, like: Tensor, shared: Params) -> Params:
        """Tensors of one site."""
        raise NotImplementedError


class Fresh(Source):
    """First values, drawn from a generator or settled from data. Asked again for the same, it draws the same."""

    def __init__(self, generator: Generator, index: int, starts: Mapping[tuple[int, str], Params]):
        self.generator, self.index, self.starts = generator, index, starts
        self.states: dict[str, Tensor] = {}

    def _stand_at(self, place: str) -> None:
        """Puts the generator where it stood when this place was asked for first."""
        if place in self.states:
            self.generator.set_state(self.states[place])
        else:
            self.states[place] = self.generator.get_state()

    def shared(self, part: Method, group: str, members: Sequence[Site]) -> Params:
        self._stand_at("@" + group)
        return part.init_shared(members, self.generator)

    def own(self, method: Method, site: Site, module: nn.Module, slot: Slot, like: Tensor, shared: Params) -> Params:
        self._stand_at(site.name)
        p = first_tensors(method, site, self.generator)
        p.update(self.starts.get((self.index, site.name), {}))
        p = {k: t.to(like.dtype) if t.is_floating_point() else t for k, t in p.items()}
        if not method.reads_weight:
            return p
        with torch.no_grad():
            return self._from_weight(method, site, module, slot, p, shared)

    def _from_weight(self, method: Method, site: Site, module: nn.Module, slot: Slot, p: Params, shared: Params) -> Params:
        if site.kind == "model":
            table = module.get_input_embeddings().weight  # type: ignore[operator]
            return method.init_from_weight(table.detach(), None, p, site, self.generator)
        if site.kind not in (*LAYERS, "parameter"):
            return p
        call = Frozen(slot, module, form_of(module, site.kind, site.parameter))
        W, b = call.weight(), call.bias()
        if site.count:
            own = W if site.rows is None else W[:, slice(*site.rows)]
            each = [method.init_from_weight(w, None, {k: t[i] for k, t in p.items()}, site, self.generator) for i, w in enumerate(own)]
            return {k: torch.stack([e[k] for e in each]) for k in each[0]}
        if site.rows is not None:
            W, b = W[slice(*site.rows)], None if b is None else b[slice(*site.rows)]
        made = method.init_from_weight(W, b, {**shared, **{k: t.to(W.device) for k, t in p.items()}}, site, self.generator)
        return {k: t for k, t in made.items() if k not in shared}


def first_tensors(method: Method, site: Site, generator: Generator) -> Params:
    """What the method's `init` gives for a site; for stacked matrices each its own draw, [count, …]."""
    if not site.count:
        return dict(method.init(site, generator))
    each = [method.init(site, generator) for _ in range(site.count)]
    return {name: torch.stack([e[name] for e in each]) for name in each[0]}


def like_of(module: nn.Module, site: Site) -> Tensor:
    """A parameter of the module that tells dtype and device for its adapters."""
    held = module._parameters.get(site.parameter) if site.kind in (*LAYERS, "parameter") else None
    if held is None or not held.is_floating_point():
        held = next((p for p in module.parameters() if p.is_floating_point()), held)
    if held is None:
        return torch.zeros((), dtype=torch.float32)
    return torch.empty(0, dtype=compute_dtype(held), device=held.device)


def cast_like(tensor: Tensor, like: Tensor, module: nn.Module) -> Tensor:
    """A first tensor in the adapter's dtype on the layer's device; where the layer is offloaded, on the device it runs on."""
    device = like.device
    hook = getattr(module, "_hf_hook", None)
    if device.type == "meta" and hook is not None:
        device = torch.device(getattr(hook, "execution_device", None) or "cpu")
    return (
        tensor.detach()
        .to(device, like.dtype if tensor.is_floating_point() else tensor.dtype)
        .clone(
            memory_format=torch.contiguous_format  # as a file gives it back: the same sums, bit for bit
        )
    )
