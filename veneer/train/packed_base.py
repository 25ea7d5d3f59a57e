"""The frozen base in 4 or 8 bits, and optimiser states in 8 bits or paged: what QLoRA adds to a run (2023, arXiv:2305.14314)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import BadValue, MissingExtra

if TYPE_CHECKING:
    import torch

    from veneer.train.recipe import Recipe

FORMATS = ("none", "nf4", "fp4", "int8")
"""What the base may be stored as, through bitsandbytes."""

OPTIMIZERS = {
    "adamw": None,
    "adamw-8bit": "adamw_8bit",
    "paged-adamw": "paged_adamw_32bit",
    "paged-adamw-8bit": "paged_adamw_8bit",
}
"""Our names → those of transformers; None: what it takes by itself."""

HEADS = ["lm_head", "classifier", "score", "qa_outputs", "embed_out"]
"""Output layers, which stay as they are: they are small, and train in most tasks."""

INSTALL = "pip install 'veneer[quant]'"


def check(recipe: Recipe) -> None:
    """Refuses what cannot be had, without torch. Raises `MissingExtra`, or `BadValue` for a base that is quantised already."""
    if recipe.quantise == "none" and recipe.optimizer == "adamw":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        what = f"quantise={recipe.quantise!r}" if recipe.quantise != "none" else f"optimizer={recipe.optimizer!r}"
        raise MissingExtra(f"{what} needs bitsandbytes: {INSTALL}")
    file = Path(recipe.model).expanduser() / "config.json"
    if recipe.quantise != "none" and file.is_file():
        refuse_packed(json.loads(file.read_text(encoding="utf-8")).get("quantization_config"), recipe)


def refuse_packed(found: Any, recipe: Recipe) -> None:
    """Raises `BadValue` if a model's configuration says that its weights are quantised already."""
    if found:
        method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
        raise BadValue(
            f"{recipe.model} is quantised already ({getattr(method, 'value', method)}); quantise={recipe.quantise!r} would round it twice. "
            "Leave --quantise out, or give the model in 16 or 32 bit."
        )


def config(quantise: str, double_quant: bool, dtype: torch.dtype) -> Any:
    """bitsandbytes' configuration for transformers' `from_pretrained`; products are computed in `dtype`."""
    from transformers import BitsAndBytesConfig

    if quantise == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=HEADS)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantise,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=HEADS,
    )


def loading(recipe: Recipe, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """What the recipe adds to `from_pretrained`: nothing, or the packing and the place."""
    if recipe.quantise == "none":
        return {}
    from transformers import AutoConfig

    from veneer.assets import resolve

    try:
        known = AutoConfig.from_pretrained(resolve(recipe.model))
    except (OSError, ValueError):
        known = None  # the task says what is wrong with the name
    refuse_packed(getattr(known, "quantization_config", None), recipe)
    return {"quantization_config": config(recipe.quantise, recipe.double_quant, dtype), "device_map": {"": device}}


def optimizer(recipe: Recipe, device: str) -> tuple[str | None, str]:
    """transformers' name of the optimiser, None for its own choice; and what is to be said about it.

    Pages are memory of the CUDA driver: elsewhere the states lie in ordinary memory, with the same numbers.
    """
    name = OPTIMIZERS[recipe.optimizer]
    if recipe.optimizer.startswith("paged") and not device.startswith("cuda"):
        plain = recipe.optimizer.removeprefix("paged-")
        return OPTIMIZERS[plain], f"Optimiser: {plain}; pages are CUDA's, states lie in ordinary memory here, with the same numbers"
    return name, "" if name is None else f"Optimiser: {recipe.optimizer}"
