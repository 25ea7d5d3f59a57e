"""Self-labelling: pictures without masks are labelled by a slow copy of the trained tensors and mixed with others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, nn

from veneer.strategies.passes import Lasting, named_inputs, trains
from veneer.strategy import Strategy

if TYPE_CHECKING:
    from veneer.methods.strategy.self_training import SelfTraining
    from veneer.tuned import Tuned


class SelfLabelling(Strategy):
    """Keeps the slow copy, and the hook that changes batches before the model reads them."""

    def __init__(self, how: SelfTraining) -> None:
        self.how = how
        self.labeller = Labeller(how)
        self.hooks: Lasting | None = None

    def start(self, tuned: Tuned, name: str, total_steps: int | None = None) -> None:
        own = self.labeller
        own.tuned, own.name, own.learned = tuned, name, tuned.parameters(name)
        own.first = int(self.how.start * (total_steps or 0))
        if not own.slow:
            own.slow = [p.detach().clone() for p in own.learned]
        self.hooks = Lasting([tuned.model.register_forward_pre_hook(own.changed, with_kwargs=True, prepend=True)])

    @torch.no_grad()
    def after_step(self) -> None:
        own = self.labeller
        decay = min(1 - 1 / (own.step + 1), self.how.decay)
        for slow, p in zip(own.slow, own.learned):
            slow.lerp_(p.detach().to(slow), 1 - decay)
        own.step += 1

    def state_dict(self) -> dict[str, Any]:
        own = self.labeller
        return {"step": own.step, "passes": own.passes, "slow": {str(i): t for i, t in enumerate(own.slow)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = self.labeller
        own.step, own.passes = state["step"], state["passes"]
        own.slow = [state["slow"][str(i)].to(p) for i, p in enumerate(own.learned)]


class Labeller:
    """What the hook needs; it does not hold the strategy, so that both go with the adapter."""

    def __init__(self, how: SelfTraining) -> None:
        self.how, self.step, self.passes, self.first, self.busy = how, 0, 0, 0, False
        self.slow: list[Tensor] = []
        self.learned: list[nn.Parameter] = []
        self.tuned: Tuned | None = None
        self.name = ""

    def changed(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The model's inputs with labels for the rows that have none."""
        if self.busy or self.tuned is None or not trains(self.tuned, self.name):
            return None
        inputs = named_inputs(model, args, kwargs)
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor) or labels.ndim != 3 or "pixel_values" not in inputs:
            return None
        bare = (labels == self.how.ignored).flatten(1).all(1)
        if not bare.any() or (self.step < self.first and not bare.all()):
            return None
        found = self.labelled(model, inputs["pixel_values"][bare], labels.shape[-2:])
        pixels, labels = self.mixed(inputs["pixel_values"], labels, bare, found)
        return (), {**inputs, "pixel_values": pixels, "labels": labels}

    @torch.no_grad()
    def labelled(self, model: nn.Module, pixels: Tensor, size: Sequence[int]) -> Tensor:
        """The slow copy's classes of pictures [n, 3, …], [n, height, width]."""
        modes = {module: module.training for module in model.modules()}
        quick = [p.data for p in self.learned]
        self.busy = True
        try:
            model.eval()
            for p, slow in zip(self.learned, self.slow):
                p.data = slow
            logits = model(pixel_values=pixels).logits
        finally:
            for p, own in zip(self.learned, quick):
                p.data = own
            for module, mode in modes.items():
                module.training = mode
            self.busy = False
        return nn.functional.interpolate(logits.float(), tuple(size), mode="bilinear", align_corners=False).argmax(1)

    def mixed(self, pixels: Tensor, labels: Tensor, bare: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures and labels in which the bare rows have their labels, and half the classes of a row with a mask pasted on."""
        chance = Generator().manual_seed(self.how.seed * 1_000_003 + self.passes)
        self.passes += 1
        pixels, labels = pixels.clone(), labels.clone()
        labels[bare] = found.to(labels.dtype)
        givers = (~bare).nonzero().flatten()
        for row in bare.nonzero().flatten().tolist() if len(givers) else ():
            giver = givers[int(torch.randint(len(givers), (), generator=chance))]
            classes = labels[giver].unique().cpu()
            classes = classes[classes != self.how.ignored]
            drawn = classes[torch.randperm(len(classes), generator=chance)[: (len(classes) + 1) // 2]]
            inside = torch.isin(labels[giver], drawn.to(labels.device))
            labels[row] = torch.where(inside, labels[giver], labels[row])
            pixels[row] = torch.where(inside, pixels[giver], pixels[row])
        return pixels, labels
