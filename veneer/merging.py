"""Writing adapters into the base's weights, and taking them out again without a trace."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import Unsupported
from veneer.part import LAYERS
from veneer.route import Active
from veneer.slot import Slot


class Merging:
    """What is merged into one model: the original parameters, kept whole, so that taking out is exact."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.originals: dict[tuple[str, str], nn.Parameter | None] = {}
        self.for_good = False
        self.untied: list[Any] = []

    def __bool__(self) -> bool:
        return bool(self.originals) or self.for_good

    def write(self, active: Active, keep: bool = True) -> None:
        """Merges the active adapters, all of their weights or none; without `keep` each original goes as its merged one comes."""
        slots = self._mergeable(active)
        if not keep:
            return self._write_for_good(slots, active)
        done: dict[tuple[str, str], nn.Parameter | None] = {}
        try:
            with torch.no_grad():
                for path, module, slot in slots:
                    self._write(path, module, slot, active, done)
        except BaseException:
            self._put_back(done)
            raise
        self.originals = done
        self._untie(done)

    def _write_for_good(self, slots: Sequence[tuple[str, nn.Module, Slot]], active: Active) -> None:
        uses = Counter(id(p) for module in self.model.modules() for p in module._parameters.values())
        tied: dict[tuple[str, str], nn.Parameter | None] = {}
        self.for_good = True
        with torch.no_grad():
            for path, module, slot in slots:
                done: dict[tuple[str, str], nn.Parameter | None] = {}
                self._write(path, module, slot, active, done)
                tied.update({place: p for place, p in done.items() if p is not None and uses[id(p)] > 1})
        self._untie(tied)

    def _mergeable(self, active: Active) -> list[tuple[str, nn.Module, Slot]]:
        found = []
        for path, module in self.model.named_modules():
            slot = module._modules.get("veneer")
            if not isinstance(slot, Slot):
                continue
            parts = [p for name, _ in active for p in slot.parts.get(name, ())]
            for part in parts:
                if not part.method.foldable or part.site.kind not in (*LAYERS, "parameter"):
                    reason = part.method.limits.get("merge", "it does not act on a weight")
                    raise Unsupported(f"merge: {part.method.label} at {part.site.name} cannot be merged: {reason}")
                form = slot.forms[part.site.parameter]
                if form.writable:
                    raise Unsupported(f"merge: {part.site.name} cannot take a merge: {form.writable}")
                held: Any = module._parameters[part.site.parameter]
                if held.device.type == "meta":
                    raise Unsupported(f"merge: the weight of {part.site.name} is offloaded; load the model without offloading to merge.")
                if hasattr(held, "full_tensor"):
                    raise Unsupported(
                        f"merge: the weight of {part.site.name} is sharded over processes; save the adapter and merge it into a base "
                        "that is not (on the CPU, say)."
                    )
            if parts:
                found.append((path, module, slot))
        if not found:
            raise Unsupported("merge: no active adapter acts on a weight; activate one first.")
        return found

    def _write(self, path: str, module: nn.Module, slot: Slot, active: Active, done: dict) -> None:
        names = {p.site.parameter for name, _ in active for p in slot.parts.get(name, ())}
        for parameter in sorted(names):
            form = slot.forms[parameter]
            W, b = slot.effective(module, parameter, active)
            raw = module._parameters[parameter]
            assert raw is not None
            self._replace(path, module, parameter, form.store(W, raw), done)
            own = module._parameters.get(form.bias_name)
            if b is None:
                continue
            if own is None and form.bias_name not in module._parameters:
                raise Unsupported(f"merge: {type(module).__name__} at {path} has no bias to take the shift.")
            self._replace(path, module, form.bias_name, b.to(raw.dtype if own is None else own.dtype), done)

    @staticmethod
    def _replace(path: str, module: nn.Module, name: str, value: Tensor, done: dict) -> None:
        before = done[path, name] = module._parameters[name]
        value = value.detach()
        if before is not None and value.untyped_storage().data_ptr() == before.untyped_storage().data_ptr():
            value = value.clone()  # a fold that left it as it was: the original must stay apart
        module._parameters[name] = nn.Parameter(value, requires_grad=False)

    def _put_back(self, originals: Mapping[tuple[str, str], nn.Parameter | None]) -> None:
        for (path, name), parameter in originals.items():
            self.model.get_submodule(path)._parameters[name] = parameter

    def _untie(self, merged: Mapping[tuple[str, str], nn.Parameter | None]) -> None:
        """A merged layer keeps its own weight where it shared one: the other use must not change."""
        kept = {id(p) for _, p in self.model.named_parameters()}
        shared = [path for (path, _), p in merged.items() if p is not None and id(p) in kept]
        if not shared:
            return
        warnings.warn(f"merge: {', '.join(shared)} shared its weight with another layer; they are untied now.", stacklevel=4)
        for config in {id(c): c for m in self.model.modules() if (c := getattr(m, "config", None)) is not None}.values():
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False
                self.untied.append(config)

    def undo(self) -> None:
        """Puts the very parameters back that were there."""
        self._put_back(self.originals)
        for config in self.untied:
            config.tie_word_embeddings = True
        self.forget()

    def forget(self) -> None:
        """Leaves what is merged as it is."""
        self.originals, self.untied, self.for_good = {}, [], False
