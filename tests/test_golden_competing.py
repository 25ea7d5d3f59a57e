"""SNELL, SNELLA and PST against numbers from their authors' own code, and against their own laws."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_golden import Case, DenseCall, checked, site
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import veneer
import veneer.registry as registry
from veneer.errors import BadValue
from veneer.kernels import kernelised
from veneer.maths.competition import distances, piecewise
from veneer.maths.order_statistics import quantile, smallest
from veneer.method import Method
from veneer.site import Site
from veneer.strategies.entry_budget import EntryBudget, Schedule, allotted
from veneer.strategies.pruning import n_of_m, prune, sparsity_at

KERNELS = [
    "snell(r=6, s=0.6)",
    "snell(r=6, s=0.0)",
    "snell(r=6, P=3, s=0.3, gate='paper')",
    "snell(r=4, s=0.5, train_alpha=True)",
    "snell(r=4, s=0.5, kernel='linear')",
    "snell(r=4, s=0.7, kernel='sigmoid')",
    "snell(r=4, s=0.0, kernel='rbf')",
    "snella(r=6, init_thres=0.4)",
    "snella(r=6, variant='mixk')",
]
UNGATED = [spec for spec in KERNELS if "s=0.0" in spec or "mixk" in spec]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def moved(method: Method, at: Site | None = None) -> dict[str, Tensor]:
    """A site's tensors in float64, the trained ones moved so that all of them act; they want gradients."""
    p = {k: t.double() if t.is_floating_point() else t for k, t in method.init(at or site(), Generator().manual_seed(0)).items()}
    return {k: t if k in method.frozen else (t + 0.2 * draw(*t.shape)).requires_grad_() for k, t in p.items()}


def gradients(y: Tensor, towards: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, tensors, towards, retain_graph=True)


def trained(method: Method, *shapes: tuple[int, int]) -> int:
    """Trained numbers for layers of these shapes (out, in)."""
    made = [method.init(site(out=out, inside=inside), Generator()) for out, inside in shapes]
    return sum(t.numel() for p in made for k, t in p.items() if k not in method.frozen)


