"""TSViT: a transformer over the dates of a satellite series, then one over its places (2023, arXiv:2301.04944).

Every patch of the picture is a series of its own for the temporal encoder, which begins with one learned token a class. What
those tokens became is read by the spatial encoder, class by class, and a linear head turns each into the patch's pixels.
Importing this module makes the model known to transformers' Auto classes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, SemanticSegmenterOutput

from veneer.errors import BadValue
from veneer.models.days import DAYS, check_days
from veneer.models.tsvit_config import TSViTConfig
from veneer.models.tsvit_layers import TSViTAttention, TSViTEmbeddings, TSViTEncoder, TSViTPositions, TSViTTokens

__all__ = ["TSViTConfig", "TSViTForSemanticSegmentation", "TSViTModel"]


class TSViTPreTrainedModel(PreTrainedModel):
    """Loading, saving and first values: as in the published code, torch's own for layers, N(0, 1) for tokens and places."""

    config: TSViTConfig
    config_class = TSViTConfig
    base_model_prefix = "tsvit"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = False
    _no_split_modules = ["TSViTLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def example_inputs(self) -> dict[str, Tensor]:
        """Two made-up series, always the same, to compare models by."""
        config, T = self.config, min(6, self.config.max_dates)
        shape = (2, T, config.num_channels, config.image_size, config.image_size)
        pictures = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return {"pixel_values": pictures, "days": torch.linspace(1, DAYS - 1, T).long().expand(2, -1)}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As ever; biases that merging put on fused projections are kept, with zeros where a block has none."""
        fused = [module.qkv for module in self.modules() if isinstance(module, TSViTAttention)]
        self.config.qkv_bias = any(layer.bias is not None for layer in fused)
        for layer in fused if self.config.qkv_bias else ():
            if layer.bias is None:
                layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)), requires_grad=False)
        super().save_pretrained(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                init.uniform_(module.bias, -(module.in_features**-0.5), module.in_features**-0.5)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, TSViTTokens):
            init.normal_(module.tokens)
        elif isinstance(module, TSViTPositions):
            init.normal_(module.position)


class TSViTModel(TSViTPreTrainedModel):
    """The two encoders: series [B, T, C, H, W] → one vector for every class at every patch [B, K, N, d]."""

    def __init__(self, config: TSViTConfig) -> None:
        super().__init__(config)
        self.embeddings = TSViTEmbeddings(config)
        self.class_tokens = TSViTTokens(config)
        self.temporal_encoder = TSViTEncoder(config, config.temporal_layers)
        self.positions = TSViTPositions(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.spatial_encoder = TSViTEncoder(config, config.spatial_layers)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embedding

    def forward(self, pixel_values: Tensor, days: Tensor, date_mask: Tensor | None = None) -> BaseModelOutput:
        """Pictures [B, T, C, H, W] with their days of the year [B, T]; date_mask [B, T] is True where there is a picture.

        Without a mask all T count, also zero pictures of day 0, as in the published code. Raises `BadValue` for other sizes
        than the configuration's.
        """
        self.check(pixel_values, days)
        B = len(days)
        K, N, d = self.config.num_classes, self.config.patches, self.config.hidden_size
        seen = None if date_mask is None else date_mask.bool().repeat_interleave(N, 0)
        dtype = self.positions.position.dtype  # of the base also where its layers are quantised
        series = self.class_tokens(self.embeddings(pixel_values, days, dtype).flatten(0, 1))
        found = self.temporal_encoder(series, seen)[:, :K].reshape(B, N, K, d)
        places = self.dropout(self.positions(found.transpose(1, 2).reshape(B * K, N, d)))
        return BaseModelOutput(last_hidden_state=self.spatial_encoder(places).view(B, K, N, d))

    def check(self, pixel_values: Tensor, days: Tensor) -> None:
        """Raises `BadValue` for a series that does not fit the configuration."""
        side, bands, most = self.config.image_size, self.config.num_channels, self.config.max_dates
        if pixel_values.ndim != 5 or pixel_values.shape[2:] != (bands, side, side):
            got = list(pixel_values.shape)
            raise BadValue(f"TSViT: pixel_values must be [batch, dates, {bands}, {side}, {side}] for this model; they are {got}.")
        if days.shape != pixel_values.shape[:2]:
            raise BadValue(f"TSViT: days must be {list(pixel_values.shape[:2])}, one a picture; they are {list(days.shape)}.")
        if days.shape[1] > most:
            raise BadValue(f"TSViT: {days.shape[1]} dates are more than max_dates={most}; leave some out.")
        if not torch.compiler.is_compiling():
            check_days(days)


class TSViTHead(nn.Module):
    """The pixels of every patch, for each class token its own class."""

    def __init__(self, config: TSViTConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.projection = nn.Linear(config.hidden_size, config.patch_size**2)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.projection(self.norm(hidden_states))


class TSViTForSemanticSegmentation(TSViTPreTrainedModel):
    """TSViT with its head: one class for every pixel of the place that the series shows."""

    def __init__(self, config: TSViTConfig) -> None:
        super().__init__(config)
        self.tsvit = TSViTModel(config)
        self.head = TSViTHead(config)
        self.classifier = nn.Linear(config.num_classes, config.num_outputs) if config.num_outputs else nn.Identity()
        self.post_init()

    def forward(
        self, pixel_values: Tensor, days: Tensor, date_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> SemanticSegmenterOutput:
        """Logits [B, classes, H, W]; with one output, the logit of class 1 against class 0. Labels [B, H, W] add the loss."""
        pixels = self.head(self.tsvit(pixel_values, days, date_mask).last_hidden_state)
        logits = self.classifier(self.picture(pixels).movedim(1, -1)).movedim(-1, 1)
        return SemanticSegmenterOutput(loss=None if labels is None else self.loss(logits, labels), logits=logits)

    def picture(self, pixels: Tensor) -> Tensor:
        """Patches [B, K, N, p²] → pixels [B, K, H, W]."""
        B, K, p, side = *pixels.shape[:2], self.config.patch_size, self.config.image_size
        if self.config.raster_runs:
            return pixels.reshape(B, K, side, side)
        n = side // p
        return pixels.reshape(B, K, n, n, p, p).transpose(3, 4).reshape(B, K, side, side)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean over the labelled pixels: cross-entropy, or binary cross-entropy with one output."""
        counts = labels != self.config.ignored
        if logits.shape[1] == 1:
            each = F.binary_cross_entropy_with_logits(logits[:, 0], (labels * counts).to(logits.dtype), reduction="none")
            return (each * counts).sum() / counts.sum().clamp(min=1)
        return F.cross_entropy(logits, labels, ignore_index=self.config.ignored, reduction="sum") / counts.sum().clamp(min=1)


AutoConfig.register("tsvit", TSViTConfig, exist_ok=True)
AutoModel.register(TSViTConfig, TSViTModel, exist_ok=True)
AutoModelForSemanticSegmentation.register(TSViTConfig, TSViTForSemanticSegmentation, exist_ok=True)
