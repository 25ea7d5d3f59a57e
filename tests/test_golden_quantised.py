"""QWHA, L4Q and SketchTune against numbers from their authors' code or equations, and against the laws of quantised weights."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from conformance.formulas import FORMULAS
from test_golden import HOME, Case, DenseCall, site
from test_quantised import nf4
from tiny import SUBJECTS, loss, output
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import veneer
import veneer.registry as registry
from veneer.errors import BadFile, BadValue, Unsupported
from veneer.maths import grids, hadamard, sketch, sparse_repair
from veneer.site import Site
from veneer.tools.integers import integers, weight_of

LLAMA = {"7B": (4096, 11008, 4096, 32), "13B": (5120, 13824, 5120, 40), "8B": (4096, 14336, 1024, 32), "3B": (3072, 8192, 1024, 28)}


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def near(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance, check_dtype=False)


def linears(model: str) -> list[Site]:
    """The seven linear layers of every block of a LLaMA model."""
    d, m, kv, depth = LLAMA[model]
    shapes = [(d, d), (kv, d), (kv, d), (d, d), (m, d), (m, d), (d, m)]
    return [site(out=out, inside=inside) for out, inside in shapes] * depth


def first(method: Any, W: Tensor, S: Tensor | None = None, at: Site | None = None) -> dict[str, Tensor]:
    """A method's first tensors for a weight, in float64."""
    at = at or Site.bare(W)
    method.check(at)
    p = {k: t.double() if t.is_floating_point() else t for k, t in method.init(at, Generator()).items()}
    return method.init_from_weight(W, None, p if S is None else {**p, "S": S}, at, Generator())


def kept(run: Any) -> list[tuple[int, ...]]:
    """Shapes of all tensors that a run leaves for backward."""
    shapes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):  # type: ignore[func-returns-value]
        run()
    return shapes