@pytest.fixture(params=[1 << 22, 50])
def limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The whole of K in one piece, and in many."""
    monkeypatch.setattr(kernelised, "LIMIT", request.param)
    return request.param


# -- against the authors' code ----------------------------------------------------------------------------------


GOLDEN: list[tuple[str, int, dict[str, Any]]] = [
    ("snell", 0, {"r": 6, "s": 0.6}),
    ("snell", 1, {"r": 6, "s": 0.0}),
    ("snella", 0, {"r": 6}),
    ("snella", 1, {"r": 6, "variant": "mixk"}),
]


def opened(slug: str, index: int) -> Case:
    case = Case(slug, index)
    if case.hyper.get("variant") == "SNELLA":
        case["param.s"] = torch.tensor([case.hyper["s"]], dtype=torch.float64)
    return case


@pytest.mark.parametrize(("slug", "index", "hyper"), GOLDEN)
def test_kernels_and_gates(slug: str, index: int, hyper: dict[str, Any], limit: int) -> None:
    case, method = opened(slug, index), registry.method(slug, **hyper)
    p = case.params()
    case.agree("out.K", method.matrix(p))  # type: ignore[attr-defined]
    checked(method, case, case["W"], site())
    if "out.delta" in case:
        case.agree("out.delta", method.change(p, site()))  # type: ignore[attr-defined]
    if "out.threshold" in case:
        K = case["out.K"]
        case.agree("out.threshold", method.threshold(lambda: [K], K.numel(), K))  # type: ignore[attr-defined]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(("slug", "index", "hyper"), GOLDEN)
def test_kernel_gradients(slug: str, index: int, hyper: dict[str, Any], fast: bool, limit: int) -> None:
    case, method = opened(slug, index), registry.method(slug, **hyper)
    p, x = case.params(), case["x"].clone().requires_grad_()
    names = [k.removeprefix("grad.") for k in case if k.startswith("grad.") and k != "grad.x"]
    for name in names:
        p[name].requires_grad_()
    call = DenseCall(case["W"], case["b"])
    y = call(x) + method.delta(x, p, site()) if fast else method.forward(call, x, p, site())  # type: ignore[attr-defined]
    case.agree("y", y)
    (y * case["grad_y"]).sum().backward()
    assert set(names) == p.keys() - {"s"}
    for name in names:
        case.agree(f"grad.{name}", p[name].grad)
    if "grad.x" in case:
        case.agree("grad.x", x.grad)


def test_snella_scores_and_budget() -> None:
    case = Case("snella", 2)
    h, sizes = case.hyper, [i * o for i, o in case.hyper["shapes_in_out"]]
    schedule = Schedule(h["total_epochs"], h["init_thres"], h["target_ratio"], h["init_warmup"], h["final_warmup"], h["mask_interval"])
    budget = EntryBudget("snella", schedule, h["total_epochs"], h["beta1"], h["beta2"])
    for i in range(len(sizes)):
        p = {k: case[f"param.{k}.{i}"].clone().requires_grad_() for k in ("A", "B")}
        budget.layers[f"layer{i}"] = {**p, "s": torch.zeros(1, dtype=torch.float64)}
        budget.sizes[f"layer{i}"] = sizes[i]
    for t in range(3):
        for i, p in enumerate(budget.layers.values()):
            for k in ("A", "B"):
                p[k].grad = case[f"grad.{k}.{i}.{t}"]
        with torch.no_grad():
            budget.update()
    case.agree("score.layer", torch.tensor(budget.shares(), dtype=torch.float64))
    for epoch in (4, 9):
        volume = schedule.at(epoch, sum(sizes))
        assert volume == int(case[f"out.volume.{epoch}"])
        with torch.no_grad():
            budget.set(epoch - 1, epoch)
        case.agree(f"out.s.{epoch}", torch.cat([p["s"] for p in budget.layers.values()]))


def pst_of(case: Case) -> tuple[Method, dict[str, Tensor]]:
    h = case.hyper
    method = registry.method("pst", **{k: h[k] for k in ("weight_rank", "mask_rank", "alpha1", "alpha2", "beta")})
    case["param.pruned"] = torch.tensor([int(case["W"].numel() * h["sparsity"])])
    return method, {k: t if k == "pruned" else t.requires_grad_() for k, t in case.params().items()}


@pytest.mark.parametrize("index", range(3))
def test_pst(index: int) -> None:
    case = Case("pst", index)
    method, p = pst_of(case)
    x, W = case["x"].clone().requires_grad_(), case["W"]
    checked(method, case, W, site())
    _, S = method.scored(W, p)  # type: ignore[attr-defined]
    case.agree("score.S", S)
    assert torch.equal(method.mask(S, p), case["mask"].bool())  # type: ignore[attr-defined]
    (method.forward(DenseCall(W, case["b"]), x, p, site()) * case["grad_y"]).sum().backward()
    case.agree("grad.x", x.grad)
    for name in ("U", "V", "A", "B", "R", "C"):
        case.agree(f"grad.{name}", p[name].grad)


VIT_B = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
COUNTS = [
    ("snell(r=8)", 1_327_104),
    ("snell(r=32)", 5_308_416),
    ("snella(r=32)", 5_308_632),
    ("pst", 2_820_096),
]


@pytest.mark.parametrize(("spec", "expected"), COUNTS)
def test_counts(spec: str, expected: int) -> None:
    assert 12 * trained(veneer.parse(spec), *VIT_B) == expected


# -- order statistics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_order_statistics(dtype: torch.dtype) -> None:
    for round_off in (False, True):
        x = draw(7, 61).to(dtype) * 10.0 ** float(torch.randint(-20, 20, ()))
        if round_off:  # ties, and zeros of both signs
            x = (x / x.abs().max() * 3).round() * -1.0
        n, q = x.numel(), float(torch.rand(()))
        found = quantile(lambda: x.split(2), n, q, x)  # noqa: B023
        torch.testing.assert_close(found, torch.quantile(x, q), rtol=1e-5, atol=0)
        for k in (0, 1, int(torch.randint(n, ())), n):
            mask = torch.zeros(n, dtype=torch.bool)
            mask[x.flatten().sort(stable=True).indices[:k]] = True
            assert torch.equal(smallest(x, torch.tensor([k])).flatten(), mask)


def test_a_quantile_of_more_numbers_than_torch_takes() -> None:
    n = (1 << 24) + 1001
    found = quantile(lambda: torch.arange(n, dtype=torch.float32).sub_(1e7).split(1 << 22), n, 0.75, torch.zeros(()))
    assert float(found) == pytest.approx(0.75 * (n - 1) - 1e7, abs=1)


# -- kernels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", KERNELS)
def test_what_backward_builds_again_is_the_definition(spec: str, limit: int) -> None:
    method, W = veneer.parse(spec), draw(12, 20)
    p = moved(method)
    leaves = [t for t in p.values() if t.requires_grad]
    for shape in ((20,), (5, 20), (2, 3, 20)):
        x = draw(*shape).requires_grad_()
        dense = F.linear(x, method.weight(W, p, site()))
        towards = torch.randn_like(dense)
        call = DenseCall(W)
        for y in (call(x) + method.delta(x, p, site()), method.forward(call, x, p, site())):  # type: ignore[attr-defined]
            torch.testing.assert_close(y, dense)
            for a, b in zip(gradients(y, towards, x, *leaves), gradients(dense, towards, x, *leaves)):
                torch.testing.assert_close(a, b)
    frozen = {k: t.detach() for k, t in p.items()}
    x = draw(3, 20).requires_grad_()
    (only,) = gradients(method.delta(x, frozen, site()), towards.flatten(0, -2)[:3], x)  # type: ignore[attr-defined]
    torch.testing.assert_close(only, towards.flatten(0, -2)[:3] @ method.change(frozen, site()))  # type: ignore[attr-defined]


@pytest.mark.parametrize("spec", UNGATED)
def test_gradients_are_differences_without_a_gate(spec: str, limit: int) -> None:
    method, x = veneer.parse(spec), draw(4, 20)
    p = moved(method)
    names = list(p)
    assert torch.autograd.gradcheck(lambda *t: method.delta(x, dict(zip(names, t)), site()), tuple(p.values()))  # type: ignore[attr-defined]


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for t in made if isinstance(made, tuple | list) else [made]:
            if isinstance(t, Tensor) and t.untyped_storage().nbytes() // t.element_size() == t.numel():
                self.numel = max(self.numel, t.numel())
        return made


@pytest.mark.parametrize("spec", ["snell(r=2, s=0.6)", "snella(r=2)"])
def test_neither_kept_nor_formed(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernelised, "LIMIT", 40_000)
    method, at = veneer.parse(spec), site(out=500, inside=600)
    p, x, saved = moved(method, at), draw(4, 600).requires_grad_(), list[Tensor]()
    with Largest() as seen:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
            y = method.delta(x, p, at)  # type: ignore[attr-defined]
        y.sum().backward()
    assert max(t.numel() for t in saved) <= 4 * 600
    assert seen.numel <= max(45_000, 1 << 16)  # a piece, or the counts of a digit


def test_one_piece_is_not_kept_either() -> None:
    model = nn.Sequential(nn.Linear(40, 50))
    for spec in ("snell(targets='0', s=0.5)", "snella(targets='0')", "pst(targets='0', initial_sparsity=0.5)"):
        tuned, saved = veneer.attach(model, spec), list[Tensor]()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):  # noqa: B023
            y = model(torch.randn(3, 40))
        y.sum().backward()
        assert max(t.numel() for t in saved) < 50 * 40
        assert all(p.grad is not None for p in tuned.parameters())
        tuned.detach()


def test_rows_that_meet_have_no_gradient() -> None:
    A, B = draw(5, 3), draw(4, 3)
    B[2] = A[1]
    A.requires_grad_(), B.requires_grad_()
    D = distances(B, A)
    torch.testing.assert_close(D, torch.cdist(B, A, compute_mode="donot_use_mm_for_euclid_dist"))
    assert D[2, 1] == 0
    gA, gB = gradients(D[2, 1], torch.ones((), dtype=torch.float64), A, B)
    assert not gA.any() and not gB.any()


def test_near_rows_in_float32() -> None:
    A = torch.randn(30, 4)
    B = A[:20] + 1e-4 * torch.randn(20, 4)
    exact = torch.cdist(B.double(), A.double(), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(distances(B, A).double(), exact, rtol=1e-5, atol=1e-7)


def test_the_kernel_has_full_rank_and_the_linear_one_is_lora() -> None:
    at = site(out=40, inside=56)
    snell = registry.method("snell", s=0.0)
    assert torch.linalg.matrix_rank(snell.change(moved(snell, at), at)) == 40  # type: ignore[attr-defined]
    linear = registry.method("snell", s=0.0, kernel="linear")
    p, W, x = moved(linear, at), draw(40, 56), draw(3, 56)
    lora = registry.method("lora", r=8)
    torch.testing.assert_close(linear.weight(W, p, at), lora.weight(W, {"A": p["A"].T, "B": p["B"]}, at))
    torch.testing.assert_close(linear.forward(DenseCall(W), x, p, at), lora.forward(DenseCall(W), x, {"A": p["A"].T, "B": p["B"]}, at))


def test_as_many_entries_change_as_asked() -> None:
    n = 12 * 20
    for s in (0.0, 0.3, 0.6, 0.9, 0.995, *torch.rand(5).tolist()):
        code, paper = registry.method("snell", r=4, s=s), registry.method("snell", r=4, s=s, gate="paper")
        p = moved(code)
        K, kept = code.matrix(p), n - 1 - math.floor(s * (n - 1)) if s else n  # type: ignore[attr-defined]
        change = code.change(p, site())  # type: ignore[attr-defined]
        assert change.count_nonzero() == kept
        if s:
            torch.testing.assert_close(change, K * K.abs() * (K.abs() > torch.quantile(K.abs(), s)))
            t = K.abs().flatten().sort().values[math.ceil(s * n) - 1]
            torch.testing.assert_close(paper.change(p, site()), K * (K.abs() - t).relu())  # type: ignore[attr-defined]


def test_the_paper_gates_gradient() -> None:
    method = registry.method("snell", r=4, s=0.6, gate="paper")
    K, G = draw(12, 20).requires_grad_(), draw(12, 20)
    t = K.detach().abs().median()
    (gK,) = gradients(method.gated(K, t), G, K)  # type: ignore[attr-defined]
    torch.testing.assert_close(gK, G * (2 * K.abs() - t) * (K.abs() > t))


def test_first_matrices() -> None:
    at = site(out=300, inside=500)
    p = registry.method("snell", r=8, P=4).init(at, Generator().manual_seed(1))
    for name, n in (("A", 500), ("B", 300)):
        bound = 1 / math.sqrt(n * 2)
        assert 0.99 * bound < p[name].abs().max() <= bound
    change = registry.method("snell", r=8, s=0.9).change(p, at)  # type: ignore[attr-defined]
    assert 0 < change.abs().max() < 1e-3


def test_the_kernel_fits_what_a_product_of_the_same_rank_does_not() -> None:
    torch.manual_seed(0)
    target, at, left = torch.randn(24, 24), site(out=24, inside=24), {}
    for kernel in ("piecewise", "linear"):
        method = registry.method("snell", r=8, s=0.0, kernel=kernel, alpha=1.0)
        p = {k: t.requires_grad_() for k, t in method.init(at, Generator().manual_seed(0)).items()}
        adam = torch.optim.Adam(p.values(), 0.05)
        for _ in range(600):
            adam.zero_grad()
            loss = F.mse_loss(method.change(p, at), target)  # type: ignore[attr-defined]
            loss.backward()
            adam.step()
        left[kernel] = float(loss.detach())
    assert left["piecewise"] < left["linear"]


def test_what_training_drops() -> None:
    method = veneer.parse("snell(r=4, s=0.5, drop_path=0.5)")
    p, W, x = moved(method), draw(12, 20), draw(400, 2, 20)
    base, full = F.linear(x, W), method.forward(DenseCall(W), x, p, site())
    torch.testing.assert_close(full, F.linear(x, method.weight(W, p, site())))
    change = method.forward(DenseCall(W, training=True), x, p, site()) - base
    gone = change.flatten(1).abs().amax(1) < 1e-12
    torch.testing.assert_close(change[~gone], 2 * (full - base)[~gone])
    assert 0.3 < gone.double().mean() < 0.7
    drops = veneer.parse("snell(r=4, s=0.5, dropout=0.4)")
    training = DenseCall(W, training=True)
    torch.testing.assert_close(drops.forward(training, x, p, site("attn.o")), full)
    q = drops.forward(training, x, p, site("attn.q"))
    assert (q - full).abs().max() > 1e-3 and not drops.adds(site()) and veneer.parse("snell").adds(site())
    torch.testing.assert_close(q.mean(0), full.mean(0), rtol=0, atol=0.5)


def test_half_precision_keeps_small_changes(limit: int) -> None:
    method = registry.method("snell", r=8, s=0.5)
    p = {k: t.detach().float() for k, t in moved(method).items()}
    p = {k: 0.2 * t for k, t in p.items()}
    x = draw(64, 20)
    exact = x @ method.change(p, site()).double().T  # type: ignore[attr-defined]
    found = method.delta(x.bfloat16(), p, site())  # type: ignore[attr-defined]
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).norm() < 0.02 * exact.norm()
    with torch.autocast("cpu", torch.bfloat16):
        again = method.delta(x.float(), p, site())  # type: ignore[attr-defined]
    assert torch.equal(again, found)


def refused(spec: str, *words: str, at: Site | None = None) -> None:
    with pytest.raises(BadValue) as error:
        method = veneer.parse(spec)
        method.check(at or site())
    assert all(word in str(error.value) for word in words), str(error.value)


def test_refusals() -> None:
    refused("snell(r=7)", "SNELL", "P=2", "r=7", "r = 6")
    refused("snell(s=1.0)", "s=1.0", "less than 1")
    refused("snell(s=0.999, gate='paper')", "none of the 240 entries", "at site", "1 − 1/240")
    refused("snell(kernel='rbf', train_alpha=True)", "rbf")
    refused("snella(r=5)", "r=5", "r = 6")
    refused("snella(epochs=4, init_warmup=2, final_warmup=2)", "init_warmup=2", "4 epochs")
    refused("pst(initial_warmup=0.6, final_warmup=0.5)", "0.6", "more than 1")
    refused("pst(sparsity=1.0)", "sparsity=1.0", "less than 1")


# -- layers that compete ----------------------------------------------------------------------------------------


def test_the_softmax_runs_over_outputs() -> None:
    method, p = registry.method("snella", r=4), moved(registry.method("snella", r=4))
    D, zero, one = piecewise(p["B"], p["A"], (0.1, -0.1)), torch.zeros(1), torch.ones(1)
    soft = method.matrix({**p, "alpha": one, "beta": zero}) - D  # type: ignore[attr-defined]
    torch.testing.assert_close(soft.sum(0), torch.ones(20, dtype=torch.float64))
    flat = method.matrix({**p, "alpha": zero, "beta": zero + 3})  # type: ignore[attr-defined]
    torch.testing.assert_close(flat, D + 3)
    for gamma in (0.0, -1e-9, 1e-5):
        p["gamma"] = torch.tensor([gamma], dtype=torch.float64, requires_grad=True)
        K = method.matrix(p)  # type: ignore[attr-defined]
        assert K.isfinite().all() and gradients(K.sum(), torch.ones_like(K.sum()), p["gamma"])[0].isfinite().all()


def test_allotted_entries() -> None:
    assert allotted(30, [1 / 3] * 3, [20, 20, 20]) == [10, 10, 10]
    full = allotted(30, [0.98, 0.01, 0.01], [20, 20, 20])
    assert full == [20, 5, 5]
    assert allotted(10, [1.0, 0.0, 0.0], [4, 50, 50]) == [4, 3, 3]  # nothing tells the others apart
    assert allotted(99, [0.2, 0.8], [4, 5]) == [4, 5]
    for _ in range(50):
        sizes = torch.randint(1, 10_000, (9,)).tolist()
        scores = torch.rand(9).pow(float(torch.rand(())) * 20).tolist()
        volume = int(torch.rand(()) * sum(sizes))
        a = allotted(volume, [q / sum(scores) for q in scores], sizes)
        assert all(0 <= each <= n for each, n in zip(a, sizes))
        assert volume - len(sizes) <= sum(a) <= volume


def test_the_budget_only_falls() -> None:
    schedule = Schedule(20, 0.1, 0.7, before=3, after=5, interval=2)
    volumes = [schedule.at(e, 1000) for e in range(20)]
    assert volumes[:4] == [None] * 4 and set(volumes[16:]) == {300}
    assert [v is None for v in volumes[4:16]] == [e % 2 > 0 for e in range(4, 16)]
    falls = [v for v in volumes if v is not None]
    assert falls == sorted(falls, reverse=True) and falls[0] <= 900


class Two(nn.Module):
    """Two layers, of which only the first reaches the output."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(12, 10), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + 1e-4 * self.idle(x)


