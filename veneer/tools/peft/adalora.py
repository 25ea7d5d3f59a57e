"""AdaLoRA as PEFT's ADALORA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veneer import registry
from veneer.errors import BadFile, Unsupported
from veneer.tools.peft.given import Given, Piece, finished
from veneer.tools.peft.names import split_key
from veneer.tools.peft.taken import Grouped, Taken, whole_number


def read_adalora(given: Given) -> Piece:
    config, found = given.config, []
    r = int(config.get("init_r") or 12)
    named = {"gamma": "orth_reg_weight", "t_i": "tinit", "t_f": "tfinal", "delta_T": "deltaT", "T": "total_step", "dropout": "lora_dropout"}
    options = {ours: config[theirs] for ours, theirs in named.items() if config.get(theirs) is not None}
    options |= {key: config[key] for key in ("beta1", "beta2") if key in config}
    target = min(int(config.get("target_r") or 8), r)
    method = registry.method("adalora", target_r=target, init_r=r, alpha=config.get("lora_alpha", 8), **options)
    for path in given.having("lora_E"):
        site = given.places.whole(path)
        Q = given.need(path, "lora_A", (-1, site.in_features))
        P, E = given.need(path, "lora_B", (site.out_features, len(Q))), given.need(path, "lora_E", (len(Q), 1))
        kept = kept_triplets(given, path, r, len(Q))
        p = {"P": P.new_zeros(len(P), r), "lambda": E.new_zeros(r), "Q": Q.new_zeros(r, Q.shape[1])}
        p["P"][:, kept], p["lambda"][kept], p["Q"][kept] = P, E[:, 0], Q
        found.append((method, site, p))
    return finished(given, method, found)


def kept_triplets(given: Given, path: str, r: int, count: int) -> Tensor:
    """Which of the r triplets the file holds: all, or those that `rank_pattern` keeps."""
    for key, mask in (given.config.get("rank_pattern") or {}).items():
        if given.places.path(split_key(key)[0]) == path:
            kept = torch.tensor(mask).flatten().bool()
            if len(kept) == r and int(kept.sum()) == count:
                return kept
            raise BadFile(f"{given.folder}: rank_pattern keeps {int(kept.sum())} of {len(kept)} at {path}, the file holds {count} of {r}.")
    if count != r:
        raise BadFile(f"{given.folder}: {path} has {count} triplets, init_r is {r}, and no rank_pattern says which they are.")
    return torch.ones(r, dtype=torch.bool)


def write_adalora(taken: Taken, groups: Grouped) -> None:
    """AdaLoRA: triplets that are masked for good are cut off and noted in rank_pattern."""
    methods = [p.method for parts in groups.values() for p in parts]
    method: Any = methods[0]
    if any(len(parts) > 1 or parts[0].site.rows for parts in groups.values()) or any(m != method for m in methods):
        raise Unsupported("PEFT's AdaLoRA acts on whole layers with one initial rank; write this one with as_lora=True.")
    before, masks = taken.remembered, {}
    loaded = before.get("peft_type") == "ADALORA"
    known = {taken.places.path(split_key(k)[0]): v for k, v in (before.get("rank_pattern") or {}).items()}
    trained = any(bool((parts[0].tensors()["lambda"] != 0).any()) for parts in groups.values())
    for path, (part,) in groups.items():
        p = part.tensors()
        kept = p["lambda"] != 0 if trained and (known or not loaded) else torch.ones_like(p["lambda"], dtype=torch.bool)
        if path in known:
            kept = kept | torch.tensor(known[path], device=kept.device).flatten()
        masks[f"{path}.lora_E"] = kept.tolist()
        taken.put(path, "lora_A", p["Q"][kept])
        taken.put(path, "lora_E", p["lambda"][kept][:, None])
        taken.put(path, "lora_B", p["P"][:, kept])
    total = int(method.T or before.get("total_step") or 1000)
    times = method.budget(total)
    taken.config.update(
        init_r=method.init_r, target_r=method.target_r, r=method.init_r, lora_alpha=whole_number(method.alpha), lora_dropout=method.dropout,
        beta1=method.beta1, beta2=method.beta2, orth_reg_weight=method.gamma, deltaT=method.delta_T, total_step=total,
        tinit=times.t_i, tfinal=times.t_f, rank_pattern=None if all(all(m) for m in masks.values()) and not known else masks,
        init_lora_weights=True, bias="none",
    )  # fmt: skip
    taken.name_targets(list(groups))
