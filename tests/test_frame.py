"""Laws of the frame that belong to no method: what attaching refuses and says, prompts and caches, files, foreign machinery."""

from __future__ import annotations

import copy
import errno
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import SUBJECTS, VOCABULARY, loss, output, spread
from torch import Tensor, nn

import veneer
from veneer.errors import BadFile, BadValue, Mismatch, NoMatch, UnknownName, Unsupported, VeneerError
from veneer.tuned import Tuned

LORA = "lora(r=2)"
IDS = torch.tensor([[5, 9, 13, 21, 8, 7], [11, 3, 17, 30, 41, 2]])


def llama(**changes: Any) -> nn.Module:
    """A tiny Llama that computes in float64 and fills its cache."""
    model = spread(tiny.llama(**{"use_cache": True, **changes})).double().eval()
    tiny.exact_norms(model)
    return model


def stirred(model: nn.Module, method: str = LORA, name: str = "default", size: float = 0.3, **options: Any) -> Tuned:
    """An adapter whose effect shows."""
    tuned = veneer.attach(model, method, name, **options)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for p in tuned.parameters(name):
            p.add_(size * torch.empty(p.shape).normal_(generator=generator).to(p))
    return tuned


@torch.no_grad()
def logits(model: nn.Module, **inputs: Any) -> Tensor:
    return model(**inputs).logits


def refusal(action: Callable[[], Any], kind: type[Exception] = VeneerError) -> str:
    with pytest.raises(kind) as caught:
        action()
    text = str(caught.value)
    assert text.count("\n") <= 2 and len(text) < 600, text
    return text


# -- attaching ------------------------------------------------------------------------------------------------


def test_nothing_is_attached_yet() -> None:
    said = refusal(lambda: veneer.of(llama()))
    assert "Nothing is attached to this LlamaForCausalLM" in said and "veneer.attach" in said


@pytest.mark.parametrize("thing", ["meta-llama/Llama-3", None, {"a": 1}, nn.Linear])
def test_only_models_are_attached_to(thing: Any) -> None:
    assert "torch.nn.Module" in refusal(lambda: veneer.attach(thing, LORA), BadValue)


@pytest.mark.parametrize("name", ["", "two words", "a.b", "1st", "weight-1", "forward", "parameters", "route"])
def test_adapter_names_are_plain_words(name: str) -> None:
    assert repr(name) in refusal(lambda: veneer.attach(llama(), LORA, name), BadValue)


def test_a_taken_name_says_what_to_do() -> None:
    model = llama()
    veneer.attach(model, LORA, "fr")
    said = refusal(lambda: veneer.attach(model, LORA, "fr"), BadValue)
    assert "'fr'" in said and "remove('fr')" in said


def test_an_unknown_adapter_gets_the_nearest_name() -> None:
    tuned = veneer.attach(llama(), LORA, "french")
    assert "'french'" in refusal(lambda: tuned.activate("frnch"), UnknownName)
    assert "there are: french" in refusal(lambda: tuned.activate(per_row=["french", "german"]), UnknownName)
    assert "there are: french" in refusal(lambda: tuned.remove("german"), UnknownName)


def test_activate_wants_one_choice() -> None:
    tuned = veneer.attach(llama(), LORA)
    refusal(lambda: tuned.activate(), BadValue)
    refusal(lambda: tuned.activate("default", per_row=["default"]), BadValue)
    refusal(lambda: tuned.activate(per_row=[]), BadValue)


def test_a_failed_attach_leaves_the_model_as_it_was() -> None:
    model = llama()
    before = logits(model, input_ids=IDS)
    classes = [type(m) for m in model.modules()]
    refusal(lambda: veneer.attach(model, "lora(targets='attn.q attn.qq')"), NoMatch)
    refusal(lambda: veneer.attach(model, "lora(r=99, start=pissa)"), BadValue)
    assert [type(m) for m in model.modules()] == classes
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model, input_ids=IDS), before)


def test_a_method_that_would_train_nothing_is_refused() -> None:
    said = refusal(lambda: veneer.attach(llama(), "bitfit", head=False), NoMatch)
    assert "BitFit" in said and "nothing to train" in said


