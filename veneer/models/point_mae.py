"""Point-MAE: a transformer over patches of a point cloud (2022, arXiv:2203.06604).

Importing this module makes the model known to transformers' Auto classes. `veneer.models.point_mae_pretraining` trains one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from veneer.errors import BadValue
from veneer.models.point_mae_config import PIECES, PointMAEConfig
from veneer.models.point_mae_layers import PointMAEEmbeddings, PointMAEEncoder, PointMAELayer

__all__ = ["PointMAEConfig", "PointMAEForPointCloudClassification", "PointMAELayer", "PointMAEModel", "PointMAEPreTrainedModel"]


class PointMAEPreTrainedModel(PreTrainedModel):
    """Loading, saving and first values: N(0, 0.02²), zeros for biases, as in the published code."""

    config: PointMAEConfig
    config_class = PointMAEConfig
    base_model_prefix = "point_mae"
    main_input_name = "points"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PointMAELayer"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def get_input_embeddings(self) -> nn.Module:
        """What makes tokens: of patches, not of words."""
        backbone: Any = getattr(self, "point_mae", self)
        return backbone.embeddings.patch_embeddings

    def example_inputs(self) -> dict[str, Tensor]:
        """Two clouds of random points, always the same."""
        points = torch.rand((2, self.config.num_points, 3), generator=torch.Generator().manual_seed(0))
        return {"points": 2 * points - 1}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PointMAEEmbeddings):
            init.trunc_normal_(module.cls_token, std=self.config.initializer_range)
            init.trunc_normal_(module.cls_position, std=self.config.initializer_range)
        elif isinstance(module, PointMAEModel):
            init.zeros_(module.piece_mean)
            init.ones_(module.piece_std)


class PointMAEModel(PointMAEPreTrainedModel):
    """Points [B, N, 3], centred and scaled into the unit ball → tokens [B, 1 + G, d], the class token first.

    Raises `BadValue` for points of another shape, or too few of them for the patches.
    """

    piece_mean: Tensor
    piece_std: Tensor

    def __init__(self, config: PointMAEConfig) -> None:
        super().__init__(config)
        self.embeddings = PointMAEEmbeddings(config)
        self.encoder = PointMAEEncoder(config, config.num_hidden_layers)
        self.register_buffer("piece_mean", torch.zeros(len(PIECES), config.hidden_size))
        self.register_buffer("piece_std", torch.ones(len(PIECES), config.hidden_size))
        self.post_init()

    def forward(self, points: Tensor) -> BaseModelOutput:
        if points.ndim != 3 or points.shape[-1] != 3:
            raise BadValue(f"PointMAE: points of shape {tuple(points.shape)} were given; it reads [batch, points, 3].")
        if points.shape[1] < self.config.least_points:
            raise BadValue(
                f"PointMAE: a cloud of {points.shape[1]} points is too small for {self.config.num_groups} patches of "
                f"{self.config.group_size} points; give at least {self.config.least_points}."
            )
        tokens, positions, centers, _ = self.embeddings(points)
        return BaseModelOutput(last_hidden_state=self.encoder(tokens, positions, centers))

    def pieces(self, hidden: Tensor) -> Tensor:
        """What heads read of the tokens [B, T, d]: class token, mean of the prompts behind it (0 without), maximum of the patches, which
        are the last tokens; [B, 3, d], each channel less its mean over the pre-training clouds and in units of its spread there."""
        G = self.config.num_groups
        prompts = hidden[:, 1:-G]
        middle = prompts.mean(1) if prompts.shape[1] else torch.zeros_like(hidden[:, 0])
        return (torch.stack([hidden[:, 0], middle, hidden[:, -G:].amax(1)], 1) - self.piece_mean) / self.piece_std

    @torch.no_grad()
    def standardise(self, clouds: Tensor, batch: int = 64) -> None:
        """Takes mean and spread of the class token and the patches over clouds [n, N, 3], as the norm in front of a linear probe
        of a masked autoencoder does (arXiv:2111.06377); there is nothing to train in it."""
        init.zeros_(self.piece_mean)
        init.ones_(self.piece_std)
        found = torch.cat([self.pieces(self(part).last_hidden_state) for part in clouds.split(batch)])
        for i in (PIECES.index("cls"), PIECES.index("patch")):
            self.piece_mean[i] = found[:, i].mean(0)
            self.piece_std[i] = found[:, i].std(0) + 1e-6


class PointMAEForPointCloudClassification(PointMAEPreTrainedModel):
    """One of several classes for every cloud.

    The head's hidden layers are normed over their channels, not over the batch as in the published code: a batch norm keeps
    running numbers, which an adapter's file would have to carry.
    """

    def __init__(self, config: PointMAEConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.point_mae = PointMAEModel(config)
        self.head = head(config)
        self.post_init()

    def forward(self, points: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        pieces = self.point_mae.pieces(self.point_mae(points).last_hidden_state)
        logits = self.head(pieces[:, [PIECES.index(piece) for piece in self.config.head_pieces]].flatten(1))
        return SequenceClassifierOutput(loss=None if labels is None else F.cross_entropy(logits.float(), labels), logits=logits)


def head(config: PointMAEConfig) -> nn.Module:
    """The classifier: hidden layers (linear, norm, ReLU, dropout), then one that gives the classes."""
    width = len(config.head_pieces) * config.hidden_size
    layers: list[nn.Module] = []
    for inner in config.head_widths:
        norm = nn.LayerNorm(inner, elementwise_affine=False)
        layers += [nn.Linear(width, inner), norm, nn.ReLU(), nn.Dropout(config.head_dropout)]
        width = inner
    return nn.Sequential(*layers, nn.Linear(width, int(config.num_labels or 2)))


AutoConfig.register(PointMAEConfig.model_type, PointMAEConfig, exist_ok=True)
AutoModel.register(PointMAEConfig, PointMAEModel, exist_ok=True)
