"""A picture classifier on the unit sphere: features of norm 1, and losses on how they spread there (2025, arXiv:2503.19683)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from veneer.maths.sphere import alignment, on_sphere, slerp_within_classes, uniformity
from veneer.models.vision_tower import load_tower, pooled


class SphereConfig(PreTrainedConfig):
    """A vision tower and what is asked of its features.

    Args:
        vision_config: the tower's. w_align, w_uniform: weights of the two losses.
        slerp: range of the share by which training moves features towards another of their class; None: not at all.
    """

    model_type = "sphere-classifier"
    sub_configs = {"vision_config": AutoConfig}

    def __init__(
        self,
        vision_config: Any = None,
        w_align: float = 0.1,
        w_uniform: float = 0.5,
        slerp: tuple[float, float] | None = (0.0, 1.0),
        **kwargs: Any,
    ) -> None:
        self.vision_config = AutoConfig.for_model(**vision_config) if isinstance(vision_config, dict) else vision_config
        self.w_align, self.w_uniform, self.slerp = w_align, w_uniform, slerp
        super().__init__(**kwargs)

    @property
    def image_size(self) -> int:
        return self.vision_config.image_size


class SphereForImageClassification(PreTrainedModel):
    """logits = W_h z/‖z‖ + b_h of the pooled feature z; loss = cross-entropy + w_align L_align + w_uniform L_uniform.

    In training the features are first moved along arcs within their class (slerp); head and losses see them after that.
    Plain otherwise: the head has no temperature and its weights are not normalised.
    """

    config_class = SphereConfig
    base_model_prefix = "tower"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True

    def __init__(self, config: SphereConfig) -> None:
        super().__init__(config)
        self.tower = AutoModel.from_config(config.vision_config)
        self.classifier = nn.Linear(config.vision_config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    @classmethod
    def around(cls, name: str, settings: dict[str, Any], **kwargs: Any) -> SphereForImageClassification:
        """A fresh head, of torch's own first values, on the pretrained tower of this name."""
        tower: Any = load_tower(name, **kwargs)
        with torch.device("meta"):
            model: Any = cls(SphereConfig(tower.config, **settings))
        model.tower = tower
        model.classifier = nn.Linear(tower.config.hidden_size, len(model.config.id2label), dtype=tower.dtype, device=tower.device)
        return model

    def get_input_embeddings(self) -> nn.Module:
        return self.tower.get_input_embeddings()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Logits [n, classes] of pictures [n, 3, height, width]; with labels [n] the loss too."""
        f = on_sphere(pooled(self.tower, pixel_values))
        if self.training and labels is not None and self.config.slerp is not None:
            f = slerp_within_classes(f, labels, *self.config.slerp)
        logits = self.classifier(f.to(self.classifier.weight.dtype))
        loss = None if labels is None else self.loss(f, logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def loss(self, f: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """The three losses of unit features f [n, D] and their logits."""
        loss = F.cross_entropy(logits.to(f.dtype), labels)
        if self.config.w_align:
            loss = loss + self.config.w_align * alignment(f, labels)
        if self.config.w_uniform:
            loss = loss + self.config.w_uniform * uniformity(f)
        return loss


AutoConfig.register(SphereConfig.model_type, SphereConfig, exist_ok=True)
AutoModelForImageClassification.register(SphereConfig, SphereForImageClassification, exist_ok=True)
