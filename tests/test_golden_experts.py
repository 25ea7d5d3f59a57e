"""Mixtures of experts, shared sparse factors and ranks from spectra: numbers of their published code and the laws of their papers."""

from __future__ import annotations

import copy
import functools
import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_golden import Case, DenseCall, checked, site
from test_quantised import nf4
from tiny import SUBJECTS, loss
from torch import Generator, Tensor
from torch.nn import functional as F

import veneer
from veneer import anatomy, registry
from veneer.errors import BadValue, Unsupported
from veneer.kernels import gated
from veneer.maths import allocation, spectrum
from veneer.maths.experts import balance, distance, gates, redundancy
from veneer.method import Method
from veneer.site import Site
from veneer.strategies.sparsity import cut, prune, shrunk


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def begun(method: Method, at: Site, W: Tensor | None = None, stir: float = 0.0) -> dict[str, Tensor]:
    """First tensors of a site in float64, moved by random numbers."""
    generator = Generator().manual_seed(0)
    p = {k: t.double() for k, t in {**method.init(at, generator), **method.init_shared([at], generator)}.items()}
    if W is not None:
        p = method.init_from_weight(W, None, p, at, generator)
    trained = [k for k in p if k not in method.frozen]
    return {k: t.double() + stir * draw(*t.shape) if k in trained else t.double() for k, t in p.items()}


def attached(spec: Any, family: str = "llama", **options: Any) -> Any:
    tuned = veneer.attach(SUBJECTS[family].build(), spec, head=False, **options)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.15 * torch.randn_like(p))
    return tuned


def llama_sites(layers: int = 32, h: int = 4096, mlp: int = 11008) -> list[Site]:
    roles = {f"attn.{c}": (h, h) for c in "qkvo"} | {"mlp.gate": (mlp, h), "mlp.up": (mlp, h), "mlp.down": (h, mlp)}
    return [
        Site(f"{i}.{role}", f"{i}.{role}", role, "linear", i, *shape, index=i, length=layers)
        for i in range(layers)
        for role, shape in roles.items()
    ]


