"""Vision transformers with what they learn from pictures alone: a decoder of hidden patches, or a head to distil themselves."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn

from veneer.errors import Unsupported
from veneer.maths import self_supervision as losses
from veneer.maths.crops import crops, hidden_blocks
from veneer.models.self_supervised_heads import Decoder, Projector, picked
from veneer.strategies.self_distillation import Teacher

GLOBAL, LOCAL = (0.32, 1.0), (0.05, 0.32)
"""Shares of the area that global and local crops show."""


class SelfSupervised(nn.Module):
    """A backbone and what is thrown away after training. Called without labels, and as a file, it is the backbone alone.

    Args:
        backbone: a vision transformer of transformers whose `embeddings` give class token and patch tokens.
    """

    main_input_name = "pixel_values"

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone, self.config = backbone, backbone.config
        if not isinstance(getattr(backbone, "embeddings", None), nn.Module) or not isinstance(
            getattr(self.config, "patch_size", None), int
        ):
            raise Unsupported(
                f"{type(backbone).__name__} cannot be trained without labels here: it has no patch embeddings of its own. "
                "Take a ViT or DINOv2 model."
            )
        if self.config.model_type == "vit_mae":
            raise Unsupported("ViT-MAE hides patches by itself, in its own order; take a ViT or DINOv2 model.")
        self.side: int = self.config.patch_size

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.dtype

    def save_pretrained(self, folder: Any) -> None:
        self.backbone.save_pretrained(folder)

    @staticmethod
    def from_pretrained(folder: Any, **options: Any) -> nn.Module:
        from transformers import AutoModel

        return AutoModel.from_pretrained(folder, **options)

    def states(self, pixels: Tensor) -> Tensor:
        """Last hidden states [B, 1 + L, D] of pictures of any size that patches divide."""
        wants = "interpolate_pos_encoding" in inspect.signature(type(self.backbone).forward).parameters
        return self.backbone(pixel_values=pixels, **({"interpolate_pos_encoding": True} if wants else {})).last_hidden_state

    def features(self, pixels: Tensor) -> Tensor:
        """Class token and mean of the patch tokens, [B, 2 D]."""
        h = self.states(pixels)
        return torch.cat([h[:, 0], h[:, -self.count(pixels) :].mean(1)], 1)

    def count(self, pixels: Tensor) -> int:
        """Number of patches of a picture."""
        return (pixels.shape[-1] // self.side) * (pixels.shape[-2] // self.side)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        """The backbone's output; with labels, whatever they say, the loss, and `logits` [B, 1 + 2 D]: each picture's loss and features."""
        from transformers.modeling_outputs import ImageClassifierOutput

        if labels is None:
            return self.backbone(pixel_values=pixel_values)
        loss, each = self.objective(pixel_values, None if self.training else Generator().manual_seed(0))
        kept = each[:, None].float()
        if not self.training:
            kept = torch.cat([kept, self.features(pixel_values).float()], 1)
        return ImageClassifierOutput(loss=loss, logits=kept)

    def objective(self, pixels: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """The loss and every picture's share of it, [B]; `generator` makes it the same each time."""
        raise NotImplementedError

    @contextmanager
    def changed(self, change: Callable[[Tensor], Tensor], module: nn.Module) -> Iterator[None]:
        """What the module gives, changed, inside the `with` block."""
        handle = module.register_forward_hook(lambda _m, _i, out: change(out))
        try:
            yield
        finally:
            handle.remove()


class MaskedAutoencoderForSelfSupervision(SelfSupervised):
    """MAE: the backbone reads a share of the patches, a small decoder draws the others; the error is taken on those."""

    def __init__(self, backbone: Any, mask_ratio: float = 0.75) -> None:
        super().__init__(backbone)
        self.mask_ratio = mask_ratio
        self.head = Decoder(self.config.hidden_size, 3 * self.side**2)

    def objective(self, pixels: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        L = self.count(pixels)
        noise = torch.rand(len(pixels), L, generator=generator).to(pixels.device)
        keep, restore, mask = losses.masking(noise, self.mask_ratio)

        def gathered(tokens: Tensor) -> Tensor:
            return torch.cat([tokens[:, :-L], picked(tokens[:, -L:], keep)], 1)

        with self.changed(gathered, self.backbone.embeddings):
            h = self.states(pixels)
        pred = self.head(h[:, -keep.shape[1] :], restore, pixels.shape[-1] // self.side)
        each = losses.reconstruction(pred.float(), losses.standardised(losses.patches(pixels.float(), self.side)), mask.float())
        return each.mean(), each


class SelfDistillationForSelfSupervision(SelfSupervised):
    """DINOv2: the student's views of a picture are to say what the teacher's say; hidden patches too, and pictures keep apart."""

    def __init__(self, backbone: Any, local_crops: int = 4, prototypes: int = 1024, centring: str = "centre") -> None:
        super().__init__(backbone)
        self.local_crops = local_crops
        self.head = Projector(self.config.hidden_size, prototypes)
        self.teacher = Teacher(still="head.prototypes", centring=centring)

    def objective(self, pixels: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        B, size, L = len(pixels), pixels.shape[-1], self.count(pixels)
        views = torch.cat([crops(pixels, size, GLOBAL, generator) for _ in range(2)])
        small = max(1, round(size * 96 / 224 / self.side)) * self.side
        locals_ = [crops(pixels, small, LOCAL, generator) for _ in range(self.local_crops)]
        mask = hidden_blocks(2 * B, size // self.side, size // self.side, generator).to(pixels.device)
        learns = self.training
        with self.teacher.acting(self):
            h = self.states(views)
            classes = self.teacher.answers("class", self.head(h[:, 0]), learns)
            hidden = self.teacher.answers("patch", self.head(h[:, -L:]), learns)
        with self.changed(lambda out: self.hide(out, mask), self.patch_layer):
            h = self.states(views)
        whole = self.head(h[:, 0])
        part = self.head(self.states(torch.cat(locals_))[:, 0]) if locals_ else whole[:0]
        across, local = losses.class_terms(classes, whole, part)
        apart = torch.stack([losses.spreading(half) for half in h[:, 0].float().chunk(2)]).sum() if B > 1 else across.new_zeros(())
        each = losses.disagreement(classes.roll(B, 0), whole).view(2, B).mean(0)
        return across + local + losses.patch_term(hidden, self.head(h[:, -L:]), mask) + 0.1 * apart, each.detach()

    @property
    def patch_layer(self) -> nn.Module:
        """The convolution that makes patch tokens."""
        return next(m for m in self.backbone.embeddings.modules() if isinstance(m, nn.Conv2d))

    def hide(self, out: Tensor, mask: Tensor) -> Tensor:
        """Patch tokens [N, D, rows, columns] with the mask token where mask [N, L] says so."""
        token = getattr(self.backbone.embeddings, "mask_token", None)
        blank = out.new_zeros(out.shape[1]) if token is None else token.detach().flatten().to(out)
        return torch.where(mask.view(len(out), 1, *out.shape[2:]), blank[None, :, None, None], out)
