"""SPT against its authors' numbers, and against the rule of its paper written out: scores, marks, decisions, counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_golden import Case, DenseCall, site
from tiny import SUBJECTS, loss
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import veneer
import veneer.registry as registry
from veneer import anatomy
from veneer.errors import BadValue, Unsupported
from veneer.maths.sensitivity import Candidate, most_sensitive, within
from veneer.site import Site


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def chance(low: int, high: int) -> int:
    return int(torch.randint(low, high, ()))


def attached(subject: str, spec: str, batches: int = 2, **options: Any) -> veneer.Tuned:
    one = SUBJECTS[subject]
    shown = [one.batch(n) for n in range(batches)]
    return veneer.attach(options.pop("model", None) or one.build(), spec, head=False, batches=shown, loss=loss, **options)


def decided(tuned: veneer.Tuned, name: str | None = None) -> dict[str, str]:
    return {at.name: method.spec for at, method, _ in tuned.entries(name)}


def stir(tuned: veneer.Tuned, size: float = 0.1) -> veneer.Tuned:
    with torch.no_grad():
        for p in tuned.parameters():
            p += size * torch.randn_like(p)
    return tuned


# -- against other code -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["forward", "delta", "fold"])
def test_entries(route: str) -> None:
    case, at = Case("spt", 0), site()
    index, x = case["mask.index"], case["x"].clone().requires_grad_()
    method: Any = registry.method("spt", entries=17, columns=len(index[1].unique()), bias_entries=3)
    v, vb = (case[f"param.{k}"].clone().requires_grad_() for k in ("v", "vb"))
    p = {"v": v, "vb": vb, "bias_indices": case["mask.bias_index"], **method.positions(index[0] * 20 + index[1], 20)}
    method.check_tensors(p, at)
    assert {k: t.shape for k, t in method.init(at, Generator()).items()} == {k: t.shape for k, t in p.items()}
    W_eff, b_eff = method.fold(case["W"], case["b"], p, at)
    case.agree("W_eff", W_eff)
    case.agree("out.b_eff", b_eff)
    call = DenseCall(case["W"], case["b"])
    y = {"forward": lambda: method.forward(call, x, p, at), "delta": lambda: call(x) + method.delta(x, p, at)}.get(
        route, lambda: F.linear(x, W_eff, b_eff)
    )()
    case.agree("y", y)
    y.backward(case["grad_y"])
    for name, tensor in (("x", x), ("v", v), ("vb", vb)):
        case.agree(f"grad.{name}", tensor.grad)  # type: ignore[arg-type]


def vit_b() -> dict[str, tuple[Site, int]]:
    """The sites of ViT-B/16 with the marks that a published decision for 0.4 M parameters comes to, by name."""
    shapes = {"attn.q": (768, 768), "attn.k": (768, 768), "attn.v": (768, 768), "attn.o": (768, 768)}
    shapes |= {"mlp.up": (3072, 768), "mlp.down": (768, 3072)}
    sites = [Site(f"{i}.{role}", "", role, "linear", i, *shape) for i in range(12) for role, shape in shapes.items()]
    attention, feedforward = ([s for s in sites if s.role.startswith(parent)] for parent in ("attn", "mlp"))
    found = {s.name: (s, 1229 + n) for n, s in enumerate(attention[:14])} | {s.name: (s, 3072 + n) for n, s in enumerate(feedforward[:6])}
    rest = [1228] * 19 + [23_789 - 19 * 1228]
    found |= {s.name: (s, n) for s, n in zip(attention[14:], rest)}
    return found | {"cls_token": (Site("cls_token", "", "parameter", "parameter", None, 768, 1), 0)}


def test_the_published_count() -> None:
    sites, states = vit_b(), {}
    for name, (at, marks) in sites.items():
        score = torch.zeros(at.out_features, at.in_features)
        score.view(-1)[torch.randperm(score.numel())[:marks]] = 1 + torch.rand(marks)
        states[name] = {"weight": score}
    method = registry.method("spt", budget=380_909)
    plan = method.settle(states, [at for at, _ in sites.values()])
    trained = {name: sum(t.numel() for t in own[0].init(sites[name][0], Generator()).values() if t.is_floating_point())
               for name, own in plan.items() if own is not None}  # fmt: skip
    structured = {name for name, own in plan.items() if own is not None and own[0].structured}  # type: ignore[attr-defined]
    assert len(structured) == 20 and sum(trained[name] for name in structured) == 356_352
    assert trained["cls_token"] == 768 and sum(trained.values()) == 380_909
    assert sum(n for name, n in trained.items() if name not in structured) == 23_789 + 768


# -- the rule, written out --------------------------------------------------------------------------------------


def by_definition(candidates: Sequence[Candidate], tau: int, only: bool) -> tuple[list[int], int]:
    """Marks of each tensor and numbers trained, when the tau largest scores of all are marked."""
    pool = sorted(((float(s), i) for i, c in enumerate(candidates) if c.least for s in c.score), reverse=True)[:tau]
    marks = [sum(owner == i for _, owner in pool) for i in range(len(candidates))]
    return marks, sum(c.cost if n >= c.least else 0 if only else n for c, n in zip(candidates, marks))


def some(alpha: float) -> list[Candidate]:
    found = [Candidate(torch.rand(5), 5, 0)]
    for _ in range(chance(2, 6)):
        n = chance(3, 40)
        cost = chance(2, 2 * n)
        found.append(Candidate(torch.rand(n) * chance(1, 5), cost, min(n + 1, max(1, math.ceil(cost / alpha)))))
    return found


@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0, 10.0, 1e6])
def test_a_budget_is_met_as_nearly_as_any_tau_does_from_below(alpha: float, only: bool) -> None:
    for _ in range(5):
        candidates = some(alpha)
        total = sum(c.size for c in candidates if c.least)
        sums = {by_definition(candidates, tau, only)[1] for tau in range(total + 1)} - {5}
        if not sums:
            with pytest.raises(BadValue, match="no budget but the 5 that are always trained"):
                within(candidates, 7, only, "SPT")
            continue
        for budget in {*sums, *(chance(min(sums), max(sums) + 1) for _ in range(5))}:
            marks = within(candidates, budget, only, "SPT")
            spent = sum(c.cost if n >= c.least else 0 if only else n for c, n in zip(candidates, marks))
            assert spent == max(s for s in sums if s <= budget)
            assert any(
                all((n >= c.least) == (m >= c.least) and (n >= c.least or only or n == m) for c, n, m in zip(candidates, marks, other))
                for other in (by_definition(candidates, tau, only)[0] for tau in range(1, total + 1))
            )
        for wrong in (min(sums) - 1, max(sums) + 1):
            with pytest.raises(BadValue, match=rf"SPT: {wrong} numbers cannot be trained .* {min(sums)} … {max(sums)}\."):
                within(candidates, wrong, only, "SPT")


def test_marks_are_the_largest_of_all() -> None:
    for _ in range(10):
        candidates = some(3.0)
        total = sum(c.size for c in candidates if c.least)
        tau = chance(1, total + 1)
        assert most_sensitive(candidates, tau, "SPT") == by_definition(candidates, tau, False)[0]
        with pytest.raises(BadValue, match=f"choose tau ≤ {total}"):
            most_sensitive(candidates, total + 1, "SPT")


# -- on models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("subject", "structured_type"), [("bert", "lora"), ("vit", "lora"), ("vit", "adapter"), ("convnet", "lora")])
def test_decisions_are_those_of_the_rule(subject: str, structured_type: str) -> None:
    """Scores from plain autograd, marks by one sort over all, decisions by the two inequalities: the same as attaching comes to."""
    model, r, alpha, beta = SUBJECTS[subject].build(), 2, 6.0, 3.0
    spec = f"spt(tau={chance(40, 200)}, r={r}, alpha={alpha}, beta={beta}, structured_type={structured_type})"
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    method: Any = veneer.parse(spec)
    sites = method.select(anatomy.sites(model))
    tensors = {(at.name, k): getattr(model.get_submodule(at.module), at.parameter if k == "weight" else k, None)
               for at in sites for k in ("weight", "bias")}  # fmt: skip
    tensors = {k: t for k, t in tensors.items() if t is not None}
    scores = dict.fromkeys(tensors, 0)
    for n in range(2):
        found = torch.autograd.grad(loss(model, SUBJECTS[subject].batch(n)), list(tensors.values()))
        scores = {k: scores[k] + g.square() for k, g in zip(tensors, found)}  # type: ignore[misc]
    token = {k for k in scores if k[0].endswith("cls_token")}
    bar = torch.cat([s.flatten() for k, s in scores.items() if k not in token]).sort(descending=True).values[method.tau - 1]
    tuned = attached(subject, spec, model=model)
    assert {n: (p is not None) for n, p in model.named_parameters() if n in before} == dict.fromkeys(before, True)
    assert all(torch.equal(p, before[n][0]) and p.grad is None for n, p in model.named_parameters() if n in before)
    got, total = {at.name: (one, p) for at, one, p in tuned.entries()}, 0
    for at in sites:
        one, p = got.get(at.name, (None, {}))
        for k in ("weight", "bias"):
            if (at.name, k) not in scores:
                continue
            s: Any = scores[at.name, k]
            s = s.reshape(at.out_features, -1)
            out, inside = s.shape
            marks = s >= bar
            c = int(marks.sum())
            if inside > 1:
                wide = at.in_features if at.role == "attn.o" else out
                cost = r * (out + inside) if structured_type == "lora" else r * (out + wide) + r + out
                module = c >= cost / alpha and (structured_type == "lora" or at.kind == "linear")
                assert (one is not None and one.structured) == module, at.name
                total += cost if module else c
                if not module and c:
                    rows, places = p["indices"]
                    assert torch.equal(torch.stack([rows, p["columns"][places]]), marks.nonzero().T), at.name
            else:
                whole = (at.name, k) in token or c >= out / beta
                total += out if whole else c
                wanted = torch.arange(out) if whole else marks.flatten().nonzero().flatten()
                held = p.get("bias_indices", torch.zeros(0)) if k == "bias" else p.get("indices", torch.zeros(1, 0))[0]
                assert held.tolist() == wanted.tolist(), (at.name, k)
    assert total == tuned.summary().trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_alpha_decides_between_entries_and_modules() -> None:
    few = attached("vit", "spt(alpha=1e-6, budget=0.2)")
    assert not any(m.structured for _, m, _ in few.entries()) and few.summary().trained <= 0.2 * few.base_size()  # type: ignore[attr-defined]
    many = attached("vit", "spt(alpha=1e12, r=1, tau=300)")
    matrices = [m for at, m, _ in many.entries() if at.kind == "linear" and (m.structured or m.entries)]  # type: ignore[attr-defined]
    assert matrices and all(m.structured for m in matrices)  # type: ignore[attr-defined]
    only = attached("vit", "spt(alpha=1000, r=1, budget=200, structured_only=True)")
    vectors = [(at, m) for at, m, _ in only.entries() if not m.structured or m.bias_entries]  # type: ignore[attr-defined]
    assert all(m.bias_entries in (0, at.out_features) and m.entries in (0, at.out_features) for at, m in vectors)  # type: ignore[attr-defined]


@pytest.mark.parametrize("budget", [60, 200, 300, 0.05])
def test_no_more_is_trained_than_the_budget(budget: float) -> None:
    tuned = attached("vit", f"spt(budget={budget}, r=1, alpha=5)")
    sites = registry.method("spt").select(anatomy.sites(SUBJECTS["vit"].build()))
    size = sum(s.out_features * s.in_features + s.out_features * (s.kind == "linear") for s in sites if s.kind in ("linear", "parameter"))
    size += sum(2 * s.out_features for s in sites if s.kind == "norm")
    most = budget if budget >= 1 else int(budget * size)
    assert most - 48 <= tuned.summary().trained <= most


def test_a_class_token_is_always_trained() -> None:
    tuned = attached("vit", "spt(budget=20)")
    assert {at.name: m.entries for at, m, _ in tuned.entries()}["vit.embeddings.cls_token"] == 16  # type: ignore[attr-defined]
    with pytest.raises(BadValue, match=r"SPT: 16 numbers cannot be trained in the chosen layers; their legal budgets are 17 … \d+\."):
        attached("vit", "spt(budget=16)")


class Chain(nn.Module):
    """Residual blocks of one layer each."""

    def __init__(self, depth: int = 6, width: int = 16):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + 0.3 * torch.tanh(block(x))
        return x


def distance(teacher: nn.Module) -> Any:
    return lambda model, x: F.mse_loss(model(x), teacher(x).detach())


def test_marks_gather_where_the_task_differs_and_that_beats_lora_everywhere() -> None:
    torch.manual_seed(chance(0, 1000))
    base, x = Chain(), torch.randn(256, 16)
    teacher = Chain()
    teacher.load_state_dict(base.state_dict())
    wanted = chance(1, 5)
    with torch.no_grad():
        teacher.blocks[wanted].weight += 0.5 * torch.randn(16, 3) @ torch.randn(3, 16)  # type: ignore[operator]
        teacher.blocks[wanted].bias += torch.randn(16)  # type: ignore[operator]

    def only(model: Any, x: Tensor) -> Tensor:
        """The distance, hardly felt but at one block."""
        for i, block in enumerate(model.blocks):
            change = torch.tanh(block(x))
            x = x + 0.3 * (change if i == wanted else change.detach() + 0.01 * (change - change.detach()))
        return F.mse_loss(x, teacher(batch).detach())

    ends = {}
    for spec in ("spt(budget=176, r=5, targets='blocks.*')", "lora(r=1, targets='blocks.*')"):
        model = Chain()
        model.load_state_dict(base.state_dict())
        batch = x
        tuned = veneer.attach(model, spec, batches=[x], loss=only)
        if spec.startswith("spt"):
            assert decided(tuned).keys() == {f"blocks.{wanted}"}
        assert tuned.summary().trained <= 192
        optimiser = torch.optim.Adam(tuned.parameters(), 2e-2)
        for _ in range(300):
            optimiser.zero_grad()
            value = distance(teacher)(model, x)
            value.backward()
            optimiser.step()
        ends[spec[:3]] = float(value.detach())
    assert ends["spt"] < 0.7 * ends["lor"], ends


def test_one_tied_weight_is_one_candidate() -> None:
    model = Chain(2)
    model.blocks[1].weight = model.blocks[0].weight
    tuned = veneer.attach(model, "spt(tau=100, alpha=1e-6, targets='blocks.*')", batches=[torch.randn(8, 16)], loss=lambda m, x: m(x).sum())
    at_second = [p for at, _, p in tuned.entries() if at.name == "blocks.1"]
    assert all(set(p) == {"vb", "bias_indices"} for p in at_second)


def test_another_adapter_does_not_change_the_scores() -> None:
    tuned = stir(attached("llama", "spt(budget=200, r=1)"), 0.5)
    again = attached("llama", "spt(budget=200, r=1)", model=tuned.model, name="b")
    assert decided(again, "b") == decided(again, "default") and again.active == ["b"]


@pytest.mark.parametrize("structured_type", ["lora", "adapter"])
def test_files_hold_what_was_decided(structured_type: str, tmp_path: Path) -> None:
    tuned = stir(attached("vit", f"spt(budget=400, r=1, alpha=20, structured_type={structured_type})"))
    kinds = {k for _, _, p in tuned.entries() for k in p}
    assert {"v", "vb", "A" if structured_type == "lora" else "up"} <= kinds
    tuned.save(tmp_path)
    again = veneer.load(SUBJECTS["vit"].build(), tmp_path)  # without data
    assert decided(again) == decided(tuned)
    assert torch.equal(SUBJECTS["vit"].answers(again.model), SUBJECTS["vit"].answers(tuned.model))


def test_decided_over_the_full_base_loaded_over_a_packed_one(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    plain, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(8, 64)
    packed = bnb.nn.Linear4bit(64, 64, True, compute_dtype=torch.float32, quant_type="nf4")
    packed.weight = bnb.nn.Params4bit(plain[0].weight.data.clone(), requires_grad=False, quant_type="nf4")
    packed.bias = plain[0].bias
    model = nn.Sequential(packed.to("cpu")).train()
    with pytest.raises(BadValue, match=r"SPT: starts from gradients .* stored quantised at 0; load the base in 16 or 32 bit"):
        veneer.attach(model, "spt(targets='0')", batches=[x], loss=lambda m, x: m(x).square().mean())
    before = model(x)
    tuned = stir(veneer.attach(plain, "spt(tau=60, targets='0')", batches=[x], loss=lambda m, x: m(x).square().mean()))
    ((at, method, p),) = tuned.entries()
    tuned.save(tmp_path)
    change, shift = method.fold(torch.zeros(64, 64), torch.zeros(64), p, at)
    torch.testing.assert_close(veneer.load(model, tmp_path).model(x), before + F.linear(x, change, shift), rtol=1e-4, atol=1e-4)


# -- the layer --------------------------------------------------------------------------------------------------


def entry_layer(n: int, columns: int, out: int = 64, inside: int = 256) -> tuple[Any, Site, dict[str, Tensor]]:
    at = site("attn.q", out=out, inside=inside)
    chosen = torch.randperm(inside)[:columns]
    cells = torch.cat([torch.arange(columns), torch.randperm(out * columns)[: n - columns] + columns]).unique()
    flat = (cells // columns % out) * inside + chosen[cells % columns]
    own = registry.method("spt").positions(flat.unique(), inside)  # type: ignore[attr-defined]
    n = own["indices"].shape[1]
    return registry.method("spt", entries=n, columns=len(own["columns"])), at, {"v": torch.randn(n, requires_grad=True), **own}


def test_backward_keeps_the_columns_that_entries_meet() -> None:
    method, at, p = entry_layer(60, 12)
    x = torch.randn(3, 50, 256, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.numel() if t.is_floating_point() else 0
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        method.delta(x, p, at)
    assert sum(kept.values()) <= 150 * len(p["columns"]) + len(p["v"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thin_entries_are_the_dense_definition(dtype: torch.dtype) -> None:
    method, at, p = entry_layer(60, 12)
    x, W = torch.randn(5, 7, 256).to(dtype).requires_grad_(), torch.randn(64, 256)
    y = method.forward(DenseCall(W.to(dtype)), x, p, at)
    assert 16 * method.entries <= W.numel() and y.dtype == dtype
    near = {"rtol": 0.05, "atol": 0.3} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(y.float(), F.linear(x.float(), method.weight(W, p, at)), **near)
    y.sum().backward()
    assert x.grad is not None and p["v"].grad is not None and p["v"].grad.dtype == torch.float32


@pytest.mark.parametrize(("structured_type", "role"), [("lora", "attn.q"), ("adapter", "attn.q"), ("adapter", "attn.o")])
def test_modules(structured_type: str, role: str) -> None:
    at, W, b, x = site(role), draw(12, 20), draw(12), draw(4, 3, 20)
    method = registry.method("spt", r=2, structured=True, bias_entries=2, structured_type=structured_type)
    p = {k: t.double() if t.is_floating_point() else t for k, t in method.init(at, Generator()).items()}
    call = DenseCall(W, b)
    torch.testing.assert_close(method.forward(call, x, p, at), F.linear(x, W, b), rtol=0, atol=0)
    p = {k: torch.randn_like(t) if t.is_floating_point() else t for k, t in p.items()}
    shift = torch.zeros(12).double().index_put((p["bias_indices"],), p["vb"])
    if structured_type == "lora":
        expected = F.linear(x, W + p["B"] @ p["A"], b + shift)
        torch.testing.assert_close(F.linear(x, *method.fold(W, b, p, at)), expected)
        L, R = method.low_rank(W, p, at)  # type: ignore[misc]
        torch.testing.assert_close(L @ R, p["B"] @ p["A"])
    else:
        h = F.linear(x, W, b)
        read = x if role == "attn.o" else h
        expected = h + shift + F.linear(F.gelu(F.linear(read, p["down"], p["down_b"])), p["up"], p["up_b"])
        with pytest.raises(Unsupported, match="its adapters are nonlinear"):
            method.fold(W, b, p, at)
        assert sum(p[k].numel() for k in ("down", "down_b", "up", "up_b")) == method.cost(at, 20)  # type: ignore[attr-defined]
    torch.testing.assert_close(method.forward(call, x, p, at), expected)


@pytest.mark.parametrize("structured_type", ["lora", "adapter"])
def test_training_drops(structured_type: str) -> None:
    at, W, x = site("attn.q"), draw(12, 20), draw(400, 3, 20)
    plain = DenseCall(W, training=True)
    for option in ("dropout", "drop_path"):
        method = registry.method("spt", r=2, structured=True, structured_type=structured_type, **{option: 0.3})
        p = {k: draw(*t.shape) for k, t in method.init(at, Generator()).items()}
        full = method.forward(DenseCall(W), x, p, at) - plain(x)
        part = method.forward(plain, x, p, at) - plain(x)
        if option == "dropout":
            assert not torch.allclose(part, full)
            continue
        gone = part.abs().amax((1, 2)) < 1e-12
        assert 0.15 < float(gone.double().mean()) < 0.45
        torch.testing.assert_close(part[~gone], full[~gone] / 0.7)


# -- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("spt(budget=0)", "SPT: budget=0 is out of range; it must be more than 0."),
        ("spt(budget=10.5)", "SPT: budget=10.5 must be a whole number of parameters, or a share below 1."),
        ("spt(budget=100000000)", "SPT: 100000000 numbers cannot be trained in the chosen layers; their legal budgets are 17 … "),
        ("spt(budget=0.0001)", "SPT: 0 numbers cannot be trained in the chosen layers; their legal budgets are 17 … "),
        ("spt(tau=100000)", "SPT: tau=100000 is more than the 4480 entries of the chosen layers; choose tau ≤ 4480."),
        ("spt(structured_type=prompt)", "SPT: structured_type='prompt' is not one of 'lora', 'adapter'."),
    ],
)
def test_refusals(spec: str, said: str) -> None:
    with pytest.raises(BadValue) as refused:
        attached("vit", spec)
    assert str(refused.value).startswith(said) and str(refused.value).endswith(("." if "…" in said else said, "^"))


def test_refuses_to_guess() -> None:
    subject = SUBJECTS["vit"]
    with pytest.raises(BadValue, match=r"SPT starts from data: pass batches"):
        veneer.attach(subject.build(), "spt")
    with pytest.raises(BadValue, match=r"SPT: no gradient reached the chosen layers; give one batch at least"):
        veneer.attach(subject.build(), "spt", batches=[], loss=loss)
    with pytest.raises(BadValue, match=r"SPT: the gradients at vit\S* are not finite"):
        veneer.attach(subject.build(), "spt", batches=[subject.batch()], loss=lambda m, b: loss(m, b) * math.inf)
    with pytest.raises(BadValue, match=r"SPT: stacked matrices cannot each have entries of their own at site"):
        registry.method("spt").check(site("expert.up", "parameter", count=2))
    with pytest.raises(Unsupported, match=r"SPT: what it trains is decided on data"):
        registry.method("spt").init(site(), Generator())


@pytest.mark.parametrize("broken", ["row", "column", "order", "twice", "count", "bias", "float"])
def test_positions_outside_the_weight_are_refused(broken: str) -> None:
    method: Any = registry.method("spt", entries=3, columns=2, bias_entries=2)
    at = site()
    p = {"v": torch.zeros(3), "vb": torch.zeros(2), "bias_indices": torch.tensor([1, 5]), **method.positions(torch.tensor([3, 25, 43]), 20)}
    method.check_tensors(p, at)
    indices, columns = p["indices"].clone(), p["columns"].clone()
    if broken == "row":
        indices[0, -1] = 12
    elif broken == "column":
        columns[-1] = 20
    elif broken == "order":
        indices = indices.flip(1)
    elif broken == "twice":
        indices[:, 1] = indices[:, 0]
    bad = {
        "indices": indices[:, :2] if broken == "count" else indices,
        "columns": columns.float() if broken == "float" else columns,
        "bias_indices": torch.tensor([5, 12]) if broken == "bias" else p["bias_indices"],
    }
    with pytest.raises(BadValue, match="position"):
        method.check_tensors({**p, **bad}, at)


def test_every_decision_can_be_written_down() -> None:
    for spec in decided(attached("vit", "spt(budget=400, r=1, alpha=20)")).values():
        assert veneer.parse(spec).spec == spec
