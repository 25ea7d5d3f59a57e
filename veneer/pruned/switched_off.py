"""The whole model with zeros in place of what is to go: what a pruned one must answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter import Adapter
from veneer.errors import Mismatch
from veneer.plan import run
from veneer.pruned.modules import is_module, key_of, masks_of
from veneer.pruned.shrinking import rank_axes
from veneer.slot import Slot

ALLOWED = {torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest difference of outputs, over the largest output, by dtype; 1e-3 otherwise."""


@torch.no_grad()
def switch_off(model: nn.Module, adapter: Adapter, kept: Mapping[str, Tensor], alive: Mapping[str, Tensor]) -> None:
    """Sets masks to 0 and 1 and dropped ranks to 0, and takes dropped modules out of the layers. The adapter is spent then."""
    gone = [part for part in adapter.parts if is_module(part) and key_of(part) not in alive]
    for slot in (m for m in model.modules() if isinstance(m, Slot)):
        slot.parts[adapter.name] = [part for part in slot.parts.get(adapter.name, ()) if part not in gone]
    for part in adapter.parts:
        for m in masks_of(part):
            m.copy_(kept.get(part.site.name, torch.ones(m.shape)))
        for name, axis in (rank_axes(part) if key_of(part) in alive else {}).items():
            t = part.tensors()[name]
            t.index_fill_(axis, (~alive[key_of(part)]).nonzero()[:, 0].to(t.device), 0)


@torch.no_grad()
def answers(model: nn.Module, batch: Any) -> Tensor:
    """The model's logits, or its first output, in evaluation mode."""
    training = model.training
    try:
        found = run(model.eval(), batch)
    finally:
        model.train(training)
    found = getattr(found, "logits", found)
    return found if isinstance(found, Tensor) else found[0]


def compare(expected: Tensor, model: nn.Module, batch: Any) -> None:
    """Raises `Mismatch` where the pruned model answers otherwise, or not at all."""
    allowed, unknown = ALLOWED.get(expected.dtype, 1e-3), "this model reads its heads or neurons in a way that is not known"
    try:
        found = answers(model, batch)
    except (RuntimeError, ValueError, IndexError) as error:
        raise Mismatch(
            f"slim: the pruned model does not run ({error}): {unknown}. Load it anew, and leave heads whole with rho_a=0."
        ) from error
    far = float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-12))
    if not far <= allowed:
        raise Mismatch(
            f"slim: the pruned model's answers differ by {far:.1e} of the largest from those with the same units switched off, more "
            f"than {allowed:.0e}: {unknown}. Load it anew, and leave heads whole with rho_a=0."
        )
