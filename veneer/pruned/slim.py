"""The second phase of Light-PEFT: the model and the modules on it really shrink, and training goes on from there (arXiv:2406.03792)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from veneer import anatomy
from veneer.adapter import Adapter
from veneer.errors import BadValue, Unsupported
from veneer.method import replaced
from veneer.part import Part
from veneer.pruned.base import prune
from veneer.pruned.choice import kept_heads, kept_modules, kept_neurons
from veneer.pruned.modules import FACT, is_module, key_of, masks_of, rank_count
from veneer.pruned.pieces import attach_pieces, pieces_of
from veneer.pruned.shrinking import rank_axes
from veneer.pruned.switched_off import answers, compare, switch_off
from veneer.pruned.units import units_at
from veneer.strategies.early_pruning import EarlyPruning
from veneer.tuned import Tuned


def slim(tuned: Tuned, name: str | None = None, *, batch: Any = None, **changes: Any) -> Tuned:
    """Prunes a model that was trained with `… + light-peft`, in place, and attaches what is left of the adapter to it.

    Heads, neurons, modules and ranks go as the method's ratios say; the rest keeps its values and its scale, the masks are
    dropped. The old `tuned` is of no use afterwards.

    Args:
        name: the adapter; by default the active one. It must be the only one.
        batch: model inputs to compare the pruned model on with the unpruned one whose units are switched off.
        changes: hyper-parameters of light-peft that differ from those trained with: rho_m=0.5, ffn_scope="layer" …

    Raises:
        BadValue: nothing to prune by, nothing left to train, or tensors that cannot follow. Unsupported: layers that cannot
        be cut. Nothing has changed then. Mismatch: the pruned model answers differently on the batch.
    """
    adapter = _only(tuned, name)
    masks = [part for part in adapter.parts if masks_of(part)]
    if not masks:
        raise BadValue(f"slim: {adapter.method.spec} has no masks to prune by; train with '{adapter.method.spec} + light-peft' first.")
    rule: Any = replaced(masks[0].method, changes)
    kept, alive = _kept_units(tuned.model, masks, rule), _kept_parts(adapter, rule)
    pieces = pieces_of(tuned.model, adapter, kept, alive)
    for strategy in adapter.strategies:
        if isinstance(strategy, EarlyPruning):
            strategy.look(False)
    if batch is not None:
        switch_off(tuned.model, adapter, kept, alive)
        expected = answers(tuned.model, batch)
    model = tuned.detach()
    prune(model, kept)
    again = attach_pieces(model, adapter, pieces)
    if batch is not None:
        compare(expected, model, batch)
    return again


def _only(tuned: Tuned, name: str | None) -> Adapter:
    if len(tuned.adapters) > 1:
        raise Unsupported(f"slim: the model has the adapters {', '.join(tuned.adapters)}; remove all but one, as the others would not fit.")
    if name not in (None, *tuned.adapters) or not tuned.adapters:
        raise BadValue(f"slim: there is no adapter {name!r} here; there is: {', '.join(tuned.adapters) or 'none'}.")
    return next(iter(tuned.adapters.values()))


def _kept_units(model: nn.Module, masks: Sequence[Part], rule: Any) -> dict[str, Tensor]:
    """Which units stay, at sites where some go."""
    values = {part.site.name: m.detach().abs() if rule.absolute else m.detach() for part in masks for m in masks_of(part)}
    heads = [part.site for part in masks if part.site.role == "attn.o" and rule.rho_a]
    kept = {s.name: kept_heads(values[s.name], rule.rho_a, s.heads // s.kv_heads) for s in heads}
    neurons = {p.site.name: values[p.site.name] for p in masks if p.site.role == "mlp.down" and rule.rho_f}
    kept |= kept_neurons(neurons, rule.rho_f, rule.ffn_scope)
    kept = {name: mask for name, mask in kept.items() if not mask.all()}
    units_at(model, anatomy.sites(model), kept)  # refuses here what cannot be cut
    return kept


def _kept_parts(adapter: Adapter, rule: Any) -> dict[str, Tensor]:
    """The modules that stay, each with a mask over its ranks."""
    modules = {key_of(part): part for part in adapter.parts if is_module(part)}
    if not modules:
        raise BadValue(f"slim: {adapter.method.spec} has no modules to go on with; train '{{a method}} + light-peft', such as lora.")
    worth = adapter.facts.get(FACT) or {}
    if not rule.rho_m and not rule.rho_r:
        worth = {key: [1.0, *[1.0] * rank_count(part, rank_axes(part))] for key, part in modules.items()}
    if worth.keys() != modules.keys():
        raise BadValue(
            "slim: the modules were not weighed, which happens in the second half of the steps of a training loop with masks; "
            "train longer, or keep all of them with rho_m=0, rho_r=0."
        )
    return kept_modules(worth, rule.rho_m, rule.rho_r, rule.rank_scope)
