"""P-tuning: its prompts against peft's encoder, number by number, and what they are in a model."""

from __future__ import annotations

import pytest
import torch
from tiny import SUBJECTS, WIDTH, loss
from torch import Generator, Tensor

import veneer
import veneer.registry as registry
from veneer.site import Site

AT = Site("input", "", "model", "model", None, 16, 16)


def theirs(encoder: str, p: dict[str, Tensor], h: int, layers: int) -> Tensor:
    """The tokens that peft's prompt encoder makes of the same numbers."""
    from peft import PromptEncoder, PromptEncoderConfig

    made = PromptEncoder(
        PromptEncoderConfig(
            num_virtual_tokens=5,
            token_dim=16,
            num_transformer_submodules=1,
            encoder_reparameterization_type=encoder.upper(),
            encoder_hidden_size=h,
            encoder_num_layers=layers,
            encoder_dropout=0.0,
        )
    ).double()
    names = {"embedding.weight": "E"}
    for n, place in (("1", 0), ("2", 2), ("3", 4)) if encoder == "mlp" else (("2", 0), ("3", 2)):
        names |= {f"mlp_head.{place}.weight": f"W_{n}", f"mlp_head.{place}.bias": f"b_{n}"}
    for l in range(layers if encoder == "lstm" else 0):
        for way, tail in (("f", ""), ("b", "_reverse")):
            parts = {"weight_ih": "ih", "weight_hh": "hh", "bias_ih": "bi", "bias_hh": "bh"}
            names |= {f"lstm_head.{long}_l{l}{tail}": f"{short}_{l}{way}" for long, short in parts.items()}
    state = made.state_dict()
    assert set(names) == set(state) and set(names.values()) == set(p)
    made.load_state_dict({name: p[own] for name, own in names.items()})
    return made(torch.arange(5))


@pytest.mark.parametrize(("encoder", "h", "layers"), [("mlp", 7, 2), ("lstm", 6, 2), ("lstm", 3, 3)])
def test_tokens_are_those_of_the_peer(encoder: str, h: int, layers: int) -> None:
    method = registry.method("p-tuning", num_virtual_tokens=5, encoder=encoder, h=h, layers=layers)
    p = {name: t.double() for name, t in method.init(AT, Generator().manual_seed(3)).items()}
    torch.testing.assert_close(method.tokens(p, AT), theirs(encoder, p, h, layers))  # type: ignore[attr-defined]


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_in_a_model_it_is_prompt_tuning_with_its_tokens(name: str, encoder: str) -> None:
    subject = SUBJECTS[name]
    made = veneer.attach(subject.build(), f"p-tuning(length=3, encoder={encoder})", head=False)
    table = veneer.attach(subject.build(), "prompt-tuning(length=3)", head=False)
    site, method, p = next(iter(made.entries()))
    with torch.no_grad():
        next(iter(table.entries()))[2]["P"].copy_(method.tokens(p, site))  # type: ignore[attr-defined]
    torch.testing.assert_close(subject.answers(made.model), subject.answers(table.model))


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_counts_and_widths(encoder: str) -> None:
    method, D, P = registry.method("p-tuning", encoder=encoder, length=7), WIDTH, 7
    trained = sum(t.numel() for t in method.init(AT, Generator()).values())
    lstm = 2 * (4 * D // 2) * (D + D // 2 + 2) * 2  # both layers read D: the input, then both directions
    assert trained == P * D + (3 * (D * D + D) if encoder == "mlp" else lstm + 2 * (D * D + D))


def test_the_lstm_trains_and_compiles() -> None:
    torch._dynamo.reset()
    tuned = veneer.attach(SUBJECTS["llama"].build(depth=1), "p-tuning(length=3, encoder=lstm, h=5)")
    value = loss(tuned.model.train(), SUBJECTS["llama"].batch())
    expected = torch.autograd.grad(value, tuned.parameters())
    assert all(g.any() for g in expected)
    compiled = torch.compile(tuned.model, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(loss(compiled, SUBJECTS["llama"].batch()), tuned.parameters())  # type: ignore[arg-type]
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)
