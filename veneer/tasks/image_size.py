"""The size of pictures that enter a model: which side it is, and whether the model can take it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from veneer.errors import BadValue

if TYPE_CHECKING:
    from torch import nn


def side_of(processor: Any) -> int:
    """The side in pixels of the square that a model's own preparation of pictures makes."""
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    given = dict(size) if not isinstance(size, int) else {"height": size}
    return int(given.get("height") or given.get("shortest_edge") or next(v for v in given.values() if v))


def check_side(model: nn.Module, side: int, name: str) -> None:
    """Lets the model read one blank picture [1, 3, side, side].

    Raises `BadValue` with the sides that would work if the patches do not divide it, or if the model cannot read it.
    """
    import torch

    patch = _patch(model.config)
    if patch and side % patch:
        lower = side // patch * patch
        near = " or ".join(str(s) for s in (lower, lower + patch) if s > 0)
        raise BadValue(
            f"Pictures of side {side} do not divide into the patches of {name}, {patch} × {patch} pixels; use --image-size {near}."
        )
    first = next(p for p in model.parameters() if p.is_floating_point())
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(pixel_values=torch.zeros(1, 3, side, side, dtype=first.dtype, device=first.device))
    except (ValueError, RuntimeError) as error:
        trained = getattr(model.config, "image_size", None)
        advice = f"; use --image-size {trained}" if isinstance(trained, int) and trained != side else ""
        reason = str(error).strip().splitlines()[0][:200].rstrip(".") if str(error).strip() else type(error).__name__
        raise BadValue(f"{name} cannot read pictures of side {side}: {reason}{advice}.") from error
    finally:
        model.train(training)


def _patch(config: Any) -> int | None:
    """The side of a patch; None for models whose patches overlap, and those with windows, which pad pictures themselves."""
    if hasattr(config, "window_size"):
        return None
    backbone = getattr(config, "backbone", None)
    patch = backbone.get("patch_size") if isinstance(backbone, dict) else getattr(config, "patch_size", None)
    return patch if isinstance(patch, int) else None
