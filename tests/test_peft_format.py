"""Hugging Face PEFT's files: what PEFT saves gives the same outputs here, bit-equal tensors, and the other way round."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import veneer
from veneer.errors import BadFile, BadValue, Mismatch, Unsupported
from veneer.tools.peft_format import CHANGES_THE_MATHS, load_peft, save_peft

peft = pytest.importorskip("peft")

TOLERANCE = 1e-6
LENGTH = 7


def bert(cls=BertForSequenceClassification):
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, max_position_embeddings=32,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return cls(config)


def roberta():
    config = RobertaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, max_position_embeddings=32,
        num_labels=3, pad_token_id=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return RobertaForSequenceClassification(config)


def llama():
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2():
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(config)


def t5():
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0
    )
    return T5ForConditionalGeneration(config)


class Net(nn.Module):
    """A convolution, a table and a linear layer, without transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1, stride=2)
        self.last = nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask=None, **_):
        return {"logits": self.last(self.conv(self.table(input_ids).movedim(1, 2)).movedim(2, 1))}


MODELS = {"bert": bert, "roberta": roberta, "llama": llama, "gpt2": gpt2, "t5": t5, "net": Net}
TASKS = {"bert": "SEQ_CLS", "roberta": "SEQ_CLS", "llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "net": None}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    warnings.simplefilter("ignore")


def made(family):
    model = MODELS[family]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p + 0.1 * torch.randn_like(p))  # nothing at its start value: gains, biases and zeros all count
    return model


def inputs(family):
    batch = {"input_ids": torch.randint(3, 40, (3, LENGTH)), "attention_mask": torch.ones(3, LENGTH, dtype=torch.long)}
    batch["attention_mask"][1, 5:] = 0
    if family == "t5":
        batch["decoder_input_ids"] = torch.randint(3, 40, (3, 5))
    return batch


@torch.no_grad()
def answers(model, batch):
    out = model(**batch)
    return out["logits"] if isinstance(out, dict) else out[0]


def shaken(model):
    """Random non-zero values in everything that PEFT trains."""
    for name, p in model.named_parameters():
        if p.requires_grad or any(w in name for w in ("lora_", "ia3_", "prompt_encoder")):
            if name.endswith("ranknum.default"):
                continue
            p.data = p.data + 0.1 * torch.randn_like(p)
    return model


def by_peft(family, config, folder):
    """A base, PEFT's outputs with a random adapter on a copy of it, the batch, and the saved folder."""
    base, batch = made(family), inputs(family)
    tuned = shaken(peft.get_peft_model(copy.deepcopy(base), config)).eval()
    tuned.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    return base, loaded, batch


def close(ours, theirs):
    scale = theirs.abs().max().clamp_min(1.0)
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / scale) <= TOLERANCE


def same_files(one, other):
    a, b = load_file(Path(one) / "adapter_model.safetensors"), load_file(Path(other) / "adapter_model.safetensors")
    assert sorted(a) == sorted(b)
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


def lora(**options):
    return lambda task: peft.LoraConfig(task_type=task, **{"r": 4, "lora_alpha": 6, **options})


