"""diffusers' LoRA file, `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(folder)` reads.

Keys are the pipeline's component and the layer, `unet.….to_q.lora_A.weight`. All layers are given one rank (smaller ones are
filled up with zeros) and no alpha, so that every reader takes the scale to be 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import MissingExtra, Unsupported
from veneer.part import Part
from veneer.store import write_tensors
from veneer.tools.peft.as_lora import as_product
from veneer.tools.peft.lora import put_product
from veneer.tools.peft.names import Places
from veneer.tools.peft.taken import Taken, grouped
from veneer.tuned import Tuned

FILE = "pytorch_lora_weights.safetensors"
COMPONENTS = ("unet", "transformer", "text_encoder")


@torch.no_grad()
def save_diffusers(tuned: Tuned, folder: str | Path, rank: int | None = None, name: str | None = None) -> Path:
    """Writes the changes of one adapter (by default of the active one) as diffusers' LoRA; gives the file.

    Args:
        tuned: a pipeline as a module (`veneer.models.diffusion.Diffusion`), or its `unet` or `transformer` alone.
        rank: of the nearest low-rank change, for methods whose change is not of low rank; None refuses these.

    Raises:
        Unsupported: a model that is no part of a pipeline, or a change that is no low-rank change of a weight.
    """
    name = name or (tuned.active or list(tuned.adapters))[0]
    prefix = _prefix(tuned.model)
    taken = Taken(tuned, name, Places(tuned.model))
    products: dict[str, tuple[Tensor, Tensor]] = {}
    for path, parts in grouped(tuned.adapters[name].parts).items():
        _refuse(taken, parts, rank)
        A, B, _ = as_product(taken, parts, rank)
        products[path] = A, B
    r = max(len(A) for A, _ in products.values())
    for path, (A, B) in products.items():
        lacking = r - len(A)
        put_product(taken, path, torch.cat([A, A.new_zeros(lacking, A.shape[1])]), torch.cat([B, B.new_zeros(len(B), lacking)], 1))
    tensors = {prefix + key.removeprefix("base_model.model."): t.detach().cpu().contiguous() for key, t in taken.tensors.items()}
    write_tensors(Path(folder) / FILE, tensors, {"format": "pt"})
    return Path(folder) / FILE


def _prefix(model: nn.Module) -> str:
    """What stands before a layer's path in the file."""
    if any(name in model._modules for name in COMPONENTS[:2]):
        return ""
    kind = type(model).__name__.removeprefix("Adapted")
    if kind.startswith("UNet") or kind.endswith("Transformer2DModel"):
        return "unet." if kind.startswith("UNet") else "transformer."
    raise Unsupported(f"{kind} is no part of a pipeline of diffusers; write the adapter with --to peft.")


def _refuse(taken: Taken, parts: Sequence[Part], rank: int | None) -> None:
    call = taken.frozen(parts)
    for part in parts:
        label, site = part.method.label, part.site
        if site.kind not in ("linear", "conv") or not part.method.foldable:
            reason = part.method.limits.get("merge", f"a {site.kind} has no matrix")
            raise Unsupported(f"{label} at {site.name} cannot be written as diffusers' LoRA: {reason}. Serve it with veneer.load.")
        W = call.weight()
        if rank is None and part.method.low_rank(W if site.rows is None else W[slice(*site.rows)], part.tensors(), site) is None:
            raise Unsupported(
                f"{label} at {site.name} is not of low rank, and diffusers' file holds nothing else. "
                "Give --as-lora --rank N for the nearest LoRA, or serve it with veneer.load or merged."
            )


def read_back(model: nn.Module, folder: str | Path) -> nn.Module:
    """A pipeline as a module, with the file loaded by diffusers itself, which needs peft for it (else `MissingExtra`)."""
    pipeline: Any = model.pipeline
    if not hasattr(pipeline, "load_lora_weights"):
        raise Unsupported(f"{type(pipeline).__name__} reads no LoRA files; write the adapter merged.")
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError:
        raise MissingExtra("diffusers reads LoRA files with the package peft. Run: pip install 'veneer[diffusion]'") from None
    pipeline.load_lora_weights(str(folder))
    return model