def steps(tuned: Any, count: int, optimiser: torch.optim.Optimizer, generator: Generator) -> None:
    for _ in range(count):
        optimiser.zero_grad()
        x = torch.randn(8, 12, generator=generator)
        (tuned.model(x) - x[:, :10]).square().mean().backward()
        tuned.before_step()
        optimiser.step()
        tuned.after_step()


def ratios(tuned: Any) -> list[float]:
    return [float(p["s"]) for _, _, p in tuned.entries()]


def test_the_layer_that_matters_wins_entries() -> None:
    tuned = veneer.attach(Two(), "snella(r=4, target_ratio=0.6, targets='used idle')")
    tuned.begin(total_steps=20)
    optimiser = torch.optim.Adam(tuned.parameters(), 1e-2)
    steps(tuned, 19, optimiser, Generator().manual_seed(0))
    used, idle = ratios(tuned)
    assert used < idle
    kept = sum((1 - s) * 120 for s in (used, idle))
    last = Schedule(100, 0.0, 0.6).at(95, 240)
    assert last is not None and last - 2.01 <= kept <= last + 1e-4
    steps(tuned, 3, optimiser, Generator().manual_seed(0))
    assert ratios(tuned) == [used, idle]  # all steps are over


@pytest.mark.parametrize(
    ("spec", "held"), [("snella(r=4, epochs=10, metric='mag', targets='used idle')", "s"), ("pst(targets='used idle')", "pruned")]
)
def test_strategies_resume(spec: str, held: str) -> None:
    def begun(model: nn.Module) -> tuple[Any, torch.optim.Optimizer]:
        tuned = veneer.attach(model, spec, seed=3)
        tuned.begin(total_steps=20)
        return tuned, torch.optim.Adam(tuned.parameters(), 1e-2)

    torch.manual_seed(1)
    whole, optimiser = begun(Two())
    steps(whole, 9, optimiser, Generator().manual_seed(5))
    torch.manual_seed(1)
    again, other = begun(Two())
    again.load_strategy_state(whole.strategy_state())
    with torch.no_grad():
        for (_, _, p), (_, _, q) in zip(whole.entries(), again.entries()):
            for key in p:
                q[key].copy_(p[key])
    other.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for tuned, adam in ((whole, optimiser), (again, other)):
        steps(tuned, 8, adam, Generator().manual_seed(6))
    for (_, _, p), (_, _, q) in zip(whole.entries(), again.entries()):
        assert all(torch.equal(p[key], q[key]) for key in p)
        assert float(p[held]) > 0


