"""Loss terms on activations and on logits against the authors' numbers, and their laws on tiny models: DEFT, ADA-DEFT, BA-LoRA."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_golden import HOME, Case
from tiny import SUBJECTS, Subject, bert, dtype_of, loss, spread, t5
from torch import Tensor, nn

import veneer
from veneer import registry
from veneer.errors import BadValue, NoMatch, Unsupported
from veneer.kernels.smooth_density import reference, smooth_density
from veneer.maths.density import counted, smooth
from veneer.maths.logits import correlation, direction_gap, divergence, entropy, leading_energy, leading_share, singular_values
from veneer.site import Site
from veneer.strategies.activations import activations
from veneer.strategies.density import close, densities, gates, thinned
from veneer.strategies.output_regularisers import OutputRegularisers, progress_factors, token_rows
from veneer.tuned import Tuned


def attached(
    spec: str, family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float64, **facts: Any
) -> tuple[Subject, Any, Tuned]:
    subject = SUBJECTS[family]
    model = subject.build(dtype, **facts)
    return subject, model, veneer.attach(model, spec, seed=seed, head=False)


def stirred(tuned: Tuned, seed: int, size: float = 0.2) -> None:
    for p in tuned.parameters():
        p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p), alpha=size)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def steps(subject: Subject, tuned: Tuned, n: int, seed: int, rate: float = 1e-2, total: int = 20) -> list[Tensor]:
    """Tensors after n plain Adam steps."""
    optimiser = torch.optim.Adam(tuned.param_groups(rate))
    tuned.begin(total)
    tuned.model.train()
    for i in range(n):
        optimiser.zero_grad()
        value = loss(tuned.model, subject.batch(seed + i, dtype_of(tuned.model)))
        sum([value, *tuned.loss_terms().values()]).backward()  # type: ignore[union-attr, arg-type]
        tuned.before_step()
        optimiser.step()
        tuned.after_step()
    return [p.detach().clone() for p in tuned.parameters()]


# -- density: bare activations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1, 2])
def test_deft_density(index: int) -> None:
    case = Case("deft", index)
    hs = [case[f"h{i}"].clone().requires_grad_() for i in range(case.hyper["layers"])]
    D = torch.stack([smooth(h, case.hyper["eps"]) for h in hs], 1)
    case.agree("score.soft_density", D)
    case.agree("loss", D.mean().reshape(1))
    for i, grad in enumerate(torch.autograd.grad(D.mean(), hs)):
        case.agree(f"grad.h{i}", grad)
    exact = torch.stack([counted(h.float()) for h in hs], 1)
    case.agree("score.density", exact.to(case["score.density"].dtype))
    case.agree("out.density_pct", (100 * exact.float().mean(0).mean()).reshape(1))  # the authors' means are float32, not all digits hold
    assert float(case["out.density_pct"]) == pytest.approx(100 * float(exact.mean(0).mean()), rel=1e-7)


def test_smooth_density_between_the_count_and_the_square(seed: int) -> None:
    h = torch.randn(3, 5, 7, dtype=torch.float64).relu()
    torch.testing.assert_close(smooth(h, 1e-30), counted(h), rtol=0, atol=1e-12)
    torch.testing.assert_close(1e12 * smooth(h, 1e12), h.square().mean((1, 2)), rtol=1e-9, atol=0)
    assert not smooth(torch.zeros(2, 3, 4), 1e-7).any() and bool((smooth(h, 1e-7) < 1).all())
    for eps in (0.05, 20.0):  # the slope is largest at √(eps / 3)
        x = torch.linspace(1e-3, 20, 200_000, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(smooth(x[None, :, None], eps).sum(), x)
        assert math.isclose(float(x.detach()[slope.argmax()]), math.sqrt(eps / 3), rel_tol=2e-3)


def test_smooth_density_is_its_reference_and_keeps_only_h(seed: int) -> None:
    h, w = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True), torch.rand(3, 4, dtype=torch.float64)
    torch.testing.assert_close(smooth_density(h, w, 0.3), reference(h, w, 0.3), rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda h: smooth_density(h, w, 0.3), (h,))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        smooth_density(h, w, 0.3)
    assert [t.data_ptr() for t in kept if t.numel() >= h.numel()] == [h.data_ptr()]
    half = (1e-4 * torch.ones(1, 2, 3)).half().requires_grad_()  # its square is no number of half precision
    D = smooth(half, 1e-8)
    assert D.dtype == torch.float32 and abs(float(D.detach()) - 0.5) < 0.01
    (grad,) = torch.autograd.grad(D.sum(), half)
    assert grad.dtype == torch.float16 and bool((grad > 0).all())


def test_padding_does_not_count_unless_asked(seed: int) -> None:
    h, real = torch.randn(2, 4, 5, dtype=torch.float64), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    for measure in (lambda h, real=None: smooth(h, 0.1, real), lambda h, real=None: counted(h, 0.7, real)):
        bare = torch.cat([measure(h[:1]), measure(h[1:, :2])])
        for laid in (h, h.flatten(0, 1), h.transpose(0, 1)):  # samples first, one row of tokens, tokens first
            torch.testing.assert_close(measure(laid, real), bare, rtol=0, atol=1e-12)
        assert torch.equal(measure(h, real[:, :3]), measure(h))
        assert not measure(h, torch.zeros_like(real)).any()


# -- density: models --------------------------------------------------------------------------------------------


def by_hand(subject: Subject, model: Any, names: list[str], eps: float, seed: int, padding: bool) -> Tensor:
    """The density loss from activations taken with plain hooks."""
    seen: list[Tensor] = []
    undo = [model.get_submodule(n).register_forward_hook(lambda m, a, y: seen.append(y)) for n in names]
    batch = subject.batch(seed, dtype_of(model))
    with torch.no_grad():
        loss(model, batch)
    for handle in undo:
        handle.remove()
    mask = batch.get("attention_mask", torch.ones(seen[0].shape[:2]))
    ratios = [(h**2 / (h**2 + eps)).mean(-1) for h in seen]
    return torch.stack([r.mean() if padding else ((r * mask).sum(1) / mask.sum(1)).mean() for r in ratios]).mean()


WHERE = {"llama": "mlp.act_fn", "bert": "intermediate.intermediate_act_fn", "vit": "mlp.activation_fn", "gpt2": "mlp.act"}


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("family", WHERE)
def test_deft_adds_the_mean_over_layers(family: str, padding: bool, seed: int) -> None:
    subject, model, tuned = attached(f"lora(r=2) + deft(lam=3.0, eps=0.05, padding={padding})", family)
    names = [a.module for a in activations(model)]
    assert len(names) == 2 and all(n.endswith(WHERE[family]) for n in names)
    tuned.begin(5)
    stirred(tuned, seed)
    loss(model.train(), subject.batch(seed))
    (term,) = tuned.loss_terms().values()
    torch.testing.assert_close(term.detach(), 3 * by_hand(subject, model, names, 0.05, seed, padding), rtol=1e-12, atol=0)
    assert all(g is not None for g in torch.autograd.grad(term, tuned.parameters()[:2], allow_unused=True))
    assert tuned.loss_terms() == {}  # a pass is counted once


def test_deft_adds_both_stacks_of_an_encoder_decoder(seed: int) -> None:
    model: Any = spread(t5().double()).eval()
    tuned = veneer.attach(model, "lora(r=2) + deft(eps=0.05)", head=False)
    tuned.begin(5)
    ids = torch.randint(2, 48, (3, 6))
    mask, after = torch.ones_like(ids), torch.ones(3, 4, dtype=torch.long)
    mask[1, 4:], after[2, 3:] = 0, 0
    model.train()(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :4], decoder_attention_mask=after)
    (term,) = tuned.loss_terms().values()
    means = []
    for side, real in (("encoder", mask), ("decoder", after)):
        seen: list[Tensor] = []
        for block in getattr(model, side).block:
            block.layer[-1].DenseReluDense.act.register_forward_hook(lambda m, a, y, seen=seen: seen.append(y))
        model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :4], decoder_attention_mask=after)
        means.append(torch.stack([smooth(h, 0.05, real).mean() for h in seen]).mean())
        assert len(seen) == 2
    torch.testing.assert_close(term, sum(means), rtol=1e-12, atol=0)
    found = densities(model, [{"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :4]}])
    assert sorted(found.sides) == ["decoder", "encoder"] and all(0 < value < 70 for value in found.sides.values())


@pytest.mark.parametrize("spec", ["lora(r=2) + deft(lam=0)", "lora(r=2) + ba-lora(l1=0, l2=0, l3=0)"])
def test_weights_of_zero_are_the_plain_method_bit_for_bit(spec: str, seed: int) -> None:
    subject, model, tuned = attached(spec, seed=seed)
    plain = attached("lora(r=2)", seed=seed)[2]
    for a, b in zip(steps(subject, tuned, 3, seed), steps(subject, plain, 3, seed)):
        assert torch.equal(a, b)
    assert not hooks(model) and tuned.summary().trained == plain.summary().trained


@pytest.mark.parametrize("spec", ["lora(r=2) + deft", "lora(r=2) + ada-deft", "lora(r=2) + ba-lora"])
def test_nothing_stays_behind(spec: str, seed: int) -> None:
    """No graph after the terms are taken, none from evaluation; hooks go with the adapter, at once; other adapters are not watched."""
    subject, model, tuned = attached(spec, seed=seed)
    before = hooks(model)
    tuned.begin(5)
    tuned.begin(5)
    held = hooks(model)
    assert held == before + (1 if "ba-" in spec else 3)
    (strategy,) = tuned.adapters["default"].strategies
    box: Any = getattr(strategy, "watch", None) or getattr(strategy, "last", None)

    def kept() -> Any:
        return box.found if hasattr(box, "found") else box.kept

    batch = subject.batch(seed)
    loss(model.eval(), batch)
    assert not kept()
    with torch.no_grad():
        loss(model.train(), batch)
    with tuned.disabled():
        loss(model, batch)
    assert not kept()
    value = loss(model, batch)
    assert kept()
    again = copy.deepcopy(model)  # a model of its own, with a strategy of its own
    before_copy = kept()
    loss(again, batch)
    assert kept() is before_copy and veneer.of(again).loss_terms() and kept() is before_copy
    veneer.of(again).detach()
    assert not hooks(again)
    sum([value, *tuned.loss_terms().values()]).backward()  # type: ignore[union-attr, arg-type]
    assert not kept()
    loss(model, batch)
    assert kept()
    tuned.after_step()
    assert not kept()
    veneer.attach(model, "ssf", "other", head=False)
    loss(model, batch)
    assert not kept()
    del strategy
    tuned.remove("default")
    assert hooks(model) == before
    tuned.detach()
    assert not hooks(model)


@pytest.mark.parametrize("spec", ["lora(r=2) + deft(eps=0.05)", "lora(r=2) + deft(eps=0.05) + ba-lora(schedule='constant')"])
def test_checkpointed_blocks_and_compiled_models_have_the_same_terms(spec: str, seed: int) -> None:
    def grads(how: str) -> list[Tensor]:
        subject, model, tuned = attached(spec, seed=seed)
        stirred(tuned, seed)
        tuned.begin(5)
        model.train()
        if how == "checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        run = torch.compile(model, backend="eager") if how == "compiled" else model
        value = loss(run, subject.batch(seed))
        terms = tuned.loss_terms()
        assert "density" in terms and ("ba-" not in spec or len(terms) == 4)
        sum([value, *terms.values()]).backward()  # type: ignore[union-attr, arg-type]
        assert tuned.loss_terms() == {}
        return [p.grad for p in tuned.parameters() if p.grad is not None]

    plain = grads("plain")
    for how in ("checkpointed", "compiled"):
        for a, b in zip(plain, grads(how), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_reentrant_checkpoints_are_refused(seed: int) -> None:
    subject, model, tuned = attached("lora(r=2) + deft")
    tuned.begin(5)
    model.train().gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    loss(model, subject.batch(seed))
    with pytest.raises(Unsupported, match="use_reentrant=False"):
        tuned.loss_terms()


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()


def test_where_activations_are(seed: int) -> None:
    found = activations(SUBJECTS["encoder"].build())  # a function there: what the last projection reads
    assert [(a.module, a.before) for a in found] == [("layers.0.linear2", True), ("layers.1.linear2", True)]
    model: Any = SUBJECTS["llama"].build()
    for block in model.model.layers:
        block.mlp.act_fn = Squared()
    with pytest.raises(Unsupported, match="gated and its activation is no module"):
        activations(model)
    names = ["model.layers.0.mlp.act_fn", "model.layers.1.mlp.act_fn"]
    assert [a.module for a in activations(model, "act_fn")] == names
    assert [a.module for a in activations(model, rf"model\..*1.*act_fn {names[1]}")] == names[1:]
    with pytest.raises(NoMatch, match="no module is called 'act_nf'"):
        activations(model, "act_nf")
    _, _, tuned = attached("lora(r=2) + deft(modules='nothing')")
    with pytest.raises(NoMatch, match="no module is called 'nothing'"):
        tuned.begin()
    for spec in ("lora(targets='conv1') + deft", "lora(targets='conv1') + ada-deft"):
        with pytest.raises(Unsupported, match="no feed-forward network"):
            attached(spec, "convnet")[2].begin()
    # A bottleneck adapter's own activation is none of them.
    model = SUBJECTS["bert"].build()
    before = activations(model)
    veneer.attach(model, "bottleneck-adapter(targets='mlp') + lora(targets='mlp.down')", head=False)
    assert activations(model) == before


def relu_bert(seed: int, act: str = "relu") -> Any:
    torch.manual_seed(seed)
    return spread(bert(hidden_act=act), seed).eval()


def test_densities_count_what_is_not_zero(seed: int) -> None:
    subject = SUBJECTS["bert"]
    batches = [subject.batch(seed + i, torch.float32) for i in range(2)]
    relu = densities(relu_bert(seed), batches)
    assert len(relu.layers) == 2 and 20 < relu.mean < 80 and relu.sides == {"": pytest.approx(relu.mean)}
    assert densities(relu_bert(seed, "gelu"), batches).mean > 99
    silu = relu_bert(seed, "silu")
    assert densities(silu, batches).mean == pytest.approx(100) and densities(silu, batches, threshold=0.05).mean < 99
    seen: list[Tensor] = []
    model = relu_bert(seed)
    model.bert.encoder.layer[0].intermediate.register_forward_hook(lambda m, a, y: seen.append(y))
    found = densities(model.train(), batches, padding=True)
    assert model.training and found.layers[next(iter(found.layers))] == pytest.approx(
        100 * sum(float((h != 0).double().mean()) for h in seen) / 2
    )


@pytest.mark.parametrize("method", ["lora(r=4, targets='attn.* mlp.*')", "bottleneck-adapter(reduction=2)"])
def test_deft_makes_activations_sparser(method: str, seed: int) -> None:
    found = []
    for lam in (0.0, 10.0):
        model = relu_bert(seed)
        tuned = veneer.attach(model, f"{method} + deft(lam={lam}, eps=0.01)", seed=seed)
        steps(SUBJECTS["bert"], tuned, 30, seed)
        found.append(densities(model, [SUBJECTS["bert"].batch(seed, torch.float32)]).mean)
    assert found[1] < 0.8 * found[0], found


def test_the_curve_of_accuracy_and_density_is_a_table() -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "density.py"
    spec = importlib.util.spec_from_file_location("density_curve", path)
    assert spec is not None and spec.loader is not None
    curve: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(curve)
    rows = curve.curve([0.0, 1.0], "lora(r=2)", 0.01, 1, 2)
    assert [lam for lam, _, _ in rows] == [0, 1] and all(len(layers) == 4 for _, _, layers in rows)
    lines = curve.table(rows).splitlines()
    assert len(lines) == 4 and "| 0.0 |" in lines[2]


def test_deft_refusals() -> None:
    for bad in ({"lam": -1}, {"eps": 0}, {"eps": -1.0}):
        for slug in ("deft", "ada-deft"):
            with pytest.raises(BadValue, match="out of range"):
                registry.method(slug, **bad)
    with pytest.raises(NoMatch, match="trains nothing by itself"):
        attached("deft")
    with pytest.raises(BadValue, match=r"mlp.down, not on the attn.q"):
        attached("lora + ada-deft(targets='attn.q')")


# -- gated density ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "encoder"])
def test_ada_deft_gates_whole_networks(family: str, seed: int) -> None:
    """Exactly the base at the start; then lam · mean of a · D + mu · mean of a; a closed gate is a network that is not there."""
    subject, model, tuned = attached("lora(r=2) + ada-deft(lam=2.0, mu=0.5, eps=0.05)", family)
    plain = subject.build()
    assert torch.equal(subject.answers(model), attached("lora(r=2)", family)[0].answers(attached("lora(r=2)", family)[1]))
    assert all(float(a.detach()) == 1 for a in gates(tuned).values()) and len(gates(tuned)) == 2
    tuned.begin(5)
    stirred(tuned, seed, 0.5)
    a = torch.stack(list(gates(tuned).values())).detach()
    names = [one.module for one in activations(model)]
    loss(model.train(), subject.batch(seed))
    terms = tuned.loss_terms()
    torch.testing.assert_close(terms["gates"].detach(), 0.5 * a.mean())
    (strategy,) = tuned.adapters["default"].strategies
    loss(model, subject.batch(seed))
    found = strategy.by_layer()  # type: ignore[attr-defined]
    D = torch.stack([found[n] for n in names])
    torch.testing.assert_close(terms["density"], 2 * (a * D).mean())
    model.eval()
    shut = list(gates(tuned))[:1]
    tuned.adapters["default"].parts[[p.site.module for p in tuned.adapters["default"].parts].index(shut[0])].tensors()["theta"].data.fill_(
        -9
    )
    assert close(tuned, 0.05) == shut and float(gates(tuned)[shut[0]].detach()) == 0
    down: Any = plain.get_submodule(shut[0])
    down.weight.data.zero_()
    down.bias.data.zero_() if down.bias is not None else None
    other = veneer.attach(plain, "lora(r=2) + ada-deft", head=False)
    for p, q in zip(other.parameters(), tuned.parameters(), strict=True):
        p.data.copy_(q.data if q.isfinite().all() else torch.full_like(q, 3.0))
    expected = subject.answers(plain, seed)
    torch.testing.assert_close(subject.answers(model, seed), expected, rtol=0, atol=1e-10)
    before = sum(p.numel() for p in model.parameters())
    thin = thinned(tuned, 0.05)
    torch.testing.assert_close(subject.answers(thin, seed), expected, rtol=0, atol=1e-10)
    assert thin.get_submodule(shut[0]).weight.numel() == 16 and sum(p.numel() for p in thin.parameters()) < before - 900


def test_ada_deft_closes_gates_that_cost_more_than_they_give(seed: int) -> None:
    model = relu_bert(seed)
    tuned = veneer.attach(model, "lora(r=2) + ada-deft(lam=0, mu=20.0)", seed=seed)
    steps(SUBJECTS["bert"], tuned, 60, seed, 2e-2)
    assert max(float(a.detach()) for a in gates(tuned).values()) < 0.1
    assert registry.method("ada-deft").lr_ratios() == {"theta": 10.0}


# -- logits: bare -----------------------------------------------------------------------------------------------


def regularisers(**hyper: Any) -> OutputRegularisers:
    found = registry.method("ba-lora", schedule="constant", **hyper).strategy()
    assert isinstance(found, OutputRegularisers)
    return found


@pytest.mark.parametrize("index", range(5))
def test_ba_lora_losses(index: int) -> None:
    case = Case("ba-lora", index)
    hyper = case.hyper
    l1, l2, l3 = hyper["lambda"]
    extra = {"T": hyper["T"]} if "T" in hyper else {}
    extra |= {"top_k": hyper["topK"]} if "topK" in hyper else {}
    strategy = regularisers(version=hyper["version"], k=hyper["k"], **extra)
    assert strategy.how.numbers(hyper["task"]) == (l1, l2, l3, hyper["k"])
    student = case["z_ft"].clone().requires_grad_()
    assert strategy.how.task_of(student.ndim) == hyper["task"]
    pair = case["z_pre"], student
    if "labels" in case:
        pair = tuple(token_rows(Z, case["labels"] != -100, hyper["mask"].startswith("shifted")) for Z in pair)  # type: ignore[assignment]
    terms = strategy.terms(hyper["task"], *pair, hyper["k"], ["consistency", "diversity", "svd"])
    for name, value in terms.items():
        if index == 1 and name == "diversity":  # the authors' log(p + 1e-10): not the entropy, by V · 1e-10
            value = value + student.shape[-1] * 1e-10
        case.agree(f"loss.{name}", value.reshape(1))
    whole = l1 * terms["consistency"] + l2 * terms["diversity"] + l3 * terms["svd"]
    case.agree("loss", whole.reshape(1))
    (grad,) = torch.autograd.grad(whole, student)
    if "grad.z_ft" in case:
        case.agree("grad.z_ft", grad)


def test_logit_measures_and_their_bounds(seed: int) -> None:
    Z, other = 3 * torch.randn(2, 7, 11, dtype=torch.float64)
    for same in (divergence(Z, Z, 2.0), direction_gap(Z, Z)):
        assert abs(float(same)) < 1e-15
    assert float(divergence(Z, other)) > 0 and float(direction_gap(Z, 5 * Z)) < 1e-15
    assert float(divergence(Z, other)) != pytest.approx(float(divergence(other, Z)))
    assert 0 < float(entropy(Z)) <= math.log(11) and 0 < float(entropy(Z, 4)) <= math.log(4)
    assert torch.equal(entropy(Z, 11), entropy(Z)) and torch.equal(entropy(Z, 50), entropy(Z))
    assert float(entropy(torch.zeros(3, 11))) == pytest.approx(math.log(11))
    assert float(correlation(Z)) > 0 and float(correlation(Z[:, :1])) == 0
    for k in (1, 3, 7):
        assert 0 < float(leading_share(Z, k)) <= 1 + 1e-12 and 0 < float(leading_energy(Z, k)) <= math.sqrt(k)
    assert float(leading_share(Z, 7)) == pytest.approx(1)
    rank_one = torch.outer(Z[:, 0], Z[0])
    assert float(leading_share(rank_one, 1)) == pytest.approx(1) == float(leading_energy(rank_one, 1))


def test_singular_values_three_ways(seed: int) -> None:
    """Values and slopes; the Gram matrix on either side; random directions find what decays within a few per cent."""
    for shape in ((6, 40), (40, 6)):
        Z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        exact, gram = singular_values(Z, 4), singular_values(Z, 4, "gram")
        torch.testing.assert_close(gram, exact, rtol=1e-9, atol=0)
        a, b = (torch.autograd.grad(s.sum(), Z)[0] for s in (exact, gram))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)
    low = (torch.randn(30, 2) @ torch.randn(2, 50)).double().requires_grad_()  # fewer directions than asked for
    (grad,) = torch.autograd.grad(singular_values(low, 5, "gram").sum(), low)
    assert bool(grad.isfinite().all())
    U, V = (torch.linalg.qr(torch.randn(n, 20, dtype=torch.float64))[0] for n in (60, 90))
    Z = ((U * 0.7 ** torch.arange(20)) @ V.T).requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    found = [leading_energy(Z, 5, how, generator) for how in ("exact", "randomised")]
    torch.testing.assert_close(found[1], found[0], rtol=0.02, atol=0)
    a, b = (torch.autograd.grad(value, Z)[0] for value in found)
    assert float((a - b).norm() / a.norm()) < 0.1
    wide = torch.randn(4, 4100)
    assert torch.isfinite(leading_energy(wide, 2)) and float(leading_energy(wide, 4, "gram")) == pytest.approx(
        float(leading_energy(wide, 4, "exact")), rel=1e-4
    )


def test_schedules() -> None:
    assert progress_factors("constant", 0.3) == (1, 1)
    points = [progress_factors("two_phase", p) for p in (0.0, 0.2, 0.225, 0.25, 1.0)]
    assert [grow for _, grow in points] == pytest.approx([0, 0, 0.5, 1, 1])
    assert [decay for decay, _ in points][::4] == pytest.approx([1, 0.1])
    assert progress_factors("linear", 0.5) == (pytest.approx(0.55), 0.5) and progress_factors("quadratic", 0.5)[1] == 0.25


# -- logits: models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_ba_lora_starts_with_no_distance(family: str, version: str, seed: int) -> None:
    """With PiSSA the base answers exactly as before without a copy of it; bounds of the terms; the model's state is left alone."""
    spec = f"lora(r=2, start='pissa') + ba-lora(version='{version}', schedule='constant')"
    subject, model, tuned = attached(spec, family, seed)
    (strategy,) = tuned.adapters["default"].strategies
    assert isinstance(strategy, OutputRegularisers)
    tuned.begin(5)
    model.train()
    modes = [m.training for m in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss(model, subject.batch(seed))
        terms = tuned.loss_terms()
        values = strategy.values
        assert set(terms) == {"consistency", "diversity", "svd"} and abs(float(values["consistency"])) < 1e-12
        assert [m.training for m in model.modules()] == modes
        k, V = strategy.how.numbers("nlg" if family == "llama" else "nlu")[3], 48
        if family == "llama":
            assert -math.log(V if version == "v1" else 20) <= float(values["diversity"]) <= 0
            assert (-1 if version == "v1" else -math.sqrt(k)) <= float(values["svd"]) < 0
        else:
            assert float(values["diversity"]) >= 0 and -1 - 1e-12 <= float(values["svd"]) < 0
        stirred(tuned, seed)
        loss(model, subject.batch(seed))
        sum(tuned.loss_terms().values()).backward()  # type: ignore[union-attr]
    assert float(strategy.values["consistency"]) > 1e-6 and all(p.grad is not None for p in tuned.parameters())
    model.eval()
    before = subject.answers(model, seed)
    torch.testing.assert_close(subject.answers(tuned.merge().model, seed), before, rtol=0, atol=1e-10)


def test_ba_lora_looks_at_the_rows_that_labels_are_predicted_from(seed: int) -> None:
    """One before in causal models; those of the labels in others; all but padding where there are no labels."""
    for family, shift in (("llama", True), ("llama", False)):
        subject, model, tuned = attached(f"lora(r=2) + ba-lora(schedule='constant', shift={shift})", family, seed)
        stirred(tuned, seed)
        tuned.begin(5)
        batch = subject.batch(seed)
        labels = batch["input_ids"].masked_fill(torch.rand(batch["input_ids"].shape) < 0.4, -100)
        labels[:, 3] = batch["input_ids"][:, 3]
        for given, counted_ in (({"labels": labels}, labels != -100), ({}, batch["attention_mask"].bool())):
            model.train()(**batch, **given)
            terms = tuned.loss_terms()
            with torch.no_grad():
                student = model(**batch).logits
                with tuned.disabled():
                    teacher = model(**batch).logits
            rows = [token_rows(Z, counted_, shift) for Z in (teacher, student)]
            assert len(rows[0]) == int((counted_[:, 1:] if shift else counted_).sum())
            torch.testing.assert_close(terms["consistency"].detach(), 0.025 * divergence(*rows, 2.0))
            torch.testing.assert_close(terms["diversity"].detach(), -0.005 * entropy(rows[1], 20))
            torch.testing.assert_close(terms["svd"].detach(), -0.005 * leading_energy(rows[1], 10))
    model = spread(t5().double()).eval()  # a decoder's row at a token stands for that token's label
    tuned = veneer.attach(model, "lora(r=2) + ba-lora(schedule='constant')", head=False)
    tuned.begin(5)
    ids = torch.randint(2, 48, (2, 5))
    Z = model.train()(input_ids=ids, labels=ids).logits
    torch.testing.assert_close(tuned.loss_terms()["svd"], -0.005 * leading_energy(Z.flatten(0, 1), 10))


def test_ba_lora_schedule_resumes_and_adapts(seed: int) -> None:
    subject, model, tuned = attached("lora(r=2) + ba-lora(adaptive=True)", seed=seed)
    stirred(tuned, seed)
    tuned.begin(20)
    (strategy,) = tuned.adapters["default"].strategies
    assert isinstance(strategy, OutputRegularisers)
    loss(model.train(), subject.batch(seed))
    terms = tuned.loss_terms()
    assert set(terms) == {"consistency"}  # the other two wait for a fifth of the steps
    with torch.no_grad(), tuned.disabled():
        batch = subject.batch(seed)
        teacher = token_rows(model(**batch).logits, batch["attention_mask"].bool(), True)
    weight = 0.025 * (0.1 + 0.9 * (1 - entropy(teacher) / math.log(48)))
    torch.testing.assert_close(terms["consistency"].detach(), weight * strategy.values["consistency"])
    for _ in range(5):
        tuned.after_step()
    loss(model, subject.batch(seed))
    assert set(tuned.loss_terms()) == {"consistency", "diversity", "svd"}
    again = attached("lora(r=2) + ba-lora", seed=seed)[2]
    again.load_strategy_state(tuned.strategy_state())
    assert again.adapters["default"].strategies[0].step == 5  # type: ignore[attr-defined]


def test_ba_lora_refusals(seed: int) -> None:
    with pytest.raises(BadValue, match=r"lora\(.*dropout=0.1.*drops out principal directions"):
        attached("lora(r=2, start='pissa', dropout=0.1) + ba-lora")[2].begin(5)
    subject, model, tuned = attached("lora(r=2) + ba-lora")
    loss(model.train(), subject.batch(seed))
    tuned.begin()
    loss(model, subject.batch(seed))
    with pytest.raises(BadValue, match=r"number of optimiser steps.*schedule='constant'"):
        tuned.loss_terms()
    subject, model, tuned = attached("lora(r=2) + ba-lora(schedule='constant')", "bert")
    tuned.begin(5)
    one = {key: value[:1] for key, value in subject.batch(seed).items()}
    loss(model.train(), one)
    with pytest.raises(BadValue, match=r"one sample has no covariance.*l2=0"):
        tuned.loss_terms()
    loss(model, subject.batch(seed))
    with pytest.warns(UserWarning, match="k=5 is more than the 3 singular values"):
        tuned.loss_terms()
    for bad in ({"l1": -1.0}, {"k": 0}, {"T": 0.0}, {"top_k": 0}):
        with pytest.raises(BadValue, match="out of range"):
            registry.method("ba-lora", **bad)


def test_ba_lora_count() -> None:
    """LLaMA-2-7B, rank 128, all seven linear layers of 32 blocks."""
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    lora = registry.method("lora", r=128, start="pissa")
    sizes = [lora.kept((128, inside), (out, 128)) for out, inside in shapes]  # type: ignore[attr-defined]
    assert all(set(p) == {"A0", "B0"} for p in sizes)
    (counted_,) = (c["trainable"] for c in json.loads((HOME / "ba-lora.json").read_text("utf-8"))["counts"])
    assert sum(128 * (out + inside) for out, inside in shapes) * 32 == counted_
    small = lora.init(Site.bare(torch.empty(11008, 4096)), torch.Generator())
    assert small["A"].numel() + small["B"].numel() == 128 * (11008 + 4096)
