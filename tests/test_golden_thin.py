"""MELoRA, GraLoRA, 1LoRA, VeRA, RandLoRA and DeLoRA against numbers from other code, and against their own laws."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_golden import HOME, Case, DenseCall, checked, site
from tiny import SUBJECTS, output
from torch import Generator, Tensor, nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

import veneer
import veneer.registry as registry
from veneer.errors import BadValue
from veneer.kernels import rebuilt_low_rank
from veneer.method import Method
from veneer.site import Site

SPECS = [
    "melora(n=4, r=2)",
    "melora(n=2, r=(1, 3), alpha=(2, 5.0))",
    "gralora(r=4, k=2)",
    "gralora(r=4, k=4, hybrid_r=2, alpha=3)",
    "1lora",
    "1lora(compression='random', seed=3)",
    "vera(r=6)",
    "randlora(r=3, alpha=6)",
    "randlora(r=3, alpha=6, form='peft', bases='sparse')",
    "delora(r=3)",
]
THIN = [spec for spec in SPECS if not spec.startswith("randlora")]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def moved(method: Method, W: Tensor, at: Site | None = None) -> dict[str, Tensor]:
    """A site's tensors in float64, the trained ones moved so that all of them act; they want gradients."""
    at, generator = at or site(out=len(W), inside=W[0].numel()), Generator().manual_seed(0)
    p = {k: t.double() for k, t in {**method.init(at, generator), **method.init_shared([at], generator)}.items()}
    p = method.init_from_weight(W, None, p, at, generator)
    idle = (*method.frozen, *method.fixed)
    return {k: t if k in idle else (t + 0.2 * draw(*t.shape)).requires_grad_() for k, t in p.items()}


def trained(method: Method, *shapes: tuple[int, int]) -> int:
    """Trained numbers for layers of these shapes (out, in)."""
    idle, total = (*method.frozen, *method.fixed), 0
    for out, inside in shapes:
        p = method.init(site(out=out, inside=inside), Generator())
        total += sum(t.numel() for k, t in p.items() if k not in idle)
    return total


# -- against other code -----------------------------------------------------------------------------------------

GOLDEN: list[tuple[str, int, dict[str, Any]]] = [
    ("melora", 0, {"n": 2, "r": 3, "alpha": 6}),
    ("melora", 0, {"n": 2, "r": (3, 3), "alpha": (6, 6)}),
    ("1lora", 0, {}),
    ("gralora", 0, {"r": 4, "k": 2, "alpha": 8}),
    ("gralora", 1, {"r": 4, "k": 4, "hybrid_r": 2, "alpha": 8}),
    ("vera", 0, {"r": 4}),
    ("vera", 1, {"r": 4}),
    ("delora", 0, {"r": 3}),
    ("delora", 1, {"r": 4}),
    ("randlora", 0, {"r": 4, "form": "peft"}),
    ("randlora", 1, {"r": 3, "form": "peft"}),
]


@pytest.mark.parametrize(("slug", "index", "hyper"), GOLDEN)
def test_weights_and_outputs(slug: str, index: int, hyper: dict[str, Any]) -> None:
    case, method = Case(slug, index), registry.method(slug, **hyper)
    at = site(out=case["W"].shape[0], inside=case["W"].shape[1])
    checked(method, case, case["W"], at)
    delta = method.delta(case["x"], case.params(), at)  # type: ignore[attr-defined]
    case.agree("y", linear(case["x"], case["W"], case["b"]) + delta)
    tensors = {k: t.shape for k, t in case.params().items()}
    made = {**method.init(at, Generator()), **method.init_shared([at], Generator())}
    assert slug == "vera" or {k: t.shape for k, t in made.items()} == tensors  # vera's there are shared with a larger layer


@pytest.mark.parametrize(("slug", "index", "hyper"), [g for g in GOLDEN if g[0] in ("1lora", "vera", "delora")])
def test_gradients(slug: str, index: int, hyper: dict[str, Any]) -> None:
    case, method = Case(slug, index), registry.method(slug, **hyper)
    p = case.params(grad=True)
    (
        method.forward(DenseCall(case["W"], case["b"]), case["x"], p, site(out=len(case["b"]), inside=case["x"].shape[-1])) * case["C"]
    ).sum().backward()
    names = [k.removeprefix("grad.") for k in case if k.startswith("grad.")]
    assert names
    for name in names:
        case.agree(f"grad.{name}", p[name].grad)