def trained(method: Method, sites: list[Site]) -> int:
    """Trained parameters from the shapes `init` gives; equal sites are drawn once."""

    @functools.cache
    def one(at: Site) -> int:
        return sum(t.numel() for t in method.init(at, Generator()).values())

    alike = [
        Site("", "", "", "linear", s.index * 4 // s.length, s.out_features, s.in_features, index=s.index, length=s.length) for s in sites
    ]
    return sum(one(at) for at in alike)


class Training(DenseCall):
    """A layer in training that takes notes."""

    def __init__(self, W: Tensor, b: Tensor | None = None) -> None:
        super().__init__(W, b, training=True)
        self.caller = SimpleNamespace(notes={})  # type: ignore[assignment]


# -- the kernel -------------------------------------------------------------------------------------------------


def test_a_gated_term_gives_the_plain_gradients_and_keeps_only_coordinates_and_gates() -> None:
    inputs = [t.requires_grad_() for t in (draw(3, 4, 7), draw(3, 4, 6), draw(3, 4, 2), draw(2, 6), draw(7, 6))]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fast = gated.gated(*inputs)
    assert [t.shape for t in kept] == [t.shape for t in inputs[1:]]
    plain, towards = gated.reference(*inputs), draw(3, 4, 7)
    torch.testing.assert_close(fast, plain)
    for mine, theirs in zip(torch.autograd.grad(fast, inputs, towards), torch.autograd.grad(plain, inputs, towards)):
        torch.testing.assert_close(mine, theirs)
    assert torch.autograd.gradcheck(gated.gated, inputs)


@pytest.mark.parametrize("only", range(5))
def test_a_gated_term_gives_each_gradient_alone(only: int) -> None:
    inputs = [draw(5, 7), draw(5, 6), draw(5, 2), draw(2, 6), draw(7, 6)]
    inputs[only].requires_grad_()
    towards = draw(5, 7)
    mine, theirs = (torch.autograd.grad(f(*inputs), inputs[only], towards)[0] for f in (gated.gated, gated.reference))
    torch.testing.assert_close(mine, theirs)


# -- MoLA -------------------------------------------------------------------------------------------------------


def mola(**options: Any) -> Any:
    return registry.method("mola", **{"N": 5, "K": 2, "r": 3, "alpha": 6, "allocation": "rectangle", **options})


@pytest.mark.parametrize("index", [0, 1])
def test_mola(index: int) -> None:
    case = Case("mola", index)
    method, call, p = mola(N=case.hyper["N"], K=case.hyper["K"]), Training(case["W"], case["b"]), case.params()
    y = method.forward(call, case["x"], p, site())
    case.agree("y", y)
    torch.testing.assert_close(y, case["out.y_official"], rtol=1e-6, atol=1e-6)
    logits = call.caller.notes["router"].flatten(0, -2)
    case.agree("out.router_logits", logits)
    case.agree("out.gates", gates(logits, case.hyper["K"]))
    case.agree("loss", balance(logits, case.hyper["K"])[None])


def routed_one_by_one(p: dict[str, Tensor], W: Tensor, x: Tensor, K: int, s: float) -> Tensor:
    """The definition, a token and an expert at a time."""
    y = x @ W.T
    for t, token in enumerate(x):
        chances = (p["W_r"] @ token).softmax(0)
        best = chances.topk(K)
        for e, weight in zip(best.indices, best.values / best.values.sum()):
            y[t] = y[t] + weight * s * p["B"][e] @ p["A"][e] @ token
    return y


@pytest.mark.parametrize("K", [1, 2, 5])
def test_mola_is_the_sum_over_the_experts_each_token_takes(K: int) -> None:
    method, W, x = mola(K=K), draw(12, 20), draw(9, 20).requires_grad_()
    p = {k: t.requires_grad_() for k, t in begun(method, site(), stir=0.5).items()}
    fast, plain, towards = method.forward(DenseCall(W), x, p, site()), routed_one_by_one(p, W, x, K, 2.0), draw(9, 12)
    torch.testing.assert_close(fast, plain)
    inputs = [x, *p.values()]
    found, expected = (torch.autograd.grad(y, inputs, towards, allow_unused=True) for y in (fast, plain))
    for g, e in zip(found, expected):
        torch.testing.assert_close(g, torch.zeros_like(g) if e is None else e)


def test_mola_starts_as_the_base_and_with_one_expert_is_lora() -> None:
    W, x = draw(12, 20), draw(2, 5, 20)
    assert torch.equal(mola().forward(DenseCall(W), x, begun(mola(), site()), site()), x @ W.T)
    one = mola(N=1, K=1)
    p = begun(one, site(), stir=0.3)
    lora = registry.method("lora", r=3, alpha=6)
    expected = lora.forward(DenseCall(W), x, {"A": p["A"][0], "B": p["B"][0]}, site())
    torch.testing.assert_close(one.forward(DenseCall(W), x, p, site()), expected, rtol=0, atol=1e-12)


def test_mola_does_not_depend_on_the_order_of_its_experts() -> None:
    method, W, x = mola(), draw(12, 20), draw(2, 5, 20)
    p, order = begun(method, site(), stir=0.3), torch.randperm(5)
    y = method.forward(DenseCall(W), x, p, site())
    torch.testing.assert_close(method.forward(DenseCall(W), x, {k: t[order] for k, t in p.items()}, site()), y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gates_sum_to_one_over_exactly_K_experts(dtype: torch.dtype) -> None:
    g = gates(torch.randn(50, 6).to(dtype), 2)
    assert g.dtype == torch.promote_types(dtype, torch.float32)
    assert ((g > 0).sum(-1) == 2).all()
    torch.testing.assert_close(g.sum(-1), torch.ones_like(g[:, 0]))


def test_gradient_reaches_the_router_through_the_gates_only_where_there_is_a_choice() -> None:
    W, x = draw(12, 20), draw(5, 20)
    for K, moves in ((2, True), (1, False)):
        method, call = mola(K=K), Training(W)
        p = {k: t.requires_grad_() for k, t in begun(method, site(), stir=0.3).items()}
        y = method.forward(call, x, p, site())
        g = torch.autograd.grad(y.square().sum(), p["W_r"], retain_graph=True)[0]
        assert (float(g.abs().max()) > 1e-8) == moves
        assert torch.autograd.grad(balance(call.caller.notes["router"], K), p["W_r"])[0].abs().max() > 1e-8


def test_the_router_reads_its_input_without_dropout() -> None:
    method, call, x = mola(dropout=0.5), Training(draw(12, 20)), draw(5, 20)
    p = begun(method, site(), stir=0.3)
    y = method.forward(call, x, p, site())
    torch.testing.assert_close(call.caller.notes["router"], x @ p["W_r"].T)
    assert not torch.equal(y, method.forward(call, x, p, site()))


def test_balance_of_uniform_and_of_one_sided_routers() -> None:
    torch.testing.assert_close(balance(torch.zeros(7, 5).double(), 2), torch.tensor(1.0).double())
    turns = 3 * F.one_hot(torch.arange(20) % 5, 5).double() + 2 * F.one_hot((torch.arange(20) + 1) % 5, 5)
    torch.testing.assert_close(balance(turns, 2), torch.tensor(1.0).double())  # every expert is picked equally often
    one_sided = torch.tensor([[100.0, 0, 0, 0]]).double().expand(6, 4)
    torch.testing.assert_close(balance(one_sided, 1), torch.tensor(4.0).double())


SPEC = "mola(r=2, N=4, allocation=rectangle)"


def by_hand(tuned: Any) -> Tensor:
    """The balance term from its definition: all logits of a block in one matrix."""
    total = torch.zeros((), dtype=torch.float64)
    for depth in (0, 1):
        rows = torch.cat([t.reshape(-1, 4) for at, _, t in tuned.notes("default", "router") if at.depth == depth])
        p = rows.softmax(1)
        c = torch.bincount(p.topk(2).indices.flatten(), minlength=4)
        total = total + 4 * (c / c.sum() * p.mean(0)).sum()
    return total


def test_the_balance_term_is_of_each_block_and_of_the_last_pass() -> None:
    tuned = attached(SPEC)
    tuned.begin()
    assert tuned.loss_terms() == {}
    SUBJECTS["llama"].answers(tuned.model.eval())
    assert tuned.loss_terms() == {}  # routing outside training leaves nothing
    seen = []
    for seed in (0, 1):
        batch = SUBJECTS["llama"].batch(seed)
        loss(tuned.model.train(), batch)
        rows = sum(t[..., 0].numel() for _, _, t in tuned.notes("default", "router"))
        assert rows == 14 * batch["input_ids"].numel()  # padding is routed, and counts
        seen.append(tuned.loss_terms()["balance"])
        torch.testing.assert_close(seen[-1], 0.001 * by_hand(tuned))
    assert not torch.equal(*seen)
    assert attached("mola(r=2, balance=0)").loss_terms() == {}


def test_checkpointing_adds_no_loss_twice() -> None:
    tuned = attached(SPEC.replace(")", ", balance=1.0)"))
    tuned.begin()
    model, batch, found = tuned.model.train(), SUBJECTS["llama"].batch(), []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        runs: list[int] = []
        norm = model.get_submodule("model.layers.0.input_layernorm")
        hook = norm.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        total = loss(model, batch) + tuned.loss_terms()["balance"]
        found.append([total, *torch.autograd.grad(total, tuned.parameters())])
        assert len(runs) == 1 + again
        hook.remove()
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_a_copy_after_a_training_pass_has_its_own_balance() -> None:
    tuned = attached(SPEC)
    tuned.begin()
    batch = SUBJECTS["llama"].batch()
    loss(tuned.model.train(), batch)
    twin = veneer.of(copy.deepcopy(tuned.model))
    twin.begin()
    assert twin.loss_terms() == {}
    loss(twin.model, batch)
    torch.testing.assert_close(twin.loss_terms()["balance"], tuned.loss_terms()["balance"])
    assert all(a is not b for (_, _, a), (_, _, b) in zip(twin.notes("default", "router"), tuned.notes("default", "router")))


def test_mola_counts_of_the_paper() -> None:
    sites = llama_sites()
    for patterns, published in (
        (("5555", "2468", "8642", "8228", "2882"), 105_635_840),
        (("4444", "2356", "6532", "6226", "2662"), 84_508_672),
        (("8888",), 169_017_344),
    ):
        for pattern in patterns:
            assert trained(registry.method("mola", allocation=pattern), sites) == published
            assert trained(registry.method("mola", N=tuple(map(int, pattern))), sites) == published


def test_named_allocations() -> None:
    names = dict(zip(allocation.SHAPES, ("5555", "8642", "2468", "8228", "2882")))
    small = dict(zip(allocation.SHAPES, ("4444", "6532", "2356", "6226", "2662")))
    for mean, known in ((5, names), (4, small)):
        for name, counts in known.items():
            assert registry.method("mola", N=mean, allocation=name).counts == tuple(map(int, counts))
    for mean in range(1, 12):
        for name in allocation.SHAPES:
            counts = allocation.shaped(name, mean)
            assert (sum(counts) == 4 * mean and min(counts) == min(counts[0], 2, mean)) or name == "rectangle"
    assert veneer.parse("mola(allocation=2468)").counts == veneer.parse("mola(allocation='2468')").counts == (2, 4, 6, 8)
    assert veneer.parse("mola(N=(10, 2, 2, 2))").counts == (10, 2, 2, 2)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (8, [2, 2, 4, 4, 6, 6, 8, 8]),
        (10, [2, 2, 4, 4, 6, 6, 6, 8, 8, 8]),
        (5, [2, 4, 6, 8, 8]),
        (2, [6, 8]),
        (1, [8]),
    ],
)
def test_groups_of_layers_are_cut_from_the_bottom_and_what_is_left_goes_to_the_top(layers: int, expected: list[int]) -> None:
    found = [allocation.at((2, 4, 6, 8), site(index=i, length=layers)) for i in range(layers)]
    assert found == expected
    assert allocation.at((2, 4, 6, 8), site()) == 5 and allocation.at(7, site(index=1, length=2)) == 7


