"""Sizes of a TSViT."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from veneer.errors import BadValue
from veneer.models.days import check_days


class TSViTConfig(PreTrainedConfig):
    """Sizes of a TSViT; the defaults are those of arXiv:2301.04944 on PASTIS (1.66 M parameters).

    Args:
        image_size, patch_size: side of the picture and of a patch in pixels; patches must fill the picture.
        num_channels: spectral bands.
        num_classes: class tokens; each gives the logits of its class.
        num_outputs: width of a last linear layer over the classes, for data with other classes than the tokens'; None: none.
        hidden_size, num_attention_heads, head_dim, mlp_ratio: width, heads, width of a head, inner width over width.
        qkv_bias: whether the fused projections have a bias; the published model has none, one whose biases were adapted has.
        temporal_layers, spatial_layers: blocks of the two encoders.
        max_dates: most dates of a series.
        train_days: None: one code for each day of the year. Else the days that training had: others get what lies between.
        band_means, band_stds: subtracted from and divided into the bands at the input; None: the input comes normalised.
        raster_runs: pixels in the order of the released code, which writes patch k to pixels k·p² … of the picture row by
            row; only for weights that were trained so.
        ignored: label of pixels that do not count in the loss.
    """

    model_type = "tsvit"

    image_size: int = 24
    patch_size: int = 2
    num_channels: int = 10
    num_classes: int = 19
    num_outputs: int | None = None
    hidden_size: int = 128
    num_attention_heads: int = 4
    head_dim: int = 32
    mlp_ratio: int = 4
    qkv_bias: bool = False
    temporal_layers: int = 4
    spatial_layers: int = 4
    hidden_dropout_prob: float = 0.0
    max_dates: int = 60
    train_days: list[int] | None = None
    band_means: list[float] | None = None
    band_stds: list[float] | None = None
    raster_runs: bool = False
    ignored: int = 255

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.patch_size < 1 or self.image_size % self.patch_size:
            fits = ", ".join(str(p) for p in range(1, self.image_size + 1) if self.image_size % p == 0)
            raise BadValue(f"TSViT: patch_size={self.patch_size} does not divide image_size={self.image_size}; choose one of {fits}.")
        for name in ("band_means", "band_stds"):
            values = getattr(self, name)
            if values is not None and len(values) != self.num_channels:
                raise BadValue(f"TSViT: {name} has {len(values)} numbers for num_channels={self.num_channels} bands; give one a band.")
        if self.train_days is not None:
            check_days(torch.tensor(self.train_days), "train_days")

    @property
    def patches(self) -> int:
        """Patches of a picture."""
        return (self.image_size // self.patch_size) ** 2
