"""Early pruning: masks pulled towards zero, and a record of what each trained module and rank is worth (2024, arXiv:2406.03792)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veneer.errors import BadValue
from veneer.part import Part, Respond
from veneer.pruned.modules import FACT, Worth, is_module, key_of, masks_of, rank_count
from veneer.pruned.shrinking import rank_axes
from veneer.strategy import Strategy

if TYPE_CHECKING:
    from veneer.tuned import Tuned


def response(h: Tensor, y: Tensor, site_kind: str, real: Tensor | None) -> Tensor:
    """Mean over the real tokens of ‖y − h‖ / ‖h‖, norms over features; real [rows, tokens] is 1 there."""
    axis = 1 if site_kind == "conv" else -1
    h, y = h.detach().float() if h.dtype in (torch.float16, torch.bfloat16) else h.detach(), y.detach()
    ratio = torch.linalg.vector_norm(y - h, dim=axis) / torch.linalg.vector_norm(h, dim=axis)
    if real is None or real.shape != ratio.shape:
        return ratio.mean()
    kept = real.to(ratio.dtype)
    return torch.where(real.bool(), ratio, 0).sum() / kept.sum()


def rank_scores(p: Mapping[str, Tensor], axes: Mapping[str, int]) -> Tensor:
    """Σ over matrices of |mean of w ⊙ ∂L/∂w over all but the rank axis|, [r]; the mean comes first, then its absolute value."""
    total = torch.zeros(())
    for name, axis in axes.items():
        w = p[name]
        if w.ndim > 1:
            product = w * w.grad if w.grad is not None else torch.zeros_like(w)
            total = total.to(w.device) + product.detach().movedim(axis, 0).flatten(1).mean(1).abs()
    return total


class EarlyPruning(Strategy):
    """Adds lam · Σ|m| over all masks, and takes the mean worth of modules and ranks over the second half of the steps.

    Worth is noted in training mode, once a step (the mean over the forwards of a step), from the whole gradient.
    """

    def __init__(self, lam: float, T: int | None) -> None:
        self.lam, self.T, self.step, self.count = lam, T, 0, 0
        self.sums: Tensor | None = None
        self.tuned: Tuned | None = None
        self.name = ""
        self.modules: dict[str, Part] = {}
        self.axes: dict[str, Mapping[str, int]] = {}
        self.seen: dict[str, list[Tensor]] = {}
        self.others: dict[str, Respond | None] = {}
        self.real: Tensor | None = None
        self.hook: Any = None

    def start(self, tuned: Tuned, name: str, total_steps: int | None = None) -> None:
        parts = tuned.adapters[name].parts
        for mask in (part for part in parts if masks_of(part)):
            for other in (p for p in parts if p.site.module == mask.site.module and p.site.kind == "linear" and p.index > mask.index):
                raise BadValue(f"{mask.method.label} must come last: write {other.method.slug} + {mask.method.slug}, at {mask.site.name}.")
        self.tuned, self.name, self.T = tuned, name, self.T or total_steps
        self.modules = {key_of(part): part for part in parts if is_module(part)}
        self.axes = {key: rank_axes(part) for key, part in self.modules.items()}
        self.watch()

    def watch(self) -> None:
        """Looks at what modules add in the second half of the steps, and no longer."""
        assert self.tuned is not None
        self.look(self.T is not None and self.T // 2 <= self.step < self.T)

    def look(self, looks: bool) -> None:
        """Sets or takes away what looks at the forward passes."""
        for key, part in self.modules.items():
            if looks and key not in self.others:
                self.others[key] = part.respond
                part.respond = self._looking(key, part.site.kind, part.respond)
            elif not looks and key in self.others:
                part.respond = self.others.pop(key)
        if looks and self.hook is None and self.tuned is not None:
            self.hook = self.tuned.model.register_forward_pre_hook(self._take_mask, with_kwargs=True)
        elif not looks and self.hook is not None:
            self.hook.remove()
            self.hook = None

    def _looking(self, key: str, kind: str, other: Respond | None) -> Respond:
        def look(h: Tensor, y: Tensor) -> Tensor:
            y = y if other is None else other(h, y)
            if self.tuned is not None and self.tuned.model.training:
                with torch.no_grad():
                    self.seen.setdefault(key, []).append(response(h, y, kind, self.real))
            return y

        return look

    def _take_mask(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        found = {**dict(zip(names, args)), **kwargs}.get("attention_mask")
        self.real = found if isinstance(found, Tensor) and found.ndim == 2 else None

    def loss_terms(self) -> dict[str, Tensor]:
        if not self.lam or self.tuned is None:
            return {}
        sums = [m.abs().sum() for part in self.tuned.adapters[self.name].parts for m in masks_of(part)]
        return {"masks": self.lam * torch.stack([s.to(sums[0].device) for s in sums]).sum()}

    @torch.no_grad()
    def before_step(self) -> None:
        if self.T is None:
            raise BadValue("LightPEFT needs the number of optimiser steps: give T=… to the method or call tuned.begin(total_steps).")
        if not self.T // 2 <= self.step < self.T or not self.modules:
            return
        now = torch.cat([self._worth(key, part).double().cpu() for key, part in self.modules.items()])
        self.sums = now if self.sums is None else self.sums + now
        self.count += 1
        self.seen = {}
        self.tuned.adapters[self.name].facts[FACT] = {  # type: ignore[union-attr]
            key: [float(f"{v:.6g}") for v in values] for key, values in self.worth().items()
        }

    def _worth(self, key: str, part: Part) -> Tensor:
        """Importance of a module and its ranks at this step, [1 + r]; what is not a finite number counts as 0."""
        seen = self.seen.get(key)
        module = torch.stack(seen).mean() if seen else torch.zeros(())
        ranks = rank_scores(part.tensors(), self.axes[key]) if self.axes[key] else torch.zeros(0)
        return torch.cat([module.reshape(1).to(ranks), ranks]).nan_to_num(0.0, 0.0, 0.0)

    def worth(self) -> Worth:
        """The means so far; empty before the second half."""
        if self.sums is None:
            return {}
        lengths = [1 + rank_count(part, self.axes[key]) for key, part in self.modules.items()]
        return {key: piece.tolist() for key, piece in zip(self.modules, (self.sums / self.count).split(lengths))}

    def after_step(self) -> None:
        self.step += 1
        self.watch()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "T": self.T, "count": self.count, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.T, self.count, self.sums = state["step"], state["T"], state["count"], state["sums"]
        self.watch()
