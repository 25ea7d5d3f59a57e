"""Tiny models under Hugging Face PEFT and under this library, and what makes the two comparable."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import veneer

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


def phi3():
    config = Phi3Config(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        max_position_embeddings=64, original_max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Phi3ForCausalLM(config)


class Net(nn.Module):
    """A convolution, a table and a linear layer, without transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1, stride=2)
        self.last = nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask=None, **_):
        return {"logits": self.last(self.conv(self.table(input_ids).movedim(1, 2)).movedim(2, 1))}


class Picture(nn.Module):
    """2-d convolutions, one of them over single pixels, without transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 16)
        self.conv = nn.Conv2d(4, 8, 3, padding=1, stride=2)
        self.point = nn.Conv2d(8, 8, 1)
        self.last = nn.Linear(8, 4)

    def forward(self, input_ids, attention_mask=None, **_):
        picture = self.table(input_ids).unflatten(-1, (4, 4)).movedim(1, -1)  # [rows, 4, 4, tokens]
        return {"logits": self.last(self.point(self.conv(picture)).mean((2, 3)))}


MODELS = {"bert": bert, "roberta": roberta, "llama": llama, "gpt2": gpt2, "t5": t5, "net": Net, "phi3": phi3, "picture": Picture}
DECODERS = {family: "CAUSAL_LM" for family in ("llama", "gpt2", "phi3")}
TASKS = {"bert": "SEQ_CLS", "roberta": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM", "net": None, "picture": None, **DECODERS}


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


def text_of(family, logits, length=3):
    """PEFT leaves the prompt's positions in a decoder's logits."""
    return logits[:, length:] if family in ("llama", "gpt2") else logits


def ours_on(family, method, **options):
    """Our adapter with random non-zero tensors, its base before, and a batch."""
    base, batch = made(family), inputs(family)
    plain = copy.deepcopy(base)
    tuned = veneer.attach(base, method, **options)
    for p in tuned.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p)
    return plain, tuned, batch


def in_peft(plain, folder, family, batch, length=3):
    model = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval()
    out = answers(model, batch)
    return text_of(family, out, length) if model.active_peft_config.peft_type == "PROMPT_TUNING" else out


def changed(folder, **options):
    path = Path(folder) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
