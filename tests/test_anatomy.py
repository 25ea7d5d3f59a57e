"""Anatomy: the same roles for every family, on tiny random models."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from veneer import anatomy
from veneer.anatomy.order import calls
from veneer.errors import BadFile, NoMatch, UnknownName
from veneer.site import Site

SIZE: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
TEXT: dict[str, Any] = dict(SIZE, vocab_size=50)
DECODER: dict[str, Any] = dict(TEXT, num_key_value_heads=2, pad_token_id=0)
WIDE: dict[str, Any] = dict(DECODER, head_dim=8)
IMAGE: dict[str, Any] = dict(SIZE, image_size=8, patch_size=4)
SPEECH: dict[str, Any] = dict(
    TEXT, conv_dim=(16, 16), conv_kernel=(3, 3), conv_stride=(2, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
)  # fmt: skip
PAIR: dict[str, Any] = dict(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
    decoder_ffn_dim=64, vocab_size=50, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0,
)  # fmt: skip
OPT: dict[str, Any] = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    ffn_dim=64,
    vocab_size=50,
    word_embed_proj_dim=32,
    max_position_embeddings=16,
)
TOWERS: dict[str, Any] = dict(text_config=dict(TEXT, max_position_embeddings=16), vision_config=IMAGE)


def of(name: str, **config: Any) -> Callable[[], nn.Module]:
    """A transformers model: the class's own configuration class, with these sizes."""

    def build() -> nn.Module:
        cls = getattr(tf, name)
        return cls(cls.config_class(**config))

    return build


def diffuser(name: str, **config: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(pytest.importorskip("diffusers"), name)(**config)


class TimmAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)


class TimmMlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)


class TimmBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), TimmAttention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), TimmMlp(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TimmPatches(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, 4, 4)


class TimmViT(nn.Module):
    """timm's VisionTransformer by names and order."""

    def __init__(self, width: int = 32, heads: int = 4):
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 5, width))
        self.patch_embed = TimmPatches(width)
        self.blocks = nn.Sequential(*[TimmBlock(width, heads) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.blocks(self.patch_embed(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.forward_features(x))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "bert": of("BertForSequenceClassification", **TEXT),
    "roberta": of("RobertaForSequenceClassification", **TEXT),
    "deberta": of(
        "DebertaV2ForSequenceClassification", **TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=True,
        position_biased_input=False, norm_rel_ebd="layer_norm", position_buckets=8, max_position_embeddings=32,
    ),
    "distilbert": of("DistilBertForSequenceClassification", dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=50),
    "gpt2": of("GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16),
    "neox": of("GPTNeoXForCausalLM", **TEXT),
    "opt": of("OPTForCausalLM", **OPT),
    "opt-post": of("OPTForCausalLM", **OPT, do_layer_norm_before=False),
    "llama": of("LlamaForCausalLM", **WIDE),
    "mistral": of("MistralForCausalLM", **WIDE),
    "qwen2": of("Qwen2ForCausalLM", **DECODER),
    "qwen3": of("Qwen3ForCausalLM", **WIDE),
    "gemma2": of("Gemma2ForCausalLM", **WIDE),
    "gemma3": of("Gemma3ForCausalLM", **WIDE),
    "phi3": of("Phi3ForCausalLM", **DECODER),
    "mixtral": of("MixtralForCausalLM", **WIDE, num_local_experts=4),
    "t5": of("T5ForConditionalGeneration", d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=50),
    "bart": of("BartForConditionalGeneration", **PAIR, max_position_embeddings=16),
    "vit": of("ViTForImageClassification", **IMAGE),
    "deit": of("DeiTForImageClassification", **IMAGE),
    "dinov2": of("Dinov2ForImageClassification", **{k: v for k, v in IMAGE.items() if k != "intermediate_size"}),
    "swin": of("SwinForImageClassification", image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 4], window_size=2),
    "clip": of("CLIPModel", **TOWERS, projection_dim=16),
    "siglip": of("SiglipModel", **TOWERS),
    "q-former": of("Blip2QFormerModel", **TEXT, encoder_hidden_size=32),
    "whisper": of("WhisperForConditionalGeneration", **PAIR, max_source_positions=16, max_target_positions=16, num_mel_bins=8),
    "wav2vec2": of("Wav2Vec2ForSequenceClassification", **SPEECH),
    "wav2vec2-pre": of("Wav2Vec2ForCTC", **SPEECH, do_stable_layer_norm=True, feat_extract_norm="layer"),
    "musicgen": of(
        "MusicgenForCausalLM", vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, num_codebooks=2,
        max_position_embeddings=16, pad_token_id=0, bos_token_id=0,
    ),
    "segformer": of(
        "SegformerForImageClassification", num_encoder_blocks=2, depths=[2, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[3, 3],
        strides=[2, 2], num_attention_heads=[2, 4], mlp_ratios=[2, 2],
    ),
    "rwkv": of("RwkvForCausalLM", vocab_size=50, hidden_size=32, num_hidden_layers=2, intermediate_size=64, context_length=16),
    "mamba": of("MambaForCausalLM", vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=4),
    "unet": diffuser(
        "UNet2DConditionModel", sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=24,
        attention_head_dim=8, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "dit": diffuser(
        "DiTTransformer2DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, norm_num_groups=8,
    ),
    "pixart": diffuser(
        "PixArtTransformer2DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        cross_attention_dim=16, caption_channels=12,
    ),
    "torch-encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 2, enable_nested_tensor=False),
    "torch-pre": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, norm_first=True, batch_first=True), 2, norm=nn.LayerNorm(32), enable_nested_tensor=False
    ),
    "torch-transformer": lambda: nn.Transformer(32, 4, 2, 2, 64),
    "timm-vit": TimmViT,
    "resnet": of("ResNetForImageClassification", embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1]),
}  # fmt: skip


@functools.cache
def built(family: str) -> nn.Module:
    return FAMILIES[family]()


@functools.cache
def found(family: str) -> list[Site]:
    return anatomy.sites(built(family))


def named(family: str, name: str) -> Site:
    return next(s for s in found(family) if s.name == name)


WEIGHTS = ("linear", "conv", "embedding", "norm", "parameter")


def counts(sites: list[Site], kinds: str = " ".join(WEIGHTS)) -> str:
    """How many sites each role has; `attn.*` stands for q, k, v and o where they are equally many."""
    told = Counter(s.role for s in sites if s.kind in kinds.split())
    for part in ("attn", "cross"):
        four = [f"{part}.{x}" for x in "qkvo"]
        if len({told[r] for r in four}) == 1 and told[four[0]]:
            told[f"{part}.*"] = told[four[0]]
            told -= Counter({r: told[r] for r in four})
    return " ".join(f"{role}:{n}" for role, n in sorted(told.items()) if n)


EXPECTED = {
    "bert": (
        "attn.*:2 embed.other:1 embed.position:1 embed.token:1 head:1 mlp.down:2 mlp.up:2 norm.attn:2 norm.embed:1 norm.mlp:2 pooler:1",
        "attn:4 block:2 mlp:2 model:1",
    ),
    "roberta": (
        "attn.*:2 embed.other:1 embed.position:1 embed.token:1 head:2 mlp.down:2 mlp.up:2 norm.attn:2 norm.embed:1 norm.mlp:2",
        "attn:4 block:2 mlp:2 model:1",
    ),
    "deberta": (
        "attn.*:2 embed.other:1 embed.token:1 head:1 mlp.down:2 mlp.up:2 norm.attn:2 norm.embed:2 norm.mlp:2 pooler:1",
        "attn:4 block:2 mlp:2 model:1",
    ),
    "distilbert": (
        "attn.*:2 embed.position:1 embed.token:1 head:2 mlp.down:2 mlp.up:2 norm.attn:2 norm.embed:1 norm.mlp:2",
        "attn:4 block:2 mlp:2 model:1",
    ),
    "gpt2": (
        "attn.*:2 embed.position:1 embed.token:1 head:1 mlp.down:2 mlp.up:2 norm.attn:2 norm.final:1 norm.mlp:2",
        "attn:4 block:2 mlp:2 model:1",
    ),
    "neox": (
        "attn.o:2 attn.qkv:2 embed.token:1 head:1 mlp.down:2 mlp.up:2 norm.attn:2 norm.final:1 norm.mlp:2",
        "attn:4 block:2 mlp:2 model:1",
    ),
    "opt": (
        "attn.*:2 embed.position:1 embed.token:1 head:1 mlp.down:2 mlp.up:2 norm.attn:2 norm.final:1 norm.mlp:2",
        "attn:4 block:2 mlp:2 model:1",
    ),
    "opt-post": (
        "attn.*:2 embed.position:1 embed.token:1 head:1 mlp.down:2 mlp.up:2 norm.attn:2 norm.mlp:2",
        "attn:4 block:2 mlp:2 model:1",
    ),
    "llama": (
        "attn.*:2 embed.token:1 head:1 mlp.down:2 mlp.gate:2 mlp.up:2 norm.attn:2 norm.final:1 norm.mlp:2",
        "attn:4 block:2 mlp:2 model:1",
    ),
    "mistral": (
        "attn.*:2 embed.token:1 head:1 mlp.down:2 mlp.gate:2 mlp.up:2 norm.attn:2 norm.final:1 norm.mlp:2",
        "attn:4 block:2 mlp:2 model:1",
    ),
    "qwen2": (
        "attn.*:2 embed.token:1 head:1 mlp.down:2 mlp.gate:2 mlp.up:2 norm.attn:2 norm.final:1 norm.mlp:2",
        "attn:4 block:2 mlp:2 model:1",
    ),
    "qwen3": (
        "attn.*:2 embed.token:1 head:1 mlp.down:2 mlp.gate:2 mlp.up:2 norm.attn:2 norm.final:1 norm.mlp:2 norm.qk:4",
        "attn:4 block:2 mlp:2 model:1",
    ),
    "gemma2": (
        "attn.*:2 embed.token:1 head:1 mlp.down:2 mlp.gate:2 mlp.up:2 norm.attn:4 norm.final:1 norm.mlp:4",
        "attn:4 block:2 mlp:2 model:1",
    ),
    "gemma3": (
        "attn.*:2 embed.token:1 head:1 mlp.down:2 mlp.gate:2 mlp.up:2 norm.attn:4 norm.final:1 norm.mlp:4 norm.qk:4",
        "attn:4 block:2 mlp:2 model:1",
    ),
    "phi3": (
        "attn.*:2 embed.token:1 head:1 mlp.down:2 mlp.gate:2 mlp.up:2 norm.attn:2 norm.final:1 norm.mlp:2",
        "attn:4 block:2 mlp:2 model:1",
    ),
    "mixtral": (
        "attn.*:2 embed.token:1 expert.down:2 expert.gate:2 expert.up:2 head:1 norm.attn:2 norm.final:1 norm.mlp:2 router:2",
        "attn:4 block:2 mlp:2 model:1",
    ),
    "t5": (
        "attn.*:4 cross.*:2 embed.other:2 embed.token:2 head:1 mlp.down:4 mlp.up:4 norm.attn:4 norm.cross:2 norm.final:2 norm.mlp:4",
        "attn:8 block:4 cross:4 mlp:4 model:1",
    ),
    "bart": (
        "attn.*:4 cross.*:2 embed.position:2 embed.token:2 head:1 mlp.down:4 mlp.up:4 norm.attn:4 norm.cross:2 norm.embed:2 norm.mlp:4",
        "attn:8 block:4 cross:4 mlp:4 model:1",
    ),
    "vit": (
        "attn.*:2 embed.patch:1 embed.position:1 head:1 mlp.down:2 mlp.up:2 norm.attn:2 norm.final:1 norm.mlp:2 parameter:1",
        "attn:4 block:2 mlp:2 model:1",
    ),
    "deit": (
        "attn.*:2 embed.patch:1 embed.position:1 head:1 mlp.down:2 mlp.up:2 norm.attn:2 norm.final:1 norm.mlp:2 parameter:2",
        "attn:4 block:2 mlp:2 model:1",
    ),
    "dinov2": (
        "attn.*:2 embed.patch:1 embed.position:1 head:1 mlp.down:2 mlp.up:2 norm.attn:2 norm.final:1 norm.mlp:2 parameter:6",
        "attn:4 block:2 mlp:2 model:1",
    ),
    "swin": (
        "attn.*:3 embed.patch:1 head:1 mlp.down:3 mlp.up:3 norm.attn:3 norm.embed:1"
        " norm.final:1 norm.mlp:3 norm.other:1 other:1 parameter:3",
        "attn:6 block:3 mlp:3 model:1",
    ),
    "clip": (
        "attn.*:4 embed.patch:1 embed.position:2 embed.token:1 mlp.down:4 mlp.up:4"
        " norm.attn:4 norm.embed:1 norm.final:2 norm.mlp:4 other:2 parameter:2",
        "attn:8 block:4 mlp:4 model:1",
    ),
    "siglip": (
        "attn.*:4 embed.patch:1 embed.position:2 embed.token:1 mlp.down:4 mlp.up:4"
        " norm.attn:4 norm.final:2 norm.mlp:4 norm.other:1 parameter:3 pooler:7",
        "attn:8 block:4 mlp:4 model:1",
    ),
    "q-former": (
        "attn.*:2 cross.*:1 mlp.down:2 mlp.up:2 norm.attn:2 norm.cross:1 norm.embed:1 norm.mlp:2",
        "attn:4 block:2 cross:2 mlp:2 model:1",
    ),
    "whisper": (
        "attn.*:4 cross.*:2 embed.patch:2 embed.position:2 embed.token:1 head:1"
        " mlp.down:4 mlp.up:4 norm.attn:4 norm.cross:2 norm.final:2 norm.mlp:4",
        "attn:8 block:4 cross:4 mlp:4 model:1",
    ),
    "wav2vec2": (
        "attn.*:2 conv:2 embed.patch:1 embed.position:1 head:2 mlp.down:2 mlp.up:2"
        " norm.attn:2 norm.embed:2 norm.mlp:2 norm.other:1 parameter:1",
        "attn:4 block:2 mlp:2 model:1",
    ),
    "wav2vec2-pre": (
        "attn.*:2 conv:2 embed.patch:1 embed.position:1 head:1 mlp.down:2 mlp.up:2"
        " norm.attn:2 norm.embed:1 norm.final:1 norm.mlp:2 norm.other:2 parameter:1",
        "attn:4 block:2 mlp:2 model:1",
    ),
    "musicgen": (
        "attn.*:2 cross.*:2 embed.token:2 head:2 mlp.down:2 mlp.up:2 norm.attn:2 norm.cross:2 norm.final:1 norm.mlp:2",
        "attn:4 block:2 cross:4 mlp:2 model:1",
    ),
    "segformer": (
        "attn.*:3 conv:5 embed.patch:2 head:1 mlp.down:3 mlp.up:3 norm.attn:3 norm.embed:2 norm.final:2 norm.mlp:3 norm.other:2",
        "attn:6 block:3 mlp:3 model:1",
    ),
    "rwkv": (
        "embed.token:1 head:1 mixer.in:6 mixer.out:2 mlp.down:2 mlp.gate:2 mlp.up:2"
        " norm.embed:1 norm.final:1 norm.mlp:2 norm.other:2 parameter:14",
        "block:2 mlp:2 model:1",
    ),
    "mamba": ("conv:2 embed.token:1 head:1 mixer.in:2 mixer.out:2 norm.final:1 norm.other:2 other:4 parameter:4", "block:2 model:1"),
    "unet": (
        "attn.*:4 conv:33 cross.*:4 embed.other:2 mlp.down:4 mlp.gate:4 mlp.up:4"
        " norm.attn:4 norm.cross:4 norm.final:1 norm.mlp:4 norm.other:20 other:8",
        "attn:8 block:4 cross:8 mlp:4 model:1",
    ),
    "dit": ("attn.*:2 embed.other:6 embed.patch:1 mlp.down:2 mlp.up:2 other:4", "attn:4 block:2 mlp:2 model:1"),
    "pixart": (
        "attn.*:2 cross.*:2 embed.other:2 embed.patch:1 mlp.down:2 mlp.up:2 other:4 parameter:3",
        "attn:4 block:2 cross:4 mlp:2 model:1",
    ),
    "torch-encoder": ("attn.*:2 mlp.down:2 mlp.up:2 norm.attn:2 norm.mlp:2", "attn:4 block:2 mlp:2 model:1"),
    "torch-pre": ("attn.*:2 mlp.down:2 mlp.up:2 norm.attn:2 norm.final:1 norm.mlp:2", "attn:4 block:2 mlp:2 model:1"),
    "torch-transformer": (
        "attn.*:4 cross.*:2 mlp.down:4 mlp.up:4 norm.attn:4 norm.cross:2 norm.final:2 norm.mlp:4",
        "attn:8 block:4 cross:4 mlp:4 model:1",
    ),
    "timm-vit": (
        "attn.*:2 embed.patch:1 embed.position:1 head:1 mlp.down:2 mlp.up:2 norm.attn:2 norm.final:1 norm.mlp:2 parameter:1",
        "attn:4 block:2 mlp:2 model:1",
    ),
    "resnet": ("conv:12 head:1 norm.embed:1 norm.other:11", "block:3 model:1"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_of_every_family(family: str) -> None:
    assert counts(found(family)) == EXPECTED[family][0]
    assert counts(found(family), "branch attention block model") == EXPECTED[family][1]


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_agree_with_the_model(family: str) -> None:
    """Names are unique, shapes are those of the weights, row ranges tile their layer, and every matrix is there once."""
    model, sites = built(family), found(family)
    assert len({s.name for s in sites}) == len(sites)
    assert all(s.out_features == s.in_features > 0 for s in sites if s.kind not in WEIGHTS)
    layers: dict[tuple[str, str], list[Site]] = {}
    for s in sites:
        if s.kind in WEIGHTS:
            layers.setdefault((s.module, s.parameter), []).append(s)
    for (module, parameter), mine in layers.items():
        weight = getattr(model.get_submodule(module), parameter)
        assert sum(s.out_features * (1 if s.kind == "norm" else s.in_features) * max(s.count, 1) for s in mine) == weight.numel()
        start = 0
        for s in mine if len(mine) > 1 else ():
            assert s.rows == (start, start + s.out_features)
            start += s.out_features
    matrices = {n for n, p in model.named_parameters() if p.ndim > 1 and "parametrizations" not in n}
    assert matrices <= {f"{m}.{p}".lstrip(".") for m, p in layers} | {"shared.weight", "model.shared.weight"}


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_counts_every_block_once(family: str) -> None:
    blocks = [s for s in found(family) if s.kind == "block"]
    assert {s.depth for s in blocks} == set(range(len(blocks)))
    assert all(s.index < s.length for s in blocks)
    assert all(s.depth is not None for s in found(family) if s.kind in ("branch", "attention"))


TOKENS = {"input_ids": torch.arange(6)[None]}
PIXELS = {"pixel_values": torch.randn(1, 3, 8, 8)}
RUNS: dict[str, Any] = {
    **dict.fromkeys(("bert", "roberta", "deberta", "distilbert", "gpt2", "neox", "opt", "opt-post", "llama", "qwen3", "gemma2"), TOKENS),
    **dict.fromkeys(("gemma3", "phi3", "mixtral"), TOKENS),
    **{family: {**TOKENS, "decoder_input_ids": torch.arange(4)[None]} for family in ("t5", "bart")},
    **dict.fromkeys(("vit", "dinov2"), PIXELS),
    "swin": {"pixel_values": torch.randn(1, 3, 16, 16)},
    "segformer": {"pixel_values": torch.randn(1, 3, 32, 32)},
    "q-former": {"query_embeds": torch.randn(1, 4, 32), "encoder_hidden_states": torch.randn(1, 5, 32)},
    "wav2vec2": {"input_values": torch.randn(1, 400)},
    "wav2vec2-pre": {"input_values": torch.randn(1, 400)},
}


@pytest.mark.parametrize("family", RUNS)
def test_sublayers_and_norms_run_in_the_order_told(family: str) -> None:
    """Hooks on a real forward: a sub-layer's entry runs before its end, a norm before it unless it is `post`, then after."""
    model, sites, ran = built(family).eval(), found(family), list[str]()
    hooks = [m.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, m in model.named_modules()]
    with torch.no_grad():
        model(**RUNS[family])
    for hook in hooks:
        hook.remove()
    at = {n: i for i, n in reversed(list(enumerate(ran)))}
    for branch in (s for s in sites if s.kind == "branch"):
        if branch.entry != branch.module:
            assert at[branch.entry] < at[branch.module], branch.name
        norms = [s for s in sites if s.kind == "norm" and s.depth == branch.depth and s.role == f"norm.{branch.role}"]
        assert any(s.post for s in norms) == branch.post
        for norm in norms:
            before = at[norm.name] < at[branch.entry] or branch.entry.startswith(branch.module)
            assert not (norm.post and at[norm.name] < at[branch.module]), norm.name
            assert norm.post or before or len(norms) == 2, norm.name
    for norm in (s for s in sites if s.role in ("norm.final", "norm.embed") and s.kind == "norm" and s.depth is None and s.name in at):
        blocks = [at[s.name] for s in sites if s.kind == "block" and s.side == norm.side]
        assert at[norm.name] > min(blocks) if norm.role == "norm.final" else at[norm.name] < max(blocks)


@pytest.mark.parametrize(
    ("family", "name", "facts"),
    [
        ("gpt2", "transformer.h.1.attn.c_attn.k", dict(role="attn.k", module="transformer.h.1.attn.c_attn", rows=(32, 64), depth=1)),
        ("gpt2", "transformer.h.0.mlp.c_fc", dict(role="mlp.up", out_features=128, in_features=32)),
        ("gpt2", "transformer.h.0.attn", dict(kind="branch", entry="transformer.h.0.attn.c_attn", module="transformer.h.0.attn.c_proj")),
        ("gpt2", "transformer.h.0.attn.attention", dict(kind="attention", module="transformer.h.0.attn", causal=True, heads=4, head_dim=8)),
        ("neox", "gpt_neox.layers.0.attention.query_key_value", dict(role="attn.qkv", rows=None, out_features=96)),
        ("phi3", "model.layers.0.self_attn.qkv_proj.q", dict(rows=(0, 32), role="attn.q")),
        ("phi3", "model.layers.0.self_attn.qkv_proj.v", dict(rows=(48, 64), role="attn.v")),
        ("phi3", "model.layers.0.mlp.gate_up_proj.up", dict(rows=(64, 128), role="mlp.up")),
        ("llama", "model.layers.1.self_attn", dict(kind="attention", heads=4, kv_heads=2, head_dim=8, out_features=16, causal=True)),
        ("llama", "model.layers.1.mlp", dict(kind="branch", entry="model.layers.1.mlp.gate_proj", module="model.layers.1.mlp.down_proj")),
        ("llama", "lm_head", dict(role="head", trainable_head=False)),
        ("gemma2", "model.layers.0.post_attention_layernorm", dict(role="norm.attn", post=False)),
        ("gemma2", "model.layers.0.pre_feedforward_layernorm", dict(role="norm.mlp", post=False)),
        ("bert", "bert.encoder.layer.1.attn", dict(post=True, module="bert.encoder.layer.1.attention.output.dense", index=1, length=2)),
        ("bert", "bert.encoder.layer.0.attention.self", dict(kind="attention", causal=False, heads=4)),
        ("bert", "bert.encoder.layer.0.output.LayerNorm", dict(role="norm.mlp", post=True)),
        ("bert", "classifier", dict(role="head", trainable_head=True)),
        ("bert", "input", dict(kind="model", role="model", module="", out_features=32, side="")),
        ("roberta", "classifier.dense", dict(role="head", trainable_head=True)),
        ("mixtral", "model.layers.0.mlp.experts.gate_up_proj.up", dict(count=4, rows=(64, 128), out_features=64, in_features=32)),
        ("mixtral", "model.layers.0.mlp.experts.down_proj", dict(count=4, rows=None, out_features=32, in_features=64, role="expert.down")),
        ("mixtral", "model.layers.0.mlp", dict(kind="branch", entry="model.layers.0.mlp", module="model.layers.0.mlp")),
        ("bart", "model.decoder.layers.0.cross", dict(role="cross", post=True, depth=2, side="decoder", index=0)),
        ("bart", "model.decoder.layers.1.self_attn", dict(kind="attention", causal=True, side="decoder", depth=3)),
        ("bart", "input", dict(side="encoder", out_features=32)),
        ("t5", "decoder.block.0.layer.1.EncDecAttention", dict(kind="attention", role="cross", causal=False)),
        ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias", dict(role="embed.other", out_features=4, in_features=32)),
        ("clip", "text_model.encoder.layers.0.self_attn", dict(causal=True)),
        ("clip", "vision_model.encoder.layers.0.self_attn", dict(causal=False, depth=2)),
        ("opt-post", "model.decoder.layers.0.mlp", dict(post=True, entry="model.decoder.layers.0.fc1")),
        ("vit", "vit.embeddings.position_embeddings", dict(kind="parameter", role="embed.position", parameter="position_embeddings")),
        ("vit", "vit.embeddings.patch_embeddings.projection", dict(kernel=(4, 4), in_features=48, role="embed.patch")),
        ("swin", "swin.encoder.layers.1.blocks.0", dict(kind="block", depth=2, index=0, length=1, out_features=16)),
        ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.gate", dict(rows=(64, 128), role="mlp.gate")),
        ("torch-encoder", "layers.0.self_attn.k", dict(parameter="in_proj_weight", rows=(32, 64), batch_dim=1)),
        ("torch-encoder", "layers.0.linear1", dict(batch_dim=1, role="mlp.up")),
        ("torch-encoder", "layers.0.attn", dict(post=True, entry="layers.0.self_attn", module="layers.0.self_attn")),
        ("torch-encoder", "layers.0.self_attn.out_proj", dict(role="attn.o")),
        ("torch-pre", "layers.1.mlp", dict(post=False, batch_dim=0)),
        ("timm-vit", "blocks.1.attn.qkv.v", dict(rows=(64, 96), module="blocks.1.attn.qkv")),
        ("timm-vit", "head", dict(role="head", trainable_head=True)),
        ("segformer", "segformer.stages.0.blocks.0.mlp.dwconv.dwconv", dict(role="conv", groups=32, in_features=9)),
        ("wav2vec2", "wav2vec2.encoder.layers.0.mlp", dict(post=True)),
        ("wav2vec2-pre", "wav2vec2.encoder.layers.0.mlp", dict(post=False)),
    ],
)  # fmt: skip
def test_exact_sites(family: str, name: str, facts: dict[str, Any]) -> None:
    site = named(family, name)
    assert {k: getattr(site, k) for k in facts} == facts


def test_grouped_fused_projection_without_told_head_width() -> None:
    """Heads × width + two times the key heads × width make up the rows."""
    attention: Any = nn.Module()
    attention.qkv_proj, attention.o_proj = nn.Linear(24, 40), nn.Linear(24, 24)
    attention.num_heads, attention.num_kv_heads = 3, 1
    block = nn.ModuleDict({"attention": attention})
    rows = {s.role: s.rows for s in anatomy.sites(nn.ModuleList([block])) if s.rows}
    assert rows == {"attn.q": (0, 24), "attn.k": (24, 32), "attn.v": (32, 40)}


class Odd(nn.Module):
    """A block whose names nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.beta, self.gamma = nn.Linear(8, 8), nn.Linear(8, 24), nn.Linear(24, 8)


def odd() -> Any:
    return nn.Sequential(nn.Linear(4, 8), nn.ModuleList([Odd(), Odd()]), nn.Linear(8, 2))


def test_unknown_model_by_shape_and_by_name() -> None:
    from veneer.site import choose

    sites = anatomy.sites(odd())
    assert counts(sites, "linear") == "mlp.down:2 mlp.up:2 other:4"
    assert [s.name for s in choose(sites, r"1\.\d\.alpha", kinds=("linear",), who="test")] == ["1.0.alpha", "1.1.alpha"]
    assert [s.depth for s in sites if s.name.endswith("beta")] == [0, 1]


def test_custom_roles_correct_and_add() -> None:
    sites = {
        s.name: s
        for s in anatomy.sites(odd(), {"alpha": "attn.q", r"1\.1\.beta": "mlp.gate", "2": "head", "1.0.beta": "attn.k attn.v mlp.up"})
    }
    assert sites["1.0.alpha"].role == sites["1.1.alpha"].role == "attn.q"
    assert sites["1.1.beta"].role == "mlp.gate" and sites["2"].role == "head"
    assert sites["1.0.beta.v"].rows == (8, 16)
    fused = anatomy.sites(built("gpt2"), {"h.0.attn.c_attn.q": "other", "h.1.attn.c_attn": "attn.qkv"})
    assert next(s for s in fused if s.name.endswith("h.0.attn.c_attn.q")).role == "other"
    assert next(s for s in fused if s.name.endswith("h.1.attn.c_attn")).rows is None


def test_unknown_role_and_unused_name_are_refused() -> None:
    with pytest.raises(UnknownName, match=r"'attn\.qq'.*'attn\.q'"):
        anatomy.sites(odd(), {"alpha": "attn.qq"})
    with pytest.raises(NoMatch, match=r"'alpa' names no layer.*'alpha'"):
        anatomy.sites(odd(), {"alpa": "attn.q"})


def test_swapped_classes_and_adapter_tensors_change_nothing() -> None:
    model = FAMILIES["bert"]()
    before = anatomy.sites(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) or name.endswith("layer.1"):
            swapped = type(f"Adapted{type(module).__name__}", (type(module),), {})
            module.__class__ = swapped
            module.add_module("veneer", nn.ModuleDict({"default": nn.Linear(3, 3)}))
    assert anatomy.sites(model) == before


def test_shared_modules_and_tied_parameters_stand_once() -> None:
    model = odd()
    model[1][1].alpha = model[1][0].alpha
    assert [s.name for s in anatomy.sites(model) if s.name.endswith("alpha")] == ["1.0.alpha"]
    token = nn.Parameter(torch.zeros(1, 1, 8))
    model[1][0].token = model[1][1].token = token
    assert [s.name for s in anatomy.sites(model) if s.kind == "parameter"] == ["1.0.token"]


def test_quantised_layers_count_by_their_features() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    site = anatomy.sites(nn.Sequential(bnb.nn.Linear4bit(64, 32), bnb.nn.Linear8bitLt(16, 8)))
    assert [(s.kind, s.out_features, s.in_features) for s in site if s.kind == "linear"] == [("linear", 32, 64), ("linear", 8, 16)]


def test_single_layer_and_transposed_convolution() -> None:
    assert [(s.name, s.kind) for s in anatomy.sites(nn.Linear(3, 2))] == [("weight", "linear")]
    assert anatomy.sites(nn.Sequential(nn.ConvTranspose1d(2, 3, 2))) == []
    apart = anatomy.sites(nn.Sequential(nn.MultiheadAttention(16, 2, kdim=8, vdim=12)))
    assert [(s.name, s.parameter, s.in_features) for s in apart[:3]] == [
        ("0.q", "q_proj_weight", 16), ("0.k", "k_proj_weight", 8), ("0.v", "v_proj_weight", 12),
    ]  # fmt: skip


def test_layout_collapses_equal_blocks() -> None:
    text = anatomy.layout(built("llama"))
    assert re.search(r"block × 2 +model\.layers\.0 … model\.layers\.1", text)
    assert text.count("self_attn.q_proj") == 1
    assert re.search(r"attn\.k +\[16, 32\] +self_attn\.k_proj", text)
    assert re.search(r"head +\[50, 32\] +lm_head", text)
    assert "block × 1  encoder.block.0" in anatomy.layout(built("t5"))
    assert "rows 32–64" in anatomy.layout(built("gpt2"))


def test_skeleton_builds_on_meta_from_the_named_architecture(tmp_path: Path) -> None:
    config = tf.BertConfig(**TEXT, architectures=["BertForSequenceClassification"])
    config.save_pretrained(tmp_path)
    model = anatomy.skeleton(str(tmp_path))
    assert type(model).__name__ == "BertForSequenceClassification"
    assert all(p.is_meta for p in model.parameters())
    assert anatomy.sites(model) == found("bert")
    with pytest.raises(BadFile, match="configuration"):
        anatomy.skeleton(str(tmp_path / "nothing"))


def test_skeleton_of_a_diffusers_folder(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "DiTTransformer2DModel", "num_layers": 1, "num_attention_heads": 2}))
    assert type(anatomy.skeleton(str(tmp_path))).__name__ == "DiTTransformer2DModel"
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "NoSuchModel"}))
    with pytest.raises(BadFile, match="NoSuchModel"):
        anatomy.skeleton(str(tmp_path))


def test_a_second_walk_reads_no_source_again() -> None:
    """Reading the forwards' sources is the only slow step, and once a class."""
    model = built("llama")
    anatomy.sites(model)
    before = calls.cache_info()
    anatomy.sites(model)
    after = calls.cache_info()
    assert after.misses == before.misses and after.hits > before.hits
