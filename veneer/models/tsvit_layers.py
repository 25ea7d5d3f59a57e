"""The parts of a TSViT: embeddings, tokens, places, and the blocks of its two encoders."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from veneer.models.days import DAYS, day_codes
from veneer.models.tsvit_config import TSViTConfig
from veneer.prompts import eager


class TSViTEmbeddings(nn.Module):
    """One vector for every patch at every date: its pixels and bands, plus the code of the day."""

    def __init__(self, config: TSViTConfig) -> None:
        super().__init__()
        self.config = config
        codes = len(config.train_days) if config.train_days else DAYS
        self.patch_embedding = nn.Linear(config.patch_size**2 * config.num_channels, config.hidden_size)
        self.date_embedding = nn.Linear(codes, config.hidden_size, bias=config.train_days is None)

    def forward(self, pixel_values: Tensor, days: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T, C, H, W] and [B, T] → [B, N, T, d]; the layers run in this dtype."""
        B, T, C, H, W = pixel_values.shape
        p = self.config.patch_size
        tubelets = self.normalised(pixel_values).to(dtype).reshape(B, T, C, H // p, p, W // p, p).permute(0, 3, 5, 1, 4, 6, 2)
        codes = day_codes(days, self.config.train_days).to(dtype)
        return self.patch_embedding(tubelets.reshape(B, -1, T, p * p * C)) + self.date_embedding(codes)[:, None]

    def normalised(self, x: Tensor) -> Tensor:
        means, stds = self.config.band_means, self.config.band_stds
        if means is None or stds is None:
            return x
        shape = (-1, 1, 1)
        return (x - x.new_tensor(means).view(shape)) / x.new_tensor(stds).view(shape)


class TSViTTokens(nn.Module):
    """Learned class tokens before a sequence."""

    def __init__(self, config: TSViTConfig) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(1, config.num_classes, config.hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B·N, T, d] → [B·N, K + T, d]."""
        return torch.cat([self.tokens.expand(len(hidden_states), -1, -1), hidden_states], 1)


class TSViTPositions(nn.Module):
    """A learned code for every place of the picture."""

    def __init__(self, config: TSViTConfig) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(1, config.patches, config.hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.position


class TSViTAttention(nn.Module):
    """Attention with a fused projection."""

    def __init__(self, config: TSViTConfig) -> None:
        super().__init__()
        self.config, self.head_dim, self.num_heads, self.is_causal = config, config.head_dim, config.num_attention_heads, False
        inner = self.num_heads * self.head_dim
        self.qkv = nn.Linear(config.hidden_size, 3 * inner, bias=config.qkv_bias)
        single = self.num_heads == 1 and self.head_dim == config.hidden_size  # the published model leaves the projection out then
        self.out_proj = nn.Identity() if single else nn.Linear(inner, config.hidden_size)

    def forward(self, hidden_states: Tensor, date_mask: Tensor | None = None) -> Tensor:
        """[n, tokens, d] → the same; date_mask [n, T] says which of the last T tokens count, those before them always do."""
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        query, key, value = (x.reshape(shape).transpose(1, 2) for x in self.qkv(hidden_states).chunk(3, -1))
        mask = None
        if date_mask is not None:  # tokens that a method adds stand before the dates, so they are seen
            mask = F.pad(date_mask, (key.shape[2] - date_mask.shape[1], 0), value=True)[:, None, None]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        mixed, _ = attend(self, query, key, value, mask, dropout=0.0, scaling=self.head_dim**-0.5)
        return self.out_proj(mixed.flatten(2))


class TSViTMLP(nn.Module):
    """Two layers with GELU between them."""

    def __init__(self, config: TSViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_ratio * config.hidden_size)
        self.fc2 = nn.Linear(config.mlp_ratio * config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(hidden_states)))))


class TSViTLayer(nn.Module):
    """A pre-norm block."""

    def __init__(self, config: TSViTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size)
        self.attention = TSViTAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size)
        self.mlp = TSViTMLP(config)

    def forward(self, hidden_states: Tensor, date_mask: Tensor | None = None) -> Tensor:
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states), date_mask)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class TSViTEncoder(nn.Module):
    """Blocks and a last norm."""

    def __init__(self, config: TSViTConfig, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([TSViTLayer(config) for _ in range(depth)])
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, hidden_states: Tensor, date_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, date_mask)
        return self.norm(hidden_states)
