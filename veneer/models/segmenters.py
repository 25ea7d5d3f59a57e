"""Pretrained models for semantic segmentation: those with a head of their own, and plain backbones, which get a light one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING, AutoConfig, AutoModelForSemanticSegmentation
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES

from veneer.errors import Unsupported
from veneer.models.patch_segmenter import is_plain, on_backbone
from veneer.tasks.legend import IGNORED

INDEX_NAMES = ("semantic_loss_ignore_index", "loss_ignore_index")


class StillBatchNorm(nn.BatchNorm2d):
    """Batch norm by its running statistics in training too: they are the base's, and no part of an adapter."""

    def train(self, mode: bool = True) -> StillBatchNorm:
        super().train(False)
        return self


def segmenter(folder: str, labels: Sequence[str], **kwargs: Any) -> nn.Module:
    """A model that gives logits [batch, classes, rows, columns] and the loss for labels [batch, height, width].

    A pretrained head is kept; its last layer is drawn afresh where it has another number of classes.

    Raises:
        Unsupported: a model that answers with sets of masks, or no vision transformer. OSError, ValueError: nothing to load.
    """
    config = AutoConfig.from_pretrained(folder)
    classes = {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    if config.model_type in MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES:
        raise Unsupported(
            f"{folder} is a {config.model_type} model, which answers with sets of masks. semantic-segmentation needs one class a pixel: "
            "SegFormer, UPerNet, BEiT, DPT, or a plain vision transformer (DINOv2, ViT)."
        )
    trained = any("ForSemanticSegmentation" in name for name in config.architectures or ())
    if type(config) not in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING or (is_plain(config) and not trained):
        return on_backbone(folder, config, classes, **kwargs)
    model = AutoModelForSemanticSegmentation.from_pretrained(folder, ignore_mismatched_sizes=True, **classes, **kwargs)
    for name in INDEX_NAMES:
        if hasattr(model.config, name):
            setattr(model.config, name, IGNORED)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = StillBatchNorm
    return model
