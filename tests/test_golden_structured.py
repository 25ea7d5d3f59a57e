"""Structured changes of a weight (LoHa, LoKr, ALoRE, HUT, Bone, MiSS): golden numbers, PEFT's numbers, and the laws of each."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from test_golden import Case, DenseCall, checked, site
from tiny import SUBJECTS, loss
from torch import Generator, Tensor, nn

import veneer
from veneer.errors import BadValue
from veneer.method import AdditiveMethod, Method, replaced
from veneer.registry import method
from veneer.site import Site


def drawn(m: Method, at: Site, size: float = 0.5) -> dict[str, Tensor]:
    """Random tensors of the shapes that a method has at a site, in float64."""
    made = {**m.init_shared([at], Generator()), **m.init(at, Generator())}
    return {name: size * torch.randn(t.shape, dtype=torch.float64) for name, t in made.items()}


def layer(at: Site) -> tuple[Tensor, Tensor, Tensor]:
    """A random weight, bias and input for a site."""
    W = torch.randn(at.out_features, at.in_features, dtype=torch.float64)
    return W, torch.randn(at.out_features).double(), torch.randn(2, 5, at.in_features).double()


def as_defined(m: Method, at: Site) -> None:
    """The forward and all of its gradients are those of the dense definition."""
    (W, b, x), p = layer(at), drawn(m, at)
    x, p = x.requires_grad_(), {k: t.requires_grad_() for k, t in p.items()}
    fast, (W_eff, b_eff) = m.forward(DenseCall(W, b), x, p, at), m.fold(W, b, p, at)
    dense = nn.functional.linear(x, W_eff, b_eff)
    torch.testing.assert_close(fast, dense, rtol=0, atol=1e-10)
    towards, inputs = torch.randn_like(fast), [x, *p.values()]
    for mine, theirs in zip(torch.autograd.grad(fast, inputs, towards), torch.autograd.grad(dense, inputs, towards)):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def kept(m: Method, at: Site) -> list[tuple[int, ...]]:
    """Shapes of what a forward keeps for backward, for an input of seven tokens that needs no gradient."""
    (W, b, _), p, shapes = layer(at), drawn(m, at), []
    p = {k: t.requires_grad_() for k, t in p.items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        m.forward(DenseCall(W, b), torch.randn(7, at.in_features).double(), p, at)
    return shapes


class Packed(DenseCall):
    """A layer whose weight must not be read."""

    def weight(self) -> Tensor:
        raise AssertionError("the weight was read")


def trained_change(m: Method, at: Site, p: dict[str, Tensor]) -> Tensor:
    """The ΔW of one training pass, dropout and all."""
    W = torch.zeros(at.out_features, at.in_features, dtype=torch.float64)
    return m.forward(DenseCall(W, None, training=True), torch.eye(at.in_features).double(), p, at).T


ALL = [
    "loha(r=2)", "loha(r=6, alpha=3)", "lokr(r=2)", "lokr(r=1, decompose_both=True, alpha=4)", "lokr(r=9, decompose_factor=2)",
    "alore(n=2, r=3, s=0.5)", "alore(n=4, form='phm', h=8)", "alore(n=1)", "alore(share_S=True, n=2)", "hut(r=1)",
    "hut(r=1, form='product')", "hut(r=3, s=2.0)", "hut(r=3, form='product')", "bone(r=3)", "bone(r=4)", "bone(r=4, structure='bat')",
    "bone(r=4, structure='bat', share='col')", "miss(r=3, mini_r=4)", "miss(r=5)", "miss(r=2, structure='bat', share='col')",
]  # fmt: skip


@pytest.mark.parametrize("spec", ALL)
def test_forward_and_gradients_are_the_dense_definitions(spec: str) -> None:
    as_defined(veneer.parse(spec), site(out=12, inside=20))
    as_defined(veneer.parse(spec), site(out=16, inside=8))


@pytest.mark.parametrize("spec", ALL)
def test_starts_as_the_base(spec: str) -> None:
    m, at = veneer.parse(spec), site()
    W, _, _ = layer(at)
    p = {**m.init_shared([at], Generator().manual_seed(1)), **m.init(at, Generator().manual_seed(2))}
    assert torch.equal(m.weight(W, {k: t.double() for k, t in p.items()}, at), W)


LAYERS = [("vit", "attn.q attn.v mlp.down"), ("vit", "embed.patch"), ("gpt2", "attn.q attn.v mlp.down"), ("bert", "embed.token"),
    ("encoder", "attn.q attn.v attn.o")]  # fmt: skip


@pytest.mark.parametrize(("family", "targets"), LAYERS)
@pytest.mark.parametrize("spec", ALL)
def test_every_kind_of_layer(spec: str, family: str, targets: str, tmp_path: Any) -> None:
    subject = SUBJECTS[family]
    tuned = veneer.attach(subject.build(), replaced(veneer.parse(spec), {"targets": targets}), head=False)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    before = subject.answers(tuned.model)
    found = torch.autograd.grad(loss(tuned.model.train(), subject.batch()), tuned.parameters())
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in found)
    tuned.save(tmp_path)
    assert torch.equal(subject.answers(veneer.load(subject.build(), tmp_path).model), before)
    tuned.model.eval()
    torch.testing.assert_close(subject.answers(tuned.merge().model), before, rtol=0, atol=1e-10)


THIN = ["loha(r=2)", "lokr(r=1)", "lokr(r=1, decompose_both=True)", "bone(r=3)", "miss(r=3, mini_r=12)", "alore(n=2, r=1)",
    "alore(n=2, h=2, form='phm')"]  # fmt: skip


@pytest.mark.parametrize("spec", THIN)
def test_low_rank_factors_are_the_change(spec: str) -> None:
    m, at = veneer.parse(spec), site(out=48, inside=60)
    (W, _, _), p = layer(at), drawn(m, at)
    pair = m.low_rank(W, p, at)
    assert pair is not None
    torch.testing.assert_close(W + pair[0] @ pair[1], m.weight(W, p, at))
    assert pair[0].numel() + pair[1].numel() < W.numel()


@pytest.mark.parametrize("spec", ["loha(r=8)", "lokr(r=99)", "alore(n=4, r=4)", "hut", "bone(r=4, structure='bat')"])
def test_changes_that_are_not_thin_have_no_factors(spec: str) -> None:
    m, at = veneer.parse(spec), site()
    assert m.low_rank(layer(at)[0], drawn(m, at), at) is None


# -- LoHa, LoKr -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "thin"), [(1, True), (4000, False)])
@pytest.mark.parametrize("grad", [True, False])
def test_loha_takes_the_cheaper_form(tokens: int, thin: bool, grad: bool) -> None:
    m, at = method("loha", r=8), site(out=64, inside=64)
    with torch.set_grad_enabled(grad):
        assert m.thin(torch.zeros(tokens, 64), at) is thin  # type: ignore[attr-defined]
        (W, b, _), p, x = layer(at), drawn(m, at), torch.randn(tokens, 64).double()
        y = m.forward(DenseCall(W, b), x, p, at)
    torch.testing.assert_close(y, nn.functional.linear(x, m.weight(W, p, at), b))
    torch.testing.assert_close(m.delta(x, p, at), x @ (m.weight(W, p, at) - W).T)  # type: ignore[attr-defined]


def test_loha_reaches_rank_r_squared_and_no_more() -> None:
    m, at = method("loha", r=3), site(out=30, inside=40)
    assert torch.linalg.matrix_rank(m.change(drawn(m, at), at)) == 9  # type: ignore[attr-defined]


@pytest.mark.parametrize("r", [2, 30])
def test_loha_rank_dropout_drops_output_rows(r: int) -> None:
    m, at = method("loha", r=r, rank_dropout=0.5), site(out=40, inside=20)
    p = drawn(m, at)
    whole, seen = m.change(p, at), trained_change(m, at, p)  # type: ignore[attr-defined]
    rows = seen.abs().amax(1) > 0
    assert 0 < rows.sum() < 40
    torch.testing.assert_close(seen[rows], whole[rows] * 40 / rows.sum())
    torch.testing.assert_close(m.forward(DenseCall(0 * whole), torch.eye(20).double(), p, at).T, whole)


def test_lokr_rank_dropout_rescales_only_if_asked() -> None:
    at = site(out=40, inside=20)
    for rescales in (False, True):
        m = method("lokr", r=2, rank_dropout=0.5, rank_dropout_scale=rescales)
        p = drawn(m, at)
        whole, seen = m.change(p, at), trained_change(m, at, p)  # type: ignore[attr-defined]
        rows = seen.abs().amax(1) > 0
        assert 0 < rows.sum() < 40
        torch.testing.assert_close(seen[rows], whole[rows] * (40 / rows.sum() if rescales else 1))


@pytest.mark.parametrize("slug", ["loha", "lokr"])
def test_module_dropout_leaves_all_out_or_nothing(slug: str) -> None:
    m, at = method(slug, r=2, module_dropout=0.5), site()
    assert isinstance(m, AdditiveMethod) and not m.adds(at)
    p = drawn(m, at)
    seen = [trained_change(m, at, p) for _ in range(60)]  # one of 2⁵⁹ runs has them all alike
    whole = m.change(p, at)
    assert all(torch.equal(s, 0 * whole) or torch.allclose(s, whole) for s in seen)
    assert len({bool(s.abs().max() > 0) for s in seen}) == 2


@pytest.mark.parametrize(("index", "options"), [
    (0, {"r": 2, "alpha": 4}),
    (1, {"r": 2, "alpha": 4, "decompose_both": True, "decompose_factor": 8}),
    (2, {"r": 1, "alpha": 1, "decompose_both": True}),
])  # fmt: skip
def test_lokr_golden(index: int, options: dict[str, Any]) -> None:
    case = Case("lokr", index)
    m, at = method("lokr", **options), site(out=len(case["W"]), inside=case["W"].shape[1])
    assert {k: tuple(t.shape) for k, t in m.init(at, Generator()).items()} == {k: tuple(t.shape) for k, t in case.params().items()}
    checked(m, case, case["W"], at)
    case.agree("W_eff", case["W"] + m.change(case.params(), at))  # type: ignore[attr-defined]


def test_lokr_is_a_kronecker_product_whose_ranks_multiply() -> None:
    m, at = method("lokr", r=2, alpha=6, decompose_both=True), site(out=100, inside=144)
    p = drawn(m, at)
    assert {k: tuple(t.shape) for k, t in p.items()} == {"w1_a": (10, 2), "w1_b": (2, 12), "w2_a": (10, 2), "w2_b": (2, 12)}
    change = m.change(p, at)  # type: ignore[attr-defined]
    torch.testing.assert_close(change, 3 * torch.kron(p["w1_a"] @ p["w1_b"], p["w2_a"] @ p["w2_b"]))
    assert torch.linalg.matrix_rank(change) == 4


def test_lokr_starts() -> None:
    at = site()
    for start, zero in (("zero_w1", {"w1"}), ("lycoris", {"w2_b"})):
        p = method("lokr", r=2, start=start).init(at, Generator())
        assert {k for k, t in p.items() if not t.any()} == zero
    assert not method("lokr", r=9, start="lycoris").init(at, Generator())["w2"].any()
    assert not method("lokr", r=1, decompose_both=True).init(at, Generator())["w1_a"].any()


def test_lokr_convolution_splits_channels_and_keeps_the_kernel_whole() -> None:
    m, at = method("lokr", r=2), site(kind="conv", out=12, inside=180, kernel=(3, 3))
    p = drawn(m, at)
    w2 = (p["w2_a"] @ p["w2_b"]).reshape(4, 5, 3, 3)
    kernel = torch.einsum("ac,bdxy->abcdxy", p["w1"], w2).reshape(12, 20, 3, 3)
    torch.testing.assert_close(m.change(p, at).reshape(12, 20, 3, 3), kernel)  # type: ignore[attr-defined]


def test_loha_and_lokr_counts_on_a_small_layer() -> None:
    at = site(out=24, inside=16)
    counts = {spec: sum(t.numel() for t in veneer.parse(spec).init(at, Generator()).values()) for spec in ("loha(r=4)", "lokr(r=4)")}
    assert counts == {"loha(r=4)": 320, "lokr(r=4)": 40}
    big = site(out=4096, inside=4096)
    assert sum(t.numel() for t in method("lokr").init(big, Generator()).values()) == 5120


def test_lokr_refuses_a_factor_of_zero() -> None:
    with pytest.raises(BadValue, match="LoKr: decompose_factor=0 divides nothing; choose 1 or more, or -1"):
        method("lokr", decompose_factor=0)


# -- against PEFT -----------------------------------------------------------------------------------------------


def peft_layer(base: nn.Module, config: Any) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """PEFT's model of one adapted layer `net.0` with random tensors, those tensors, and its merged weight."""
    import peft

    model = peft.get_peft_model(nn.Sequential(base).double(), config)
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = 0.5 * torch.randn_like(parameter)
            found[name.split(".")[-2].removeprefix("hada_").removeprefix("lokr_").replace("miss_block", "D")] = parameter.data.clone()
    return model, found, merged_weight(model)


