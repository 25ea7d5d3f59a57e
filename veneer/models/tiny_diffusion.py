"""Text-to-image pipelines of a few hundred thousand random numbers, in the forms diffusers has: for tests and for trying things.

    python -m veneer.models.tiny_diffusion FOLDER --kind sd3

No pretrained diffusion model is small enough to come along; a folder made here has every part of a large one and is read by
`DiffusionPipeline.from_pretrained` like any other. Its pictures are noise until it is trained (`veneer.models.fashion_diffusion`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.errors import MissingExtra, UnknownName, nearest
from veneer.models.tiny_tokenizers import CONTEXT, clip_tokenizer, t5_tokenizer


def tiny_pipeline(
    kind: str = "sd", *, width: int = 16, sample_size: int = 8, prediction: str = "epsilon", halvings: int = 1, seed: int = 0
) -> Any:
    """A diffusers pipeline with random weights; `save_pretrained` makes it a folder.

    Args:
        kind: "sd" (UNet, one text encoder), "sdxl" (UNet, two), "sd3", "flux" (transformers, flow matching), "pixart".
        width: channels of the first level; more is a larger model.
        sample_size: side of the latents. halvings: how often the VAE halves a picture's side to get there.
        prediction: what the UNets and "pixart" predict: "epsilon", "v_prediction" or "sample".

    Raises:
        UnknownName: another kind; MissingExtra: diffusers is not installed.
    """
    if kind not in KINDS:
        raise UnknownName(f"There is no tiny pipeline {kind!r}.{nearest(kind, KINDS)} There are: {', '.join(KINDS)}.")
    try:
        import diffusers  # noqa: F401
    except ModuleNotFoundError:
        raise MissingExtra("Pipelines need the package diffusers. Run: pip install 'veneer[diffusion]'") from None
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return KINDS[kind](Sizes(width, sample_size, prediction, halvings))


@dataclass(frozen=True)
class Sizes:
    """What the kinds are built to, as in `tiny_pipeline`."""

    width: int
    sample_size: int
    prediction: str
    halvings: int


# -- kinds ------------------------------------------------------------------------------------------------------


def _sd(s: Sizes) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=_vae(s), text_encoder=_clip(2 * s.width), tokenizer=clip_tokenizer(), unet=_unet(s, 2 * s.width),
        scheduler=_ddim(s.prediction), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sdxl(s: Sizes) -> Any:
    from diffusers import StableDiffusionXLPipeline

    sizes = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 48 + 2 * s.width}
    return StableDiffusionXLPipeline(
        vae=_vae(s), text_encoder=_clip(2 * s.width), text_encoder_2=_clip(2 * s.width, projected=True), tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(), unet=_unet(s, 4 * s.width, **sizes), scheduler=_ddim(s.prediction),
    )  # fmt: skip


def _sd3(s: Sizes) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    net = SD3Transformer2DModel(
        sample_size=s.sample_size, patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2,
        attention_head_dim=s.width, joint_attention_dim=4 * s.width, caption_projection_dim=2 * s.width,
        pooled_projection_dim=4 * s.width, pos_embed_max_size=4 * s.sample_size,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=net, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=_vae(s, 0.06),
        text_encoder=_clip(2 * s.width, projected=True), tokenizer=clip_tokenizer(),
        text_encoder_2=_clip(2 * s.width, projected=True), tokenizer_2=clip_tokenizer(),
        text_encoder_3=_t5(4 * s.width), tokenizer_3=t5_tokenizer(),
    )  # fmt: skip


def _flux(s: Sizes) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    net = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=s.width, num_attention_heads=2,
        joint_attention_dim=2 * s.width, pooled_projection_dim=2 * s.width, axes_dims_rope=(s.width // 4, s.width // 4, s.width // 2),
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=_vae(s, 0.1), text_encoder=_clip(2 * s.width), tokenizer=clip_tokenizer(),
        text_encoder_2=_t5(2 * s.width), tokenizer_2=t5_tokenizer(), transformer=net,
    )  # fmt: skip


def _pixart(s: Sizes) -> Any:
    from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel

    net = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=s.width, in_channels=4, out_channels=8, num_layers=2, sample_size=s.sample_size,
        cross_attention_dim=2 * s.width, caption_channels=2 * s.width,
    )  # fmt: skip
    return PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(), text_encoder=_t5(2 * s.width), vae=_vae(s), transformer=net, scheduler=_ddim(s.prediction)
    )


KINDS: dict[str, Callable[[Sizes], Any]] = {"sd": _sd, "sdxl": _sdxl, "sd3": _sd3, "flux": _flux, "pixart": _pixart}


# -- parts ------------------------------------------------------------------------------------------------------


def _vae(s: Sizes, shift: float | None = None) -> Any:
    from diffusers import AutoencoderKL

    widths = (s.width // 2, *(s.width,) * s.halvings)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * len(widths), "up_block_types": ("UpDecoderBlock2D",) * len(widths)}
    return AutoencoderKL(
        block_out_channels=widths, latent_channels=4, norm_num_groups=8, layers_per_block=1, shift_factor=shift, **blocks
    )  # fmt: skip


def _unet(s: Sizes, context: int, **further: Any) -> Any:
    from diffusers import UNet2DConditionModel

    blocks = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    return UNet2DConditionModel(
        sample_size=s.sample_size, block_out_channels=(s.width, 2 * s.width), layers_per_block=1, cross_attention_dim=context,
        attention_head_dim=2, norm_num_groups=8, **blocks, **further,
    )  # fmt: skip


def _ddim(prediction: str) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction,
    )  # fmt: skip


def _clip(width: int, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    size = len(clip_tokenizer())
    config = CLIPTextConfig(
        vocab_size=size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=CONTEXT, projection_dim=width, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def _t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=len(t5_tokenizer()), d_model=width, d_kv=width // 2, d_ff=2 * width, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval()


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description="Make a tiny text-to-image pipeline with random weights.")
    flags.add_argument("folder", type=Path)
    flags.add_argument("--kind", choices=tuple(KINDS), default="sd")
    flags.add_argument("--width", type=int, default=16)
    flags.add_argument("--prediction", choices=("epsilon", "v_prediction", "sample"), default="epsilon")
    given = flags.parse_args()
    tiny_pipeline(given.kind, width=given.width, prediction=given.prediction).save_pretrained(given.folder)
    print(f"{given.folder}: a random pipeline of the kind {given.kind}")
