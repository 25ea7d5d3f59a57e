"""Hugging Face PEFT's files: what PEFT saves gives the same outputs here, bit-equal tensors, and the other way round."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from peft_models import (
    TASKS,
    answers,
    by_peft,
    changed,
    close,
    in_peft,
    inputs,
    made,
    ours_on,
    peft,
    same_files,
    shaken,
    text_of,
)
from safetensors.torch import load_file, save_file
from transformers import BertModel

import veneer
from veneer.errors import BadFile, BadValue, Mismatch, Unsupported
from veneer.tools.peft import load_peft, save_peft
from veneer.tools.peft.given import CHANGES_THE_MATHS


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    warnings.simplefilter("ignore")


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


def prompt(task):
    return peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3)


def prefix(task, **options):
    return peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3, **options)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5"])
def test_prompt_tuning(family, tmp_path):
    base, tuned, batch = by_peft(family, prompt(TASKS[family]), tmp_path / "theirs")
    theirs, plain = text_of(family, answers(tuned, batch)), answers(base, batch)
    ours = load_peft(base, tmp_path / "theirs")
    close(answers(base, batch), theirs)
    save_peft(ours, tmp_path / "back")
    if family != "t5":  # PEFT saves a second table for the decoder there and never reads it
        same_files(tmp_path / "theirs", tmp_path / "back")
    clean = ours.detach()
    assert torch.equal(answers(clean, batch), plain)
    again = peft.PeftModel.from_pretrained(clean, tmp_path / "back").eval()
    close(text_of(family, answers(again, batch)), theirs)


@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "gpt2"])
@pytest.mark.parametrize("projection", [False, True])
def test_prefix_tuning(family, projection, tmp_path):
    options = {"prefix_projection": True, "encoder_hidden_size": 5} if projection else {}
    base, tuned, batch = by_peft(family, prefix(TASKS[family], **options), tmp_path / "theirs")
    theirs, plain = answers(tuned, batch), answers(base, batch)
    ours = load_peft(base, tmp_path / "theirs")
    close(answers(base, batch), theirs)
    save_peft(ours, tmp_path / "back")
    same_files(tmp_path / "theirs", tmp_path / "back")
    clean = ours.detach()
    assert torch.equal(answers(clean, batch), plain)
    again = peft.PeftModel.from_pretrained(clean, tmp_path / "back").eval()
    close(answers(again, batch), theirs)


# -- what PEFT answers otherwise -------------------------------------------------------------------------------


def test_a_prompt_before_a_head_that_reads_the_first_position_is_refused(tmp_path):
    base, *_ = by_peft("roberta", prompt("SEQ_CLS"), tmp_path)
    with pytest.raises(Unsupported, match="reads the first position"):
        load_peft(base, tmp_path)
    assert not any(hasattr(m, "veneer") and m.veneer.parts for m in base.modules())


def test_a_prefix_of_an_encoder_decoder_is_refused(tmp_path):
    base, *_ = by_peft("t5", prefix("SEQ_2_SEQ_LM"), tmp_path)
    with pytest.raises(Unsupported, match="half of its table"):
        load_peft(base, tmp_path)


# -- from ours to PEFT -----------------------------------------------------------------------------------------


OURS = {
    "lora": ("bert", "lora(r=4)"),
    "lora t5": ("t5", "lora(r=4, alpha=3)"),
    "lora everywhere": ("llama", "lora(r=3, targets='attn.* mlp.up embed.token')"),
    "lora on ranges of fused rows": ("gpt2", "lora(r=4, alpha=6)"),
    "rslora on ranges of fused rows": ("gpt2", "lora(r=4, alpha=6, rslora=True)"),
    "pissa": ("llama", "lora(r=4, start='pissa')"),
    "olora on ranges": ("gpt2", "lora(r=4, start='olora', rslora=True)"),
    "lora bias": ("bert", "lora(r=4, alpha=3, lora_bias=True)"),
    "lora bias on ranges": ("gpt2", "lora(r=4, alpha=3, lora_bias=True)"),
    "lora bias and pissa": ("bert", "lora(r=4, alpha=3, lora_bias=True, start='pissa')"),
    "lora and head": ("roberta", "lora(r=4)"),
    "lora and its biases": ("bert", "lora(r=4) + bitfit(targets='attn.q attn.v')"),
    "lora and all biases": ("bert", "bitfit + lora(r=4)"),
    "lora and norms in full": ("llama", "lora(r=4) + full(targets='norm.final')"),
    "lora conv": ("net", "lora(r=4, targets='conv table last')"),
    "dora": ("llama", "dora(r=4, alpha=7)"),
    "dora on ranges": ("gpt2", "dora(r=4, alpha=7)"),
    "dora rslora conv": ("net", "dora(r=4, rslora=True, targets='conv last')"),
    "magnitudes alone": ("bert", "dora(magnitude_only=True)"),
    "adalora": ("bert", "adalora(init_r=4, target_r=2)"),
    "ia3 bert": ("bert", "ia3"),
    "ia3 llama": ("llama", "ia3"),
    "ia3 on ranges": ("gpt2", "ia3"),
    "ia3 t5": ("t5", "ia3"),
    "ln bert": ("bert", "ln-tuning"),
    "ln llama": ("llama", "ln-tuning(targets='norm.attn')"),
    "ln t5": ("t5", "ln-tuning"),
    "prompt bert": ("bert", "prompt-tuning(length=3, after_first=False)"),
    "prompt llama": ("llama", "prompt-tuning(length=3)"),
    "prompt t5": ("t5", "prompt-tuning(length=3)"),
    "prefix bert": ("bert", "prefix-tuning(length=3, shift_positions=True)"),
    "prefix gpt2": ("gpt2", "prefix-tuning(length=3)"),
    "prefix llama by a network": ("llama", "prefix-tuning(length=3, mid=5)"),
}


@pytest.mark.parametrize("case", OURS)
def test_what_we_save_answers_the_same_in_peft_and_here_again(case, tmp_path):
    family, method = OURS[case]
    plain, tuned, batch = ours_on(family, method)
    save_peft(tuned, tmp_path)
    ours = answers(tuned.model, batch)
    assert float((ours - answers(plain, batch)).abs().max()) > 1e-3
    close(in_peft(plain, tmp_path, family, batch), ours)
    again = copy.deepcopy(plain)
    load_peft(again, tmp_path)
    close(answers(again, batch), ours)


def test_ranks_that_differ_by_site(tmp_path):
    plain, tuned, batch = ours_on(
        "llama", "lora(r=4, alpha=3)", overrides={"layers.1": {"r": 2}, "layers.0.self_attn.v_proj": {"alpha": 9.0}}
    )
    save_peft(tuned, tmp_path)
    close(in_peft(plain, tmp_path, "llama", batch), answers(tuned.model, batch))


def test_masked_triplets_are_cut_off(tmp_path):
    plain, tuned, batch = ours_on("bert", "adalora(init_r=4, target_r=2)")
    with torch.no_grad():
        for i, (_, _, p) in enumerate(tuned.entries()):
            if "lambda" in p:
                p["lambda"][: 1 + i % 3] = 0
    save_peft(tuned, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    assert any(len(t) < 4 for k, t in load_file(tmp_path / "adapter_model.safetensors").items() if k.endswith("lora_A"))
    close(in_peft(plain, tmp_path, "bert", batch), answers(tuned.model, batch))
    again = copy.deepcopy(plain)
    save_peft(load_peft(again, tmp_path), tmp_path / "back")
    same_files(tmp_path, tmp_path / "back")


LOW_RANK = {
    "lora": ("llama", "lora(r=3)", None),
    "two products": ("llama", "lora(r=3) + lora(r=2, alpha=5, targets='attn.q mlp.up')", None),
    "adalora on ranges": ("gpt2", "adalora(init_r=3, target_r=2)", None),
    "wegeft": ("llama", "wegeft", 16),
    "dora": ("bert", "dora(r=3)", 16),
    "full": ("bert", "full(targets='attn.q mlp.up')", 16),
    "ia3": ("llama", "ia3(targets='attn.k mlp.down')", 16),
}


@pytest.mark.parametrize("case", LOW_RANK)
def test_any_change_of_a_weight_as_plain_lora(case, tmp_path):
    family, method, rank = LOW_RANK[case]
    plain, tuned, batch = ours_on(family, method)
    said: list[str] = []
    save_peft(tuned, tmp_path, as_lora=True, rank=rank, tell=said.append)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    ours, theirs = answers(tuned.model, batch), in_peft(plain, tmp_path, family, batch)
    assert float((ours - theirs).abs().max()) < 1e-4


def test_the_error_of_a_cut_rank_is_told(tmp_path):
    _, tuned, _ = ours_on("bert", "full(targets='attn.q')")
    said: list[str] = []
    save_peft(tuned, tmp_path, as_lora=True, rank=2, tell=said.append)
    assert len(said) == 1 and "relative error" in said[0] and "attention.self.query" in said[0]
    with pytest.raises(BadValue, match="give rank="):
        save_peft(tuned, tmp_path / "none", as_lora=True)


# -- refusals --------------------------------------------------------------------------------------------------


REFUSED = {
    "prompt twice": ("llama", "lora(r=2) + prompt-tuning(length=2)", "exactly one method"),
    "two low-rank methods": ("llama", "lora(r=2) + dora(r=2)", "exactly one method"),
    "unknown to PEFT": ("llama", "ssf", "PEFT has no ssf"),
    "biases alone": ("bert", "bitfit", "exactly one method"),
    "biases beside norms": ("bert", "ln-tuning + bitfit", "cannot train biases"),
    "quantised start": ("llama", "lora(r=2, start='loftq')", "quantised copy"),
    "prompt after the first token": ("bert", "prompt-tuning(length=2)", "after_first"),
    "prefix without a layer": ("llama", "prefix-tuning(length=2, leave_out=(0,))", "leaves some out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_cannot_hold_is_refused_and_nothing_is_written(case, tmp_path):
    family, method, words = REFUSED[case]
    _, tuned, _ = ours_on(family, method, head=False)
    with pytest.raises(Unsupported, match=words):
        save_peft(tuned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def saved(tmp_path):
    base, *_ = by_peft("llama", lora(target_modules=LLAMA_QV)("CAUSAL_LM"), tmp_path)
    return base, tmp_path


@pytest.mark.parametrize("option", CHANGES_THE_MATHS)
def test_options_that_change_the_maths_are_refused_by_name(option, saved):
    base, folder = saved
    changed(folder, **{option: {"some": "value"}})
    with pytest.raises(Unsupported, match=option):
        load_peft(base, folder)


def test_options_without_effect_on_the_maths_are_ignored(saved):
    base, folder = saved
    changed(folder, something_new=3, velora_config=None, runtime_config={"ephemeral_gpu_offload": True})
    load_peft(base, folder)


def test_other_types_and_starts_are_refused(saved):
    base, folder = saved
    changed(folder, init_lora_weights="corda")
    with pytest.raises(Unsupported, match="rewrote the base's weights"):
        load_peft(base, folder)
    changed(folder, init_lora_weights=True, peft_type="VBLORA")
    with pytest.raises(Unsupported, match="VBLORA cannot be read"):
        load_peft(base, folder)


def test_files_that_are_not_whole(saved, tmp_path_factory):
    base, folder = saved
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadFile, match="not a whole safetensors file"):
        load_peft(base, folder)
    weights.unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(BadFile, match="never read"):
        load_peft(base, folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(BadFile, match="not readable as JSON"):
        load_peft(base, folder)
    with pytest.raises(BadFile, match=r"no adapter_config\.json"):
        load_peft(base, tmp_path_factory.mktemp("empty"))


def test_tensors_that_do_not_fit(saved):
    base, folder = saved
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = next(iter(tensors))
    save_file({**tensors, key: torch.zeros(4, 5)}, weights)
    with pytest.raises(Mismatch, match="this model needs"):
        load_peft(base, folder)
    save_file({k.replace("q_proj", "q_prj"): t for k, t in tensors.items()}, weights)
    with pytest.raises(Mismatch, match=r"no layer .*q_prj"):
        load_peft(base, folder)
    save_file({k: t for k, t in tensors.items() if k != key.replace("lora_A", "lora_B")}, weights)
    with pytest.raises(BadFile, match="not whole"):
        load_peft(base, folder)
    save_file({**tensors, key.replace("lora_A", "lora_variant"): torch.zeros(2)}, weights)
    with pytest.raises(Unsupported, match="lora_variant"):
        load_peft(base, folder)
    save_file(tensors, weights)
    load_peft(base, folder)


# -- the rest --------------------------------------------------------------------------------------------------


def test_pissa_without_conversion_starts_from_the_same_residual(tmp_path):
    config = lora(target_modules=LLAMA_QV, init_lora_weights="pissa")("CAUSAL_LM")
    base, tuned, batch = by_peft("llama", config, tmp_path)
    load_peft(base, tmp_path)
    assert float((answers(base, batch) - answers(tuned, batch)).abs().max()) < 1e-4  # two decompositions, to rounding


def test_pissa_converted_by_peft_is_plain_lora(tmp_path):
    base, batch = made("llama"), inputs("llama")
    tuned = peft.get_peft_model(copy.deepcopy(base), lora(target_modules=LLAMA_QV, init_lora_weights="pissa")("CAUSAL_LM"))
    tuned.save_pretrained(tmp_path / "start")
    shaken(tuned).eval()
    theirs = answers(tuned, batch)
    tuned.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    load_peft(base, tmp_path / "end")
    assert float((answers(base, batch) - theirs).abs().max()) < 1e-4


def test_a_backbone_takes_an_adapter_of_the_model_with_a_head(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=BERT_QV)
    whole = made("bert")
    tuned = shaken(peft.get_peft_model(copy.deepcopy(whole), config)).eval()
    tuned.save_pretrained(tmp_path)
    backbone = BertModel(whole.config).eval()
    backbone.load_state_dict(whole.bert.state_dict())
    load_peft(backbone, tmp_path)
    batch = inputs("bert")
    with torch.no_grad():
        close(backbone(**batch).pooler_output, tuned.base_model.model.bert(**batch).pooler_output)


def test_half_precision_bases_keep_float32_adapters(tmp_path):
    base, *_ = by_peft("llama", lora(target_modules=LLAMA_QV)("CAUSAL_LM"), tmp_path / "theirs")
    tuned = load_peft(base.bfloat16(), tmp_path / "theirs")
    assert {p.dtype for p in tuned.parameters()} == {torch.float32}
    save_peft(tuned, tmp_path / "back")
    same_files(tmp_path / "theirs", tmp_path / "back")


def test_load_finds_the_format_and_the_name(saved):
    base, folder = saved
    tuned = veneer.load(base, folder, name="french")
    assert tuned.active == ["french"]
    assert tuned.adapters["french"].method.targets == "q_proj v_proj" or set(tuned.adapters["french"].method.targets.split()) == set(
        LLAMA_QV
    )


@pytest.mark.parametrize("case", ["lora gpt2 fused", "lora bias", "all biases", "adalora pattern", "ia3 llama", "ln bert"])
def test_what_came_from_peft_is_saved_and_loaded_as_ours(case, tmp_path):
    family, config = CASES[case]
    base, _, batch = by_peft(family, config(TASKS[family]), tmp_path / "theirs")
    plain = copy.deepcopy(base)
    load_peft(base, tmp_path / "theirs").save(tmp_path / "ours")
    tuned = veneer.load(plain, tmp_path / "ours")
    assert torch.equal(answers(plain, batch), answers(base, batch))
    save_peft(tuned, tmp_path / "back")
    same_files(tmp_path / "theirs", tmp_path / "back")


def test_a_failed_save_leaves_what_was_there(saved, monkeypatch):
    base, folder = saved
    tuned = load_peft(base, folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    monkeypatch.setattr("safetensors.torch.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(veneer.VeneerError, match="No space left"):
        save_peft(tuned, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