@pytest.mark.parametrize("targets", ["attn.q attn.kk", "q_proj w_proj", "attn.q router"])
def test_a_partial_target_is_refused_unless_asked_for(targets: str) -> None:
    good, bad = targets.split()
    spec = f"lora(r=2, targets='{targets}')"
    said = refusal(lambda: veneer.attach(llama(), spec), NoMatch)
    assert repr(bad) in said and "attn.q" in said
    tuned = veneer.attach(llama(), spec, allow_unmatched=True)
    assert len(tuned.sites()) == 2 and {s.role for s in tuned.sites()} == {"attn.q"}
    optional = veneer.attach(llama(), f"lora(r=2, targets='{good} {bad}?')")
    assert [s.name for s in optional.sites()] == [s.name for s in tuned.sites()]


def test_targets_that_match_nothing_are_refused_even_if_unmatched_is_allowed() -> None:
    said = refusal(lambda: veneer.attach(llama(), "lora(targets='c_attn')", allow_unmatched=True), NoMatch)
    assert "attn.q" in said


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("attn.q", 2), ("attn.*", 8), ("mlp.up mlp.down", 4), ("q_proj", 2), ("self_attn.q_proj", 2), ("model.layers.0.mlp.down_proj", 1),
        (r".*layers\.1\..*_proj", 7), ("attn.q, attn.v", 4), ("mlp.up mlp.up", 2),
    ],
)  # fmt: skip
def test_targets_name_roles_modules_and_patterns(targets: str, count: int) -> None:
    method = veneer.method("lora", r=2, targets=targets)
    assert len(veneer.attach(llama(), method).sites()) == count


def test_overrides_change_hyper_parameters_at_some_sites(tmp_path: Path) -> None:
    tuned = stirred(llama(), "lora(r=2, targets='attn.q attn.v')", overrides={"attn.v": {"r": 3}, "layers.1": {"alpha": 7.0}})
    ranks = {s.name: (m.r, m.alpha) for s, m, _ in tuned.entries()}  # type: ignore[attr-defined]
    assert ranks["model.layers.0.self_attn.q_proj"] == (2, None)
    assert ranks["model.layers.1.self_attn.v_proj"] == (3, 7.0)
    tuned.save(tmp_path)
    again = veneer.load(llama(), tmp_path)
    assert {s.name: (m.r, m.alpha) for s, m, _ in again.entries()} == ranks  # type: ignore[attr-defined]
    assert torch.equal(logits(again.model, input_ids=IDS), logits(tuned.model, input_ids=IDS))


def test_overrides_are_checked() -> None:
    assert "'rr'" in refusal(lambda: veneer.attach(llama(), LORA, overrides={"attn.q": {"rr": 3}}))
    assert "r=0" in refusal(lambda: veneer.attach(llama(), LORA, overrides={"attn.q": {"r": 0}}), BadValue)
    assert "'layers.7'" in refusal(lambda: veneer.attach(llama(), LORA, overrides={"layers.7": {"r": 3}}), NoMatch)


def test_roles_can_be_given() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    refusal(lambda: veneer.attach(model, LORA), NoMatch)
    tuned = veneer.attach(model, LORA, roles={"0": "attn.q", "2": "attn.v"})
    assert [(s.name, s.role) for s in tuned.sites()] == [("0", "attn.q"), ("2", "attn.v")]
    assert "'attn.v'" in refusal(lambda: veneer.attach(nn.Sequential(nn.Linear(8, 8)), LORA, roles={"0": "attn.vv"}), UnknownName)
    refusal(lambda: veneer.attach(nn.Sequential(nn.Linear(8, 8)), LORA, roles={"9": "attn.v"}), NoMatch)


def test_the_base_is_frozen_and_free_again_after_detaching() -> None:
    model = llama()
    next(model.parameters()).requires_grad_(False)
    tuned = veneer.attach(model, LORA)
    ours = {id(p) for p in tuned.parameters()}
    assert all(p.requires_grad == (id(p) in ours) for p in model.parameters())
    tuned.detach()
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * (len(list(model.parameters())) - 1)
    assert not any("veneer" in n for n, _ in model.named_modules())
    refusal(lambda: veneer.of(model))


def test_keys_of_the_base_do_not_change() -> None:
    model = llama()
    keys = list(model.state_dict())
    tuned = veneer.attach(model, LORA)
    assert [k for k in model.state_dict() if ".veneer." not in f".{k}"] == keys
    assert all(isinstance(model.get_submodule(s.module), nn.Linear) for s in tuned.sites())


