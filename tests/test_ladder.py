"""Ladder side-tuning: the definition, written out beside the blocks, and what backward must not do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import SUBJECTS, WIDTH, loss, moved, t5
from torch import Tensor, nn
from torch.nn import functional as F

import veneer
import veneer.registry as registry
from veneer.errors import BadValue
from veneer.maths.passengers import joined, parted
from veneer.tuned import Tuned


def blocks_of(tuned: Tuned) -> list[nn.Module]:
    return [tuned.model.get_submodule(s.module) for s in tuned.sites() if s.kind == "block"]


def stream(tuned: Tuned, name: str) -> list[Tensor]:
    """What enters the first block of the base, and what every block of it gives."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        if not seen:
            seen.append(args[0] if args else kwargs["hidden_states"])
        seen.append(out[0] if isinstance(out, tuple) else out)

    hooks = [b.register_forward_hook(note, with_kwargs=True) for b in blocks_of(tuned)]
    with tuned.disabled():
        SUBJECTS[name].answers(tuned.model)
    for hook in hooks:
        hook.remove()
    return seen


def climbed(tuned: Tuned, h: list[Tensor], heads: int = 0, T: float = 0.1) -> Tensor:
    """W_up LN(g_N) + b_up, as the method's first line says."""

    def norm(g: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
        return F.layer_norm(g, g.shape[-1:], p[f"{name}_w"], p[f"{name}_b"])

    g = torch.empty(0)
    for i, (_, _, p) in enumerate(e for e in tuned.entries() if e[0].kind == "block"):
        g = h[0] @ p["W_in"].T + p["b_in"] if i == 0 else g
        if "alpha" in p:
            mu = torch.sigmoid(p["alpha"] / T)
            g = mu * g + (1 - mu) * (h[i + 1] @ p["W_down"].T + p["b_down"])
            if heads:
                n = norm(g, p, "ln_a")
                q, k, v = ((n @ p[f"W_{m}"].T).unflatten(-1, (heads, -1)).transpose(1, 2) for m in "qkv")
                weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
                g = g + (weights @ v).transpose(1, 2).flatten(2) @ p["W_o"].T
            g = g + F.gelu(norm(g, p, "ln") @ p["W_1"].T + p["b_1"]) @ p["W_2"].T + p["b_2"]
    return norm(g, p, "ln_up") @ p["W_up"].T + p["b_up"]


@pytest.mark.parametrize("T", [1, 2, 5, 16, 17])
@pytest.mark.parametrize(("w", "D"), [(1, 16), (2, 16), (5, 16), (16, 16), (96, 768)])
def test_passengers_come_out_as_they_went_in(T: int, w: int, D: int) -> None:
    h, g = torch.randn(3, T, D, requires_grad=True), torch.randn(3, T, w, requires_grad=True)
    x = joined(h, g)
    assert x.shape[1] == T - (-T * w // D)
    again, side = parted(x, w)
    assert torch.equal(again, h) and torch.equal(side, g)
    assert not again.requires_grad and side.requires_grad


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("bert", "w=4"),
        ("llama", "reduction=4, T=0.5"),
        ("gpt2", "w=3, leave_out=(0,)"),
        ("llama", "w=3, leave_out=(2,)"),
        ("vit", "w=4, heads=2"),
        ("vit", "w=16, output=replace"),
    ],
)
def test_as_its_definition(name: str, spec: str) -> None:
    subject = SUBJECTS[name]
    tuned = moved(veneer.attach(subject.build(depth=3), f"ladder-side-tuning({spec})", head=False))
    h = stream(tuned, name)
    up = climbed(tuned, h, heads=2 * ("heads" in spec), T=0.5 if "T=" in spec else 0.1)
    ended: list[Tensor] = []
    hook = blocks_of(tuned)[-1].register_forward_hook(lambda _, a, out: ended.append(out[0] if isinstance(out, tuple) else out))
    subject.answers(tuned.model)
    hook.remove()
    torch.testing.assert_close(ended[0], up if "replace" in spec else h[-1] + up)


def test_backward_never_enters_the_base() -> None:
    """Nothing inside a block carries a gradient, and nothing of it is saved, whatever is trained."""
    tuned = moved(veneer.attach(SUBJECTS["llama"].build(depth=3), "ladder-side-tuning(w=2)"))
    model, inside = tuned.model.train(), []
    for block in blocks_of(tuned):
        for m in block.modules():
            if isinstance(m, nn.Linear):
                m.register_forward_hook(lambda _, args, out: inside.append(out.requires_grad))
    loss(model, SUBJECTS["llama"].batch()).backward()
    assert inside and not any(inside)
    assert all(p.grad is not None and p.grad.any() for p in tuned.parameters())


def test_what_is_trained_in_the_last_block_beside_it_learns() -> None:
    tuned = moved(veneer.attach(SUBJECTS["llama"].build(), "lora(r=2) + ladder-side-tuning(w=2)"))
    loss(tuned.model.train(), SUBJECTS["llama"].batch()).backward()
    for site, one, p in tuned.entries():
        if one.slug == "lora":
            assert all((t.grad is not None and bool(t.grad.any())) == (site.depth == 1) for t in p.values())


def test_generation_with_a_cache_is_generation_without() -> None:
    model = moved(veneer.attach(SUBJECTS["llama"].build(), "ladder-side-tuning(w=3)")).model.eval()
    ids = torch.tensor([[0, 0, 5, 9], [7, 3, 8, 4]])
    options = {"attention_mask": (ids != 0).long(), "do_sample": False, "max_new_tokens": 4}
    made = [model.generate(ids, use_cache=cached, **options) for cached in (True, False)]  # type: ignore[operator]
    assert torch.equal(*made)


def test_tokens_before_rows() -> None:
    """Layers that take [tokens, batch, width] answer as those that take [batch, tokens, width]."""
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True)
    one = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
    two = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0), 2, enable_nested_tensor=False).double()
    two.load_state_dict(one.state_dict())
    x = torch.randn(3, 5, WIDTH).double()
    a, b = (moved(veneer.attach(m, "ladder-side-tuning(w=4)")).model.eval() for m in (one, two))
    torch.testing.assert_close(a(x), b(x.transpose(0, 1)).transpose(0, 1))


def test_refusals() -> None:
    with pytest.raises(BadValue, match="names 2 of them"):
        veneer.attach(t5(), "ladder-side-tuning")
    with pytest.raises(BadValue, match=f"w=17 is wider than the stream .*; choose w ≤ {WIDTH}"):
        veneer.attach(SUBJECTS["bert"].build(), "ladder-side-tuning(w=17)")
    with pytest.raises(BadValue, match="heads=3 does not divide the width 4"):
        veneer.attach(SUBJECTS["vit"].build(), "ladder-side-tuning(w=4, heads=3)")
    with pytest.raises(BadValue, match="reads tokens, not images"):
        veneer.attach(SUBJECTS["bert"].build(), "ladder-side-tuning(w=4, heads=2)")
    convnet = veneer.attach(SUBJECTS["convnet"].build(), "ladder-side-tuning(w=2)", head=False)
    with pytest.raises(BadValue, match="reads 4 axes"):
        SUBJECTS["convnet"].answers(convnet.model)
    assert registry.method("ladder-side-tuning", task_reduction_factor=16).reduction == 16  # type: ignore[attr-defined]
