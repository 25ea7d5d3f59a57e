"""A language model that reads pictures: a vision tower, a projector, and a causal language model behind it (2023, arXiv:2312.08900)."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput

from veneer.contexts import by_token, contexts, remembered
from veneer.errors import BadValue
from veneer.models.vision_tower import load_tower, patch_grid

TEXT, IMAGE = 0, 1
"""Contexts of the tokens."""


class CaptionerConfig(PreTrainedConfig):
    """The tower's and the language model's configurations.

    Args:
        image_tokens: how many tokens a picture becomes, a square number. dropout: before the projector.
        vision: name the tower was loaded by, whose image processor prepares the pictures.
    """

    model_type = "captioner"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        image_tokens: int = 16,
        dropout: float = 0.1,
        vision: str = "",
        **kwargs: Any,
    ) -> None:
        self.vision_config = AutoConfig.for_model(**vision_config) if isinstance(vision_config, dict) else vision_config
        self.text_config = AutoConfig.for_model(**text_config) if isinstance(text_config, dict) else text_config
        self.image_tokens, self.dropout, self.vision = image_tokens, dropout, vision
        super().__init__(**kwargs)

    @property
    def image_token_id(self) -> int:
        """The id that stands for a piece of the picture: one past the vocabulary, so that no text can hold it."""
        return self.text_config.vocab_size


class ImageTokensForCaptioning(PreTrainedModel):
    """Plain causal attention over [BOS], the picture's tokens and the caption; the loss is the caption's.

    The picture's patch features are averaged over a grid of regions, dropped out, and projected by one linear layer, which trains
    with any adapter. The tower stays as it is: adapters leave it alone. While the model runs, `veneer.contexts` says which tokens
    are text (0) and which the picture (1).
    """

    config_class = CaptionerConfig
    base_model_prefix = "language_model"
    supports_gradient_checkpointing = True
    left_alone = ("vision_tower",)
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.dropout = nn.Dropout(config.dropout)
        self.projector = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    @classmethod
    def over(cls, language: PreTrainedModel, vision: str, image_tokens: int, **kwargs: Any) -> ImageTokensForCaptioning:
        """A fresh projector between the pretrained tower of this name and a language model."""
        tower: Any = load_tower(vision, **kwargs)
        with torch.device("meta"):
            model = cls(CaptionerConfig(tower.config, language.config, image_tokens, vision=vision))
        model.vision_tower, model.language_model = tower.to(language.device), language
        width = language.config.get_text_config().hidden_size
        model.projector = nn.Linear(tower.config.hidden_size, width, dtype=tower.dtype, device=language.device)
        return model

    @property
    def base_model(self) -> nn.Module:
        """Where learned input tokens go in: behind the heads, as in the language model by itself."""
        return self.language_model.base_model

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Layers that run again in backward are told again which tokens are the picture's."""
        given = {**(gradient_checkpointing_kwargs or {}), "use_reentrant": False, "context_fn": remembered}
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs=given, **kwargs)

    # -- running ------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Logits [n, tokens, words] of token ids [n, tokens], in which `image_token_id` holds a picture's places."""
        with self.told(input_ids):
            given = self.embedded(input_ids, pixel_values)
            logits = self.language_model(inputs_embeds=given, attention_mask=attention_mask, use_cache=False).logits
        if labels is None:
            return CausalLMOutput(logits=logits)
        loss = ForCausalLMLoss(logits, labels, vocab_size=logits.shape[-1], num_items_in_batch=kwargs.get("num_items_in_batch"))
        return CausalLMOutput(loss=loss, logits=logits)

    def generate(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """What the language model writes behind the prompt: new token ids [n, new]; `kwargs` are its own `generate`'s."""
        with self.told(input_ids):
            given = self.embedded(input_ids, pixel_values)
            return self.language_model.generate(inputs_embeds=given, attention_mask=attention_mask, **kwargs)

    def told(self, input_ids: Tensor) -> contextlib.AbstractContextManager[None]:
        return contexts(by_token(input_ids, {self.config.image_token_id: IMAGE}))

    def embedded(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """Input embeddings [n, tokens, D] with the projected picture in its places.

        Raises `BadValue` unless every row has as many places as a picture has tokens."""
        places = input_ids == self.config.image_token_id
        words = self.get_input_embeddings()(input_ids.masked_fill(places, 0))
        if pixel_values is None and not bool(places.any()):
            return words
        if pixel_values is None or bool((places.sum(1) != self.config.image_tokens).any()):
            raise BadValue(
                f"Every row needs a picture and {self.config.image_tokens} places of the token {self.config.image_token_id} for it."
            )
        with torch.no_grad():
            seen = patch_grid(self.vision_tower, pixel_values.to(self.vision_tower.dtype), round(self.config.image_tokens**0.5))
        projected = self.projector(self.dropout(seen).to(self.projector.weight.dtype))
        return words.masked_scatter(places[..., None], projected.to(words.dtype))


AutoConfig.register(CaptionerConfig.model_type, CaptionerConfig, exist_ok=True)
