"""A light segmentation head on any plain vision transformer (DINOv2, ViT, DeiT …): patch tokens → classes of pixels."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput

from veneer.errors import Unsupported


class PatchSegmenterConfig(PreTrainedConfig):
    """Configuration of `PatchForSemanticSegmentation`.

    Args:
        backbone: configuration of the vision transformer, as a mapping with `model_type`.
        taps: so many blocks, evenly spaced up to the last, are read.
        width: of the hidden layer.
        fine: each patch is answered for by fine × fine cells; interpolation does the rest.
    """

    model_type = "patch-segmenter"

    def __init__(self, backbone: dict[str, Any] | None = None, taps: int = 4, width: int = 64, fine: int = 4, **kwargs: Any) -> None:
        self.backbone, self.taps, self.width, self.fine = backbone or {}, taps, width, fine
        self.semantic_loss_ignore_index = kwargs.pop("semantic_loss_ignore_index", 255)
        super().__init__(**kwargs)


class PatchHead(nn.Module):
    """logits = shuffle(W_2 GELU(W_1 [norm(f_1) … norm(f_t)])): the taps of a patch, side by side, give fine × fine cells of it."""

    def __init__(self, inside: int, width: int, classes: int, fine: int) -> None:
        super().__init__()
        self.fuse, self.classify, self.fine = nn.Linear(inside, width), nn.Linear(width, classes * fine**2), fine

    def forward(self, taps: list[Tensor]) -> Tensor:
        """Patches of each tap [batch, rows, columns, D] → logits [batch, classes, fine · rows, fine · columns]."""
        joined = torch.cat([F.layer_norm(f, f.shape[-1:]) for f in taps], -1)
        cells = self.classify(F.gelu(self.fuse(joined)))
        return F.pixel_shuffle(cells.movedim(-1, 1), self.fine)


class PatchForSemanticSegmentation(PreTrainedModel):
    """A vision transformer and a `PatchHead`; inputs and outputs are those of transformers' segmentation models.

    Whatever stands before the patches (class token, registers) is left out. The logits are coarser than the picture;
    the loss, cross-entropy over pixels, interpolates them to the labels' size.
    """

    config_class = PatchSegmenterConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"

    def __init__(self, config: Any, backbone: Any = None) -> None:
        super().__init__(config)
        if backbone is None:
            settings = dict(config.backbone)
            backbone = AutoModel.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
        self.backbone, self.patch = backbone, backbone.config.patch_size
        self.given = {"interpolate_pos_encoding": True} if _interpolates(backbone) else {}
        self.head = PatchHead(config.taps * backbone.config.hidden_size, config.width, config.num_labels, config.fine)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> SemanticSegmenterOutput:
        """Pictures [batch, 3, height, width] and, for the loss, labels [batch, height, width]."""
        out = self.backbone(pixel_values, output_hidden_states=True, **self.given)
        states, n = [*out.hidden_states[1:-1], out.last_hidden_state], self.config.taps
        chosen = [states[round(len(states) * (k + 1) / n) - 1] for k in range(n)]
        logits = self.head([self.patches(f, pixel_values) for f in chosen])
        loss = None
        if labels is not None:
            full = F.interpolate(logits.float(), labels.shape[-2:], mode="bilinear", align_corners=False)
            loss = F.cross_entropy(full, labels, ignore_index=self.config.semantic_loss_ignore_index)
        return SemanticSegmenterOutput(loss=loss, logits=logits)  # type: ignore[arg-type]

    def patches(self, f: Tensor, pixel_values: Tensor) -> Tensor:
        """The patch tokens among f [batch, tokens, D], on their grid [batch, rows, columns, D]."""
        patch: int = self.patch
        rows, columns = (side // patch for side in pixel_values.shape[-2:])
        if f.ndim != 3 or f.shape[1] < rows * columns:
            raise Unsupported(
                f"{type(self.backbone).__name__} gives {list(f.shape[1:])} and no token for each of {rows} × {columns} patches; "
                "choose a plain vision transformer (DINOv2, ViT), or a model with a segmentation head of its own."
            )
        return f[:, f.shape[1] - rows * columns :].unflatten(1, (rows, columns))


def is_plain(config: Any) -> bool:
    """Whether a configuration may be that of a plain vision transformer: one size of patches, one width."""
    return isinstance(getattr(config, "patch_size", None), int) and isinstance(getattr(config, "hidden_size", None), int)


def on_backbone(folder: str, config: Any, labels: dict[str, Any], **kwargs: Any) -> PatchForSemanticSegmentation:
    """A pretrained backbone with a fresh head. Raises `Unsupported` for models that are no plain vision transformers."""
    if not is_plain(config):
        raise Unsupported(
            f"{folder} is a {config.model_type} model; semantic-segmentation needs a plain vision transformer (DINOv2, ViT), "
            "or a model with a segmentation head of its own (SegFormer, UPerNet, BEiT, DPT)."
        )
    pooler = {"add_pooling_layer": False} if config.model_type in ("vit", "deit", "beit", "data2vec-vision") else {}
    backbone = AutoModel.from_pretrained(folder, **pooler, **kwargs)
    settings = PatchSegmenterConfig(backbone=backbone.config.to_dict(), **labels)
    model = PatchForSemanticSegmentation(settings, backbone)
    model.head.to(backbone.dtype)
    return model


def _interpolates(backbone: nn.Module) -> bool:
    return "interpolate_pos_encoding" in inspect.signature(backbone.forward).parameters


AutoConfig.register(PatchSegmenterConfig.model_type, PatchSegmenterConfig)
AutoModelForSemanticSegmentation.register(PatchSegmenterConfig, PatchForSemanticSegmentation)
