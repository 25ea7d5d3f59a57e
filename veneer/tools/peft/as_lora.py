"""Any change of a weight, written as plain LoRA."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from veneer.errors import BadValue, Unsupported
from veneer.maths.starts import truncated_svd
from veneer.part import Part
from veneer.tools.peft.lora import joined, put_lora_options, put_product, put_scales
from veneer.tools.peft.taken import Taken, grouped


def write_as_lora(taken: Taken, parts: Mapping[int, list[Part]], rank: int | None, tell: Callable[[str], object]) -> set[int]:
    """Writes every change of a weight as a plain low-rank product; returns the parts it has dealt with."""
    mine = {i: own for i, own in parts.items() if own and not (own[0].method.trains_heads or own[0].method.slug == "bitfit")}
    scales, worst = {}, (0.0, "")
    for path, group in grouped(p for own in mine.values() for p in own).items():
        for part in group:
            if part.site.kind not in ("linear", "conv", "embedding") or not part.method.foldable:
                reason = part.method.limits.get("merge", f"a {part.site.kind} has no matrix")
                raise Unsupported(f"{part.method.label} at {part.site.name} cannot be written as LoRA: {reason}")
        A, B, error = as_product(taken, group, rank)
        put_product(taken, path, A, B)
        scales[path] = len(A), 1.0
        worst = max(worst, (error, path))
    if not scales:
        raise Unsupported("There is no change of a weight here that could be written as LoRA.")
    taken.config["peft_type"] = "LORA"
    put_scales(taken, scales, False, {})
    put_lora_options(taken, grouped(p for own in mine.values() for p in own), lora_dropout=0.0, lora_bias=False)
    if worst[0]:
        tell(f"Written as LoRA of rank {rank}: the largest relative error of a weight's change is {worst[0]:.3g}, at {worst[1]}.")
    return set(mine)


def as_product(taken: Taken, parts: Sequence[Part], rank: int | None) -> tuple[Tensor, Tensor, float]:
    """A [r, in], B [out, r] of the module's whole change, and the relative error; 0 where it is of low rank."""
    call = taken.frozen(parts)
    W = call.weight()
    exact = [p.method.low_rank(W if p.site.rows is None else W[slice(*p.site.rows)], p.tensors(), p.site) for p in parts]
    if all(factors is not None for factors in exact):
        A, B, _ = joined(taken, parts, [(f[1], f[0], 1.0) for f in exact if f is not None])
        return A, B, 0.0
    label, path = parts[0].method.label, parts[0].site.module
    if rank is None:
        raise BadValue(f"{label} at {path} is not of low rank; give rank=… for its nearest LoRA (its error is reported).")
    new, b = taken.folded(parts)
    change = (new - W).flatten(1)
    if b is not None and (call.bias() is None or not torch.equal(b, call.bias().to(b.dtype))):  # type: ignore[union-attr]
        if taken.layer(parts)[0]._parameters.get("bias") is None:
            raise Unsupported(f"{label} gives {path} a bias, which it has not in the base; export the adapter merged.")
        taken.put(path, "base_layer.bias", b)
    U, S, Vt = truncated_svd(change, min(rank, *change.shape))
    left = change - (U * S) @ Vt
    return Vt * S.sqrt()[:, None], U * S.sqrt(), float(left.norm() / change.norm().clamp_min(torch.finfo(change.dtype).tiny))
