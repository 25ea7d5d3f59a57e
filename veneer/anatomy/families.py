"""Names that model families give to the parts of a block. Data only."""

from __future__ import annotations

import re


def _table(**rows: str) -> dict[str, str]:
    return {name: part for part, names in rows.items() for name in names.split()}


ATTENTION_IN = _table(
    q="q q_proj query query_proj q_lin to_q wq Wq q_linear linear_q q_attn add_q_proj",
    k="k k_proj key key_proj k_lin to_k wk Wk k_linear linear_k add_k_proj",
    v="v v_proj value value_proj v_lin to_v wv Wv v_linear linear_v add_v_proj",
    kv="kv kv_proj to_kv",
    fused="c_attn qkv qkv_proj to_qkv Wqkv in_proj_qkv",
    interleaved="query_key_value",
)
"""Last name of a projection that attention reads through → which one it is."""

ATTENTION_OUT = _table(o="o o_proj out_proj out_lin to_out to_out.0 to_add_out proj projection c_proj dense out wo Wo output linear_out")
"""Names of the output projection; they count only inside an attention module."""

ATTENTION_SCOPE = re.compile(r"attn|attention", re.IGNORECASE)
CROSS = re.compile(r"cross|encoder_attn|EncDec", re.IGNORECASE)
CROSS_IF_SECOND = re.compile(r"(^|\.)(multihead_attn|attn2)(\.|$)")
"""Names of cross-attention in blocks that have another attention before it."""
SELF_TWICE = re.compile(r"^JointTransformerBlock$")
"""Blocks whose second attention is of the same tokens."""

CAUSAL_PARENT = re.compile(r"^(X?CLIP|CLIPSeg|MetaClip2?|OwlViT|Owlv2)Text")
"""Models that are causal although their attention modules do not say so."""

MLP = _table(
    up="fc1 fc_in up_proj wi wi_1 c_fc dense_h_to_4h lin1 linear1 intermediate_dense w3 proj_mlp ffn net.0.proj"
    " intermediate.dense intermediate_query.dense",
    gate="gate_proj wi_0 w1",
    gate_up="gate_up_proj Wi weights_in w12",
    down="fc2 fc_out down_proj wo Wo c_proj dense_4h_to_h lin2 linear2 output_dense w2 weights_out ffn_output net.2"
    " output.dense output_query.dense",
)
"""Last names of the layers of a feed-forward network."""

UP_THEN_GATE = re.compile(r"^(GEGLU|SwiGLU)$")
"""Classes whose fused projection holds the linear half first, the gate last."""

MIXERS: tuple[tuple[re.Pattern[str], dict[str, str]], ...] = (
    (
        re.compile(r"Rwkv\w*(Attention|TimeMix)"),
        {"key": "mixer.in", "value": "mixer.in", "receptance": "mixer.in", "gate": "mixer.in", "output": "mixer.out"},
    ),
    (re.compile(r"Rwkv\w*(FeedForward|ChannelMix)"), {"key": "mlp.up", "receptance": "mlp.gate", "value": "mlp.down"}),
    (
        re.compile(r"Mamba\w*|\w*Mixer$|\w*DeltaNet|\w*ShortConv|\w*RecurrentBlock"),
        {
            **dict.fromkeys(("in_proj", "in_proj_qkvz", "in_proj_ba", "linear_x", "linear_y"), "mixer.in"),
            **dict.fromkeys(("out_proj", "linear_out"), "mixer.out"),
        },
    ),
)
"""Class of the holder → name of the layer → role, for blocks without attention."""

ROUTER = re.compile(r"Router|MoeGate|MoEGate")
ROUTER_NAMES = {"gate", "router", "wg", "shared_expert_gate"}
"""Names of a router beside a child called `experts`."""

BLOCK_NORMS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"^pre_ln$|emb"), "norm.embed"),
    (re.compile(r"cross|encoder_attn"), "norm.cross"),
    (re.compile(r"feedforward|ffn|ff_|mlp|^(output|final)_layer_norm$|^full_layer"), "norm.mlp"),
    (re.compile(r"^input_layernorm$|self_attn|^sa_layer|^(pre_|post_)?(attn|attention)|attn$"), "norm.attn"),
)
"""Names of norms that are direct children of a block; the others count by their order."""

HEAD_NORM = re.compile(r"(^|_)(q|k|query|key)_?(norm|ln|layer_?norm)$|^norm_(added_)?(q|k)$")
INNER_NORM = re.compile(r"sub_?norm|sub_?ln|inner")

PATCH = re.compile(r"patch_?emb|feature_projection|conv_proj|embeddings\.projection|PatchEmbed", re.IGNORECASE)
TOKEN = re.compile(
    r"(^|\.)(word_embeddings?|wte|tok_embeddings|token_embeddings?|token_embedding|embed_tokens|embed_in|shared|embeddings)(\.\d+)?$"
)
POSITION = re.compile(r"position|pos_emb|wpe|pos_conv")
NOT_POSITION = re.compile(r"rel|bias|token_type")
EMBEDDING_SCOPE = re.compile(r"embed|(^|\.)emb(\.|$)")
POOLER = re.compile(r"(^|\.)(pooler|pool|attn_pool)(\.|$)|(text|vision)_model\.head(\.|$)")
POOLER_CLASS = re.compile(r"(Pooler|Pooling|PoolingHead)$")
HEAD = re.compile(
    r"(^|\.)(lm_heads?|heads?|\w*head|classifier|\w*_classifier|score|qa_outputs|fc|embed_out|projector|cls|vocab_(transform|projector)"
    r"|output_projection|\w*predictions)(\.|$)"
)
LANGUAGE_HEAD = re.compile(r"(^|\.)(lm_heads?|cls|embed_out|vocab_\w+|\w*predictions)(\.|$)")
TASK_MODEL = re.compile(
    r"For(Sequence|Token|Image|Audio|Video|AudioFrame|PointCloud)Classification|ForQuestionAnswering|ForMultipleChoice|ForSemanticSegmentation|ForSelfSupervision|ForCaptioning"
)
TASK_HEADS = {"head", "heads", "classifier", "fc", "score"}
"""Children of a plain model that are its task head."""

PRE_NORM_FLAGS = ("norm_first", "do_layer_norm_before", "normalize_before", "pre_norm")
"""Attributes of a block that say whether norms come before the sub-layers."""

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "dim_head")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads")

SWAPPED = ("Adapted", "FSDP", "Parametrized")
"""How the names of classes begin that stand in for a module's own."""
