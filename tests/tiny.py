"""Tiny models of every family, with random weights large enough that each part of them shows in the output.

A `Subject` says how to build a model, what to feed it and what to read from it, so that a law can be stated once
for all families. Models are built once a process and copied. In float64 the norms of Llama-like models, which
always compute in float32, are replaced by torch's own, so that laws can hold to 1e-10.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, WIDTH, LENGTH, ROWS, LABELS = 48, 16, 6, 4, 3


@dataclass(frozen=True)
class Subject:
    """A model family under test.

    Args:
        make: builds the model with that many blocks of that width. feed: an input batch of `ROWS` rows for a generator.
    """

    name: str
    make: Callable[..., nn.Module]
    feed: Callable[[torch.Generator], dict[str, Tensor]]

    def build(self, dtype: torch.dtype = torch.float64, depth: int = 2, width: int = WIDTH) -> nn.Module:
        """A fresh copy of the model in evaluation mode."""
        return copy.deepcopy(_built(self.name, dtype, depth, width))

    def batch(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        fed = self.feed(torch.Generator().manual_seed(seed))
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in fed.items()}

    def answers(self, model: nn.Module, seed: int = 0) -> Tensor:
        """The model's output for the batch of this seed, in the model's dtype."""
        return output(model, self.batch(seed, dtype_of(model)))


def dtype_of(model: nn.Module) -> torch.dtype:
    """Dtype of the base: of its norms, which no quantiser touches."""
    return next(p.dtype for n, p in model.named_parameters() if p.is_floating_point() and "veneer" not in n.split("."))


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The logits, or whatever single tensor a plain model gives."""
    given = model(**batch) if hasattr(model, "config") else model(*batch.values())
    return given if isinstance(given, Tensor) else given["logits"]


def loss(model: nn.Module, batch: dict[str, Tensor], seed: int = 0) -> Tensor:
    """Cross-entropy of the outputs against random targets, in at least float32."""
    logits = output(model, batch)
    rows = logits.reshape(-1, logits.shape[-1])
    wanted = torch.randint(rows.shape[1], (len(rows),), generator=torch.Generator().manual_seed(seed))
    return F.cross_entropy(rows.to(torch.promote_types(rows.dtype, torch.float32)), wanted)


def moved(tuned: Any, seed: int = 1, size: float = 0.2, name: str | None = None) -> Any:
    """The adapter, every trained tensor moved by small random numbers, so that zero-initialised ones act."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters(name):
            parameter.add_(size * torch.empty(parameter.shape).normal_(generator=generator).to(parameter))
    return tuned


def spread(model: nn.Module, seed: int = 1) -> nn.Module:
    """Random weights: matrices N(0, 1/in), gains around 1, everything else N(0, 0.1²)."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None:
                continue
            noise = torch.empty(p.shape).normal_(generator=generator)
            gain = p.ndim == 1 and name == "weight"
            p.data = (1 + 0.1 * noise if gain else noise / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1 * noise).to(p.dtype)
    return model


@functools.cache
def _built(name: str, dtype: torch.dtype, depth: int, width: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = spread(SUBJECTS[name].make(depth, width)).to(dtype).eval()
    if dtype == torch.float64:
        exact_norms(model)
    return model


def exact_norms(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(len(child.weight), eps=child.variance_epsilon, dtype=child.weight.dtype)  # type: ignore[arg-type]
                norm.weight.data = child.weight.data  # type: ignore[assignment]
                setattr(module, name, norm)


# -- text -----------------------------------------------------------------------------------------------------


def tokens(generator: torch.Generator) -> dict[str, Tensor]:
    """Token ids with padding at the end of one row."""
    ids = torch.randint(2, VOCABULARY, (ROWS, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def llama(depth: int = 2, width: int = WIDTH, **changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    options: dict[str, Any] = dict(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=depth, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, use_cache=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**options | changes))


def gpt2(depth: int = 2, width: int = WIDTH, **changes: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    options: dict[str, Any] = dict(
        vocab_size=VOCABULARY, n_embd=width, n_layer=depth, n_head=4, n_positions=64, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(GPT2Config(**options | changes))


def bert(depth: int = 2, width: int = WIDTH, **changes: Any) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    options: dict[str, Any] = dict(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=depth, num_attention_heads=4,
        max_position_embeddings=64, num_labels=LABELS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(BertConfig(**options | changes))


def t5(depth: int = 2, width: int = WIDTH, **changes: Any) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    options: dict[str, Any] = dict(
        vocab_size=VOCABULARY, d_model=width, d_ff=2 * width, d_kv=width // 4, num_heads=4, num_layers=depth, num_decoder_layers=depth,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    return T5ForConditionalGeneration(T5Config(**options | changes))


# -- images, points and plain torch -----------------------------------------------------------------------------


def images(generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.empty(ROWS, 3, 8, 8).normal_(generator=generator)}


def vit(depth: int = 2, width: int = WIDTH, **changes: Any) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    options: dict[str, Any] = dict(
        image_size=8, patch_size=4, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=depth, num_attention_heads=4,
        num_labels=LABELS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(ViTConfig(**options | changes))


class Residual(nn.Module):
    """A residual block of two convolutions, an ordinary one and one in groups, dilated."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=2, dilation=2, groups=2)
        self.norm = nn.GroupNorm(2, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv2(F.gelu(self.conv1(x))))


class ConvNet(nn.Module):
    """A small residual network: stem, blocks, mean over the picture, head."""

    def __init__(self, depth: int = 2, width: int = WIDTH):
        super().__init__()
        width //= 2
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList([Residual(width) for _ in range(depth)])
        self.fc = nn.Linear(width, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


def hidden(generator: torch.Generator) -> dict[str, Tensor]:
    return {"src": torch.empty(ROWS, LENGTH, WIDTH).normal_(generator=generator)}


def encoder(depth: int = 2, width: int = WIDTH) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, depth)


def points(generator: torch.Generator) -> dict[str, Tensor]:
    return {"points": torch.empty(ROWS, 24, 3).uniform_(-1, 1, generator=generator)}


def point_mae(depth: int = 2, width: int = WIDTH, **changes: Any) -> nn.Module:
    from veneer.models.point_mae import PointMAEConfig, PointMAEForPointCloudClassification

    options: dict[str, Any] = dict(
        num_points=24, num_groups=8, group_size=4, hidden_size=width, num_hidden_layers=depth, num_attention_heads=4, mlp_ratio=2,
        point_widths=[8, 8, 16], head_widths=[], drop_path_rate=0.0, num_labels=LABELS,
    )  # fmt: skip
    return PointMAEForPointCloudClassification(PointMAEConfig(**options | changes))


SUBJECTS: dict[str, Subject] = {
    s.name: s
    for s in (
        Subject("llama", llama, tokens),
        Subject("bert", bert, tokens),
        Subject("vit", vit, images),
        Subject("convnet", ConvNet, images),
        Subject("gpt2", gpt2, tokens),
        Subject("encoder", encoder, hidden),
        Subject("points", point_mae, points),
    )
}
