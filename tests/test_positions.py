"""Learned tokens and text beyond a model's positions: one sentence that says what to change, when it can be known."""

from __future__ import annotations

import pytest
import torch
from tiny import bert, gpt2, llama, t5

import veneer
from veneer.errors import BadValue


def ids(length: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(2, 48, (2, length), generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("make", [bert, gpt2, llama])
@pytest.mark.parametrize("spec", ["prompt-tuning(length=64, start=uniform)", "p-tuning(length=70)", "prefix-tuning(length=64)"])
def test_at_attach(make, spec: str) -> None:
    """Prompts that fill all 64 positions are refused, with the model left as it was; a prefix where it shifts the text."""
    model = make()
    if spec.startswith("prefix") and make is bert:  # whose text stays where it is
        veneer.attach(model, spec, head=False)
        assert model(**ids(64))["logits"].shape[0] == 2
        return
    with pytest.raises(BadValue, match=r"\d+ learned tokens leave no room for text, as the model has 64 positions; choose fewer of them"):
        veneer.attach(model, spec, head=False)
    assert not any("veneer" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("make", [bert, gpt2, llama])
@pytest.mark.parametrize("spec", ["prompt-tuning(length=20, start=uniform)", "prefix-tuning(length=20, shift_positions=True)"])
def test_at_the_first_forward(make, spec: str) -> None:
    if make is bert and spec.startswith("prefix"):
        spec = "dept(length=20, r=2, s=60)"
    model = make()
    veneer.attach(model, spec, head=False)
    assert model(**ids(44))["logits"].shape[0] == 2
    said = r"20 learned tokens and 45 of text are more than the model's 64 positions; cut the text to 44 tokens or at most 19 learned ones"
    with pytest.raises(BadValue, match=said):
        model(**ids(45))


def test_a_text_that_goes_beyond_by_itself() -> None:
    """Turned positions have no end: a text longer than the model says is the caller's own affair, as without a prompt."""
    model = llama()
    veneer.attach(model, "prompt-tuning(length=4, start=uniform)", head=False)
    assert model(**ids(80))["logits"].shape[1] == 80
    table = gpt2()
    veneer.attach(table, "prompt-tuning(length=4, start=uniform)", head=False)
    with pytest.raises(
        BadValue, match=r"4 learned tokens and 80 of text are more than the model's 64 positions; cut the text to 60 tokens[.]"
    ):
        table(**ids(80))


def test_while_generating() -> None:
    """The cache counts: generation stops with the sentence where a table ends."""
    model = gpt2(use_cache=True).eval()
    veneer.attach(model, "prompt-tuning(length=20, start=uniform)", head=False)
    assert model.generate(**ids(40), max_new_tokens=4, pad_token_id=0).shape[1] == 44
    with pytest.raises(BadValue, match="20 learned tokens and 45 of text"):
        model.generate(**ids(40), max_new_tokens=8, pad_token_id=0)


def test_models_without_positions() -> None:
    model = t5()
    veneer.attach(model, "prompt-tuning(length=600, start=uniform)", head=False)
    assert model(**ids(10), decoder_input_ids=ids(3)["input_ids"])["logits"].shape[1] == 3