@pytest.mark.parametrize(("spec", "name"), [("snella(r=4, targets='used')", "SNELLA"), ("pst(targets='used')", "PST")])
def test_the_number_of_steps_is_asked_for(spec: str, name: str) -> None:
    tuned = veneer.attach(Two(), spec)
    with pytest.raises(BadValue, match=f"{name} needs the number of optimiser steps"):
        steps(tuned, 1, torch.optim.Adam(tuned.parameters(), 1e-2), Generator())


# -- pruning ----------------------------------------------------------------------------------------------------


def test_the_cubic_of_sparsity() -> None:
    path = [sparsity_at(t, 100, 0.1, 0.9, 0.2, 0.3) for t in range(101)]
    assert path[:21] == [0.1] * 21 and path[71:] == [0.9] * 30 and path == sorted(path)
    assert path[45] == pytest.approx(0.9 - 0.8 * 0.5**3)
    assert sparsity_at(100, 100, 0.0, 0.9, 0.0, 0.0) == sparsity_at(100, 100, 0.0, 0.9, 0.5, 0.5) == 0.9


def pst_cases() -> Iterator[tuple[Method, dict[str, Tensor], Tensor]]:
    for start in ("normal", "lora"):
        for sparsity in (0.0, 0.37, 0.9, float(torch.rand(()))):
            method = registry.method("pst", weight_rank=3, mask_rank=2, start=start, initial_sparsity=sparsity)
            yield method, moved(method), draw(12, 20)