def merged_weight(model: Any) -> Tensor:
    copied = copy.deepcopy(model)  # PEFT takes a merge back in float32
    copied.merge_adapter()
    return copied.base_model.model[0].get_base_layer().weight.data


LIKE_PEFT = [
    ("loha(r=3, alpha=6)", "LoHaConfig", {"r": 3, "alpha": 6}),
    ("lokr(r=2, alpha=3)", "LoKrConfig", {"r": 2, "alpha": 3}),
    ("lokr(r=9, alpha=3)", "LoKrConfig", {"r": 9, "alpha": 3}),
    ("lokr(r=1, alpha=3, decompose_both=True, decompose_factor=4)", "LoKrConfig",
     {"r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 4}),
    ("miss(r=3)", "MissConfig", {"r": 3}),
    ("miss(r=4, structure='bat')", "MissConfig", {"r": 4, "init_weights": "bat"}),
    ("miss(r=3, mini_r=4)", "MissConfig", {"r": 3, "mini_r": 4, "init_weights": "mini"}),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "config", "options"), LIKE_PEFT)
def test_peft_has_the_same_weight_and_output(spec: str, config: str, options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    base = nn.Linear(20, 12).double()
    W, b, x = base.weight.data.clone(), base.bias.data.clone(), torch.randn(2, 5, 20).double()
    model, p, merged = peft_layer(base, getattr(peft, config)(target_modules=["0"], **options))
    m, at = veneer.parse(spec), site()
    assert {k: t.shape for k, t in m.init(at, Generator()).items()} == {k: t.shape for k, t in p.items()}
    torch.testing.assert_close(m.weight(W, p, at), merged, rtol=0, atol=1e-9)
    torch.testing.assert_close(m.forward(DenseCall(W, b), x, p, at), model.eval()(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("spec", "config", "options"), LIKE_PEFT[:4])
def test_peft_has_the_same_convolution(spec: str, config: str, options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    base = nn.Conv2d(20, 12, 3).double()
    W, at = base.weight.data.clone(), site(kind="conv", out=12, inside=180, kernel=(3, 3))
    _, p, merged = peft_layer(base, getattr(peft, config)(target_modules=["0"], **options))
    m = veneer.parse(spec)
    p = {k: t.flatten(1) for k, t in p.items()}
    assert {k: t.shape for k, t in m.init(at, Generator()).items()} == {k: t.shape for k, t in p.items()}
    torch.testing.assert_close(m.weight(W, p, at), merged, rtol=0, atol=1e-9)


def test_lokr_splits_sizes_as_peft_does() -> None:
    layer = pytest.importorskip("peft.tuners.lokr.layer")
    for factor in (-1, 1, 2, 3, 4, 5, 7, 8, 16, 50):
        m = method("lokr", decompose_factor=factor)
        assert all(m.split(n) == layer.factorization(n, factor) for n in range(1, 200))  # type: ignore[attr-defined]


# -- ALoRE ------------------------------------------------------------------------------------------------------


def kron_sum(S: Tensor, E: Tensor) -> Tensor:
    return sum((torch.kron(s, e) for s, e in zip(S, E)), torch.zeros(()))


@pytest.mark.parametrize(("n", "r"), [(1, 3), (2, 2), (4, 1), (5, 2)])
def test_alore_is_the_sum_of_kronecker_products(n: int, r: int) -> None:
    m, at = method("alore", n=n, r=r, s=0.7), site()
    (W, _, x), p = layer(at), drawn(m, at)
    M = kron_sum(p["S"], p["P"] @ p["Q"])
    torch.testing.assert_close(m.weight(W, p, at), W @ (torch.eye(20).double() + 0.7 * M))
    torch.testing.assert_close(m.turn(x, p, at), x + 0.7 * x @ M.T)  # type: ignore[attr-defined]
    assert torch.linalg.matrix_rank(M) == min(20, n * n * r)


def test_alore_of_two_kronecker_maps() -> None:
    m, at = method("alore", n=4, h=8, form="phm"), site()
    (W, _, x), p = layer(at), drawn(m, at)
    M = kron_sum(p["T"], p["U"]) @ kron_sum(p["S"], p["D"])
    torch.testing.assert_close(m.weight(W, p, at), W @ (torch.eye(20).double() + M))
    torch.testing.assert_close(m.turn(x, p, at), x + x @ M.T)  # type: ignore[attr-defined]


def test_alore_of_one_expert_is_a_linear_bottleneck() -> None:
    m, at = method("alore", n=1, r=3), site()
    (W, b, x), p = layer(at), drawn(m, at)
    p["S"] = torch.ones(1, 1, 1).double()
    h = x + x @ p["Q"][0].T @ p["P"][0].T
    torch.testing.assert_close(m.forward(DenseCall(W, b), x, p, at), h @ W.T + b)


def test_alore_keeps_small_tensors_only() -> None:
    m, at = method("alore", n=4, r=2), site(out=60, inside=80)
    sizes = [math.prod(s) for s in kept(m, at)]
    assert sizes.count(7 * 80) == 1 and sizes.count(60 * 80) == 1  # x and the frozen weight
    assert all(size <= 7 * 4 * 4 * 2 for size in sizes if size not in (7 * 80, 60 * 80))


def test_alore_count_of_the_paper() -> None:
    roles = ("attn.q", "attn.k", "attn.v", "mlp.up")
    sites = [Site(f"{i}.{r}", "", r, "linear", i, 3072 if r == "mlp.up" else 768, 768) for i in range(12) for r in roles]
    for options, published in (({}, 148_992), ({"form": "phm"}, 150_528)):
        m = method("alore", n=4, r=4, h=16, **options)
        assert not m.init(sites[0], Generator())
        groups = {m.tie(s): s for s in sites}
        shared = [m.init_shared([s], Generator()) for s in groups.values()]
        assert sum(t.numel() for p in shared for t in p.values()) == published


def test_alore_layers_that_read_one_input_share_a_module() -> None:
    tuned = veneer.attach(SUBJECTS["llama"].build(), "alore(n=2, r=2)", head=False)
    modules: dict[tuple[int | None, str], set[int]] = {}
    for at, _, p in tuned.entries():
        modules.setdefault((at.depth, at.role.split(".")[0]), set()).add(id(p["Q"]))
        assert len(p) == 3
    assert set(modules) == {(0, "attn"), (0, "mlp"), (1, "attn"), (1, "mlp")}
    assert all(len(ids) == 1 for ids in modules.values()) and len(set.union(*modules.values())) == 4


def test_alore_one_mixing_for_all() -> None:
    tuned = veneer.attach(SUBJECTS["llama"].build(), "alore(n=2, r=2, share_S=True)", head=False)
    entries = list(tuned.entries())
    assert len({id(p["S"]) for _, _, p in entries}) == 1 and len({id(p["Q"]) for _, _, p in entries}) == len(entries)


def test_alore_roles_of_a_module() -> None:
    m = method("alore")
    assert m.tie(site("cross.k")) == m.tie(site("cross.v")) != m.tie(site("cross.q"))
    assert m.tie(site("mlp.up")) == m.tie(site("mlp.gate")) != m.tie(site("attn.q"))
    assert m.tie(site("attn.o")) == "site" and m.tie(Site("x", "x", "attn.q", "linear", None, 4, 4)) == "x"


def test_alore_dropout_acts_in_training_only() -> None:
    at = site()
    for form in ("experts", "phm"):
        m = method("alore", n=2, h=8, form=form, dropout=0.5)
        (W, b, x), p = layer(at), drawn(m, at)
        plain = nn.functional.linear(x, m.weight(W, p, at), b)
        torch.testing.assert_close(m.forward(DenseCall(W, b), x, p, at), plain)
        assert not torch.allclose(m.forward(DenseCall(W, b, training=True), x, p, at), plain)


@pytest.mark.parametrize(("options", "said"), [
    ({"n": 3}, "ALoRE: n=3 does not divide in=20 at site; choose n = 2 or 4."),
    ({"dropout": 0.1}, "ALoRE: dropout=0.1 is for linear layers, not for the conv at site."),
])  # fmt: skip
def test_alore_refuses_at_a_site(options: dict[str, Any], said: str) -> None:
    with pytest.raises(BadValue) as error:
        method("alore", **options).check(site(kind="conv" if "dropout" in options else "linear"))
    assert str(error.value) == said


def test_alore_refuses_what_does_not_go_together() -> None:
    with pytest.raises(BadValue, match="n=3 does not divide h=16; choose n = 2 or 4, or another h"):
        method("alore", n=3, form="phm")
    with pytest.raises(BadValue, match="share a module but read 20 and 24 features; choose share_S=True"):
        method("alore").init_shared([site("attn.q"), site("attn.k", inside=24)], Generator())


# -- HUT --------------------------------------------------------------------------------------------------------


def test_hut_golden() -> None:
    case = Case("hut", 0)
    checked(method("hut", r=3), case, case["W"], site())
    p, x, W = case.params(grad=True), case["x"], case["W"]
    y = method("hut", r=3).forward(DenseCall(W, case["b"]), x, p, site())
    C = torch.randn_like(y)
    dA, dB = torch.autograd.grad(y, (p["M_A"], p["M_B"]), C)
    H = torch.einsum("bto,bti->oi", C, x) * W
    torch.testing.assert_close(dA, (H @ p["M_B"].T).detach())
    torch.testing.assert_close(dB, (p["M_A"].T @ H).detach())
    per_rank = sum(p["M_A"][:, k] * ((x * p["M_B"][k]) @ W.T) for k in range(3))
    torch.testing.assert_close(y, x @ W.T + case["b"] + per_rank)


@pytest.mark.parametrize("form", ["offset", "product"])
def test_hut_keeps_zeros_and_changes_at_full_rank(form: str) -> None:
    m, at = method("hut", r=2, form=form), site()
    (W, _, _), p = layer(at), drawn(m, at)
    W = W * (torch.rand_like(W) > 0.3)
    new = m.weight(W, p, at)
    assert torch.equal(new == 0, W == 0)
    assert torch.linalg.matrix_rank(new - W) == 12


def test_hut_small_masks_keep_signs() -> None:
    m, at = method("hut", r=2), site()
    (W, _, _), p = layer(at), drawn(m, at)
    p["M_A"] = p["M_A"] / (p["M_A"] @ p["M_B"]).abs().max() * 0.99
    assert torch.equal(m.weight(W, p, at).sign(), W.sign())


def test_hut_product_of_one_rank_more_contains_the_offset() -> None:
    at = site()
    offset, product = method("hut", r=3, s=1.5), method("hut", r=4, form="product")
    (W, _, _), p = layer(at), drawn(offset, at)
    one = {"M_A": torch.ones(12, 1).double(), "M_B": torch.ones(1, 20).double()}
    q = {"M_A": torch.cat([one["M_A"], 1.5 * p["M_A"]], 1), "M_B": torch.cat([one["M_B"], p["M_B"]])}
    torch.testing.assert_close(product.weight(W, q, at), offset.weight(W, p, at))


def test_hut_of_rank_one_fits_what_lora_of_rank_one_cannot_and_the_other_way_round() -> None:
    W, u, v = torch.randn(12, 20).double(), torch.randn(12, 1).double(), torch.randn(1, 20).double()
    fitted = method("hut", r=1).weight(W, {"M_A": u, "M_B": v}, site())
    torch.testing.assert_close(fitted, W * (1 + u @ v))
    assert torch.linalg.matrix_rank(fitted - W) > 1  # no product of rank one
    assert torch.linalg.matrix_rank(u @ v / W) > 1  # no mask of rank one gives W + u vᵀ


@pytest.mark.parametrize("form", ["offset", "product"])
def test_hut_of_rank_one_builds_no_weight(form: str) -> None:
    m, at = method("hut", r=1, form=form), site()
    (W, b, x), p = layer(at), drawn(m, at)
    torch.testing.assert_close(m.forward(Packed(W, b), x, p, at), nn.functional.linear(x, m.weight(W, p, at), b))


def test_hut_steps_of_a_thousandth_are_not_lost_over_bfloat16() -> None:
    m, at = method("hut", r=1, form="product"), site()
    W, x = torch.randn(12, 20).bfloat16(), torch.randn(64, 20).bfloat16()
    p = {"M_A": torch.full((12, 1), 1.001), "M_B": torch.ones(1, 20)}
    y, base = m.forward(DenseCall(W), x, p, at), nn.functional.linear(x, W).float()
    torch.testing.assert_close(y, 1.001 * base, rtol=1e-5, atol=1e-5)


def test_hut_refusal_and_warning() -> None:
    with pytest.raises(BadValue, match=r"s=2\.0 scales an offset"):
        method("hut", form="product", s=2.0)
    model = SUBJECTS["vit"].build()
    veneer.attach(model, "hut(targets='mlp.up')", "fine", head=False)
    zero = SUBJECTS["vit"].build()
    at = next(s for s in veneer.anatomy.sites(zero) if s.role == "mlp.up")
    nn.init.zeros_(zero.get_submodule(at.module).weight)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=f"HUT: the weight of {at.name} is all zeros"):
        veneer.attach(zero, "hut(targets='mlp.up')", head=False)


# -- Bone, MiSS -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("index", "options"), [(0, {}), (1, {}), (2, {"structure": "bat"}), (3, {"structure": "bat", "share": "col"})])
@pytest.mark.parametrize("slug", ["bone", "miss"])
def test_bone_golden(slug: str, index: int, options: dict[str, Any]) -> None:
    case = Case("bone", index)
    m, at = method(slug, r=4, **options), site(inside=case["W"].shape[1])
    assert m.init(at, Generator())["D"].shape == case["param.D"].shape
    checked(m, case, case["W"], at)


def blocks_of(W: Tensor, r: int) -> Tensor:
    return W.reshape(W.shape[0] // r, r, W.shape[1] // r, r).transpose(1, 2)  # [i, j, r, r]


@pytest.mark.parametrize("share", ["row", "col"])
def test_bat_is_an_affine_map_of_every_block(share: str) -> None:
    m, at = method("bone", r=4, structure="bat", share=share), site()
    (W, _, _), p = layer(at), drawn(m, at)
    new, old, eye = blocks_of(m.weight(W, p, at), 4), blocks_of(W, 4), torch.eye(4).double()
    D = p["D"][:, None] if share == "row" else p["D"][None]
    torch.testing.assert_close(new + eye, (old + eye) @ (eye + D))
    torch.testing.assert_close((new - D) @ torch.linalg.inv(eye + D), old)  # and it can be taken back


def test_bone_columns_repeat_and_rank_is_r() -> None:
    m, at = method("bone", r=4), site(inside=18)
    (W, _, _), p = layer(at), drawn(m, at)
    change = m.weight(W, p, at) - W
    for c in range(18):
        torch.testing.assert_close(change[:, c], p["D"][c % 4])
    assert torch.linalg.matrix_rank(change) == 4


@pytest.mark.parametrize("spec", ["bone(r=8)", "miss(r=8, mini_r=6)"])
def test_bone_keeps_the_group_sums_alone(spec: str) -> None:
    m, at = veneer.parse(spec), site(out=36, inside=60)
    assert [s for s in kept(m, at) if s[0] == 7] == [(7, 8)]


def test_bat_by_columns_reads_no_weight() -> None:
    m, at = method("bone", r=4, structure="bat", share="col"), site()
    (W, b, x), p = layer(at), drawn(m, at)
    torch.testing.assert_close(m.forward(Packed(W, b), x, p, at), nn.functional.linear(x, m.weight(W, p, at), b))


def test_mini_repeats_the_block_along_the_outputs() -> None:
    mini, whole, at = method("miss", r=4, mini_r=3), method("miss", r=4), site()
    (W, _, _), p = layer(at), drawn(mini, at)
    assert p["D"].shape == (4, 3)
    torch.testing.assert_close(mini.weight(W, p, at), whole.weight(W, {"D": p["D"].repeat(1, 4)}, at))
    assert method("miss", r=4, mini_r=12).init(at, Generator())["D"].shape == whole.init(at, Generator())["D"].shape


def test_miss_dropout_is_on_the_input() -> None:
    m, at = method("miss", r=4, dropout=0.5), site(inside=60)
    p = drawn(m, at)
    whole, seen = m.change(p, at), trained_change(m, at, p)  # type: ignore[attr-defined]
    columns = seen.abs().amax(0) > 0
    assert 0 < columns.sum() < 60 and not m.adds(at)
    torch.testing.assert_close(seen[:, columns], 2 * whole[:, columns])


@pytest.mark.parametrize("options", [{}, {"structure": "bat"}])
def test_bone_count_of_llama_2_7b(options: dict[str, Any]) -> None:
    d, f = 4096, 11008
    shapes = [(d, d)] * 4 + [(f, d)] * 2 + [(d, f)]
    m = method("bone", r=64, **options)
    assert 32 * sum(m.init(site(out=o, inside=i), Generator())["D"].numel() for o, i in shapes) == 87_031_808
    assert method("miss", r=4).init(site(out=24, inside=16), Generator())["D"].numel() == 96


@pytest.mark.parametrize(("spec", "said"), [
    ("bone(r=32)", "Bone: r=32 is larger than in=20 at site; choose r ≤ 20."),
    ("bone(r=5, structure='bat')", "Bone: r=5 does not divide out=12 and in=20 at site, as bat must; choose r = 4."),
    ("miss(r=4, mini_r=5)", "MiSS: mini_r=5 does not divide out=12 at site; choose mini_r = 4 or 6."),
])  # fmt: skip
def test_bone_refuses_at_a_site(spec: str, said: str) -> None:
    with pytest.raises(BadValue) as error:
        veneer.parse(spec).check(site())
    assert str(error.value) == said


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"mini_r": 4}])
def test_miss_refuses_what_bat_does_not_have(options: dict[str, Any]) -> None:
    with pytest.raises(BadValue, match=r"goes with structure='bone', not with 'bat'"):
        method("miss", structure="bat", **options)
