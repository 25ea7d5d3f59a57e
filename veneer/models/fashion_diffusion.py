"""A small diffusion pipeline trained from nothing on pictures of clothes: the base of the text-to-image recipes.

Small pretrained diffusion models cannot be had, so this one is made on first use, in about four minutes of one core: an
autoencoder, then a UNet with prompts. It has seen shirts, trousers, pullovers, dresses and coats, but no shoes and no bags.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.models.diffusion import Diffusion
from veneer.models.sampling import pixels
from veneer.models.tiny_diffusion import tiny_pipeline
from veneer.tasks.described_fashion import CLOTHES, captioned
from veneer.tasks.described_pictures import prompt_of, watched
from veneer.tasks.image_classification import open_picture

SIZE, PICTURES, BATCH = 32, 6000, 32
UNPROMPTED = 0.1
"""Share of pictures whose prompt is left out, so that sampling can be guided."""


def make(folder: Path, vae_steps: int = 300, steps: int = 1200) -> None:
    """Trains the pipeline and writes it into the folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = tiny_pipeline("sd", width=32, sample_size=SIZE // 4, halvings=2)
        rows = captioned(CLOTHES, "clothes", PICTURES, 1).train.rows
        pictures = torch.stack([pixels(open_picture(row["image"]), SIZE) for row in rows])
        train_vae(pipeline.vae, pictures, vae_steps)
        train_unet(pipeline, pictures, [prompt_of(row, "description", "attributes", None) for row in rows], steps)
    pipeline.save_pretrained(folder)


def train_vae(vae: Any, pictures: Tensor, steps: int) -> None:
    """Reconstruction and a little KL (arXiv:2112.10752); the scale of the latents is noted in the configuration."""
    vae.train()
    for chosen, _ in optimised(vae.parameters(), len(pictures), steps, "autoencoder"):
        spread = vae.encode(pictures[chosen]).latent_dist
        found = vae.decode(spread.sample()).sample
        (F.mse_loss(found, pictures[chosen]) + 1e-5 * spread.kl().mean()).backward()
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(pictures[:256]).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / float(latents.std()))


def train_unet(pipeline: Any, pictures: Tensor, prompts: list[str], steps: int) -> None:
    """The whole UNet by the loss that adapters are trained by; the text encoder stays random."""
    model = Diffusion(pipeline, SIZE)
    latents = torch.cat([model.latents(part) for part in pictures.split(256)])
    texts = [*dict.fromkeys(prompts), ""]
    with torch.no_grad():
        told = model.conditions(texts)["text"]
    number = torch.tensor([texts.index(prompt) for prompt in prompts])
    model.train()
    for chosen, _ in optimised(model.parameters(), len(pictures), steps, "UNet"):
        unprompted = torch.rand(len(chosen)) < UNPROMPTED
        text = told[torch.where(unprompted, len(texts) - 1, number[chosen])]
        loss = model(latents[chosen], text=text).loss
        assert loss is not None
        loss.backward()
    model.eval()


def optimised(parameters: Any, rows: int, steps: int, what: str) -> Iterator[tuple[Tensor, int]]:
    """Row numbers [BATCH] of each step; after the caller's backward pass Adam takes a step, with a falling rate."""
    trained = list(parameters)
    optimiser = torch.optim.AdamW(trained, lr=1e-3)
    falling = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps)
    for step in watched(range(steps), f"making the base model: {what}"):
        optimiser.zero_grad()
        yield torch.randint(rows, (BATCH,)), step
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        falling.step()
