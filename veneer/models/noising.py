"""How a diffusion model is taught: noise is added to a clean latent, and the network says what it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veneer.errors import Unsupported

PREDICTIONS = ("epsilon", "v_prediction", "sample")


class Noising:
    """The forward process of a pipeline's own scheduler, and what its network has to predict.

    Schedulers with a variance schedule: x_t = √ᾱ_t x + √(1 − ᾱ_t) n; the target is n, the velocity √ᾱ_t n − √(1 − ᾱ_t) x
    (arXiv:2202.00512), or x. Flow matching: x_t = (1 − σ) x + σ n, the target n − x (arXiv:2210.02747, arXiv:2403.03206).

    Raises `Unsupported` for a scheduler of another kind.
    """

    def __init__(self, scheduler: Any) -> None:
        from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

        name = type(scheduler).__name__
        self.flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        kind = scheduler.config.get("prediction_type", "epsilon")
        if not self.flow and (kind not in PREDICTIONS or not hasattr(scheduler, "alphas_cumprod")):
            what = f"prediction_type={kind!r}" if kind not in PREDICTIONS else "no variance schedule"
            raise Unsupported(f"The pipeline's scheduler {name} has {what}; training knows {', '.join(PREDICTIONS)} and flow matching.")
        # a copy: the pipeline's own is changed by every picture it makes
        self.scheduler = (FlowMatchEulerDiscreteScheduler if self.flow else DDPMScheduler).from_config(scheduler.config)
        self.steps = int(self.scheduler.config["num_train_timesteps"])
        self.target = "flow" if self.flow else kind

    def draw(self, count: int, device: Any) -> Tensor:
        """Places in the process [count], in (0, 1): uniform; for flow matching logit-normal, as SD3 and FLUX are trained."""
        return torch.randn(count, device=device).sigmoid() if self.flow else torch.rand(count, device=device)

    def __call__(self, x: Tensor, noise: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noised latents, time steps [batch] as the network wants them, and targets, from x, noise [batch, …] and places [batch]."""
        index = (place * self.steps).long().clamp(0, self.steps - 1)
        if not self.flow:
            noised = self.scheduler.add_noise(x, noise, index)
            targets = {"epsilon": lambda: noise, "sample": lambda: x, "v_prediction": lambda: self.scheduler.get_velocity(x, noise, index)}
            return noised, index, targets[self.target]()
        sigma = self.scheduler.sigmas.to(x.device)[index].to(x.dtype).view(-1, *(1,) * (x.ndim - 1))
        return (1 - sigma) * x + sigma * noise, self.scheduler.timesteps.to(x.device)[index], noise - x