def test_one_number_for_each_layer() -> None:
    tuned = attached("mola(N=(2, 5), K=(1, 3), r=(2, 4))", "vit")
    for at, method, p in tuned.entries():
        N, K, r = ((2, 1, 2), (5, 3, 4))[at.index]
        assert p["A"].shape[:2] == (N, r) and method.picks(at) == K


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"N": (2, 0)}, r"N=0 is out of range; it must be at least 1"),
        ({"N": ()}, r"N=\(\) is empty"),
        ({"K": 1.5}, r"K=1.5 must be"),
        ({"allocation": "pyramid"}, r"allocation='pyramid' is not one of rectangle, .* nor digits from 1 to 9"),
        ({"allocation": 2048}, r"allocation=2048 is not one of"),
        ({"N": (2, 4), "allocation": "diamond"}, r"both say how many experts a layer has"),
        ({"N": 3, "allocation": "2468"}, r"both say"),
    ],
)
def test_mola_refuses_numbers_that_say_nothing(options: dict[str, Any], said: str) -> None:
    with pytest.raises(BadValue, match=said):
        registry.method("mola", **options)


def test_mola_refuses_what_does_not_fit_a_layer() -> None:
    with pytest.raises(BadValue, match=r"MoLA: K=3 is larger than N=2 at .*q_proj; choose K ≤ 2"):
        attached("mola(N=2, K=3)")
    with pytest.raises(BadValue, match=r"MoLA: N gives 3 numbers for the 2 layers at .*; give 2 or fewer"):
        attached("mola(N=(2, 3, 4))")
    with pytest.raises(Unsupported, match="which experts act depends on the token"):
        attached("mola(r=2)").merge()