def test_the_head_of_a_task_is_trained_along() -> None:
    bert = SUBJECTS["bert"].build()
    assert "classifier" in {s.name for s in veneer.attach(bert, LORA).sites()}
    bert = SUBJECTS["bert"].build()
    assert "classifier" not in {s.name for s in veneer.attach(bert, LORA, head=False).sites()}
    assert "lm_head" not in {s.name for s in veneer.attach(llama(), LORA).sites()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_adapters_are_float32_over_half_precision_and_like_the_base_otherwise(dtype: torch.dtype) -> None:
    model = tiny.llama().to(dtype)
    tuned = veneer.attach(model, LORA)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in tuned.parameters()} == {wanted}
    assert logits(model, input_ids=IDS).dtype == dtype


def test_the_same_seed_gives_the_same_adapter_in_every_precision() -> None:
    first = [p.float() for p in veneer.attach(tiny.llama().bfloat16(), LORA, seed=3).parameters()]
    second = [p.float() for p in veneer.attach(tiny.llama().double(), LORA, seed=3).parameters()]
    other = [p.float() for p in veneer.attach(tiny.llama(), LORA, seed=4).parameters()]
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert any(not torch.equal(a, b) for a, b in zip(first, other))


def test_wrapped_models_are_refused_with_the_order() -> None:
    said = refusal(lambda: veneer.attach(torch.compile(llama()), LORA), Unsupported)  # type: ignore[arg-type]
    assert "Attach first, then shard, then compile" in said


def test_per_row_needs_as_many_names_as_rows() -> None:
    tuned = veneer.attach(llama(), LORA)
    tuned.activate(per_row=["default", None, "default"])
    said = refusal(lambda: logits(tuned.model, input_ids=IDS), BadValue)
    assert "3 rows" in said and "batch of 2" in said


# -- tied and merged ------------------------------------------------------------------------------------------


def tied_llama() -> nn.Module:
    return llama(tie_word_embeddings=True)


def test_merging_into_a_tied_embedding_unties_it_with_a_warning() -> None:
    model = tied_llama()
    assert model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]
    shared = model.lm_head.weight  # type: ignore[union-attr]
    tuned = stirred(model, "lora(r=2, targets='embed.token')")
    before = logits(model, input_ids=IDS)
    with pytest.warns(UserWarning, match="untied"):
        tuned.merge()
    assert model.lm_head.weight is shared and model.model.embed_tokens.weight is not shared  # type: ignore[union-attr]
    assert model.config.tie_word_embeddings is False  # type: ignore[union-attr]
    torch.testing.assert_close(logits(model, input_ids=IDS), before, rtol=1e-10, atol=1e-10)
    tuned.unmerge()
    assert model.lm_head.weight is shared and model.model.embed_tokens.weight is shared  # type: ignore[union-attr]
    assert model.config.tie_word_embeddings is True  # type: ignore[union-attr]
    assert torch.equal(logits(model, input_ids=IDS), before)


def test_adapting_the_embedding_leaves_the_tied_head_alone() -> None:
    model = tied_llama()
    hidden = torch.randn(2, 3, tiny.WIDTH, dtype=torch.float64)
    with torch.no_grad():
        before = model.lm_head(hidden)  # type: ignore[operator]
        stirred(model, "lora(r=2, targets='embed.token')")
        assert torch.equal(model.lm_head(hidden), before)  # type: ignore[operator]


def test_nothing_else_happens_while_merged() -> None:
    tuned = stirred(llama())
    tuned.merge()
    for action in (tuned.merge, lambda: tuned.activate("default"), lambda: tuned.remove("default"), lambda: tuned.disabled().__enter__()):
        assert "unmerge" in refusal(action, Unsupported)  # type: ignore[arg-type]
    assert "unmerge" in refusal(lambda: veneer.attach(tuned.model, LORA, "second"), Unsupported)
    tuned.unmerge()
    assert "nothing is merged" in refusal(tuned.unmerge, Unsupported)


def test_a_failed_merge_changes_nothing() -> None:
    tuned = stirred(llama(), "lora(r=2) + bottleneck-adapter")
    before = logits(tuned.model, input_ids=IDS)
    weights = {n: p.clone() for n, p in tuned.model.named_parameters()}
    assert "nonlinear" in refusal(tuned.merge, Unsupported)
    assert all(torch.equal(p, weights[n]) for n, p in tuned.model.named_parameters())
    assert torch.equal(logits(tuned.model, input_ids=IDS), before)