@pytest.mark.parametrize(("index", "r"), [(0, 4), (1, 3)])
def test_randlora_by_the_paper(index: int, r: int) -> None:
    case, method = Case("randlora", index), registry.method("randlora", r=r, alpha=640)
    p, W = case.params(), case["W"]
    at = site(out=W.shape[0], inside=W.shape[1])
    case.agree("W_eff_paper", method.weight(W, p, at))
    y = method.forward(DenseCall(W, case["b"]), case["x"], p, at)
    torch.testing.assert_close(y, linear(case["x"], case["W_eff_paper"], case["b"]), rtol=0, atol=case.tolerance)


def test_vera_draws_what_peft_draws() -> None:
    case = Case("vera", 0)
    shared = registry.method("vera", r=4, seed=case.hyper["projection_prng_key"]).init_shared(
        [site(), site(out=16, inside=12)], Generator()
    )
    for name, drawn in shared.items():
        torch.testing.assert_close(drawn.double(), case[f"param.{name}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("index", [0, 1])
def test_delora_takes_the_column_norms(index: int) -> None:
    case, method = Case("delora", index), registry.method("delora", r=3)
    p = method.init_from_weight(case["W"], case["b"], {}, site(), Generator())
    case.agree("param.w_n", p["w_n"])


LLAMA_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
LLAMA_13B = [(5120, 5120)] * 4 + [(13824, 5120)] * 2 + [(5120, 13824)]
VIT_L = [(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096)]
VIT_B = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
COUNTS: list[tuple[str, list[tuple[int, int]], int, int]] = [
    ("melora(r=8, n=2)", [(768, 768)] * 2, 12, 294_912),
    ("melora(r=8, n=8)", [(768, 768)] * 2, 12, 294_912),
    ("melora(r=1, n=8)", [(768, 768)] * 2, 12, 36_864),
    ("melora(r=1, n=8)", [(4096, 4096)] * 2, 32, 524_288),
    ("1lora", VIT_L, 24, 221_184),
    ("1lora", VIT_B, 12, 82_944),
    ("1lora", LLAMA_7B, 32, 1_359_872),
    ("1lora(compression='random')", LLAMA_13B, 40, 2_129_920),
    ("vera(r=4)", [(24, 16)], 1, 28),
    ("randlora(r=4)", [(24, 16)], 1, 80),
    ("delora(r=4)", [(24, 16)], 1, 161),
    ("gralora(r=4)", [(24, 16)], 1, 160),
]


@pytest.mark.parametrize(("spec", "shapes", "layers", "expected"), COUNTS)
def test_counts(spec: str, shapes: list[tuple[int, int]], layers: int, expected: int) -> None:
    assert trained(veneer.parse(spec), *shapes) * layers == expected


@pytest.mark.parametrize("slug", ["melora", "1lora", "vera", "delora"])
def test_all_published_counts_are_tested(slug: str) -> None:
    counts = json.loads((HOME / f"{slug}.json").read_text("utf-8"))["counts"]
    assert {c["trainable"] for c in counts} <= {expected for spec, _, _, expected in COUNTS if spec.startswith(slug)}


# -- laws of all of them ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("out", "inside"), [(12, 20), (20, 12), (16, 16)])
def test_fast_path_is_the_definition(spec: str, out: int, inside: int) -> None:
    """Output and gradients of x and of every trained tensor, for leading shapes of any depth."""
    method, W, at = veneer.parse(spec), draw(out, inside), site(out=out, inside=inside)
    p = moved(method, W)
    leaves = [t for t in p.values() if t.requires_grad]
    for lead in ((), (3,), (2, 3), (2, 1, 3)):
        x, towards = draw(*lead, inside).requires_grad_(), draw(*lead, out)
        fast = linear(x, W) + method.delta(x, p, at)  # type: ignore[attr-defined]
        dense = linear(x, method.weight(W, p, at))
        torch.testing.assert_close(fast, dense, rtol=1e-10, atol=1e-10)
        for a, b in zip(torch.autograd.grad(fast, [x, *leaves], towards), torch.autograd.grad(dense, [x, *leaves], towards)):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", THIN)
def test_low_rank_factors_are_exact(spec: str) -> None:
    method, W = veneer.parse(spec), draw(12, 20)
    p = moved(method, W)
    L, R = method.low_rank(W, p, site()) or (W, W)
    torch.testing.assert_close(L @ R, method.weight(W, p, site()) - W, rtol=1e-10, atol=1e-10)


class Made(TorchDispatchMode):
    """Notes the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        if isinstance(given, Tensor):
            self.largest = max(self.largest, given.numel())
        return given


@pytest.mark.parametrize("spec", THIN)
def test_fast_path_makes_nothing_of_the_weights_size(spec: str) -> None:
    method, at = veneer.parse(spec), site(out=160, inside=160)
    p = moved(method, draw(160, 160))
    with Made() as made:
        method.delta(draw(2, 160).requires_grad_(), p, at).sum().backward()  # type: ignore[attr-defined]
    assert made.largest <= 8 * 160


def kept(spec: str, x: Tensor, out: int) -> list[Tensor]:
    """What a layer keeps for backward besides parameters and buffers."""
    model = nn.Sequential(nn.Linear(x.shape[-1], out))
    tuned = veneer.attach(model, veneer.parse(spec), head=False)
    for p in tuned.parameters():
        p.data += 0.1 * torch.randn_like(p)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        model(x).sum().backward()
    return [t for t in seen if t.untyped_storage().data_ptr() not in own]


def same_storage(tensors: list[Tensor], x: Tensor) -> bool:
    return any(t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for t in tensors)


@pytest.mark.parametrize("compression", ["sum", "random"])
def test_1lora_keeps_one_number_a_token(compression: str) -> None:
    x = torch.randn(97, 24)
    tensors = kept(f"1lora(targets='0', compression={compression})", x, 20)
    assert not same_storage(tensors, x)
    assert sorted(t.numel() for t in tensors)[-1] == 97 and sum(t.numel() for t in tensors) <= 97 + 24 + 20


def test_vera_keeps_no_inputs() -> None:
    x = torch.randn(50, 24)
    assert not same_storage(kept("vera(targets='0', r=4)", x, 20), x)


@pytest.mark.parametrize(("inside", "out"), [(24, 40), (24, 24), (40, 24)])
def test_randlora_keeps_inputs_or_products_and_nothing_of_the_weights_size(inside: int, out: int) -> None:
    x = torch.randn(5, inside)
    tensors = kept("randlora(targets='0', r=4)", x, out)
    assert same_storage(tensors, x) == (inside <= out)
    assert max(t.numel() for t in tensors if not same_storage([t], x)) <= 6 * 24  # gamma, or x Rᵀ


def test_melora_and_gralora_keep_inputs_and_thin_products() -> None:
    x = torch.randn(97, 24)
    for spec, width in (("melora(targets='0', n=4, r=2)", 4 * 2), ("gralora(targets='0', k=4, r=4)", 4 * 4)):
        tensors = [t for t in kept(spec, x, 20) if not same_storage([t], x)]
        assert sum(t.numel() for t in tensors if t.numel() % 97 == 0) == 97 * width


@pytest.fixture(params=SPECS)
def tuned(request: pytest.FixtureRequest) -> Iterator[veneer.Tuned]:
    """An adapter with these options on every linear layer of a small encoder, its tensors moved."""
    made = veneer.attach(SUBJECTS["bert"].build(), veneer.parse(request.param), head=False)
    for p in made.parameters():
        p.data += 0.1 * torch.randn_like(p)
    yield made


def test_options_survive_files_and_merging(tuned: veneer.Tuned, tmp_path: Any) -> None:
    batch = SUBJECTS["bert"].batch()
    with torch.no_grad():
        before, plain = output(tuned.model, batch), output(SUBJECTS["bert"].build(), batch)
        assert not torch.allclose(before, plain, rtol=0, atol=1e-6)
        tuned.save(tmp_path)
        assert torch.equal(output(veneer.load(SUBJECTS["bert"].build(), tmp_path).model, batch), before)
        torch.testing.assert_close(output(tuned.merge().model, batch), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("slug", ["1lora", "vera", "randlora"])
def test_fixed_tensors_come_from_the_seed_alone(slug: str) -> None:
    options = {"compression": "random"} if slug == "1lora" else {"r": 3}
    places = [site(out=12, inside=20), site(out=24, inside=8)]

    def shared(seed: int, handed: int) -> dict[str, Tensor]:
        return registry.method(slug, seed=seed, **options).init_shared(places, Generator().manual_seed(handed))

    first, again, other = shared(1, 5), shared(1, 6), shared(2, 5)
    assert set(first) == set(registry.load(slug).fixed)
    assert all(torch.equal(t, again[k]) and t.dtype == torch.float32 for k, t in first.items())
    assert all(not torch.equal(t, other[k]) for k, t in first.items())
    wide = {"a": (20,), "A": (3, 20) if slug == "vera" else (3, 1, 12), "B": (24, 3) if slug == "vera" else (24, 4, 3)}
    assert all(tuple(t.shape) == wide[k] for k, t in first.items())


# -- MELoRA -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(3, 3), (1, 4), (2, 2, 1, 3)])
def test_melora_is_block_diagonal_and_of_the_sum_of_the_ranks(ranks: tuple[int, ...]) -> None:
    n = len(ranks)
    method, W = registry.method("melora", n=n, r=ranks), draw(24, 20)
    change = method.weight(W, moved(method, W)) - W
    blocks = change.unflatten(0, (n, -1)).unflatten(2, (n, -1))
    for i in range(n):
        for j in range(n):
            if i == j:
                assert torch.linalg.matrix_rank(blocks[i, :, j]) == ranks[i]
            else:
                assert not blocks[i, :, j].any()
    assert torch.linalg.matrix_rank(change) == sum(ranks)


def test_one_mini_adapter_is_lora() -> None:
    W, x, at = draw(12, 20), draw(2, 5, 20), site()
    mini, lora = registry.method("melora", n=1, r=3, alpha=6), registry.method("lora", r=3, alpha=6)
    A, B = draw(3, 20), draw(12, 3)
    torch.testing.assert_close(mini.weight(W, {"A0": A, "B0": B}), lora.weight(W, {"A": A, "B": B}), rtol=0, atol=1e-13)
    torch.testing.assert_close(mini.delta(x, {"A0": A, "B0": B}, at), lora.delta(x, {"A": A, "B": B}, at))
    first = mini.init(at, Generator().manual_seed(4)), lora.init(at, Generator().manual_seed(4))
    assert torch.equal(first[0]["A0"], first[1]["A"]) and torch.equal(first[0]["B0"], first[1]["B"])


def test_melora_scales_by_the_mini_rank_and_minds_the_order_of_features() -> None:
    method, W, order = registry.method("melora", n=4, r=1, alpha=16), draw(12, 20), torch.randperm(20)
    assert method.scales == [16.0] * 4
    p, x = moved(method, W), draw(3, 20)
    assert not torch.allclose(method.delta(x[:, order.roll(7)], p, site()), method.delta(x[:, order], p, site()))
    assert registry.method("melora", n=2, r=(1, 4), alpha=(2, 2)).scales == [2.0, 0.5]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": (1, 2, 3)}, "MELoRA: r=(1, 2, 3) does not fit n=2 mini adapters; give one number for all, or 2."),
        ({"alpha": (1.0,)}, "MELoRA: alpha=(1.0,) does not fit n=2 mini adapters; give one number for all, or 2."),
        ({"r": (1, 0)}, "MELoRA: r=0 is out of range; it must be at least 1."),
        ({"r": (1, 2.5)}, "MELoRA: r=2.5 must be an int"),
    ],
)
def test_melora_refuses_lists_that_do_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises(BadValue) as refused:
        registry.method("melora", **options)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("melora(n=8)", "MELoRA: n=8 does not divide in=20 and out=12 at site; choose n = 4."),
        ("melora(n=3)", "MELoRA: n=3 does not divide in=20 and out=12 at site; choose n = 2 or 4."),
        ("gralora(k=8)", "GraLoRA: k=8 does not divide in=20 and out=12 at site; choose k = 4."),
        ("gralora(k=3, r=9)", "GraLoRA: k=3 does not divide in=20 and out=12 at site; choose k = 1."),
    ],
)
def test_refuses_blocks_that_do_not_divide(spec: str, said: str) -> None:
    with pytest.raises(BadValue) as refused:
        veneer.parse(spec).check(site())
    assert str(refused.value) == said


# -- GraLoRA ----------------------------------------------------------------------------------------------------


def test_gralora_block_by_block() -> None:
    k, r, h = 4, 8, 3
    method, W = registry.method("gralora", k=k, r=r, hybrid_r=h, alpha=5), draw(12, 20)
    p, u = moved(method, W), r // k
    change = method.weight(W, p) - W - 5 / (r + h) * p["B_general"] @ p["A_general"]
    for q in range(k):
        for n in range(k):
            block = p["B"][q, n * u : (n + 1) * u].T @ p["A"][n][:, q * u : (q + 1) * u].T
            torch.testing.assert_close(change[3 * q : 3 * q + 3, 5 * n : 5 * n + 5], 5 / (r + h) * block)


@pytest.mark.parametrize(("k", "r"), [(1, 4), (2, 4), (4, 4), (4, 8), (2, 12)])
def test_gralora_has_k_times_loras_rank(k: int, r: int) -> None:
    method, W = registry.method("gralora", k=k, r=r), draw(24, 28)
    assert torch.linalg.matrix_rank(method.weight(W, moved(method, W)) - W) == min(k * r, 24)


def test_gralora_of_one_block_is_lora() -> None:
    W, p = draw(12, 20), {"A": draw(1, 20, 3), "B": draw(1, 3, 12)}
    lora = registry.method("lora", r=3, alpha=6).weight(W, {"A": p["A"][0].T, "B": p["B"][0].T})
    torch.testing.assert_close(registry.method("gralora", k=1, r=3, alpha=6).weight(W, p), lora)


def test_gralora_refuses_ranks_that_k_does_not_divide() -> None:
    with pytest.raises(BadValue) as refused:
        registry.method("gralora", k=4, r=6)
    assert str(refused.value) == "GraLoRA: k=4 does not divide r=6; choose k = 3 or 6, or r = 8."


# -- 1LoRA ------------------------------------------------------------------------------------------------------


def test_1lora_is_lora_of_rank_one_with_ones() -> None:
    method, W, x = registry.method("1lora"), draw(12, 20), draw(2, 5, 20)
    p = moved(method, W)
    change = method.weight(W, p, site()) - W
    assert torch.linalg.matrix_rank(change) == 1
    torch.testing.assert_close(change, p["b"][:, None].expand(12, 20))
    lora = registry.method("lora", r=1, alpha=1).weight(W, {"A": torch.ones(1, 20).double(), "B": p["b"][:, None]})
    assert torch.equal(method.weight(W, p, site()), lora)
    torch.testing.assert_close(method.delta(x, p, site()), x.sum(-1, keepdim=True) * p["b"])


def test_1lora_with_a_random_vector() -> None:
    method, W = registry.method("1lora", compression="random", seed=4), draw(12, 20)
    shared = method.init_shared([site(), site(inside=33)], Generator())
    a, p = shared["a"].double(), {"b": draw(12)}
    torch.testing.assert_close(method.weight(W, {**p, "a": a}, site()) - W, torch.outer(p["b"], a[:20]))


# -- VeRA and RandLoRA ------------------------------------------------------------------------------------------


def test_vera_is_its_formula_on_parts_of_larger_matrices() -> None:
    method, W = registry.method("vera", r=5), draw(12, 20)
    p = {"A": draw(5, 40), "B": draw(30, 5), "lambda_b": draw(12), "lambda_d": draw(5)}
    formula = torch.diag(p["lambda_b"]) @ p["B"][:12] @ torch.diag(p["lambda_d"]) @ p["A"][:, :20]
    torch.testing.assert_close(method.weight(W, p, site()) - W, formula)
    start = method.init(site(), Generator())
    assert (start["lambda_d"] == 0.1).all() and not start["lambda_b"].any()


@pytest.mark.parametrize(("out", "inside", "r"), [(12, 20, 4), (20, 12, 5), (16, 16, 3), (12, 20, 1), (12, 20, 50)])
def test_randlora_is_a_sum_over_bases_of_full_rank(out: int, inside: int, r: int) -> None:
    method, W, least = registry.method("randlora", r=r, alpha=2), draw(out, inside), min(out, inside)
    n = -(-least // r)
    p = {"A": draw(r, 1, 30), "B": draw(40, n + 2, r), "lambda": draw(r, n), "gamma": draw(n, least)}
    total = sum(
        p["B"][: max(out, inside), j] @ torch.diag(p["lambda"][:, j]) @ p["A"][:, 0, :least] @ torch.diag(p["gamma"][j]) for j in range(n)
    )
    change = method.weight(W, p, site(out=out, inside=inside)) - W
    torch.testing.assert_close(change, 2 / r * (total if inside <= out else total.T))  # type: ignore[union-attr]
    assert torch.linalg.matrix_rank(change) == least


def test_randlora_forms_differ() -> None:
    W, p = draw(12, 12), {"A": draw(4, 1, 12), "B": draw(12, 3, 4), "lambda": draw(4, 3), "gamma": draw(3, 12)}
    paper, peft = (registry.method("randlora", r=4, form=form).weight(W, p, site(inside=12)) for form in ("paper", "peft"))
    assert not torch.allclose(paper, peft)


@pytest.mark.parametrize(("bases", "s"), [("uniform", None), ("sparse", 3.0), ("very_sparse", 10.0)])
def test_randlora_bases_have_variance_one(bases: str, s: float | None) -> None:
    method = registry.method("randlora", r=20, bases=bases, seed=int(torch.randint(10_000, ())))
    B = method.init_shared([site(out=500, inside=100)], Generator())["B"]  # 50,000 entries
    assert B.shape == (500, 5, 20)
    assert B.mean().abs() < 6 * 50_000**-0.5
    assert abs(float(B.square().mean()) - 1) < 6 * ((s or 1.8) / 50_000) ** 0.5
    if s is not None:
        levels = B.unique()
        torch.testing.assert_close(levels, torch.tensor([-(s**0.5), 0, s**0.5]))


@pytest.mark.parametrize("frozen", [(), ("lambda",), ("gamma",), ("lambda", "gamma")])
@pytest.mark.parametrize(("out", "inside"), [(6, 8), (8, 6)])
def test_kernel_of_rebuilt_factors(out: int, inside: int, frozen: tuple[str, ...]) -> None:
    method, at = registry.method("randlora", r=2, alpha=2), site(out=out, inside=inside)
    p = {k: t.detach().requires_grad_(k in ("lambda", "gamma") and k not in frozen) for k, t in moved(method, draw(out, inside)).items()}
    x = draw(2, 3, inside).requires_grad_()

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        return rebuilt_low_rank.rebuilt_low_rank(x, lambda q: method.pair(q, at), dict(zip(p, tensors)))  # type: ignore[attr-defined]

    torch.testing.assert_close(run(x, *p.values()), rebuilt_low_rank.reference(x, lambda q: method.pair(q, at), p))  # type: ignore[attr-defined]
    assert torch.autograd.gradcheck(run, (x, *p.values()))


# -- DeLoRA -----------------------------------------------------------------------------------------------------


def test_delora_is_bounded_and_minds_directions_only() -> None:
    method, W = registry.method("delora", r=4, lambda_initial=3), draw(12, 20)
    p = moved(method, W)
    change = method.weight(W, p) - W
    assert torch.linalg.matrix_rank(change) == 4
    assert torch.linalg.matrix_norm(change / p["w_n"]) <= p["lambda"].abs() * (1 + 1e-12)
    torch.testing.assert_close(method.weight(W, {**p, "A": 7 * p["A"], "B": 0.3 * p["B"]}), method.weight(W, p))
    one = registry.method("delora", r=1, lambda_initial=3)
    alone = one.weight(W, {**p, "A": p["A"][:1], "B": p["B"][:, :1]}) - W  # of rank one the bound is met
    torch.testing.assert_close(torch.linalg.matrix_norm(alone / p["w_n"]), p["lambda"].abs()[0])


def test_delora_starts_with_lambda_15_except_in_narrow_layers() -> None:
    def first(inside: int, **options: float) -> float:
        return float(registry.method("delora", **options).init(site(inside=inside), Generator())["lambda"])

    assert first(625) == first(768) == first(11008) == first(20, lambda_initial=15) == 15
    assert first(16) == pytest.approx(2.4)


def test_delora_has_gradients_at_its_start() -> None:
    method, W, x = registry.method("delora", r=4), draw(12, 20), draw(3, 20)
    p = {k: t.double() for k, t in method.init(site(), Generator()).items()}
    p = method.init_from_weight(W, None, p, site(), Generator())
    p = {k: t.requires_grad_(k != "w_n") for k, t in p.items()}
    assert torch.equal(method.weight(W, p), W)
    method.delta(x, p, site()).sum().backward()
    assert all(torch.isfinite(p[k].grad).all() for k in ("A", "B", "lambda")) and p["B"].grad.any()
