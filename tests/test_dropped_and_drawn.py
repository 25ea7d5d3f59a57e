"""AdaMix, AdapterDrop and child-tuning: what their draws do to a step, and what is left of them in evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_golden import FunctionCall, site
from tiny import SUBJECTS, loss, moved
from torch import Generator, Tensor
from torch.nn import functional as F

import veneer
import veneer.registry as registry
from veneer.errors import BadValue, Unsupported
from veneer.method import Method
from veneer.strategies.layer_dropping import lower
from veneer.strategies.unmasking import budgeted
from veneer.tuned import Tuned

BERT = SUBJECTS["bert"]


def step(tuned: Tuned, optimiser: torch.optim.Optimizer) -> None:
    optimiser.zero_grad()
    loss(tuned.model.train(), BERT.batch()).backward()
    tuned.before_step()
    optimiser.step()
    tuned.after_step()


# -- AdaMix -----------------------------------------------------------------------------------------------------


def mixture(share: str) -> tuple[Method, dict[str, Tensor], Tensor]:
    method, at = registry.method("adamix", N=3, m=5, share=share), site("mlp", "branch", 8, 8)
    p = {k: t if k == "pick" else torch.randn(t.shape).double() for k, t in method.init(at, Generator()).items()}
    return method, p, torch.randn(2, 4, 8).double()


@pytest.mark.parametrize("share", ["up", "down", "no"])
def test_adamix_trains_what_is_drawn_and_answers_with_the_mean(share: str) -> None:
    method, p, x = mixture(share)
    counts = (1 if share == "down" else 3, 1 if share == "up" else 3)
    assert [len(p[k]) for k in ("W_down", "b_down", "W_up", "b_up")] == [counts[0]] * 2 + [counts[1]] * 2
    p = {k: t if k == "pick" else t.requires_grad_() for k, t in p.items()}
    at, o = site("mlp", "branch", 8, 8), torch.tanh(x)
    for i in range(counts[0]):
        for j in range(counts[1]):
            p["pick"] = torch.tensor([i, j])
            y = method.forward(FunctionCall(torch.tanh, training=True), x, p, at)
            up = F.gelu(o @ p["W_down"][i].T + p["b_down"][i]) @ p["W_up"][j].T + p["b_up"][j]
            torch.testing.assert_close(y, o + up)
            grads = torch.autograd.grad(y.sum(), [p["W_down"], p["W_up"]])
            assert [g.flatten(1).any(1).nonzero().flatten().tolist() for g in grads] == [[i], [j]]
    mean = {k: t if k == "pick" else t.mean(0, keepdim=True) for k, t in p.items()} | {"pick": torch.tensor([0, 0])}
    merged = method.forward(FunctionCall(torch.tanh, training=True), x, mean, at)
    torch.testing.assert_close(method.forward(FunctionCall(torch.tanh), x, p, at), merged)


def test_adamix_with_one_module_is_a_bottleneck_adapter() -> None:
    one = moved(veneer.attach(BERT.build(), "adamix(N=1, m=5)", head=False))
    other = veneer.attach(BERT.build(), "bottleneck-adapter(m=5, targets=mlp, act=gelu)", head=False)
    with torch.no_grad():
        for (_, _, p), (_, _, q) in zip(one.entries(), other.entries()):
            for name, own in (("down_w", "W_down"), ("down_b", "b_down"), ("up_w", "W_up"), ("up_b", "b_up")):
                q[name].copy_(p[own][0])
    torch.testing.assert_close(BERT.answers(one.model), BERT.answers(other.model))


def test_adamix_draws_every_module_in_time_and_each_layer_for_itself() -> None:
    tuned = veneer.attach(BERT.build(), "adamix(N=3, share=no)", head=False)
    optimiser, seen = torch.optim.SGD(tuned.parameters(), 1e-3), []
    for _ in range(40):
        step(tuned, optimiser)
        seen.append(torch.stack([p["pick"] for _, _, p in tuned.entries()]))
    drawn = torch.stack(seen)  # [steps, layers, 2]
    assert all(set(drawn[:, i, j].tolist()) == {0, 1, 2} for i in range(2) for j in range(2))
    assert bool((drawn[:, 0] != drawn[:, 1]).any())


# -- AdapterDrop ------------------------------------------------------------------------------------------------


def test_adapterdrop_trains_upper_layers_and_evaluation_has_them_all() -> None:
    tuned = moved(veneer.attach(BERT.build(depth=4), "bottleneck-adapter(m=3) + adapterdrop", head=False))
    full, optimiser, numbers = BERT.answers(tuned.model), torch.optim.SGD(tuned.parameters(), 0.0), set()
    tuned.begin(60)
    (strategy,) = tuned.adapters["default"].strategies
    for _ in range(60):
        n = strategy.n  # type: ignore[attr-defined]
        numbers.add(n)
        with lower(tuned, n):
            expected = loss(tuned.model.eval(), BERT.batch())
        optimiser.zero_grad()
        value = loss(tuned.model.train(), BERT.batch())
        torch.testing.assert_close(value, expected)
        value.backward()
        for s, _, p in tuned.entries():
            assert s.depth is not None and all((t.grad is not None) == (s.depth >= n) for t in p.values())
        tuned.before_step(), optimiser.step(), tuned.after_step()
    assert numbers == {0, 1, 2, 3}
    torch.testing.assert_close(BERT.answers(tuned.model.eval()), full)


@pytest.mark.parametrize("spec", ["bottleneck-adapter(m=3)", "lora(r=2)", "ssf"])
def test_layers_left_out_are_as_if_never_adapted(spec: str) -> None:
    tuned = moved(veneer.attach(BERT.build(depth=3), spec, head=False))
    without = spec.replace(")", ", leave_out=(0, 1))") if "(" in spec else f"{spec}(leave_out=(0, 1))"
    upper = veneer.attach(BERT.build(depth=3), without, head=False)
    with torch.no_grad():
        values = {f"{s.name}/{k}": t for s, _, p in tuned.entries() for k, t in p.items()}
        for s, _, p in upper.entries():
            for k, t in p.items():
                t.copy_(values[f"{s.name}/{k}"])
    with lower(tuned, 2):
        torch.testing.assert_close(BERT.answers(tuned.model), BERT.answers(upper.model))
    with lower(tuned, 3), pytest.raises(BadValue, match="choose 0 … 3"), lower(tuned, 4):
        pass


def test_adapterdrop_refusals() -> None:
    for spec, words in (
        ("prefix-tuning(length=2)", "changes no layer's output"),
        ("prompt-tuning(length=2)", "do not lie in several layers"),
        ("ladder-side-tuning(w=2)", "travels from block to block"),
    ):
        tuned = veneer.attach(BERT.build(), f"{spec} + adapterdrop", head=False)
        with pytest.raises(Unsupported, match=words):
            tuned.begin(3)


# -- child-tuning -----------------------------------------------------------------------------------------------


def test_child_tuning_keeps_a_share_of_the_gradient_and_scales_it() -> None:
    tuned = veneer.attach(BERT.build(), "full + child-tuning(p=0.25, seed=5)", head=False)
    model, kept, tensors = tuned.model.train(), [], list(budgeted(tuned, "default").values())
    for _ in range(3):
        model.zero_grad()
        loss(model, BERT.batch()).backward()
        before = [p.grad.clone() for p in tensors if p.grad is not None]
        tuned.before_step()
        after = [p.grad for p in tensors if p.grad is not None]
        masks = [a != 0 for a in after]
        for a, b, m in zip(after, before, masks):
            torch.testing.assert_close(a, torch.where(m, 4 * b, 0.0))
        kept.append(torch.cat([m[b != 0].flatten() for m, b in zip(masks, before)]))
        tuned.after_step()
    assert all(abs(float(k.double().mean()) - 0.25) < 0.03 for k in kept)
    assert 0.02 < float((kept[0] & kept[1]).double().mean()) < 0.11  # a new draw at every step


def test_child_tuning_by_the_data_trains_the_largest_fisher_information() -> None:
    tuned = veneer.attach(BERT.build(), "full + child-tuning(mode=D, p=0.1, samples=2)", head=False)
    model, calls, tensors = tuned.model.train(), iter(range(100)), list(budgeted(tuned, "default").values())
    tuned.begin(5, probe=lambda: loss(model, BERT.batch(next(calls))))
    optimiser = torch.optim.Adam(tuned.parameters(), 1e-3)
    fisher = [torch.zeros_like(p) for p in tensors]
    for i in range(2):
        grads = torch.autograd.grad(loss(model, BERT.batch(i)), tensors, allow_unused=True)
        for F_, g in zip(fisher, grads):
            F_ += 0 if g is None else g.square() / 2
    before = [p.detach().clone() for p in tensors]
    step(tuned, optimiser)
    changed = torch.cat([(p != b).flatten() for p, b in zip(tensors, before)])
    score = torch.cat([f.flatten() for f in fisher])
    (strategy,) = tuned.adapters["default"].strategies
    child = torch.cat([m.flatten() for m in strategy.masks.values()])  # type: ignore[attr-defined]
    assert int(child.sum()) == int(0.1 * len(child)) and bool((child | ~changed).all()) and bool(changed.any())
    assert float(score[child].min()) >= float(score[~child].max()) * (1 - 1e-9)


def test_child_tuning_refusals() -> None:
    for bad in ({"p": 0.0}, {"p": 1.5}, {"mode": "E"}):
        with pytest.raises(BadValue):
            registry.method("child-tuning", **dict[str, Any](bad))
    assert registry.method("child-tuning", reserve_p=0.2).p == 0.2  # type: ignore[attr-defined]