# -- Hadamard matrices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 8, 16, 12, 24, 20, 28, 36, 52, 56, 76, 344])
def test_the_fast_transform_is_a_hadamard_matrix(n: int) -> None:
    K = hadamard.core_order(n)
    assert K is not None and n % K == 0
    core = hadamard.core(K) if K > 1 else None
    H = hadamard.transform(torch.eye(n, dtype=torch.float64), core).T
    assert bool((H.abs() == 1).all())
    near(H @ H.T, n * torch.eye(n))
    dense = hadamard.sylvester(n // K).double()
    near(H, dense if core is None else torch.kron(core.double(), dense))
    x = draw(2, 3, n)
    near(hadamard.transform(x, core), x @ H.T)
    near(hadamard.transform(x, None if core is None else core.T), x @ H)
    if K == 1:
        near(hadamard.transform(hadamard.transform(x)), n * x)


@pytest.mark.parametrize(("n", "K"), [(11008, 344), (13824, 108), (14336, 28), (3072, 12), (5120, 20), (4096, 1), (18, None), (7, None)])
def test_sizes_of_usual_layers_have_a_matrix(n: int, K: int | None) -> None:
    assert hadamard.core_order(n) == K


def test_blocks_are_orthogonal() -> None:
    H = hadamard.transform(torch.eye(12, dtype=torch.float64), None, 4)
    near(H @ H.T, 4 * torch.eye(12))
    assert not H[:4, 4:].any()


# -- QWHA -------------------------------------------------------------------------------------------------------

QWHA = ((0, 12, 16, 2), (1, 10, 24, 3))


def qwha_case(index: int) -> Case:
    case = Case("qwha", index)
    for k, t in case.items():
        case[k] = t.double() if t.is_floating_point() else t
    return case


def relative(case: Case, name: str, value: Tensor) -> None:
    near(value / case[name].abs().max(), case[name] / case[name].abs().max(), case.tolerance)


@pytest.mark.parametrize(("index", "out", "inside", "bits"), QWHA)
def test_qwha_quantiser_and_kernel(index: int, out: int, inside: int, bits: int) -> None:
    case, core = qwha_case(index), hadamard.core_order(inside)
    H = hadamard.transform(torch.eye(inside, dtype=torch.float64), hadamard.core(core) if core != 1 else None).T
    near(H, case["H"].double())
    step, zero = grids.grid(case["W_fp"], bits, 8)
    codes = grids.gptq(case["W_fp"], None, step, zero, bits)
    assert int(codes.min()) >= 0 and int(codes.max()) < 2**bits
    relative(case, "W", grids.off_grid(codes, step, zero))


@pytest.mark.parametrize(("index", "out", "inside", "bits"), QWHA)
def test_qwha_shares_places_and_values(index: int, out: int, inside: int, bits: int) -> None:
    case = qwha_case(index)
    hyper, e, H = case.hyper, case["W_fp"] - case["W"], case["H"].double()
    S = grids.damped(case["X_calib"].T @ case["X_calib"], hyper["damp"])
    relative(case, "score.act_error", (e @ case["R"].T).norm(dim=1))
    relative(case, "score.act_error", ((e @ S) * e).sum(1).sqrt())
    near(case["R"].T @ case["R"] / S.abs().max(), S / S.abs().max(), case.tolerance)
    F0 = e @ H.T
    relative(case, "out.F_dense", F0)
    for name, size in (("out.row_budget", F0.norm(dim=1)), ("out.row_budget_paper", case["score.act_error"])):
        given = sparse_repair.allocate(size ** hyper["t"], hyper["p"], inside)
        assert int(given.sum()) == hyper["p"]
        assert int((given - case[name]).abs().max()) <= 1 and torch.equal(given.sort().values, case[name].sort().values), name
    B = H / inside
    G, given = B @ S @ B.T, case["out.row_budget"]
    E = sparse_repair.largest(F0.abs() * G.diagonal().sqrt(), given)
    order = (case["param.E"][:, 0] * inside + case["param.E"][:, 1]).argsort()
    assert torch.equal(E, case["param.E"][order])
    c = sparse_repair.refined(e @ S @ B.T, G, given, E) * out**0.5 / hyper["scale"]
    near(c / case["param.c"].abs().max(), case["param.c"][order] / case["param.c"].abs().max(), case.tolerance)
    method: Any = registry.method("qwha", r=3, bits=bits, group=8, scale=hyper["scale"])
    p: dict[str, Tensor] = {"c": case["param.c"][order], "E": E} | ({"core": hadamard.core(12)} if inside == 24 else {})
    relative(case, "out.delta", method.change(p, site(out=out, inside=inside)))


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(("index", "out", "inside", "bits"), QWHA)
def test_qwha_forward(index: int, out: int, inside: int, bits: int, sparse: bool) -> None:
    case, at = qwha_case(index), site(out=out, inside=inside)
    step, zero = grids.grid(case["W_fp"], bits, 8)
    order = (case["param.E"][:, 0] * inside + case["param.E"][:, 1]).argsort()
    p = {"c": case["param.c"][order].requires_grad_(), "E": case["param.E"][order], "step": step, "zero": zero.to(torch.uint8)}
    p |= {"codes": grids.gptq(case["W_fp"], None, step, zero, bits).to(torch.uint8)}
    p |= {"core": hadamard.core(12)} if inside == 24 else {}
    method: Any = registry.method("qwha", r=3, bits=bits, group=8, scale=case.hyper["scale"])
    W_eff, b = method.fold(case["W_fp"], case["b"], p, at)
    relative(case, "W_eff", W_eff)
    x = case["x"].requires_grad_()
    frozen = grids.off_grid(p["codes"], step, zero)
    y = F.linear(x, frozen, b) + method.delta(x, p, at) if sparse else method.forward(DenseCall(case["W_fp"], b), x, p, at)
    relative(case, "y", y)
    g = torch.randn_like(y)
    dense = torch.autograd.grad(F.linear(x, W_eff, b), (x, p["c"]), g, retain_graph=True)
    for a, d in zip(torch.autograd.grad(y, (x, p["c"]), g), dense):
        near(a, d)


def qwha(W: Tensor, S: Tensor | None = None, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    method = registry.method("qwha", **{"r": 1, "group": 8, "bits": 2, "start": "weight" if S is None else "data", **options})
    return method, first(method, W, S)


@pytest.mark.parametrize("rule", ["output", "weight"])
@pytest.mark.parametrize("inside", [32, 24])
def test_qwha_repair_is_the_least_squares_of_the_output(rule: str, inside: int) -> None:
    W, X = draw(20, inside), draw(100, inside) @ torch.diag(torch.linspace(0.1, 3, inside, dtype=torch.float64))
    S, at = X.T @ X, site(out=20, inside=inside)
    method, p = qwha(W, S, r=2, rule=rule, quantiser="nearest")
    given = torch.bincount(p["E"][:, 0], minlength=20)
    assert len(p["c"]) == 2 * (20 + inside) == int(given.sum()) and torch.equal(p["E"].unique(dim=0), p["E"])
    W_Q, root = grids.off_grid(p["codes"], p["step"], p["zero"]), torch.linalg.cholesky(grids.damped(S, 1e-4)).T
    H = hadamard.transform(torch.eye(inside, dtype=torch.float64), p.get("core")).T
    basis = H / inside @ root.T
    left = (W - method.weight(W, p, at)) @ root.T
    for row, column in p["E"].tolist():
        assert abs(float(left[row] @ basis[column])) <= 1e-8 * float(basis[column].norm() * root.norm())
    raw = {**p, "c": ((W - W_Q) @ H.T)[p["E"][:, 0], p["E"][:, 1]] * 20**0.5 / method.scale}
    refined, plain, none = (float(e.norm()) for e in (left, (W - method.weight(W, raw, at)) @ root.T, (W - W_Q) @ root.T))
    assert refined <= plain * (1 + 1e-9) and refined < none


def test_qwha_without_inputs_keeps_the_largest_coefficients() -> None:
    W = draw(16, 32)
    method, p = qwha(W, r=2)
    F0 = hadamard.transform(W - grids.off_grid(p["codes"], p["step"], p["zero"]))
    near(p["c"] * method.scale / 4, F0[p["E"][:, 0], p["E"][:, 1]])
    near(first(registry.method("qwha", r=2, bits=2, group=8, start="data"), W)["c"], p["c"])  # a layer that saw nothing
    _, everything = qwha(W[:, :16], r=8)
    near(method.weight(W[:, :16], everything, Site.bare(W[:, :16])), W[:, :16])  # all coefficients: nothing is left of the error


def test_qwha_change_is_of_full_rank() -> None:
    W = draw(24, 32)
    method, p = qwha(W)
    assert int(torch.linalg.matrix_rank(method.change(p, Site.bare(W)))) > 8


def test_qwha_gptq_lowers_the_output_error() -> None:
    W, X = draw(24, 64), draw(300, 8) @ draw(8, 64) + 0.1 * draw(300, 64)
    errors = []
    for S in (None, X.T @ X):
        step, zero = grids.grid(W, 3, 16)
        errors.append(float(((W - grids.off_grid(grids.gptq(W, S, step, zero, 3), step, zero)) @ X.T).norm()))
    assert errors[1] < 0.9 * errors[0]


def test_qwha_plain_start_and_a_packed_base() -> None:
    W, x = draw(16, 32), draw(5, 32)
    method, p = qwha(W, start="random", seed=3)
    near(method.weight(W, p), grids.off_grid(p["codes"], p["step"], p["zero"]))
    own: Any = registry.method("qwha", r=1, group=8, start="random", quantiser="base")
    q = first(own, W)
    assert set(q) == {"c", "E"} and torch.equal(q["E"], own.init(Site.bare(W), Generator())["E"])
    near(own.forward(DenseCall(W), x, q, Site.bare(W)), x @ W.T)
    with pytest.raises(BadValue, match="start='weight' must be 'random'"):
        registry.method("qwha", quantiser="base")


def test_qwha_over_a_packed_base_starts_there_and_trains() -> None:
    model, batch = nf4(), SUBJECTS["llama"].batch()
    before = output(model, batch)
    tuned = veneer.attach(model, "qwha(r=1, start='random', quantiser='base')", head=False)
    assert torch.equal(output(tuned.model, batch), before)
    loss(tuned.model, batch).backward()
    assert all(p.grad is not None and p.grad.any() for p in tuned.parameters())
    with pytest.raises(Unsupported, match="stored quantised"):
        tuned.merge()


def test_qwha_attached_from_data_and_kept_for_backward(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 128))
    batches = [torch.randn(30, 64) for _ in range(3)]
    tuned = veneer.attach(model, "qwha(r=1, group=32, bits=2, start='data', targets='0')", batches=batches, head=False)
    (_, method, p), x = next(tuned.entries()), torch.randn(40, 64, requires_grad=True)
    assert set(p) == {"c", "E", "codes", "step", "zero"} and 16 * p["c"].numel() <= 64 * 128
    near(tuned.model(x), F.linear(x, method.weight(model[0].weight, p), model[0].bias), 1e-4)
    assert not [s for s in kept(lambda: tuned.model(x)) if s == (128, 64) and p["codes"].shape != s]
    tuned.save(tmp_path)
    again = veneer.load(nn.Sequential(nn.Linear(64, 128)), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(next(again.entries())[2].values(), p.values()))


@pytest.mark.parametrize(
    ("options", "inside", "said"),
    [
        ({"group": 7}, 16, "group=7 does not divide in=16 at site; choose group = 4 or 8"),
        ({"group": 8, "r": 8}, 16, "r=8 asks for 224 of the 192 entries at site; choose r ≤ 6"),
        ({"group": 9, "r": 1}, 18, "no Hadamard matrix of order in=18 is known here at site; choose kernel='blocks'"),
    ],
)
def test_qwha_refuses(options: dict[str, Any], inside: int, said: str) -> None:
    with pytest.raises(BadValue, match=said):
        registry.method("qwha", **options).check(site(out=12, inside=inside))


def test_qwha_refuses_places_of_a_file() -> None:
    W = draw(12, 16)
    method, p = qwha(W)
    method.check_tensors(p, Site.bare(W))
    twice = torch.cat([p["E"][:1], p["E"][:-1]])
    for wrong in ({"E": twice}, {"E": p["E"] + 16}, {"E": p["E"][:, 0]}, {"codes": p["codes"] + 4}):
        with pytest.raises(BadValue, match="at weight"):
            method.check_tensors({**p, **wrong}, Site.bare(W))


def test_shares_sum_up_and_stay_within_a_row() -> None:
    for a, total in ((torch.tensor([100.0, 1, 1, 0]), 20), (torch.zeros(4), 7), (torch.rand(4), 32), (torch.rand(4), 0)):
        given = sparse_repair.allocate(a, total, 8)
        assert int(given.sum()) == total and int(given.min()) >= 0 and int(given.max()) <= 8
    assert sorted(sparse_repair.allocate(torch.zeros(4), 7, 8).tolist()) == [1, 2, 2, 2]


# -- L4Q --------------------------------------------------------------------------------------------------------

L4Q = ((0, 4, 5, 6.0), (1, 3, 10, 3.0))


@pytest.mark.parametrize(("index", "bits", "group", "alpha"), L4Q)
def test_l4q(index: int, bits: int, group: int, alpha: float) -> None:
    case, at = Case("l4q", index), site()
    method: Any = registry.method("l4q", r=3, bits=bits, group=group, alpha=alpha)
    assert alpha / 3 == pytest.approx(case.hyper["alpha_scale"])
    p, W = case.params(grad=True), case["W"]
    codes, s, beta = method.pieces(W, p)
    assert torch.equal(codes.detach().long(), case["out.codes"])
    w = grids.groups(W + alpha / 3 * p["B"] @ p["A"], group) - beta[..., None]
    low, high = case.hyper["QN"], case.hyper["QP"]
    case.agree("out.mask", ((w / s[..., None] >= low) & (w / s[..., None] <= high)).double().flatten(1))
    case.agree("W_eff", method.weight(W, p, at))
    x = case["x"].requires_grad_()
    y = method.forward(DenseCall(W, case["b"]), x, p, at)
    case.agree("y", y)
    found = torch.autograd.grad(y, [x, *p.values()], case["grad_y"])
    for name, g in zip(["x", *p], found):
        case.agree(f"grad.{name}", g)


@pytest.mark.parametrize(("index", "bits", "group", "alpha"), L4Q)
@pytest.mark.parametrize(("start", "name"), [("fitted", "l4q"), ("lsq+", "lsqp"), ("symmetric", "symm"), ("asymmetric", "asymm")])
def test_l4q_starts(index: int, bits: int, group: int, alpha: float, start: str, name: str) -> None:
    case = Case("l4q", index)
    p = first(registry.method("l4q", r=3, bits=bits, group=group, start=start), case["W"])
    case.agree(f"init.{name}.s", p["s"])
    near(p["beta"], case.get(f"init.{name}.beta", torch.zeros_like(p["s"])))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_l4q_starts_as_the_nearest_grid(bits: int) -> None:
    W = draw(8, 32)
    W[0, :8] = 0
    method: Any = registry.method("l4q", bits=bits, group=8)
    p = first(method, W)
    assert bool((p["s"][0, 0] == 1) & (p["s"] > 0).all())
    near(W / p["s"].repeat_interleave(8, 1), (W / p["s"].repeat_interleave(8, 1)).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
    assert bool(((method.weight(W, p) - W).abs() <= p["s"].repeat_interleave(8, 1) / 2 + 1e-12).all())
    near(method.weight(W, p)[0, :8], W[0, :8])


def test_l4q_without_clipping_has_loras_gradients_and_none_on_offsets() -> None:
    W, x, at = draw(8, 32), draw(6, 32), site(out=8, inside=32)
    method: Any = registry.method("l4q", r=2, alpha=3, group=16)
    p = {k: t.requires_grad_() for k, t in first(method, W).items()}
    with torch.no_grad():
        p["s"] *= 2  # room for the product below
        p["B"] += 1e-3 * torch.randn_like(p["B"])
    y = method.forward(DenseCall(W), x, p, at)
    g = torch.randn_like(y)
    A, B, _, beta = torch.autograd.grad(y, list(p.values()), g)
    G = g.T @ x
    near(A, 1.5 * p["B"].T @ G)
    near(B, 1.5 * G @ p["A"].T)
    assert not beta.any()


def test_l4q_options_of_steps() -> None:
    W, x, at = draw(8, 32), draw(6, 32), site(out=8, inside=32)
    made = {}
    for scaled in (False, True):
        method: Any = registry.method("l4q", r=2, bits=3, group=16, start="lsq+", grad_scale=scaled, train_offset=not scaled)
        assert method.frozen == (("beta",) if scaled else ())
        p = {k: t.requires_grad_() for k, t in first(method, W).items()}
        p["s"].data *= 0.5
        made[scaled] = torch.autograd.grad(method.forward(DenseCall(W), x, p, at).sum(), [p["s"], p["A"], p["B"]])
    near(made[True][0], made[False][0] / (16 * 3) ** 0.5)
    near(made[True][2], made[False][2])


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_l4q_trains_and_gives_integers(bits: int, family: str) -> None:
    subject = SUBJECTS[family]
    tuned = veneer.attach(subject.build(torch.float32), f"l4q(r=2, bits={bits}, group=8)", head=False)
    optimiser = torch.optim.AdamW(tuned.param_groups(1e-3))
    for _ in range(3):
        optimiser.zero_grad()
        subject.answers(tuned.model).square().mean().backward()
        optimiser.step()
    pieces, folded = integers(tuned), {part.site.name: part for part in tuned.adapters["default"].parts}
    assert set(pieces) == set(folded)
    for name, piece in pieces.items():
        part, codes = folded[name], piece["codes"]
        assert codes.dtype == torch.int8 and codes.min() >= -(2 ** (bits - 1)) and codes.max() < 2 ** (bits - 1)
        W = weight_at(subject, part.site)
        assert torch.equal(weight_of(piece), part.method.weight(W, part.tensors(), part.site))
    merged = tuned.merge().model
    for name, piece in pieces.items():
        near(weight_at(merged, folded[name].site), weight_of(piece), 1e-6)
    with pytest.raises(Unsupported, match="merged"):
        integers(tuned)


def weight_at(source: Any, at: Site) -> Tensor:
    model = source if isinstance(source, nn.Module) else source.build(torch.float32)
    module = model.get_submodule(at.module)
    W = module.weight.detach()
    W = W.T if "Conv1D" in type(module).__name__ else W
    return W if at.rows is None else W[slice(*at.rows)]


def test_l4q_exported_layers_answer_the_same() -> None:
    x, tuned = torch.randn(5, 32), veneer.attach(nn.Sequential(nn.Linear(32, 16)), "l4q(r=2, bits=3, group=8, targets='0')", head=False)
    with torch.no_grad():
        for p in tuned.parameters():
            p += 0.05 * torch.randn_like(p)
        adapted, piece = tuned.model(x), integers(tuned)["0"]
        plain = piece["codes"].float().view(16, 4, 8) * piece["s"][..., None] + piece["beta"][..., None]
        assert torch.equal(F.linear(x, plain.view(16, 32), tuned.model[0].bias), adapted)
    with pytest.raises(Unsupported, match="LoRA does not learn the steps"):
        integers(veneer.attach(nn.Sequential(nn.Linear(32, 16)), "lora(targets='0')", head=False))


def test_l4q_beats_quantising_a_merged_lora() -> None:
    """At 3 bits, quantise → LoRA → quantise the sum again loses what was learned; learning through the grid does not."""
    W, goal, x = draw(16, 32) / 6, draw(16, 32) / 6, draw(400, 32)
    goal = W + 0.2 * (goal - W)
    method: Any = registry.method("l4q", r=4, bits=3, group=16)
    losses = []
    for through in (True, False):
        p = {k: t.requires_grad_() for k, t in first(method, W).items()}
        base = method.weight(W, p).detach()
        optimiser = torch.optim.Adam(p.values(), lr=1e-2)
        for _ in range(150):
            optimiser.zero_grad()
            W_eff = method.weight(W, p) if through else base + p["B"] @ p["A"]
            (x @ (W_eff - goal).T).square().mean().backward()
            optimiser.step()
        again = first(method, (base + p["B"] @ p["A"]).detach()) if not through else p
        W_eff = method.weight(W if through else base + p["B"] @ p["A"], again)
        losses.append(float((x @ (W_eff - goal).T).square().mean().detach()))
    assert losses[0] < losses[1]


@pytest.mark.parametrize("spec", ["l4q(r=2, group=16, targets='0')", "sketchtune(gpr=2, bits=3, targets='0')"])
def test_nothing_of_the_weights_size_is_kept_for_backward(spec: str) -> None:
    tuned, x = veneer.attach(nn.Sequential(nn.Linear(64, 48)), spec, head=False), torch.randn(40, 64)
    shapes = kept(lambda: tuned.model(x))
    assert (40, 64) in shapes and not [s for s in shapes if torch.Size(s).numel() >= 48 * 64], shapes


# -- SketchTune -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("index", "bits", "gpr"), [(0, 4, 1), (1, 2, 2), (2, 3, 4)])
def test_sketchtune(index: int, bits: int, gpr: int) -> None:
    case = Case("sketchtune", index)
    out, inside = case["W_eff"].shape
    packed = grids.packed(case["param.codes"])
    assert torch.equal(packed, case["out.packed"]) and torch.equal(grids.unpacked(packed), case["param.codes"])
    method: Any = registry.method("sketchtune", bits=bits, gpr=gpr)
    at, w = site(out=out, inside=inside), case["param.w"].requires_grad_()
    p, W = {"w": w, "codes": packed}, draw(out, inside)
    case.agree("W_eff", method.weight(W, p, at))
    x = case["x"].requires_grad_()
    y = method.forward(DenseCall(W, case["b"]), x, p, at)
    case.agree("y", y)
    gw, gx = torch.autograd.grad(y, (w, x), case["grad_y"])
    case.agree("grad.w", gw)
    case.agree("grad.x", gx)
    near(gw.sum(-1), grids.groups(case["grad_y"].flatten(0, 1).T @ x.flatten(0, 1), inside // gpr).sum(-1))


def test_sketchtune_learns_what_the_authors_code_learns() -> None:
    case = Case("sketchtune", 3)
    W, X = case["W"].double(), case["X_calib"].double()
    near(2 * X.T @ X, case["H"].double(), 1e-3)
    w, codes = sketch.sketch(W, X.T @ X, 4, 1, case.hyper["exponent"], case.hyper["percdamp"], act_order=False, seed=0)
    near(w.sort(-1).values, case["param.w"].sort(-1).values, 1e-3)
    ours, theirs = (float(((W - E.double()) @ X.T).norm()) for E in (sketch.gathered(w, codes), case["W_eff"]))
    assert abs(ours - theirs) <= 0.02 * theirs
    relearnt = sketch.gathered(case["param.w"], case["param.codes"].flatten(1))
    near(relearnt, case["W_eff"])


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize(("bits", "gpr"), [(2, 1), (3, 2), (4, 2)])
def test_a_weight_of_few_values_is_sketched_exactly(bits: int, gpr: int, inputs: bool) -> None:
    X = draw(200, 32)
    W = torch.arange(2.0**bits, dtype=torch.float64)[torch.randint(2**bits, (6, 32))] if bits < 4 else torch.randint(2, (6, 32)).double()
    W[:, :: 32 // gpr], W[:, 1 :: 32 // gpr] = 0, W.max()  # both ends in every block
    w, codes = sketch.sketch(W, X.T @ X if inputs else None, 2**bits, gpr, 3.0, 0.01, True, 0)
    near(sketch.gathered(w, codes), W, 1e-6)


def test_an_identity_matrix_needs_two_values() -> None:
    w, codes = sketch.sketch(torch.eye(16), None, 2, 1, 3.0, 0.1, False, 0)
    near(sketch.gathered(w, codes), torch.eye(16))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_errors_are_made_up_for_by_later_columns(bits: int, act_order: bool) -> None:
    W, X = draw(24, 64), draw(300, 8) @ draw(8, 64) + 0.1 * draw(300, 64)
    X[:, 5] = 0
    w, codes = sketch.sketch(W, X.T @ X, 2**bits, 2, 3.0, 0.01, act_order, 0)
    nearest = (W.view(24, 2, 32, 1) - w[:, :, None]).abs().argmin(-1).flatten(1)
    ours, plain = (float(((W - sketch.gathered(w, c)) @ X.T).norm()) for c in (codes, nearest))
    assert ours < plain
    again = sketch.sketch(W, X.T @ X, 2**bits, 2, 3.0, 0.01, act_order, 0)
    assert torch.equal(again[0], w) and torch.equal(again[1], codes)


def test_k_means_ends_at_a_fixed_point() -> None:
    x, weight = draw(7, 40), torch.rand(7, 40, dtype=torch.float64) + 0.1
    for K in (4, 16):
        centres = sketch.k_means(x, weight, sketch.first_centres(x, weight, K, Generator().manual_seed(1)), 1000, 0.0)
        near_to = (x[..., None] - centres[:, None]).abs().argmin(-1)
        mass = torch.zeros_like(centres).scatter_add(1, near_to, weight)
        mean = torch.zeros_like(centres).scatter_add(1, near_to, weight * x) / mass
        near(torch.where(mass > 0, mean, centres), centres)


def test_sketchtune_trains_values_and_never_codes() -> None:
    model, x, goal = nn.Sequential(nn.Linear(32, 16)), torch.randn(64, 32), torch.randn(64, 16)
    tuned = veneer.attach(model, "sketchtune(bits=3, gpr=2, start='data', targets='0')", batches=[x], head=False)
    _, method, p = next(tuned.entries())
    codes, optimiser, losses = p["codes"].clone(), torch.optim.Adam(tuned.parameters(), 1e-2), []
    for _ in range(20):
        optimiser.zero_grad()
        loss = (tuned.model(x) - goal).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] and torch.equal(p["codes"], codes) and not codes.requires_grad
    W_eff = method.weight(model[0].weight, p)
    assert max(len(block.unique()) for row in W_eff.detach().view(16, 2, 16) for block in row) <= 8


@pytest.mark.parametrize(
    ("options", "inside", "said"),
    [
        ({"gpr": 3}, 32, "gpr=3 does not cut in=32 into blocks of an even size at site; choose gpr = 2 or 4"),
        ({"gpr": 16}, 16, "blocks of an even size at site; choose gpr = 8"),
        ({"gpr": 1}, 33, "choose other targets"),
        ({"gpr": 4, "bits": 4}, 32, "a block of in/gpr=8 weights has fewer than the 16 values of bits=4 at site; choose gpr ≤ 2 or fewer"),
    ],
)
def test_sketchtune_refuses(options: dict[str, Any], inside: int, said: str) -> None:
    with pytest.raises(BadValue, match=said):
        registry.method("sketchtune", **options).check(site(inside=inside))


# -- all three --------------------------------------------------------------------------------------------------


def test_published_counts() -> None:
    def trained(spec: str, model: str) -> int:
        return FORMULAS[veneer.parse(spec).slug](veneer.parse(spec), linears(model))

    facts = {slug: json.loads((HOME / f"{slug}.json").read_text("utf-8"))["counts"] for slug in ("qwha", "l4q", "sketchtune")}
    assert trained("qwha(r=64)", "8B") == facts["qwha"][0]["trainable"] and trained("qwha(r=64)", "3B") == 97_255_424
    assert trained("l4q(r=4)", "7B") == facts["l4q"][0]["trainable"] + 2 * 50_593_792
    assert trained("l4q(r=4, train_offset=False)", "7B") == facts["l4q"][0]["trainable"] + 50_593_792
    for model, fact in zip(("7B", "13B", "8B"), facts["sketchtune"]):
        assert trained("sketchtune(gpr=1)", model) == fact["trainable"]
        assert trained("sketchtune(gpr=8)", model) == 8 * fact["trainable"]


@pytest.mark.parametrize("slug", ["qwha", "l4q", "sketchtune"])
def test_a_weight_that_was_rounded_before_is_refused(slug: str) -> None:
    W = (draw(32, 64) * 2).round().clamp(-7, 7)
    options = {"qwha": {"r": 1}, "l4q": {"group": 64}, "sketchtune": {"gpr": 1}}[slug]
    with pytest.raises(BadValue, match="this one is quantised already; load the base in 16 or 32 bit at weight"):
        first(registry.method(slug, **options), W)
    for fine in (draw(32, 64), torch.zeros(32, 64).double(), torch.eye(64).double(), draw(32, 64) * (draw(32, 64) > 1.5)):
        first(registry.method(slug, **options), fine)


@pytest.mark.parametrize("spec", ["qwha(r=1, group=8)", "l4q(group=8)", "sketchtune(gpr=2, bits=2)"])
def test_stacks_of_experts(spec: str, tmp_path: Any) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, vocab_size=48)
    model, ids = (
        MixtralForCausalLM(MixtralConfig(num_local_experts=3, num_key_value_heads=2, **sizes)).eval(),
        torch.tensor([[3, 9, 11, 5]]),
    )
    whole = {k: t.clone() for k, t in model.state_dict().items()}
    tuned = veneer.attach(model, f"{spec[:-1]}, targets='expert.down')", head=False)
    with torch.no_grad():
        for p in tuned.parameters():
            p += (0.1 * p.std() + 0.01) * torch.randn_like(p)
    tuned.model(input_ids=ids).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for k, p in tuned.named_parameters() if not k.endswith(("/s", "/beta")))
    with torch.no_grad():
        before = tuned.model(input_ids=ids).logits
        if spec.startswith("l4q"):
            assert [tuple(piece["codes"].shape) for piece in integers(tuned).values()] == [(3, 16, 24)]
        tuned.save(tmp_path)
        again = MixtralForCausalLM(model.config).eval()
        again.load_state_dict(whole)
        assert torch.equal(veneer.load(again, tmp_path).model(input_ids=ids).logits, before)
        near(tuned.merge().model(input_ids=ids).logits, before, 1e-5)


def test_files_with_wrong_steps_are_refused(tmp_path: Any) -> None:
    tuned = veneer.attach(nn.Sequential(nn.Linear(32, 16)), "l4q(group=8, targets='0')", head=False)
    with torch.no_grad():
        next(tuned.entries())[2]["s"][0, 0] = 0
    tuned.save(tmp_path)
    with pytest.raises(BadFile, match="steps must be finite and not zero at 0"):
        veneer.load(nn.Sequential(nn.Linear(32, 16)), tmp_path)