def test_exactly_so_many_zeros_and_a_thin_update() -> None:
    for method, p, W in pst_cases():
        k = int(240 * method.initial_sparsity)  # type: ignore[attr-defined]
        assert int(p["pruned"]) == k and int((method.weight(W, p) == 0).sum()) == k
        tied = torch.ones(12, 20, dtype=torch.float64)
        start = {name: t.double() if t.is_floating_point() else t for name, t in method.init(site(), Generator()).items()}
        zeros = method.weight(tied, start).flatten() == 0
        assert zeros[:k].all() and not zeros[k:].any()  # of equal scores the first ones
        Wt, _ = method.scored(W, p)  # type: ignore[attr-defined]
        assert torch.linalg.matrix_rank(Wt - W) <= 3
        largest = method.init(site(), Generator())
        magnitude = method.weight(W.float(), largest) != 0  # begins as pruning by magnitude
        assert torch.equal(magnitude, ~smallest(W.float().abs(), largest["pruned"]))


def test_nothing_pruned_is_the_base_exactly() -> None:
    for start in ("normal", "lora"):
        method, W = registry.method("pst", start=start), draw(12, 20).float()
        assert torch.equal(method.weight(W, method.init(site(), Generator())), W)


def test_the_merged_model_is_sparse() -> None:
    model = Two()
    tuned = veneer.attach(model, "pst(sparsity=0.85, targets='used idle')")
    tuned.begin(total_steps=10)
    steps(tuned, 10, torch.optim.Adam(tuned.parameters(), 1e-3), Generator())
    x = torch.randn(4, 12)
    y = model(x)
    plain = tuned.merge().detach()
    torch.testing.assert_close(plain(x), y)
    for layer in (model.used, model.idle):
        assert int((layer.weight == 0).sum()) == int(120 * 0.85)
    tuned = veneer.attach(model, "pst(targets='used')")
    prune(tuned, 0.5)
    tuned.merge().detach()
    assert int((model.used.weight == 0).sum()) == 102  # those that were zero are still the smallest


