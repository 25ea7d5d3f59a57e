"""Described pictures as a diffusion model reads them: latents and text features, made once and kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.models.diffusion import Diffusion
from veneer.models.sampling import pixels
from veneer.tasks.image_classification import open_picture

ROOM = 2**31
"""Bytes of latents and text features that one split keeps in memory; what comes after is made again each time."""


class LatentRows(Sequence[Any]):
    """Rows as {latents [2, C, h, w], labels: number of the row, and text features, or the prompt's bytes where text encoders train}.

    Args:
        read: gives a row's picture (file, array or PIL) and prompt.
    """

    def __init__(self, rows: Sequence[Any], read: Callable[[Any], tuple[Any, str]], model: Diffusion) -> None:
        self.rows, self.read, self.model = rows, read, model
        self.kept: dict[Hashable, dict[str, Tensor]] = {}
        self.held = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        picture, prompt = self.read(self.rows[index])
        found = self._once(index, lambda: {"latents": self.latents(picture)})
        told = {"prompt": text_bytes(prompt)} if self.model.tells_text else self._once(prompt, lambda: self.conditions(prompt))
        return {**found, **told, "labels": torch.tensor(index)}

    def latents(self, picture: Any) -> Tensor:
        """[2, C, h, w], where transparent parts of the picture are white."""
        return self.model.latents(pixels(open_picture(picture, under="white"), self.model.size)[None])[0].cpu()

    @torch.no_grad()
    def conditions(self, prompt: str) -> dict[str, Tensor]:
        return {name: t[0].cpu() for name, t in self.model.conditions([prompt]).items()}

    def _once(self, key: Hashable, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        found = self.kept.get(key)
        if found is None:
            found = make()
            size = sum(t.numel() * t.element_size() for t in found.values())
            if self.held + size <= ROOM:
                self.kept[key], self.held = found, self.held + size
        return found


def stacked(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One batch of rows; prompts are filled up with zeros."""
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0] if name != "prompt"}
    if "prompt" in items[0]:
        batch["prompt"] = torch.nn.utils.rnn.pad_sequence([item["prompt"] for item in items], batch_first=True)
    return batch


def text_bytes(text: str) -> Tensor:
    """A text as its bytes [n] uint8: batches hold tensors only, and every pipeline has tokenizers of its own."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)
