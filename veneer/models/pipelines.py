"""Pipelines of diffusers: loading them, and the sizes of pictures that they take."""

from __future__ import annotations

import os
from typing import Any

from veneer.errors import BadValue, MissingExtra


def load_pipeline(name: str, dtype: Any = None) -> Any:
    """A pipeline from a folder or the hub.

    Raises `MissingExtra` without diffusers, `UnknownName` for what cannot be loaded.
    """
    import torch

    from veneer.tasks.task import load_failed

    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # read when it is first imported
    try:
        from diffusers import DiffusionPipeline
        from diffusers.utils import logging
    except ModuleNotFoundError:
        raise MissingExtra("Text-to-image needs the package diffusers. Run: pip install 'veneer[diffusion]'") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        pipeline = DiffusionPipeline.from_pretrained(name, dtype=dtype or torch.float32)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise load_failed(name, error) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def granule(pipeline: Any) -> int:
    """What the side of a picture must be a multiple of: the VAE's factor times the patches' side."""
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    packed = 2 if type(network).__name__.removeprefix("Adapted").startswith("Flux") else network.config.get("patch_size") or 1
    return int(pipeline.vae_scale_factor) * int(packed)


def default_size(pipeline: Any) -> int:
    """The side of the pictures that the pipeline is made for, in pixels."""
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    side: Any = getattr(network.config, "sample_size", None) or getattr(pipeline, "default_sample_size", 64)
    return int(side if isinstance(side, int) else side[0]) * int(pipeline.vae_scale_factor)


def check_size(pipeline: Any, size: int) -> None:
    """Raises `BadValue` for a side that the VAE cannot halve as often as it has to."""
    step = granule(pipeline)
    if size % step:
        near = max(step, size // step * step)
        raise BadValue(f"image_size={size} is no multiple of {step}, the factor of the pipeline's VAE and patches; choose {near}.")