def test_distances_of_experts() -> None:
    A, B = draw(4, 3, 20), draw(4, 12, 3)
    pairs = [(B[i] @ A[i] - B[j] @ A[j]).norm() for i in range(4) for j in range(i)]
    torch.testing.assert_close(distance(A, B), torch.stack(pairs).mean())
    assert distance(A[:1], B[:1]) == 0
    torch.testing.assert_close(distance(A[:1].expand(3, 3, 20), B[:1].expand(3, 12, 3)), torch.tensor(0.0).double(), rtol=0, atol=1e-6)
    tuned = attached(SPEC)
    found = redundancy(tuned)
    own = [distance(p["A"], p["B"]).item() for at, _, p in tuned.entries() if at.depth == 1 and at.role.startswith("attn")]
    assert list(found) == [0, 1] and found[1] == pytest.approx(sum(own) / 4)
    assert redundancy(tuned, targets=())[1] != found[1]


# -- S2-LoRA ----------------------------------------------------------------------------------------------------


def s2(**options: Any) -> Any:
    return registry.method("s2-lora", **{"r": 4, **options})


def test_s2_lora_is_its_definition() -> None:
    W, x, p = draw(12, 20), draw(2, 5, 20), {"A": draw(4, 20), "B": draw(12, 4), "s": draw(4)}
    for alpha, c in ((None, 1.0), (6, 1.5)):
        expected = W + c * p["B"] @ torch.diag(p["s"]) @ p["A"]
        torch.testing.assert_close(s2(alpha=alpha).weight(W, p), expected)
        torch.testing.assert_close(s2(alpha=alpha).forward(DenseCall(W), x, p, site()), x @ expected.T)
    unit = s2(unit=True)
    change = unit.change(p | {"s": torch.eye(4).double()[1] * 3}, site())
    torch.testing.assert_close(torch.linalg.matrix_norm(change), torch.tensor(3.0).double())


