"""Sizes of a Point-MAE."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from veneer.errors import BadValue

PIECES = ("cls", "prompt", "patch")


class PointMAEConfig(PreTrainedConfig):
    """Sizes of a Point-MAE; the defaults are those of arXiv:2203.06604 on ModelNet40 (22.1 M parameters with its head).

    Args:
        num_points: points of a cloud that enter. num_groups, group_size: patches of a cloud, and points of a patch.
        hidden_size, num_hidden_layers, num_attention_heads, mlp_ratio: width, blocks, heads, inner width over width.
        point_widths: widths of the small network that turns a patch's points into a token.
        drop_path_rate: share of the last block's branches that training leaves out; it rises from 0 at the first.
        positions: "every": positions are added before every block, as in pre-training; "once": before the first alone.
        head_pieces: what the head reads side by side: the class token, the mean of prompts behind it, the patches' maximum.
        head_widths, head_dropout: hidden layers of the head; () makes it one linear layer.
        mask_ratio, decoder_layers: pre-training: share of the patches that are hidden, blocks of the decoder.
    """

    model_type = "point_mae"

    num_points: int = 1024
    num_groups: int = 64
    group_size: int = 32
    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    mlp_ratio: int = 4
    point_widths: list[int] | tuple[int, ...] = (128, 256, 512)
    drop_path_rate: float = 0.1
    positions: str = "every"
    head_pieces: list[str] | tuple[str, ...] = ("cls", "patch")
    head_widths: list[int] | tuple[int, ...] = (256, 256)
    head_dropout: float = 0.5
    mask_ratio: float = 0.6
    decoder_layers: int = 4
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads:
            raise BadValue(f"PointMAE: num_attention_heads={self.num_attention_heads} does not divide hidden_size={self.hidden_size}.")
        if len(self.point_widths) != 3:
            raise BadValue(f"PointMAE: point_widths={list(self.point_widths)} must be three numbers, such as [128, 256, 512].")
        unknown = [piece for piece in self.head_pieces if piece not in PIECES]
        if unknown or not self.head_pieces:
            raise BadValue(f"PointMAE: head_pieces={list(self.head_pieces)} must be some of {', '.join(PIECES)}.")
        if self.positions not in ("every", "once"):
            raise BadValue(f"PointMAE: positions={self.positions!r} must be 'every' or 'once'.")
        if self.num_points < self.least_points:
            raise BadValue(f"PointMAE: num_points={self.num_points} is fewer than its patches need; choose at least {self.least_points}.")

    @property
    def least_points(self) -> int:
        """The fewest points that can be cut into patches."""
        return max(self.num_groups, self.group_size)
