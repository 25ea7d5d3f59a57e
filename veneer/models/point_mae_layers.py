"""The parts of a Point-MAE: patches of a point cloud as tokens, and pre-norm blocks that take positions and point centres along."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from veneer.maths.point_sets import farthest, nearest, taken
from veneer.maths.told import COORDINATES
from veneer.models.point_mae_config import PointMAEConfig


class TokenNorm(nn.BatchNorm1d):
    """Batch norm of rows [n, C] that counts along only while its own parameters train: a frozen tokeniser stays as it is."""

    def forward(self, x: Tensor) -> Tensor:
        counts = self.training and bool(self._parameters["weight"].requires_grad)  # type: ignore[union-attr]
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, counts, self.momentum or 0.0, self.eps)


class PointMAEPatchEmbeddings(nn.Module):
    """A patch's points [B, G, k, 3], seen from its centre, as a token [B, G, d]: a small PointNet of layers on single points."""

    def __init__(self, config: PointMAEConfig) -> None:
        super().__init__()
        a, b, c = config.point_widths
        self.layer1, self.norm1, self.layer2 = nn.Linear(3, a), TokenNorm(a), nn.Linear(a, b)
        self.layer3, self.norm2, self.layer4 = nn.Linear(2 * b, c), TokenNorm(c), nn.Linear(c, config.hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        f = self.layer2(F.relu(self.norm(self.norm1, self.layer1(patches))))
        f = torch.cat([f.amax(2, keepdim=True).expand_as(f), f], -1)
        return self.layer4(F.relu(self.norm(self.norm2, self.layer3(f)))).amax(2)

    def norm(self, norm: nn.Module, f: Tensor) -> Tensor:
        return norm(f.flatten(0, 2)).unflatten(0, f.shape[:3])


class PointMAEEmbeddings(nn.Module):
    """Points [B, N, 3] → tokens and positions [B, 1 + G, d], class token first, patch centres [B, G, 3], patches [B, G, k, 3]."""

    def __init__(self, config: PointMAEConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.num_groups, self.group_size = config.num_groups, config.group_size
        self.cls_token, self.cls_position = nn.Parameter(torch.zeros(1, 1, d)), nn.Parameter(torch.zeros(1, 1, d))
        self.patch_embeddings = PointMAEPatchEmbeddings(config)
        self.position_embeddings = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, d))

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        centers = taken(points, farthest(points, self.num_groups))
        patches = taken(points, nearest(points, centers, self.group_size)) - centers[:, :, None]
        dtype = self.cls_token.dtype
        tokens = self.patch_embeddings(patches.to(dtype))
        first = self.cls_token.expand(len(points), 1, -1), self.cls_position.expand(len(points), 1, -1)
        positions = self.position_embeddings(centers.to(dtype))
        return torch.cat([first[0], tokens], 1), torch.cat([first[1], positions], 1), centers, patches


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: object
) -> tuple[Tensor, Tensor]:
    """Plain attention [B, H, T, dh] → [B, T, H, dh] and its weights."""
    scores = query @ key.transpose(2, 3) * scaling
    weights = (scores if mask is None else scores + mask).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


class PointMAEAttention(nn.Module):
    """Self-attention with a fused projection without bias."""

    is_causal = False

    def __init__(self, config: PointMAEConfig) -> None:
        super().__init__()
        self.config, self.num_heads = config, config.num_attention_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.scaling = self.head_dim**-0.5
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        y, _ = attend(self, q, k, v, attention_mask, scaling=self.scaling, dropout=0.0)
        return self.proj(y.flatten(2))


class PointMAEMLP(nn.Module):
    """Two layers with exact GELU between them."""

    def __init__(self, config: PointMAEConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_ratio * config.hidden_size)
        self.fc2 = nn.Linear(config.mlp_ratio * config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(hidden_states)))


class PointMAELayer(GradientCheckpointingLayer):
    """x ← x + position; x ← x + attention(LN x); x ← x + MLP(LN x), each sum left out at random in training (drop path).

    Of a sequence that an adapter made longer, the first token is the class token and the last ones are the patches; those
    between have no position.
    """

    def __init__(self, config: PointMAEConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1, self.attn = nn.LayerNorm(config.hidden_size), PointMAEAttention(config)
        self.norm2, self.mlp = nn.LayerNorm(config.hidden_size), PointMAEMLP(config)

    def forward(self, hidden_states: Tensor, position: Tensor | None = None, centers: Tensor | None = None) -> Tensor:
        COORDINATES.tell(centers)
        if position is not None:
            between = hidden_states.shape[1] - position.shape[1]
            last = F.pad(position[:, 1:], (0, 0, between, 0)) if between else position[:, 1:]
            hidden_states = hidden_states + torch.cat([position[:, :1], last], 1)
        hidden_states = hidden_states + self.dropped(self.attn(self.norm1(hidden_states)))
        return hidden_states + self.dropped(self.mlp(self.norm2(hidden_states)))

    def dropped(self, branch: Tensor) -> Tensor:
        """The branch, or in training nothing for some rows of the batch; passes without gradient see it whole."""
        if not self.drop_path or not self.training or not torch.is_grad_enabled():
            return branch
        kept = torch.rand(len(branch), *(1,) * (branch.ndim - 1), device=branch.device) >= self.drop_path
        return branch * kept.to(branch.dtype) / (1 - self.drop_path)


class PointMAEEncoder(nn.Module):
    """The blocks and the last norm: tokens, positions [B, T, d] and centres [B, G, 3] → tokens."""

    def __init__(self, config: PointMAEConfig, depth: int) -> None:
        super().__init__()
        self.every = config.positions == "every"
        rates = (config.drop_path_rate * i / max(1, depth - 1) for i in range(depth))
        self.layers = nn.ModuleList([PointMAELayer(config, rate) for rate in rates])
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, hidden_states: Tensor, position: Tensor, centers: Tensor | None = None) -> Tensor:
        for i, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, position if self.every or i == 0 else None, centers)
        return self.norm(hidden_states)
