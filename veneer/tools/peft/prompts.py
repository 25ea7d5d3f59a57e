"""Learned tokens, keys and values: PEFT's PROMPT_TUNING and PREFIX_TUNING."""

from __future__ import annotations

import torch

from veneer import registry
from veneer.errors import BadFile, Unsupported
from veneer.tools.peft.given import Given, Piece
from veneer.tools.peft.names import CLASSIFIERS, check_first_position, prefix_sites
from veneer.tools.peft.taken import Grouped, Taken


def read_prompt(given: Given) -> Piece:
    sites = given.places.only("model")
    if not sites:
        raise Unsupported(f"{given.folder}: this model takes no token embeddings, so learned tokens have no place.")
    check_first_position(given.places, str(given.config.get("task_type")), str(given.folder))
    length = int(given.config.get("num_virtual_tokens") or 0)
    P = given.need("", "prompt_embeddings", (-1, sites[0].in_features))
    if not 1 <= length <= len(P):
        raise BadFile(f"{given.folder}: num_virtual_tokens is {length}, the table has {len(P)} rows.")
    method = registry.method("prompt-tuning", length=length, after_first=False)
    return Piece(method, [(method, sites[0], {"P": P[:length]})])  # of an encoder-decoder's two tables PEFT reads the first


def write_prompt(taken: Taken, groups: Grouped) -> None:
    (part,) = (p for parts in groups.values() for p in parts)
    if taken.task() in CLASSIFIERS and part.method.after_first is not False:  # type: ignore[attr-defined]
        raise Unsupported(
            "PEFT puts learned tokens before the first token, this adapter puts them after it (after_first); "
            "train with prompt-tuning(after_first=False) to share it with PEFT."
        )
    check_first_position(taken.places, taken.task(), "export")
    P = part.method.tokens(part.tensors(), part.site)  # type: ignore[attr-defined]
    taken.tensors["prompt_embeddings"] = P
    taken.config.update(num_virtual_tokens=len(P), token_dim=P.shape[1], num_transformer_submodules=1, prompt_tuning_init="RANDOM")


def read_prefix(given: Given) -> Piece:
    sites = prefix_sites(given.places, str(given.folder))
    width = 2 * sum(s.out_features for s in sites)
    table = given.need("", "prompt_embeddings", (-1, width))
    method = registry.method("prefix-tuning", length=len(table), shift_positions=True)
    pieces = table.split([s.out_features for s in sites for _ in "kv"], 1)
    return Piece(method, [(method, s, {"PK": pieces[2 * i], "PV": pieces[2 * i + 1]}) for i, s in enumerate(sites)])


def write_prefix(taken: Taken, groups: Grouped) -> None:
    """Prefix tuning: keys and values of all layers in one table [P, layers · 2 · width]; the network that made them is left out."""
    parts = [p for found in groups.values() for p in found]
    sites = prefix_sites(taken.places, "export")
    if {p.site.name for p in parts} != {s.name for s in sites}:
        raise Unsupported("PEFT's prefix tuning acts on every attention layer; this adapter leaves some out (leave_out or targets).")
    order = {s.name: i for i, s in enumerate(sites)}
    parts.sort(key=lambda p: order[p.site.name])
    if len({s.out_features for s in sites}) > 1:
        raise Unsupported("PEFT's prefix tuning needs keys of one width in every layer.")
    pairs = [p.method.keys_values(p.tensors(), p.site) for p in parts]  # type: ignore[attr-defined]
    table = torch.cat([t for pair in pairs for t in pair], 1)
    taken.tensors["prompt_embeddings"] = table
    taken.config.update(
        num_virtual_tokens=len(table), token_dim=sites[0].out_features, num_attention_heads=sites[0].kv_heads, num_layers=len(sites),
        num_transformer_submodules=1, prefix_projection=False, encoder_hidden_size=None,
    )  # fmt: skip
