"""How each family of text-to-image networks is told the prompt, the time and the size: by its pipeline's own encoder."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.errors import BadValue, Unsupported

GUIDANCE = 3.5
"""What guidance-distilled networks are told in training."""

Conditions = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """One kind of network.

    Args:
        keep: which of what the pipeline's `encode_prompt` gives is needed, by position → name.
        denoise: (network, latents [B, C, h, w], times [B], conditions, size in pixels) → prediction [B, C, h, w].
    """

    keep: dict[int, str]
    denoise: Callable[[Any, Tensor, Tensor, Conditions, int], Tensor]


def family_of(pipeline: Any) -> Family:
    """The family of a pipeline's network. Raises `Unsupported`, also for a pipeline that takes no text."""
    name = type(pipeline).__name__
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    if not hasattr(pipeline, "encode_prompt") or not encoders(pipeline):
        raise Unsupported(f"{name} has no text encoder, so it cannot be taught descriptions; choose a text-to-image pipeline.")
    kind = type(network).__name__.removeprefix("Adapted")
    if kind == "UNet2DConditionModel" and network is not None and network.config.get("addition_embed_type") == "text_time":
        kind = "SDXL"
    if kind not in FAMILIES or getattr(pipeline, "vae", None) is None:
        known = "Stable Diffusion 1, 2, XL and 3, FLUX.1, PixArt"
        raise Unsupported(f"{name} with the network {kind} is not trained here; those that are: {known}.")
    return FAMILIES[kind]


def encoders(pipeline: Any) -> dict[str, Any]:
    """The pipeline's text encoders by the names of its components."""
    return {name: part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part is not None}


def context(pipeline: Any, max_length: int | None) -> tuple[Any, int]:
    """The tokenizer that reads furthest and how many tokens it reads; longer prompts are cut there.

    Raises `BadValue` if max_length is more than the text encoder can read.
    """
    signature = inspect.signature(pipeline.encode_prompt).parameters
    flexible = {name: part for name, part in encoders(pipeline).items() if part.config.model_type == "t5"}
    name = list(flexible or encoders(pipeline))[-1]
    tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
    if flexible and "max_sequence_length" in signature:
        return tokenizer, max_length or signature["max_sequence_length"].default
    limit = int(tokenizer.model_max_length)
    if max_length is not None and max_length > limit:
        raise BadValue(
            f"max_length={max_length} is more than the {limit} tokens that the pipeline's text encoder reads; choose at most that."
        )
    return tokenizer, limit


def encode(pipeline: Any, prompts: Sequence[str], max_length: int | None = None) -> Conditions:
    """What the network needs of prompts, batch first: features [B, tokens, width], and pooled ones or a mask where it has them."""
    known = inspect.signature(pipeline.encode_prompt).parameters
    given: dict[str, Any] = {"prompt_2": None, "prompt_3": None, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    if max_length is not None:
        given["max_sequence_length"] = max_length
    device = next(next(iter(encoders(pipeline).values())).parameters()).device
    found = pipeline.encode_prompt(prompt=list(prompts), device=device, **{k: v for k, v in given.items() if k in known})
    return {name: found[i] for i, name in family_of(pipeline).keep.items()}


# -- families ---------------------------------------------------------------------------------------------------


def _unet(net: Any, x: Tensor, t: Tensor, c: Conditions, size: int) -> Tensor:
    return net(x, t, encoder_hidden_states=c["text"], return_dict=False)[0]


def _sdxl(net: Any, x: Tensor, t: Tensor, c: Conditions, size: int) -> Tensor:
    sizes = torch.tensor([size, size, 0, 0, size, size], device=x.device, dtype=c["pooled"].dtype).expand(len(x), 6)
    added = {"text_embeds": c["pooled"], "time_ids": sizes}  # original size, corner of the crop, target size
    return net(x, t, encoder_hidden_states=c["text"], added_cond_kwargs=added, return_dict=False)[0]


def _sd3(net: Any, x: Tensor, t: Tensor, c: Conditions, size: int) -> Tensor:
    return net(hidden_states=x, timestep=t, encoder_hidden_states=c["text"], pooled_projections=c["pooled"], return_dict=False)[0]


def _pixart(net: Any, x: Tensor, t: Tensor, c: Conditions, size: int) -> Tensor:
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if net.config.sample_size == 128:  # the 1024-pixel networks are told the size
        added = {"resolution": x.new_full((len(x), 2), size), "aspect_ratio": x.new_ones((len(x), 1))}
    text = {"encoder_hidden_states": c["text"], "encoder_attention_mask": c["mask"]}
    return net(x, timestep=t, added_cond_kwargs=added, return_dict=False, **text)[0]


def _flux(net: Any, x: Tensor, t: Tensor, c: Conditions, size: int) -> Tensor:
    batch, channels, height, width = x.shape
    rows, columns = height // 2, width // 2  # each token is a patch of 2 × 2 latents
    tokens = x.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * 4)
    grid = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).to(x)
    guidance = x.new_full((batch,), GUIDANCE) if net.config.guidance_embeds else None
    y = net(
        hidden_states=tokens, timestep=t.to(x.dtype) / 1000, guidance=guidance, pooled_projections=c["pooled"],
        encoder_hidden_states=c["text"], txt_ids=x.new_zeros((c["text"].shape[1], 3)), img_ids=grid, return_dict=False,
    )[0]  # fmt: skip
    return y.reshape(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


FAMILIES = {
    "UNet2DConditionModel": Family({0: "text"}, _unet),
    "SDXL": Family({0: "text", 2: "pooled"}, _sdxl),
    "SD3Transformer2DModel": Family({0: "text", 2: "pooled"}, _sd3),
    "PixArtTransformer2DModel": Family({0: "text", 1: "mask"}, _pixart),
    "FluxTransformer2DModel": Family({0: "text", 1: "pooled"}, _flux),
}
"""By the network's class; a UNet with sizes and pooled text counts as SDXL."""