def test_s2_lora_ranks_are_the_coefficients_left_and_all_changes_share_r_directions() -> None:
    method = s2()
    shared, changes = {"A": draw(4, 20), "B": draw(12, 4)}, []
    for kept in range(5):
        s = draw(4) * (torch.arange(4) < kept)
        changes.append(method.change(shared | {"s": s}, site()))
        assert torch.linalg.matrix_rank(changes[-1]) == kept
    for _ in range(6):
        changes.append(method.change(shared | {"s": draw(4)}, site()))
    assert torch.linalg.matrix_rank(torch.stack(changes).flatten(1)) == 4


def test_s2_lora_shares_a_pair_for_each_shape() -> None:
    tuned = attached("s2-lora(r=4)")  # 2 blocks: q and o [16, 16], k and v [8, 16]
    names = [n.rpartition("/")[2] for n, _ in tuned.named_parameters()]
    assert sorted(names) == sorted(["A", "B"] * 2 + ["s"] * 8)
    pairs = {(tuple(p["A"].shape), tuple(p["B"].shape)): id(p["A"]) for _, _, p in tuned.entries()}
    assert len(pairs) == len(set(pairs.values())) == 2
    one = attached("s2-lora(r=4, groups=all)", "vit")
    assert len({id(p["A"]) for _, _, p in one.entries()}) == 1
    with pytest.raises(BadValue, match=r"q_proj is \[16, 16\] and .*k_proj is \[8, 16\].*choose groups='shape' or other targets"):
        attached("s2-lora(groups=all)")


def test_the_gradient_of_a_shared_factor_is_the_sum_over_layers() -> None:
    tuned = attached("s2-lora(r=4, groups=all)", "vit")
    value = loss(tuned.model.train(), SUBJECTS["vit"].batch())
    shared = next(p["A"] for _, _, p in tuned.entries())
    whole = torch.autograd.grad(value, shared)[0]
    summed = torch.zeros_like(whole)
    for part in tuned.adapters["default"].parts:
        own, real = shared.detach().clone().requires_grad_(), type(part).tensors
        part.tensors = lambda part=part, own=own, real=real: real(part) | {"A": own}  # this layer reads a copy of its own
        summed += torch.autograd.grad(loss(tuned.model, SUBJECTS["vit"].batch()), own)[0]
        del part.tensors
    torch.testing.assert_close(summed, whole)