def test_rows_cannot_be_merged() -> None:
    tuned = stirred(llama())
    tuned.activate(per_row=["default", None])
    assert "rows have different adapters" in refusal(tuned.merge, Unsupported)


def test_a_merged_half_precision_base_keeps_its_dtype() -> None:
    tuned = stirred(spread(tiny.llama()).bfloat16())
    before = logits(tuned.model, input_ids=IDS)
    tuned.merge()
    assert {p.dtype for n, p in tuned.model.named_parameters() if "veneer" not in n} == {torch.bfloat16}
    torch.testing.assert_close(logits(tuned.model, input_ids=IDS), before, rtol=0.1, atol=0.2)


# -- foreign machinery ----------------------------------------------------------------------------------------


def test_an_adapter_acts_beneath_cpu_offload() -> None:
    accelerate = pytest.importorskip("accelerate")
    plain = stirred(llama())
    expected = logits(plain.model, input_ids=IDS)
    model = accelerate.cpu_offload(llama(), execution_device=torch.device("cpu"))
    base = logits(model, input_ids=IDS)
    tuned = stirred(model)
    torch.testing.assert_close(logits(model, input_ids=IDS), expected)
    assert not torch.allclose(expected, base)
    assert all(p.device.type == "cpu" for p in tuned.parameters())
    loss(model, {"input_ids": IDS}).backward()
    assert all(p.grad is not None for p in tuned.parameters())
    assert "offloaded" in refusal(tuned.merge, Unsupported)
    with tuned.disabled():
        assert torch.equal(logits(model, input_ids=IDS), base)
    tuned.detach()
    assert torch.equal(logits(model, input_ids=IDS), base)


@pytest.mark.parametrize("spec", ["dora(r=2)", "ssf", "wegeft(r=2)"])
def test_methods_that_read_weights_act_beneath_cpu_offload(spec: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = logits(stirred(llama(), spec).model, input_ids=IDS)
    model = accelerate.cpu_offload(llama(), execution_device=torch.device("cpu"))
    torch.testing.assert_close(logits(stirred(model, spec).model, input_ids=IDS), expected)


def test_an_adapter_acts_on_a_layer_whose_forward_was_patched() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    layer = model[0]
    original = layer.forward
    layer.__dict__["forward"] = lambda x: 2 * original(x)
    x = torch.randn(3, 4)
    base = model(x)
    tuned = stirred(model, "lora(r=2, targets='0')")
    L, R = tuned.adapters["default"].parts[0].method.factors(tuned.adapters["default"].parts[0].tensors())  # type: ignore[attr-defined]
    torch.testing.assert_close(model(x), base + x @ (L @ R).T)
    with tuned.disabled():
        assert torch.equal(model(x), base)
    tuned.detach()
    assert torch.equal(model(x), base) and "forward" in layer.__dict__


def test_attached_on_meta_and_filled_later(tmp_path: Path) -> None:
    tuned = stirred(llama())
    tuned.save(tmp_path)
    expected = logits(tuned.model, input_ids=IDS)
    source = llama()
    with torch.device("meta"):
        model = tiny.llama(use_cache=True).double().eval()
    attached = veneer.attach(model, LORA)
    assert attached.summary().trained == tuned.summary().trained
    assert all(p.device.type == "meta" for p in attached.parameters())
    with torch.device("meta"):
        twin = tiny.llama(use_cache=True).double().eval()
    model.load_state_dict(tuned.model.state_dict(), assign=True)  # base and adapter together
    _fill_buffers(model, source)
    tiny.exact_norms(model)
    assert torch.equal(logits(model, input_ids=IDS), expected)
    twin.load_state_dict(source.state_dict(), assign=True)  # the base first, the adapter from its folder
    _fill_buffers(twin, source)
    tiny.exact_norms(twin)
    assert torch.equal(logits(veneer.load(twin, tmp_path).model, input_ids=IDS), expected)


def _fill_buffers(model: nn.Module, source: nn.Module) -> None:
    """Buffers that no state dict holds (rotary frequencies)."""
    for name, buffer in source.named_buffers():
        holder, _, key = name.rpartition(".")
        model.get_submodule(holder)._buffers[key] = buffer


# -- prompts, caches and generation ---------------------------------------------------------------------------

PROMPTS = (
    "prompt-tuning(length=3)",
    "prefix-tuning(length=3)",
    "lora(r=2) + prompt-tuning(length=2)",
    "prompt-tuning(length=2) + prefix-tuning(length=3)",
)


def padded(side: str) -> dict[str, Tensor]:
    """Two rows of unequal length, padded on one side."""
    ids = IDS.clone()
    mask = torch.ones_like(ids)
    at = slice(0, 2) if side == "left" else slice(-2, None)
    ids[1, at], mask[1, at] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("spec", PROMPTS)
def test_decoding_with_a_cache_equals_the_full_forward(spec: str, family: str) -> None:
    model = llama() if family == "llama" else spread(tiny.gpt2(use_cache=True)).double().eval()
    stirred(model, spec, size=0.5)
    full = logits(model, input_ids=IDS)
    with torch.no_grad():
        first = model(input_ids=IDS[:, :3], use_cache=True)
        second = model(input_ids=IDS[:, 3:5], past_key_values=first.past_key_values, use_cache=True)
        third = model(input_ids=IDS[:, 5:], past_key_values=second.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits, third.logits], 1), full, rtol=1e-6, atol=1e-6)


