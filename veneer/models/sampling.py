"""Pictures from a pipeline and back: the same prompt and seed give the same picture."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from veneer.models.diffusion import Diffusion

STEPS = 25
"""Sampling steps unless told otherwise."""


@torch.no_grad()
def sample(model: Diffusion, prompts: Sequence[str], seed: int, steps: int | None = None, guidance: float | None = None) -> list[Any]:
    """PIL pictures of prompts by the pipeline as it is now; the nth starts from the noise of seed + n, drawn on the CPU.

    Args:
        steps: of the pipeline's own sampler. guidance: scale of classifier-free guidance; None: the pipeline's own choice.
    """
    training = model.training
    model.eval()
    given: dict[str, Any] = {"num_inference_steps": steps or STEPS, "height": model.size, "width": model.size}
    if guidance is not None:
        given["guidance_scale"] = guidance
    further = {"max_sequence_length": model.max_length, "use_resolution_binning": False, "clean_caption": False}  # as it is trained
    known = inspect.signature(model.pipeline.__call__).parameters
    given |= {name: value for name, value in further.items() if name in known and value is not None}
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    try:
        return model.pipeline(prompt=list(prompts), generator=generators, **given).images
    finally:
        model.train(training)


def pixels(picture: Any, size: int) -> Tensor:
    """A PIL picture as [3, size, size] in −1 … 1: its shorter side scaled to size, then the middle cut out."""
    import numpy as np
    from PIL import Image

    scale = size / min(picture.size)
    picture = picture.resize([max(size, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in picture.size)
    cut = np.array(picture.crop((left, top, left + size, top + size)), dtype=np.float32)
    return torch.from_numpy(cut).permute(2, 0, 1) / 127.5 - 1


def shown(values: Tensor) -> Any:
    """A PIL picture of [3, h, w] in −1 … 1."""
    from PIL import Image

    return Image.fromarray(((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy())
