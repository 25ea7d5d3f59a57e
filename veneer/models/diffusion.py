"""A text-to-image pipeline as one module whose forward is the diffusion loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from veneer.models.noising import Noising
from veneer.models.pipelines import check_size, default_size, load_pipeline
from veneer.models.text_conditions import Conditions, encode, encoders, family_of

PLACES = 4
"""Noise levels at which a row is measured: the middles of so many equal parts of the process."""


@dataclass
class DiffusionOutput(ModelOutput):
    """`loss`: their mean, and the prior's; `logits`: the loss of every row, [batch, 1] in training, [batch, PLACES] in evaluation."""

    loss: Tensor | None = None
    logits: Tensor | None = None


@dataclass
class Prior:
    """What must not be unlearned: latents [n, 2, C, h, w] and conditions of the untouched model's pictures, and their weight."""

    latents: Tensor
    conditions: Conditions
    weight: float


class Diffusion(nn.Module):
    """The network of a pipeline, `unet` or `transformer`, as the only child; VAE and text encoders are there but out of an adapter's sight.

    In training noise and places are drawn anew; in evaluation every row has its own, fixed by its number in `labels`, so that
    losses can be compared between checkpoints, runs and devices.

    Args:
        pipeline: a text-to-image pipeline of diffusers.
        size: side of the pictures in pixels; a multiple of `granule(pipeline)`.
        text_encoders: make the text encoders children as well, so that adapters go on them too.
        max_length: longest prompt in tokens, for text encoders without a limit of their own.
    """

    def __init__(self, pipeline: Any, size: int, text_encoders: bool = False, max_length: int | None = None) -> None:
        super().__init__()
        check_size(pipeline, size)
        self.pipeline, self.size, self.max_length = pipeline, size, max_length
        self.family, self.noising = family_of(pipeline), Noising(pipeline.scheduler)
        self.wraps = "unet" if getattr(pipeline, "unet", None) is not None else "transformer"
        self.add_module(self.wraps, getattr(pipeline, self.wraps))
        for name, encoder in encoders(pipeline).items() if text_encoders else ():
            self.add_module(name, encoder)
        self.tells_text = text_encoders
        self.prior: Prior | None = None
        self.config = Named(str(getattr(pipeline, "name_or_path", "") or ""))
        for module in self.hidden():
            module.eval().requires_grad_(False)

    @property
    def net(self) -> Any:
        return self._modules[self.wraps]

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's weights."""
        return self.pipeline.vae.dtype

    def hidden(self) -> list[nn.Module]:
        """The pipeline's modules that are no children: VAE, frozen text encoders, a safety checker."""
        parts: Iterable[Any] = self.pipeline.components.items()
        return [part for name, part in parts if isinstance(part, nn.Module) and name not in self._modules]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Diffusion:
        """`to`, `half` and the like reach what is hidden, too."""
        for module in self.hidden():
            module._apply(fn)
        return super()._apply(fn, recurse)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        self.net.enable_gradient_checkpointing()

    # -- inputs -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """Mean and spread [n, 2, C, h, w] of the latents of pictures [n, 3, size, size] in −1 … 1, scaled as the network wants them."""
        vae, half = self.pipeline.vae, self.dtype == torch.float16
        if half:
            vae.float()  # some encoders overflow in half precision
        found = vae.encode(pixels.to(vae.device, vae.dtype))
        if half:
            vae.half()
        spread = getattr(found, "latent_dist", None)
        mean, std = (spread.mean, spread.std) if spread is not None else (found[0], torch.zeros_like(found[0]))
        shift, scale = vae.config.get("shift_factor") or 0.0, vae.config.get("scaling_factor") or 1.0
        return torch.stack([(mean - shift) * scale, std * scale], 1).float()

    def conditions(self, prompts: Sequence[str]) -> Conditions:
        """What the network needs of prompts, batch first."""
        return encode(self.pipeline, prompts, self.max_length)

    # -- the loss ---------------------------------------------------------------------------------------------

    def forward(self, latents: Tensor, labels: Tensor | None = None, prompt: Tensor | None = None, **conditions: Tensor) -> DiffusionOutput:
        """Mean squared error of the network's prediction.

        Args:
            latents: [batch, 2, C, h, w], as `latents` gives them.
            labels: numbers of the rows [batch], which fix noise and places in evaluation.
            prompt: the prompts' bytes [batch, length], filled up with zeros, where the text encoders are trained.
            conditions: as `conditions` gives them, otherwise.
        """
        if self.training:
            return self._training(latents, self._told(prompt, conditions))
        errors = [squares(found, target) for found, target in self._fixed(latents, labels, self._told(prompt, conditions))]
        found = torch.stack(errors, 1)
        return DiffusionOutput(loss=found.mean(), logits=found)

    def predictions(self, latents: Tensor, labels: Tensor | None = None, prompt: Tensor | None = None, **conditions: Tensor) -> Tensor:
        """What the network predicts for the rows as evaluation noises them, [batch, PLACES, C, h, w]: to compare two models by."""
        return torch.stack([found for found, _ in self._fixed(latents, labels, self._told(prompt, conditions))], 1)

    def _told(self, prompt: Tensor | None, conditions: Conditions) -> Conditions:
        if prompt is None:
            return conditions
        return self.conditions([bytes(row.tolist()).rstrip(b"\0").decode() for row in prompt.to(torch.uint8)])

    def _fixed(self, latents: Tensor, labels: Tensor | None, conditions: Conditions) -> Iterator[tuple[Tensor, Tensor]]:
        """Predictions and targets at each of the places, with the noise of every row's number."""
        numbers = torch.arange(len(latents)) if labels is None else labels.cpu()
        for k in range(PLACES):
            noise = torch.stack([fixed_noise(int(n) * PLACES + k, latents.shape[2:]) for n in numbers]).to(latents)
            yield self.predict(latents[:, 0], noise, latents.new_full((len(latents),), (k + 0.5) / PLACES), conditions)

    def _training(self, latents: Tensor, conditions: Conditions) -> DiffusionOutput:
        count, prior = len(latents), self.prior
        if prior is not None:
            chosen = torch.randint(len(prior.latents), (count,), device=prior.latents.device)
            latents = torch.cat([latents, prior.latents[chosen].to(latents)])
            conditions = {name: torch.cat([c, prior.conditions[name][chosen].to(c)]) for name, c in conditions.items()}
        x = latents[:, 0] + latents[:, 1] * torch.randn_like(latents[:, 1])
        losses = squares(*self.predict(x, torch.randn_like(x), self.noising.draw(len(x), x.device), conditions))
        loss = losses[:count].mean()
        if prior is not None:
            loss = loss + prior.weight * losses[count:].mean()
        return DiffusionOutput(loss=loss, logits=losses[:count, None])

    def predict(self, x: Tensor, noise: Tensor, place: Tensor, conditions: Conditions) -> tuple[Tensor, Tensor]:
        """Prediction and target [batch, C, h, w] for latents x and noise [batch, C, h, w] at places [batch] in (0, 1)."""
        noised, times, target = self.noising(x, noise, place)
        told = {name: c.to(self.dtype) if c.is_floating_point() else c for name, c in conditions.items()}
        pixels = x.shape[-1] * int(self.pipeline.vae_scale_factor)
        found = self.family.denoise(self.net, noised.to(self.dtype), times, told, pixels)
        return found[:, : x.shape[1]].float(), target.float()  # some networks give a variance, too

    # -- as a model among others ------------------------------------------------------------------------------

    def example_inputs(self) -> dict[str, Tensor]:
        """Made-up inputs, always the same, to compare two models by."""
        channels, side = self.pipeline.vae.config.latent_channels, self.size // self.pipeline.vae_scale_factor
        clean = fixed_noise(1, (channels, side, side)).expand(2, -1, -1, -1)
        prompts = ["a dark shirt", "a shoe"]
        words = torch.tensor([list(p.encode().ljust(16, b"\0")) for p in prompts], dtype=torch.uint8)
        told = {"prompt": words} if self.tells_text else self.conditions(prompts)
        return {"latents": torch.stack([clean, torch.zeros_like(clean)], 1), "labels": torch.arange(2), **told}

    def save_pretrained(self, folder: Any, **options: Any) -> None:
        """Writes the whole pipeline."""
        self.pipeline.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: Any, dtype: torch.dtype | None = None) -> Diffusion:
        """A written pipeline at its own size. Raises what `load_pipeline` does."""
        pipeline = load_pipeline(str(folder), dtype)
        return cls(pipeline, default_size(pipeline))


@dataclass
class Named:
    """The configuration that models of transformers have: only the name is asked for."""

    _name_or_path: str


def squares(found: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of every row [batch]."""
    return F.mse_loss(found, target, reduction="none").flatten(1).mean(1)


def fixed_noise(number: int, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers of this shape, the same on every device."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(number))
