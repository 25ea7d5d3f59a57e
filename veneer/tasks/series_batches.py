"""Batches of series of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def padded(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """pixel_values [B, T, C, H, W], days and date_mask [B, T], labels [B, H, W]; T is the longest series, others end masked."""
    import torch

    T = max(len(item["days"]) for item in items)
    pixels = torch.zeros(len(items), T, *items[0]["series"].shape[1:])
    days, mask = torch.zeros(len(items), T, dtype=torch.long), torch.zeros(len(items), T, dtype=torch.bool)
    for b, item in enumerate(items):
        n = len(item["days"])
        pixels[b, :n], days[b, :n], mask[b, :n] = torch.from_numpy(item["series"]), torch.from_numpy(item["days"]), True
    batch = {"pixel_values": pixels, "days": days, "date_mask": mask}
    if "labels" in items[0]:
        batch["labels"] = torch.stack([torch.from_numpy(item["labels"]).long() for item in items])
    return batch
