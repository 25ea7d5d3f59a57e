"""What self-supervised training needs besides the backbone and throws away: a decoder of hidden patches, a head of prototypes.

Linear layers are all that they train, so that they are the model's head to the frame: norms have no gain, positions are sines.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def picked(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens [B, L, D] at index [B, k]."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


class Decoder(nn.Module):
    """Tokens of the kept patches [B, k, D] → pixels of all patches [B, L, p² C]: two small blocks of half the width.

    The mask token is a linear layer with a constant input.
    """

    def __init__(self, width: int, pixels: int, depth: int = 2) -> None:
        super().__init__()
        d = max(16, width // 2 // 16 * 16)
        self.narrow, self.blank, self.draw = nn.Linear(width, d), nn.Linear(1, d), nn.Linear(d, pixels)
        self.layers = nn.ModuleList(DecoderLayer(d) for _ in range(depth))
        nn.init.normal_(self.blank.weight, std=0.02)

    def forward(self, tokens: Tensor, restore: Tensor, columns: int) -> Tensor:
        h = self.narrow(tokens)
        blank = self.blank(h.new_ones(1)).expand(len(h), restore.shape[1] - h.shape[1], -1)
        h = picked(torch.cat([h, blank], 1), restore)
        h = h + positions(restore.shape[1], columns, h.shape[-1]).to(h)
        for layer in self.layers:
            h = layer(h)
        return self.draw(F.layer_norm(h, h.shape[-1:]))


class DecoderLayer(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.read, self.give, self.widen, self.close = nn.Linear(d, 3 * d), nn.Linear(d, d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, h: Tensor) -> Tensor:
        three = self.read(F.layer_norm(h, h.shape[-1:])).unflatten(-1, (3, -1, 16)).permute(2, 0, 3, 1, 4)
        h = h + self.give(F.scaled_dot_product_attention(*three.unbind()).transpose(1, 2).flatten(2))
        return h + self.close(F.gelu(self.widen(F.layer_norm(h, h.shape[-1:]))))


def positions(count: int, columns: int, d: int) -> Tensor:
    """Sines and cosines of rows and columns, [count, d]."""
    at = torch.arange(count)
    speed = 10000 ** (-torch.arange(d // 4) / (d / 4))
    angles = [axis[:, None] * speed for axis in (at // columns, at % columns)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1)


class Projector(nn.Module):
    """Tokens [..., D] → logits [..., K]: three layers, unit length, and the cosine with K prototypes."""

    def __init__(self, width: int, prototypes: int, hidden: int | None = None, bottleneck: int = 256) -> None:
        super().__init__()
        hidden, bottleneck = hidden or min(2048, 2 * width), min(bottleneck, width)
        self.first, self.second, self.third = nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, bottleneck)
        self.prototypes = nn.Linear(bottleneck, prototypes, bias=False)
        for layer in (self.first, self.second, self.third):
            nn.init.trunc_normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        z = F.normalize(self.third(F.gelu(self.second(F.gelu(self.first(tokens))))), dim=-1)
        rows = self.prototypes(torch.eye(z.shape[-1], dtype=z.dtype, device=z.device))  # through the layer: it may be adapted
        return z @ F.normalize(rows, dim=0)
