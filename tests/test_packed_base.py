"""Runs on 4- and 8-bit bases, merged into 16 bits or packed again; and models of integers that torchao and torch run alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SUBJECTS

import veneer
from veneer.cli.main import main
from veneer.errors import BadValue, MissingExtra
from veneer.forms import QuantisedForm
from veneer.tools.integers import integers, weight_of
from veneer.tools.requantise import packed_layers
from veneer.tools.torchao_integers import save_torchao
from veneer.train import Recipe, train
from veneer.train.packed_base import optimizer
from veneer.train.state import read_state, write_state
from veneer.train.use import rebuild

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "the", "very"]
ROWS = "text,label\n" + "".join(
    f"the {'good' if i % 2 else 'bad'} film {'very ' * (i % 5)},{'yes' if i % 2 else 'no'}\n" for i in range(60)
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny encoder whose widths are whole blocks of 64, and data."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder = tmp_path_factory.mktemp("packed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "max_position_embeddings": 32}
    BertForSequenceClassification(BertConfig(vocab_size=len(WORDS), **sizes)).save_pretrained(folder / "model")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder / "model")
    (folder / "data.csv").write_text(ROWS)
    return folder


def recipe(place: Path, name: str, **changes: Any) -> Recipe:
    settings = {"model": str(place / "model"), "data": str(place / "data.csv"), "method": "lora(r=4)", "device": "cpu", "steps": 6}
    return Recipe.of({**settings, "batch_size": 8, "lr": 1e-2, "out": str(place / name), **changes})


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """A finished run of LoRA on an NF4 base."""
    train(recipe(place, "nf4", quantise="nf4", optimizer="paged-adamw-8bit"), progress=False, say=lambda line: None)
    return place / "nf4"


@pytest.mark.parametrize("quantise", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("method", ["lora(r=4)", "bottleneck-adapter(m=4)"])
def test_any_method_trains_over_packed_layers_and_leaves_them_alone(place: Path, quantise: str, method: str) -> None:
    wanted = recipe(place, f"{quantise}-{method[:3]}", quantise=quantise, method=method)
    outcome = train(wanted, progress=False, say=lambda line: None)
    assert outcome.trained > 0 and outcome.curve[-1]["loss"] != outcome.curve[0]["loss"]
    model, _, _ = rebuild(wanted.folder)
    plain, _, _ = rebuild(wanted.folder, adapter=False)
    packed = packed_layers(plain)
    assert len(packed) == 13 and type(plain.classifier) is torch.nn.Linear  # heads stay as they are
    for name, layer in packed_layers(model).items():
        assert torch.equal(layer.weight.data, packed[name].weight.data)


def test_scales_are_quantised_too_unless_told_otherwise(place: Path) -> None:
    for double in (True, False):
        wanted = recipe(place, f"double-{double}", quantise="nf4", double_quant=double, steps=1)
        train(wanted, progress=False, say=lambda line: None)
        layer: Any = next(iter(packed_layers(rebuild(wanted.folder)[0]).values()))
        assert layer.weight.quant_state.nested is double


def test_a_run_on_a_packed_base_is_merged_into_the_values_it_computed_with(run: Path, tmp_path: Path, capsys: Any) -> None:
    from transformers import BertForSequenceClassification

    assert main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 0
    merged = BertForSequenceClassification.from_pretrained(tmp_path / "merged")
    tuned = veneer.of(rebuild(run)[0])
    form = QuantisedForm()
    for site in tuned.sites():
        if site.role == "head":
            continue
        W = form.weight(tuned.model.get_submodule(site.module))
        p = next(part.tensors() for part in tuned.adapters["default"].parts if part.site.name == site.name)
        expected = W + p["B"].detach() @ p["A"].detach()
        torch.testing.assert_close(merged.get_submodule(site.module).weight.detach(), expected, atol=1e-5, rtol=1e-5)
    assert not hasattr(merged.config, "quantization_config")
    assert "allowed" in capsys.readouterr().out


def test_a_merge_may_be_in_16_bits_or_packed_again(run: Path, tmp_path: Path, capsys: Any) -> None:
    from transformers import BertForSequenceClassification

    assert main(["merge", str(run), "--out", str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    half = BertForSequenceClassification.from_pretrained(tmp_path / "half", dtype="auto")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert main(["merge", str(run), "--out", str(tmp_path / "again"), "--requantise", "fp4"]) == 0
    said = capsys.readouterr().out
    assert "fp4: the packed weights differ from the merged ones by" in said and "%" in said
    again = BertForSequenceClassification.from_pretrained(tmp_path / "again")
    assert len(packed_layers(again)) == 13
    assert not list(tmp_path.glob(".*")), "nothing is left beside"


def test_what_does_not_go_together_is_said(run: Path, place: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    assert main(["export", str(run), "--to", "veneer", "--out", str(tmp_path / "x"), "--requantise", "nf4"]) == 2
    assert "--to merged" in capsys.readouterr().err
    assert main(["export", str(run), "--to", "torchao", "--out", str(tmp_path / "x")]) == 2
    assert "l4q" in capsys.readouterr().err and not (tmp_path / "x").exists()
    assert main(["merge", str(run), "--out", str(tmp_path / "packed"), "--requantise", "nf4"]) == 0
    with pytest.raises(BadValue, match=r"quantised already \(bitsandbytes\)"):
        recipe(place, "twice", model=str(tmp_path / "packed"), quantise="nf4").check()
    with pytest.raises(BadValue, match=r"'nf5'.*nf4"):
        recipe(place, "x", quantise="nf5")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"veneer\[quant\]"):
        recipe(place, "x", quantise="nf4").check()


def test_a_method_that_quantises_by_itself_refuses_a_packed_base(place: Path) -> None:
    with pytest.raises(BadValue, match="quantised already"):
        train(recipe(place, "l4q-nf4", quantise="nf4", method="l4q(group=64)"), progress=False, say=lambda line: None)


@pytest.mark.parametrize("name", ["adamw-8bit", "paged-adamw-8bit", "paged-adamw"])
def test_without_pages_the_same_optimiser_is_used_and_said(place: Path, name: str) -> None:
    wanted = recipe(place, "x", optimizer=name)
    assert optimizer(wanted, "cuda:0")[0] == {"adamw-8bit": "adamw_8bit", "paged-adamw": "paged_adamw_32bit"}.get(name, "paged_adamw_8bit")
    found, said = optimizer(wanted, "cpu")
    assert found == ("adamw_8bit" if "8bit" in name else None)
    assert ("pages are CUDA's" in said) is name.startswith("paged")


def test_states_in_8_bits_go_on_where_they_stopped(tmp_path: Path) -> None:
    from bitsandbytes.optim import AdamW8bit

    def steps(w: torch.nn.Parameter, optimiser: Any, seeds: range) -> None:
        for seed in seeds:
            w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(seed))
            optimiser.step()

    first = torch.nn.Parameter(torch.zeros(64, 128))
    optimiser = AdamW8bit([first], lr=1e-2)
    steps(first, optimiser, range(3))
    write_state(tmp_path / "state.safetensors", optimiser.state_dict())
    second = torch.nn.Parameter(first.detach().clone())
    again = AdamW8bit([second], lr=1e-2)
    again.load_state_dict(read_state(tmp_path / "state.safetensors"))
    steps(first, optimiser, range(3, 6))
    steps(second, again, range(3, 6))
    assert torch.equal(first, second)


# -- integers -----------------------------------------------------------------------------------------------------


def moved(bits: int, group: int = 16) -> Any:
    """A Llama of width 64 with an l4q adapter that is not at its start."""
    tuned = veneer.attach(SUBJECTS["llama"].build(torch.float32, width=64), f"l4q(r=2, bits={bits}, group={group})", head=False)
    for part in tuned.adapters["default"].parts:
        for name, t in part.tensors().items():
            if name in ("B", "beta"):
                t.data.normal_(std=0.02)
    return tuned


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_run_in_torchao_without_veneer(bits: int, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    tuned = moved(bits)
    ids = torch.randint(0, 48, (2, 9))
    expected = tuned.model(ids).logits.detach()
    save_torchao(tuned, tmp_path)
    again: Any = LlamaForCausalLM.from_pretrained(tmp_path)
    assert type(again.model.layers[0].mlp.up_proj.weight.data).__module__.startswith("torchao")
    assert type(again.lm_head.weight.data) is torch.Tensor
    torch.testing.assert_close(again(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "torchao"


def test_four_bit_codes_run_in_torchs_own_kernel() -> None:
    tuned = moved(4, group=32)
    for piece in integers(tuned).values():
        x = torch.randn(5, piece["codes"].shape[1])
        codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(piece["codes"].int() + 8, 1)
        grid = torch.stack([piece["s"].abs().t(), piece["beta"].t()], -1).contiguous()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, 32, grid)
        torch.testing.assert_close(y, x @ weight_of(piece).t(), atol=1e-4, rtol=1e-4)


def test_integers_beside_a_trained_head_are_written_with_it(place: Path, tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    wanted = recipe(place, "l4q", method="l4q(r=2, bits=4, group=32)")
    train(wanted, progress=False, say=lambda line: None)
    assert main(["export", str(wanted.folder), "--to", "torchao", "--out", str(tmp_path / "ao")]) == 0
    again = BertForSequenceClassification.from_pretrained(tmp_path / "ao")
    model, _, _ = rebuild(wanted.folder)
    ids = torch.randint(0, len(WORDS), (3, 7))
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