def test_patterns_of_n_in_m() -> None:
    S = draw(6, 16)
    for n, m in ((2, 4), (1, 8), (4, 4)):
        mask, groups = n_of_m(S, n, m), S.unflatten(-1, (-1, m))
        assert (mask.unflatten(-1, (-1, m)).sum(-1) == n).all()
        kept = groups.masked_fill(~mask.unflatten(-1, (-1, m)), math.inf).amin(-1)
        gone = groups.masked_fill(mask.unflatten(-1, (-1, m)), -math.inf).amax(-1)
        assert (kept > gone).all()
    with pytest.raises(BadValue, match="2 of 5 does not fit rows of 16"):
        n_of_m(S, 2, 5)


# -- how it is run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", ["snell(r=4, s=0.5)", "snella(r=4, init_thres=0.3)", "pst(weight_rank=2, mask_rank=2, initial_sparsity=0.4)"]
)
def test_compiled_and_stacked(spec: str, limit: int) -> None:
    method, W, x = veneer.parse(spec), draw(3, 12, 20), draw(5, 20)
    each = [moved(method) for _ in range(3)]
    y = F.linear(x, method.weight(W[0], each[0], site()))
    names = [k for k in each[0] if k not in method.frozen]
    expected = gradients(y.square().sum(), torch.ones_like(y.sum()), *(each[0][k] for k in names))

    torch._dynamo.reset()
    run = torch.compile(lambda p: method.forward(DenseCall(W[0]), x, p, site()), fullgraph=True, backend="aot_eager")
    again = run(each[0])
    torch.testing.assert_close(again, y)
    for a, b in zip(gradients(again.square().sum(), torch.ones_like(y.sum()), *(each[0][k] for k in names)), expected):
        torch.testing.assert_close(a, b)

    stack = {k: torch.stack([p[k] for p in each]) for k in each[0]}
    folded = torch.vmap(lambda w, p: method.fold(w, None, p, site())[0])(W, stack)
    torch.testing.assert_close(folded, torch.stack([method.weight(w, p, site()) for w, p in zip(W, each)]))
    found = gradients(F.linear(x, folded[0]).square().sum(), torch.ones_like(y.sum()), *(each[0][k] for k in names))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)
