"""The image half of a pretrained model, whatever its family: CLIP, SigLIP, DINOv2, ViT."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel

from veneer.errors import BadValue


def model_type(name: str) -> str:
    """What the configuration of a model folder calls itself; "" for hub names and short names."""
    file = Path(name).expanduser() / "config.json"
    return str(json.loads(file.read_text(encoding="utf-8")).get("model_type", "")) if file.is_file() else ""


def load_tower(name: str, **kwargs: Any) -> PreTrainedModel:
    """The image tower of a model folder or hub name; of models that read text too, their image half.

    Raises:
        BadValue: it does not read pictures in patches. UnknownName: it cannot be loaded.
    """
    from veneer.assets import resolve
    from veneer.tasks.task import load_failed

    try:
        loaded = AutoModel.from_pretrained(resolve(name), **kwargs)
    except (OSError, ValueError) as error:
        raise load_failed(name, error) from error
    tower = getattr(loaded, "vision_model", loaded)
    if not isinstance(tower, PreTrainedModel) or not isinstance(getattr(tower.config, "patch_size", None), int):
        raise BadValue(f"{name} is no vision transformer ({type(loaded).__name__}). Give one that reads pictures in patches: dinov2-small.")
    return tower


def features(tower: PreTrainedModel, pixel_values: Tensor) -> Any:
    """The tower's outputs for pictures [n, 3, height, width] of any size."""
    known = inspect.signature(tower.forward).parameters
    return tower(pixel_values, **({"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in known else {}))


def pooled(tower: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    """The picture's feature [n, D]: the class token after the last norm, before any projection; the tower's own attention
    pooling where it has no class token."""
    found = features(tower, pixel_values)
    if found.get("pooler_output") is None or hasattr(tower, "pooler"):  # ViT's pooler is one more layer, not the class token
        return found.last_hidden_state[:, 0]
    return found.pooler_output


def patch_grid(tower: PreTrainedModel, pixel_values: Tensor, side: int) -> Tensor:
    """Patch features averaged over side × side equal regions of the picture: [n, side², D].

    Raises `BadValue` for pictures of fewer patches a side.
    """
    size: int = tower.config.patch_size
    height, width = pixel_values.shape[-2] // size, pixel_values.shape[-1] // size
    if min(height, width) < side:
        raise BadValue(
            f"image_size={min(pixel_values.shape[-2:])} gives {height} × {width} patches, too few for {side * side} image tokens."
        )
    patches = features(tower, pixel_values).last_hidden_state[:, -height * width :]  # class and register tokens stand in front
    grid = patches.mT.unflatten(-1, (height, width))
    return F.adaptive_avg_pool2d(grid, side).flatten(2).mT