def test_s2_lora_counts() -> None:
    whisper = [Site(f"{i}", f"{i}", "attn.q", "linear", i // 12, 768, 768) for i in range(144)]
    method = registry.method("s2-lora")
    shared, own = method.init_shared(whisper, Generator()), method.init(whisper[0], Generator())
    assert {method.tie(s) for s in whisper} == {"768x768"}
    assert sum(t.numel() for t in shared.values()) + 144 * own["s"].numel() == 53_760


def test_the_l1_term_is_added_once() -> None:
    tuned = attached("s2-lora(r=4, lam=0.5)", "vit")
    tuned.begin()
    loss(tuned.model.train(), SUBJECTS["vit"].batch())
    terms = tuned.loss_terms()
    expected = 0.5 * sum(p["s"].abs().sum() for _, _, p in tuned.entries())
    torch.testing.assert_close(terms["sparsity"], expected)
    s = next(p["s"] for _, _, p in tuned.entries())
    torch.testing.assert_close(torch.autograd.grad(terms["sparsity"], s)[0], 0.5 * s.sign())
    plain = attached("s2-lora(lam=0)", "vit")
    assert plain.loss_terms() == {} and not plain.adapters["default"].strategies


def test_terms_of_a_stack_are_of_their_own_method() -> None:
    tuned = attached("s2-lora(r=4, lam=1.0) + bottleneck-adapter(m=2, learned_s=scalar) + mola(r=2, targets='mlp.up')", "vit")
    tuned.begin()
    loss(tuned.model.train(), SUBJECTS["vit"].batch())
    terms = tuned.loss_terms()
    expected = sum(p["s"].abs().sum() for _, method, p in tuned.entries() if method.slug == "s2-lora")
    torch.testing.assert_close(terms["sparsity"], expected)
    assert set(terms) == {"sparsity", "balance"}


def descended(spec: str, steps: int = 8, total: int | None = None) -> Any:
    torch.manual_seed(0)
    tuned = veneer.attach(SUBJECTS["vit"].build(), spec, head=False, seed=3)
    optimiser = torch.optim.Adam(tuned.param_groups(1e-2, weight_decay=0.1))
    tuned.begin(total)
    for _ in range(steps):
        optimiser.zero_grad()
        value = loss(tuned.model.train(), SUBJECTS["vit"].batch())
        (value + sum(tuned.loss_terms().values())).backward()
        tuned.before_step()
        optimiser.step()
        tuned.after_step()
    return tuned


def test_proximal_steps_give_exact_zeros_and_more_of_them_the_larger_they_are() -> None:
    active = [sum(prune(descended(f"s2-lora(r=8, prox={prox})")).values()) for prox in (0.0, 0.004, 0.006, 0.02)]
    assert active[0] == 8 * 8 and active[-1] == 0 and all(a >= b for a, b in pairwise(active)) and 0 < active[2] < 64


def test_a_larger_l1_weight_leaves_fewer_coefficients() -> None:
    active = [sum(prune(descended(f"s2-lora(r=8, lam={lam})", 12), tau=0.01).values()) for lam in (0.0, 1e-4, 1e-2)]
    assert active[0] > active[1] > active[2]


def test_small_coefficients_are_cut_after_the_last_step() -> None:
    for steps, total in ((8, 8), (8, None), (7, 8)):
        tuned = descended("s2-lora(r=8, tau=0.05)", steps, total)
        s = torch.cat([p["s"] for _, _, p in tuned.entries()])
        assert bool((s == 0).any()) == (steps == total) and (s.abs() > 0.05).any()
    kept = prune(tuned, tau=0.05)
    s = {at.name: p["s"] for at, _, p in tuned.entries()}
    assert kept == {name: int((t.abs() > 0.05).sum()) for name, t in s.items()} and all(
        t[t.abs() <= 0.05].abs().sum() == 0 for t in s.values()
    )


def test_soft_and_hard_thresholds() -> None:
    s = torch.tensor([-0.3, -0.1, 0.0, 0.05, 0.2])
    torch.testing.assert_close(shrunk(s, 0.1), torch.tensor([-0.2, 0.0, 0.0, 0.0, 0.1]))
    torch.testing.assert_close(cut(s, 0.1), torch.tensor([-0.3, 0.0, 0.0, 0.0, 0.2]))
    assert torch.equal(cut(s, 0.0), s)


def test_coefficients_do_not_decay() -> None:
    tuned = attached("s2-lora(r=4)", "vit")
    decays = {id(p): group["weight_decay"] for group in tuned.param_groups(1e-3, weight_decay=0.1) for p in group["params"]}
    for _, _, p in tuned.entries():
        assert decays[id(p["s"])] == 0 and decays[id(p["A"])] == 0.1


# -- SARA -------------------------------------------------------------------------------------------------------


def test_sara_ranks() -> None:
    case = Case("sara", 0)
    S = torch.linalg.svdvals(case["W"])
    case.agree("score.S", S)
    assert [spectrum.rank_of(S, m) for m in case.hyper["m"]] == case["out.k"].tolist()
    assert [spectrum.rank_of(S, float(m)) for m in case["score.m"]] == case["out.k"].tolist()


def test_sara_forward() -> None:
    case = Case("sara", 1)
    checked(registry.method("sara"), case, case["W"], site())


def values(W: Tensor) -> Tensor:
    return torch.linalg.svdvals(W)


def test_ranks_of_spectra() -> None:
    S = values(draw(24, 40))
    found = [spectrum.rank_of(S, m / 100) for m in range(1, 101)]
    assert found == sorted(found) and found[0] >= 1 and found[-1] == 24
    assert found == [spectrum.rank_of(7.3 * S, m / 100) for m in range(1, 101)]
    Q = torch.linalg.qr(draw(24, 24))[0]
    for dtype in (torch.float64, torch.float32):
        assert [spectrum.rank_of(values(Q.to(dtype)), m / 24) for m in range(1, 25)] == list(range(1, 25))
        assert [spectrum.rank_of(values(Q.to(dtype)), m / 100) for m in range(1, 101)] == [math.ceil(m * 24 / 100) for m in range(1, 101)]
        thin = (draw(24, 1) @ draw(1, 40)).to(dtype)
        assert {spectrum.rank_of(values(thin), m) for m in (0.01, 0.5, 0.999999, 1 - 1e-12, 1.0)} == {1}
        assert spectrum.rank_of(values((draw(24, 5) @ draw(5, 40)).to(dtype)), 1.0) == 5
    flat, peaked = torch.ones(24), 0.5 ** torch.arange(24)
    assert all(spectrum.rank_of(flat, m / 10) > spectrum.rank_of(peaked, m / 10) for m in range(2, 10))
    for m in (0.0, 1.1):
        with pytest.raises(BadValue, match="more than 0 and at most 1"):
            spectrum.rank_of(S, m)


@pytest.mark.parametrize("vectors", ["random", "svd"])
def test_sara_starts_as_the_base_and_changes_by_its_rank(vectors: str) -> None:
    method, W = registry.method("sara", m=0.3, vectors=vectors), draw(12, 20)
    p, k = begun(method, site(), W), spectrum.rank_of(values(W), 0.3)
    assert {n: tuple(t.shape) for n, t in p.items()} == {"U": (12, k), "lambda": (k,), "V": (k, 20)}
    assert torch.equal(method.weight(W, p), W)
    assert torch.linalg.matrix_rank(method.weight(W, p | {"lambda": draw(k)}) - W) == k
    if vectors == "svd":
        S = values(W)[:k]
        best = W - method.weight(W, p | {"lambda": -S})
        torch.testing.assert_close(torch.linalg.svdvals(W - best)[0], values(W)[k])


@pytest.mark.parametrize("slug", ["sara", "mo-sara"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_ranks_follow_each_layers_own_spectrum_and_the_count_follows_them(slug: str, dtype: torch.dtype) -> None:
    method = registry.method(slug, m=0.4, targets="attn.q attn.k mlp.down")
    model = SUBJECTS["gpt2"].build(dtype)  # fused, stored the other way round
    tuned = veneer.attach(model, method, head=False)
    ranks = spectrum.ranks(SUBJECTS["gpt2"].build(dtype), method)
    assert {at.name: p["lambda"].shape[-1] for at, _, p in tuned.entries()} == ranks and len(ranks) == 6
    count = 0
    for at in tuned.sites():
        k, n = ranks[at.name], 5
        count += k * (at.in_features + at.out_features + 1) if slug == "sara" else n * k + k + n + at.out_features
    assert tuned.summary().trained == count


@pytest.mark.parametrize("slug", ["sara", "mo-sara"])
def test_the_share_for_a_budget_is_the_largest_that_fits(slug: str) -> None:
    model = SUBJECTS["vit"].build()
    full = registry.method(slug, m=1.0)
    most = veneer.attach(SUBJECTS["vit"].build(), full, head=False).summary().trained
    for budget in (most // 2, most // 3, most, most + 1):
        method = registry.method(slug).within(model, budget)
        count = veneer.attach(SUBJECTS["vit"].build(), method, head=False).summary().trained
        assert count <= budget
        if method.m == 1:
            assert budget >= most
        else:
            more = registry.method(slug, m=min(1.0, method.m * (1 + 1e-9)))
            assert veneer.attach(SUBJECTS["vit"].build(), more, head=False).summary().trained > budget
    with pytest.raises(BadValue, match=r"a budget of 10 parameters is less than the \d+ that rank 1 everywhere needs"):
        registry.method(slug).within(model, 10)


@pytest.mark.parametrize("slug", ["sara", "mo-sara"])
def test_weights_without_a_spectrum_are_refused(slug: str) -> None:
    model = SUBJECTS["vit"].build()
    name = next(s.name for s in anatomy.sites(model) if s.role == "attn.v")
    torch.nn.init.zeros_(model.get_submodule(name).weight)
    with pytest.raises(BadValue, match=rf"the weight at {name} is zero everywhere"):
        veneer.attach(model, slug, head=False)
    with torch.device("meta"):
        skeleton = SUBJECTS["vit"].make()
    with pytest.raises(Unsupported, match=r"singular values of the weights, and .* has none here; load the model with its weights"):
        veneer.attach(skeleton, slug, head=False)


def test_sara_refuses_stacked_matrices() -> None:
    at = site("expert.up", "parameter", count=4)
    with pytest.raises(BadValue, match="SARA: stacked matrices at site would each have another rank"):
        registry.method("sara").check(at)


# -- Mo-SARA ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
def test_mo_sara_is_its_definition(n: int) -> None:
    method, W, b, x = registry.method("mo-sara", n=n), draw(12, 20), draw(12), draw(2, 5, 20).requires_grad_()
    p = begun(method, site(), W, stir=0.3)
    trained = [t.requires_grad_() for k, t in p.items() if k not in "UV"]
    z = x @ p["V"].T
    g = ((z * p["w_g1"]).sum(-1, keepdim=True) * p["w_g2"]).softmax(-1) if n > 1 else torch.ones(2, 5, 1).double()
    if n > 1:
        torch.testing.assert_close(method.gates(z, p), g)
        torch.testing.assert_close(g.sum(-1), torch.ones(2, 5).double())
    mixed = sum(g[..., i, None] * p["lambda"][i] for i in range(n))
    plain = x @ W.T + b + p["v"] * ((mixed * z) @ p["U"].T)
    fast, towards = method.forward(DenseCall(W, b), x, p, site()), draw(2, 5, 12)
    torch.testing.assert_close(fast, plain)
    for mine, theirs in zip(torch.autograd.grad(fast, [x, *trained], towards), torch.autograd.grad(plain, [x, *trained], towards)):
        torch.testing.assert_close(mine, theirs)
    if n == 1:
        dense = W + torch.diag(p["v"]) @ p["U"] @ torch.diag(p["lambda"][0]) @ p["V"]
        torch.testing.assert_close(method.fold(W, b, p, site())[0], dense)
        torch.testing.assert_close(torch.matmul(*method.low_rank(W, p, site())), dense - W)


def test_mo_sara_starts_as_the_base_with_leading_vectors_of_fixed_sign() -> None:
    method, W, x = registry.method("mo-sara"), draw(12, 20), draw(4, 20)
    p = begun(method, site(), W)
    assert torch.equal(method.forward(DenseCall(W), x, p, site()), x @ W.T)
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    k = spectrum.rank_of(S, 0.5)
    torch.testing.assert_close(p["U"] @ torch.diag(S[:k]) @ p["V"], (U[:, :k] * S[:k]) @ Vt[:k])
    assert (p["U"].gather(0, p["U"].abs().argmax(0, keepdim=True)) > 0).all()
    again = begun(method, site(), 3 * W)
    torch.testing.assert_close((again["U"], again["V"]), (p["U"], p["V"]))


def test_mo_sara_merges_with_one_set_and_says_why_not_with_more() -> None:
    tuned = attached("mo-sara(n=1)")
    before = SUBJECTS["llama"].answers(tuned.model)
    torch.testing.assert_close(SUBJECTS["llama"].answers(tuned.merge().model), before, rtol=0, atol=1e-10)
    with pytest.raises(Unsupported, match="depends on the token; n=1 can be merged"):
        attached("mo-sara").merge()


def test_mo_sara_trains_vectors_alone_and_keeps_little_of_its_input() -> None:
    tuned = attached("mo-sara(n=3)", "vit")
    frozen = [(p["U"].clone(), p["V"].clone()) for _, _, p in tuned.entries()]
    optimiser = torch.optim.Adam(tuned.parameters(), 1e-2)
    loss(tuned.model.train(), SUBJECTS["vit"].batch()).backward()
    optimiser.step()
    assert all(torch.equal(p["U"], U) and torch.equal(p["V"], V) for (_, _, p), (U, V) in zip(tuned.entries(), frozen))
    method, W, x = registry.method("mo-sara", m=0.2), draw(12, 20), draw(7, 20).requires_grad_()
    p = begun(method, site(), W, stir=0.3)
    for name in set(p) - {"U", "V"}:
        p[name].requires_grad_()
    call, kept = DenseCall(W), list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        method.forward(call, x, p, site())
    assert not any(t.shape in ((7, 20), (7, 12)) for t in kept)


# -- over packed weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", ["mola", "mo-sara"])
def test_gradients_over_4_bit_layers_that_were_evaluated_first(slug: str, seed: int) -> None:
    """Together they are near those over fresh ones. Single ones differ: a rounded base flips picks and turns singular vectors."""
    found = []
    for evaluated in (True, False):
        model, batch = nf4(), SUBJECTS["llama"].batch(seed, torch.float32)
        if evaluated:
            SUBJECTS["llama"].answers(model)
        tuned, generator = veneer.attach(model, slug, head=False), Generator().manual_seed(seed)
        with torch.no_grad():
            for p in tuned.parameters():
                p.add_(0.15 * torch.empty(p.shape).normal_(generator=generator))
        value = loss(model.train(), batch)
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, tuned.parameters())]))
    assert float((found[0] - found[1]).norm()) < 0.4 * float(found[1].norm())