def greedy(model: nn.Module, ids: Tensor, steps: int) -> Tensor:
    """Greedy decoding by full forwards, without a cache or padding."""
    for _ in range(steps):
        ids = torch.cat([ids, logits(model, input_ids=ids, use_cache=False)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("spec", [LORA, *PROMPTS])
def test_padding_does_not_change_a_row(spec: str, side: str) -> None:
    model = llama()
    stirred(model, spec, size=0.5)
    inputs = padded(side)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    alone = logits(model, input_ids=IDS[1:, 2:] if side == "left" else IDS[1:, :-2])
    found = logits(model, **inputs)[1:]
    torch.testing.assert_close(found[:, 2:] if side == "left" else found[:, :-2], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("spec", [LORA, *PROMPTS])
def test_generate_equals_greedy_full_forwards(spec: str, family: str) -> None:
    model = llama() if family == "llama" else spread(tiny.gpt2(use_cache=True)).double().eval()
    stirred(model, spec, size=0.5)
    expected = greedy(model, IDS[:1], 5)
    assert torch.equal(model.generate(input_ids=IDS[:1], max_new_tokens=5, do_sample=False), expected)  # type: ignore[operator]
    alone = greedy(model, IDS[1:, 2:], 5)
    batch = model.generate(**padded("left"), max_new_tokens=5, do_sample=False)  # type: ignore[operator]
    assert torch.equal(batch[:1], expected)
    assert torch.equal(batch[1:, 2:], alone)


@pytest.mark.parametrize("spec", [LORA, *PROMPTS])
def test_beams_do_not_depend_on_the_cache(spec: str) -> None:
    model = llama()
    stirred(model, spec, size=0.5)
    options = dict(max_new_tokens=4, num_beams=3, do_sample=False)
    with_cache = model.generate(**padded("left"), use_cache=True, **options)  # type: ignore[operator]
    without = model.generate(**padded("left"), use_cache=False, **options)  # type: ignore[operator]
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("spec", [LORA, *PROMPTS])
@pytest.mark.parametrize("beams", [1, 2])
def test_rows_have_their_own_adapters_in_generate(spec: str, beams: int) -> None:
    model = llama()
    tuned = stirred(model, spec, "a", size=0.5)
    stirred(model, spec.replace("length=3", "length=5"), "b", size=0.5)
    ids = torch.cat([IDS, IDS[:1]])
    names = ["a", "b", None]
    options = dict(max_new_tokens=4, do_sample=False, num_beams=beams)
    expected = []
    for row, name in enumerate(names):
        if name is None:
            with tuned.disabled():
                expected.append(model.generate(input_ids=ids[row : row + 1], **options))  # type: ignore[operator]
        else:
            tuned.activate(name)
            expected.append(model.generate(input_ids=ids[row : row + 1], **options))  # type: ignore[operator]
    tuned.activate(per_row=names)
    assert torch.equal(model.generate(input_ids=ids, **options), torch.cat(expected))  # type: ignore[operator]


@pytest.mark.parametrize("spec", ["prompt-tuning(length=3)", "prefix-tuning(length=3)", LORA])
def test_encoder_decoders_take_prompts(spec: str) -> None:
    model = spread(tiny.t5()).double().eval()
    inputs = {**padded("right"), "decoder_input_ids": IDS[:, :4]}
    base = logits(model, **inputs)
    tuned = stirred(model, spec, size=0.5)
    together = logits(model, **inputs)
    assert together.shape == base.shape and not torch.allclose(together, base)
    alone = logits(model, input_ids=IDS[1:, :-2], decoder_input_ids=IDS[1:, :4])
    torch.testing.assert_close(together[1:], alone, rtol=1e-5, atol=1e-5)
    loss(model, inputs).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in tuned.parameters())
    ids = model.generate(**padded("right"), max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    again = model.generate(**padded("right"), max_new_tokens=4, do_sample=False, use_cache=False)  # type: ignore[operator]
    assert torch.equal(ids, again)
    with tuned.disabled():
        assert torch.equal(logits(model, **inputs), base)


def test_losses_see_the_text_alone() -> None:
    model = llama()
    stirred(model, "prompt-tuning(length=3)", size=0.5)
    out = model(input_ids=IDS, labels=IDS)
    assert out.logits.shape == (*IDS.shape, VOCABULARY)
    shifted = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(out.loss.double(), shifted, rtol=1e-5, atol=1e-5)


# -- files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stirred(llama()).save(tmp_path / "adapter", note="first")
    return tmp_path / "adapter"


def test_facts_come_back(folder: Path) -> None:
    facts = json.loads((folder / "veneer.json").read_text())
    assert facts["spec"] == "lora(r=2)" and facts["base"]["class"] == "LlamaForCausalLM"
    assert veneer.load(llama(), folder).adapters["default"].facts == {"note": "first"}


def test_loaded_under_another_name_beside_another(folder: Path) -> None:
    model = llama()
    tuned = veneer.load(model, folder)
    one = logits(model, input_ids=IDS)
    veneer.load(model, folder, "second")
    assert list(tuned.adapters) == ["default", "second"] and torch.equal(logits(model, input_ids=IDS), one)
    assert "'default'" in refusal(lambda: veneer.load(model, folder), BadValue)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_truncated_files_are_named(folder: Path, kept: int) -> None:
    path = folder / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert str(path) in refusal(lambda: veneer.load(llama(), folder), BadFile)


def test_flipped_bits_in_the_header_are_caught(folder: Path) -> None:
    path = folder / "adapter.safetensors"
    data = bytearray(path.read_bytes())
    for at in range(0, 400, 7):
        changed = bytearray(data)
        changed[at] ^= 0x55
        path.write_bytes(bytes(changed))
        try:
            veneer.load(llama(), folder)
        except VeneerError as error:
            assert len(str(error)) < 700
        path.write_bytes(bytes(data))


@pytest.mark.parametrize("content", [b"", b"not a tensor file", b"\x80\x04\x95 a pickle", b"\xff" * 64])
def test_foreign_files_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "adapter.safetensors").write_bytes(content)
    assert "adapter.safetensors" in refusal(lambda: veneer.load(llama(), tmp_path), BadFile)


def test_a_header_that_claims_too_much_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (tmp_path / "adapter.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "adapter.safetensors" in refusal(lambda: veneer.load(llama(), tmp_path), BadFile)


def test_other_safetensors_are_no_adapter(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(3)}, tmp_path / "adapter.safetensors")
    assert "not a veneer adapter" in refusal(lambda: veneer.load(llama(), tmp_path), BadFile)


def test_missing_folders_and_files_are_named(tmp_path: Path) -> None:
    assert "no such folder" in refusal(lambda: veneer.load(llama(), tmp_path / "none"), BadFile)
    assert "adapter.safetensors" in refusal(lambda: veneer.load(llama(), tmp_path), BadFile)


def test_a_file_without_one_of_its_tensors_is_refused(folder: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = folder / "adapter.safetensors"
    with safe_open(str(path), "pt") as f:
        header, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    gone = sorted(tensors)[0]
    save_file({k: t for k, t in tensors.items() if k != gone}, path, metadata=header)
    said = refusal(lambda: veneer.load(llama(), folder), BadFile)
    assert gone.rpartition("/")[2] in said and gone.split("/")[1] in said
    save_file({**tensors, gone: tensors[gone][:1]}, path, metadata=header)
    said = refusal(lambda: veneer.load(llama(), folder), BadFile)
    assert gone.split("/")[1] in said and str(list(tensors[gone].shape)) in said


@pytest.mark.parametrize("where", ["safetensors.torch.save_file", "os.replace", "os.fsync"])
def test_a_full_disk_leaves_the_old_adapter_intact(folder: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    old = {p.name: p.read_bytes() for p in folder.iterdir()}
    tuned = stirred(llama(), size=0.7)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(where, full)
    said = refusal(lambda: tuned.save(folder))
    assert "No space left" in said and "unchanged" in said
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == old
    veneer.load(llama(), folder)


@pytest.mark.skipif(os.name != "posix", reason="permissions differ")
def test_a_folder_that_is_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    said = refusal(lambda: stirred(llama()).save(tmp_path / "taken"))
    assert "Could not write" in said and "taken" in said


def test_another_base_is_refused_with_site_and_shapes(folder: Path) -> None:
    said = refusal(lambda: veneer.load(llama(hidden_size=32, intermediate_size=32), folder), Mismatch)
    assert "model.layers.0.self_attn.q_proj" in said and "[16, 16]" in said and "[32, 32]" in said
    said = refusal(lambda: veneer.load(SUBJECTS["bert"].build(), folder), Mismatch)
    assert "no site 'model.layers.0.self_attn.q_proj'" in said
    said = refusal(lambda: veneer.load(llama(depth=1), folder), Mismatch)
    assert "model.layers.1.self_attn.q_proj" in said


def test_a_failed_load_leaves_the_model_as_it_was(folder: Path) -> None:
    model = llama(depth=1)
    before = logits(model, input_ids=IDS)
    refusal(lambda: veneer.load(model, folder), Mismatch)
    assert torch.equal(logits(model, input_ids=IDS), before)
    refusal(lambda: veneer.of(model))
    assert all(p.requires_grad for p in model.parameters())


def test_a_base_that_differs_elsewhere_is_loaded_with_a_warning(folder: Path) -> None:
    with pytest.warns(UserWarning, match="every adapted layer fits"):
        veneer.load(llama(intermediate_size=48), folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        veneer.load(llama(), folder)


def test_what_is_shared_by_all_layers_fits_another_depth(tmp_path: Path) -> None:
    spec = "wegeft(r=2, targets='attn.q attn.v')"
    tuned = stirred(llama(), spec)
    tuned.save(tmp_path)
    with pytest.warns(UserWarning):
        deeper = veneer.load(llama(depth=3), tmp_path)
    assert len(deeper.sites()) == 6
    for key, p in {k.rpartition("/")[2]: p for k, p in tuned.named_parameters()}.items():
        assert any(torch.equal(p, q) for k, q in deeper.named_parameters() if k.endswith(key))


def test_the_backbone_of_a_trained_classifier_takes_its_adapter(tmp_path: Path) -> None:
    tuned = stirred(SUBJECTS["bert"].build(), LORA, head=False)
    tuned.save(tmp_path)
    backbone = copy.deepcopy(tuned.detach()).bert  # type: ignore[union-attr]
    loaded = veneer.load(backbone, tmp_path)  # type: ignore[arg-type]
    assert len(loaded.sites()) == 4


def test_training_state_is_the_adapters_own(seed: int) -> None:
    tuned = stirred(llama())
    groups = tuned.param_groups(1e-3, weight_decay=0.1)
    assert sum(len(g["params"]) for g in groups) == len(tuned.parameters())
    assert output(tuned.model, {"input_ids": IDS}).requires_grad
    tuned.begin(total_steps=3)
    tuned.before_step()
    tuned.after_step()
    assert tuned.loss_terms() == {}


@pytest.mark.parametrize("spec", ["vpt(length=2) + lora(r=2)", "lora(r=2) + vpt(length=2)", "full"])
def test_rows_through_a_block_and_the_layers_inside_it(spec: str) -> None:
    """Where a block or an owner of parameters runs once a group of rows, the layers inside it must see that group."""
    vit = SUBJECTS["vit"]
    model = vit.build()
    tuned = stirred(model, spec, "a", head=False)
    stirred(model, "vpt(length=3) + ssf", "b", head=False)
    names = ["a", "b", None, "a"]
    alone = []
    with torch.no_grad():
        for row, name in enumerate(names):
            if name is None:
                with tuned.disabled():
                    alone.append(vit.answers(model)[row])
            else:
                alone.append(vit.answers(tuned.activate(name).model)[row])
        together = vit.answers(tuned.activate(per_row=names).model)
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-9, atol=1e-9)
