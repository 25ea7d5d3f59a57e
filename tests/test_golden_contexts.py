"""Context-PEFT: numbers from its authors' code, and the laws and counts of its paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_golden import Case, DenseCall, site
from tiny import SUBJECTS, loss, moved
from torch import Generator, Tensor
from torch.utils.checkpoint import CheckpointError

import veneer
import veneer.registry as registry
from veneer.contexts import by_token, contexts
from veneer.errors import BadValue
from veneer.method import Method
from veneer.site import Site
from veneer.tuned import Tuned

LLAMA = SUBJECTS["llama"]


def method(**hyper: Any) -> Method:
    return registry.method("context-peft", **hyper)


def on_llama(spec: str = "context-peft(r=3)") -> Tuned:
    return moved(veneer.attach(LLAMA.build(), spec))


def some(C: int = 2) -> Tensor:
    return torch.randint(C, (4, 6))


# -- numbers ----------------------------------------------------------------------------------------------------

CASES: list[dict[str, Any]] = [{"r": 3}, {"r": 3, "alpha": 8.0}, {"variant": "bitfit"}, {"variant": "ia3"}]


@pytest.mark.parametrize("index", range(len(CASES)))
def test_published_numbers(index: int) -> None:
    case, p, at = Case("context-peft", index), Case("context-peft", index).params(grad=True), site("attn.k")
    one, call = method(**CASES[index]), DenseCall(case["W"], case["b"])
    with contexts(case["out.context"]):
        y = one.forward(call, case["x"], p, at)
        case.agree("y", y)
        time_first = Site("site", "site", "attn.k", "linear", 0, 12, 20, batch_dim=1)
        case.agree("y", one.forward(call, case["x"].transpose(0, 1), p, time_first).transpose(0, 1))
        case.agree("y", one.forward(call, case["x"].flatten(0, 1), p, at).view_as(y))
    for t, row in zip(case["out.context"].flatten(), range(10)):  # every token with the weight and bias of its own context
        own = method(**CASES[index] | {"C": 1})
        W, b = own.fold(case["W"], case["b"], {k: v[t : t + 1] for k, v in p.items()}, at)
        torch.testing.assert_close(y.flatten(0, 1)[row], DenseCall(W, b)(case["x"].flatten(0, 1)[row]))


def test_rescaled_on_the_input_side() -> None:
    x, c, p = torch.randn(2, 5, 20).double(), torch.randint(3, (2, 5)), {"l": torch.randn(3, 20).double()}
    call, at = DenseCall(torch.randn(12, 20).double(), torch.randn(12).double()), site("mlp.down")
    with contexts(c):
        y = method(variant="ia3", C=3).forward(call, x, p, at)
    torch.testing.assert_close(y, call(x * (1 + p["l"][c])))


def mlp(r: int, variant: str, C: int) -> int:
    """Trained numbers in twelve layers of width 768 with a fused gate and up projection to 6144."""
    sizes = {**dict.fromkeys(("attn.q", "attn.k", "attn.v", "attn.o"), (768, 768)), "mlp.up": (6144, 768), "mlp.down": (768, 3072)}
    layers = [Site(role, role, role, "linear", 0, *size) for role, size in sizes.items()]
    one = method(r=r, variant=variant, C=C)
    return 12 * sum(t.numel() for s in one.select(layers) for t in one.init(s, Generator()).values())


@pytest.mark.parametrize("C", [1, 2])
@pytest.mark.parametrize(
    ("variant", "r", "trained"),
    [("ia3", 1, 55_296), ("bitfit", 1, 119_808), ("lora", 1, 202_752), ("lora", 8, 1_622_016), ("lora", 64, 12_976_128)],
)
def test_counts(variant: str, r: int, trained: int, C: int) -> None:
    assert mlp(r, variant, C) == C * trained


# -- laws -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["lora", "bitfit", "ia3"])
def test_all_tokens_in_one_context_are_one_adapter_and_it_merges(variant: str) -> None:
    spec = f"context-peft(variant={variant}, r=3, alpha=6"
    many, alone = on_llama(f"{spec}, C=3)"), veneer.attach(LLAMA.build(), f"{spec}, C=1, unsaid=None)")
    with torch.no_grad():
        for p, q in zip(many.parameters(), alone.parameters()):
            q.copy_(p[2:])
    answers = LLAMA.answers(alone.model)
    with contexts(torch.full((4, 6), 2)):
        torch.testing.assert_close(LLAMA.answers(many.model), answers)
    torch.testing.assert_close(LLAMA.answers(alone.merge().model), answers)
    assert (answers - LLAMA.answers(LLAMA.build())).abs().max() > 1e-3


def test_one_context_is_lora() -> None:
    alone = on_llama("context-peft(r=3, alpha=6, C=1, targets='attn.q mlp.down')")
    plain = veneer.attach(LLAMA.build(), "lora(r=3, alpha=6, targets='attn.q mlp.down')")
    with torch.no_grad():
        for p, q in zip(alone.parameters(), plain.parameters()):
            q.copy_(p[0])
    torch.testing.assert_close(LLAMA.answers(alone.model), LLAMA.answers(plain.model))


@pytest.mark.parametrize("variant", ["lora", "bitfit", "ia3"])
def test_numbers_of_contexts_are_only_names(variant: str) -> None:
    tuned, c = on_llama(f"context-peft(variant={variant}, r=3)"), some()
    with contexts(c):
        before = LLAMA.answers(tuned.model)
    with torch.no_grad():
        for p in tuned.parameters():
            p.copy_(p.flip(0))
    with contexts(1 - c):
        torch.testing.assert_close(LLAMA.answers(tuned.model), before)
    with contexts(c):
        assert (LLAMA.answers(tuned.model) - before).abs().max() > 1e-4


def test_a_context_that_does_not_occur_gets_no_gradient() -> None:
    tuned = on_llama("context-peft(r=3, C=3)")
    with contexts(2 * some()):
        loss(tuned.model, LLAMA.batch()).backward()
    for p in tuned.parameters():
        assert p.grad is not None and not p.grad[1].any() and p.grad[0].any() and p.grad[2].any()


def test_text_starts_as_the_base_and_stays_what_its_own_context_makes_it() -> None:
    plain = LLAMA.answers(LLAMA.build())
    tuned = veneer.attach(LLAMA.build(), "context-peft(r=3)")
    with contexts(some()):
        torch.testing.assert_close(LLAMA.answers(tuned.model), plain)
    with torch.no_grad():
        for p in tuned.parameters():
            p[1].normal_()
    torch.testing.assert_close(LLAMA.answers(tuned.model), plain)  # nothing said: text alone


def test_generation_with_a_cache_is_generation_without() -> None:
    tuned, ids = on_llama(), torch.tensor([[7, 3, 8, 4], [5, 9, 5, 2]])
    with contexts(by_token(ids, {5: 1})):
        made = tuned.model.eval().generate(ids, max_new_tokens=3, use_cache=True, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    for n in range(4, 7):
        with contexts(torch.cat([by_token(ids, {5: 1}), torch.zeros(2, n - 4, dtype=torch.long)], 1)):
            assert torch.equal(tuned.model(made[:, :n]).logits[:, -1].argmax(-1), made[:, n])


def test_checkpoints_need_the_contexts_in_backward() -> None:
    tuned, c = on_llama(), some()
    model = tuned.model.train()
    with contexts(c):
        expected = torch.autograd.grad(loss(model, LLAMA.batch()), tuned.parameters())
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        found = torch.autograd.grad(loss(model, LLAMA.batch()), tuned.parameters())
        late = loss(model, LLAMA.batch())
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)
    with pytest.raises((CheckpointError, BadValue)):
        late.backward()


def test_compiled_with_contexts() -> None:
    torch._dynamo.reset()
    tuned = on_llama()
    compiled = torch.compile(tuned.model.train(), fullgraph=True, backend="aot_eager")
    for c in (some(), some()):
        with contexts(c):
            torch.testing.assert_close(loss(compiled, LLAMA.batch()), loss(tuned.model, LLAMA.batch()))  # type: ignore[arg-type]


def test_dropout_leaves_out_whole_tokens() -> None:
    x, at = torch.randn(1, 400, 20).double(), site("attn.q")
    one, call = method(r=2, dropout=0.25), DenseCall(torch.randn(12, 20).double(), training=True)
    p = {"A": torch.randn(2, 2, 20).double(), "B": torch.randn(2, 12, 2).double()}
    full = method(r=2).forward(call, x, p, at) - call(x)
    ratio = (one.forward(call, x, p, at) - call(x)) / full
    kept = ratio[0, :, 0] > 0.5
    torch.testing.assert_close(ratio[0], torch.where(kept[:, None], 4 / 3, 0.0).double().expand(-1, 12), rtol=1e-6, atol=1e-6)
    assert 0.5 < kept.double().mean() < 0.95


# -- refusals ---------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    tuned = on_llama()
    for numbers, words in ((some() + 1, "context 2, and C=2"), (torch.zeros(4, 5, dtype=torch.long), "do not fit")):
        with contexts(numbers.clamp(max=2).index_fill(1, torch.tensor([0]), int(numbers.max()))), pytest.raises(BadValue, match=words):
            LLAMA.answers(tuned.model)
    for bad in (-some() - 1, some().float(), some()[0]):
        with pytest.raises(BadValue, match="whole numbers from 0 up"), contexts(bad):
            pass
    with pytest.raises(BadValue, match="was not said"):
        LLAMA.answers(on_llama("context-peft(r=3, unsaid=None)").model)
    with pytest.raises(BadValue, match=r"none of the C=2 contexts; choose 0 … 1"):
        method(unsaid=2)
    tuned = on_llama()
    moved(veneer.attach(tuned.model, "context-peft(r=3)", "b"))
    tuned.activate(per_row=["default", "b", None, "b"])
    with contexts(some()), pytest.raises(BadValue, match="do not fit"):  # never the contexts of other rows
        LLAMA.answers(tuned.model)