BERT_QV, LLAMA_QV = ["query", "value"], ["q_proj", "v_proj"]
CASES = {
    "lora": ("bert", lora(target_modules=BERT_QV)),
    "lora roberta head": ("roberta", lora(target_modules=BERT_QV)),
    "lora llama": ("llama", lora(target_modules=LLAMA_QV)),
    "lora t5": ("t5", lora(target_modules=["q", "v"])),
    "lora gpt2 fused": ("gpt2", lora(target_modules=["c_attn"], fan_in_fan_out=True)),
    "lora gpt2 mixed": ("gpt2", lora(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, use_rslora=True)),
    "rslora": ("llama", lora(target_modules=LLAMA_QV, use_rslora=True)),
    "regex": ("llama", lora(target_modules=r".*layers\.1\.(self_attn\.q_proj|mlp\.up_proj)")),
    "one layer": ("llama", lora(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")),
    "all-linear": ("llama", lora(target_modules="all-linear")),
    "patterns": ("llama", lora(target_modules=LLAMA_QV, rank_pattern={"q_proj": 2}, alpha_pattern={r"layers.0.self_attn.v_proj": 3})),
    "rslora patterns": ("llama", lora(target_modules=LLAMA_QV, use_rslora=True, rank_pattern={"q_proj": 2})),
    "lora bias": ("llama", lora(target_modules=LLAMA_QV, lora_bias=True)),
    "all biases": ("bert", lora(target_modules=BERT_QV, bias="all")),
    "all biases of a deep head": ("roberta", lora(target_modules=BERT_QV, bias="all")),
    "its biases": ("bert", lora(target_modules=BERT_QV, bias="lora_only")),
    "saved module": ("llama", lora(target_modules=LLAMA_QV, modules_to_save=["lm_head"])),
    "saved table": ("llama", lora(target_modules=LLAMA_QV, modules_to_save=["embed_tokens"])),
    "embedding": ("llama", lora(target_modules=["embed_tokens", "q_proj"])),
    "conv": ("net", lora(target_modules=["conv", "last", "table"])),
    "dora": ("bert", lora(target_modules=BERT_QV, use_dora=True)),
    "dora gpt2": ("gpt2", lora(target_modules=["c_attn", "c_fc"], use_dora=True, fan_in_fan_out=True)),
    "dora patterns": ("llama", lora(target_modules=LLAMA_QV, use_dora=True, use_rslora=True, rank_pattern={"q_proj": 2})),
    "dora embedding and conv": ("net", lora(target_modules=["table", "conv", "last"], use_dora=True)),
    "adalora": (
        "bert",
        lambda task: peft.AdaLoraConfig(task_type=task, init_r=5, target_r=2, lora_alpha=6, total_step=10, target_modules=BERT_QV),
    ),
    "adalora pattern": (
        "llama",
        lambda task: peft.AdaLoraConfig(
            task_type=task,
            init_r=4,
            target_r=2,
            lora_alpha=6,
            total_step=10,
            target_modules=["q_proj"],
            rank_pattern={
                "model.layers.0.self_attn.q_proj.lora_E": [True, False, True, False],
                "model.layers.1.self_attn.q_proj.lora_E": [False, True, True, True],
            },
        ),
    ),
    "ia3": ("bert", lambda task: peft.IA3Config(task_type=task, target_modules=["key", "value", "output.dense"], feedforward_modules=[])),
    "ia3 llama": (
        "llama",
        lambda task: peft.IA3Config(task_type=task, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "ia3 gpt2": (
        "gpt2",
        lambda task: peft.IA3Config(
            task_type=task, target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
        ),
    ),
    "ia3 odd side": (
        "llama",
        lambda task: peft.IA3Config(task_type=task, target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"]),
    ),
    "ln bert": ("bert", lambda task: peft.LNTuningConfig(task_type=task, target_modules=["LayerNorm"])),
    "ln llama": ("llama", lambda task: peft.LNTuningConfig(task_type=task, target_modules=["input_layernorm", "norm"])),
    "ln t5": ("t5", lambda task: peft.LNTuningConfig(task_type=task, target_modules=["layer_norm"])),
}


@pytest.mark.parametrize("case", CASES)
def test_what_peft_saves_answers_the_same_here_and_goes_back_bit_for_bit(case, tmp_path):
    family, config = CASES[case]
    base, tuned, batch = by_peft(family, config(TASKS[family]), tmp_path / "theirs")
    theirs, plain = answers(tuned, batch), answers(base, batch)
    ours = load_peft(base, tmp_path / "theirs")
    close(answers(base, batch), theirs)
    assert float((theirs - plain).abs().max()) > 1e-3  # the adapter does something
    save_peft(ours, tmp_path / "back")
    same_files(tmp_path / "theirs", tmp_path / "back")
    clean = ours.detach()
    assert torch.equal(answers(clean, batch), plain)
    again = peft.PeftModel.from_pretrained(clean, tmp_path / "back").eval()
    close(answers(again, batch), theirs)
