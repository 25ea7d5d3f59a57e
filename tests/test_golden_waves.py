"""Wavelets, frequencies, splines and compounds (WaRA, WaveFT, FourierFT, NeRA, QuIC): golden numbers, a peer's layers, their own laws."""

from __future__ import annotations

import math
from itertools import combinations, permutations
from typing import Any

import pytest
import torch
from test_golden import Case, DenseCall, checked, site
from tiny import SUBJECTS
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import veneer
import veneer.registry as registry
from veneer.errors import BadValue, Unsupported
from veneer.kernels import hats
from veneer.maths import wavelet
from veneer.maths.compound import compounds
from veneer.maths.spline import bsplines, kan
from veneer.method import Method, Params
from veneer.site import Site

WAVELETS = ["haar", "db2", "db3", "db4"]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def near(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=tolerance)


def moved(method: Method, at: Site, W: Tensor | None = None, size: float = 0.3) -> Params:
    """First tensors of a site in float64, the floating ones moved by random numbers unless they are taken from the weight."""
    generator = Generator().manual_seed(0)
    p = {k: t.double() if t.is_floating_point() else t for k, t in method.init(at, generator).items()}
    p = {k: t if k in method.frozen or not t.is_floating_point() else t + size * draw(*t.shape) for k, t in p.items()}
    return p if W is None else method.init_from_weight(W, None, p, at, generator)


def refusal(method: Method, at: Site) -> str:
    with pytest.raises(BadValue) as said:
        method.check(at)
    assert "\n" not in str(said.value)
    return str(said.value)


def gradients(y: Tensor, inputs: list[Tensor], towards: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, inputs, towards))


# -- golden numbers ---------------------------------------------------------------------------------------------

CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("wara", 0, {"r": 3, "alpha": 6.0}),
    ("wara", 1, {"r": 3, "alpha": 6.0, "wavelet": "db2"}),
    ("wara", 2, {"form": "weight", "r": 2, "alpha": 3.0}),
    ("wara", 3, {"form": "weight", "r": 2, "alpha": 3.0, "wavelet": "db2"}),
    ("fourierft", 0, {"n_frequency": 30}),
    ("waveft", 0, {"n_frequency": 30}),
    ("waveft", 1, {"n_frequency": 30, "wavelet_family": "db2"}),
    ("waveft", 2, {"n_frequency": 20, "scaling": 5.0}),
    ("quantum-adapter", 0, {"n_blocks": 2}),
    ("quantum-adapter", 1, {"n_blocks": 2, "orders": (1, 2, 3)}),
    ("quantum-adapter", 2, {"n_blocks": 2, "block_share": True, "num_adapters": 2}),
    ("quantum-adapter", 3, {"n_blocks": 2, "orders": (1,)}),
    ("quantum-adapter", 4, {"n_blocks": 2}),
]


@pytest.mark.parametrize(("slug", "index", "hyper"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_weight_and_forward(slug: str, index: int, hyper: dict[str, Any]) -> None:
    case = Case(slug, index)
    method, p = registry.method(slug, **hyper), case.params()
    at = site(out=case["W"].shape[0], inside=case["W"].shape[1])
    method.check(at)
    made = method.init(at, Generator())
    assert {k: t.shape for k, t in made.items()} == {k: t.shape for k, t in p.items()}
    if "indices" in made:
        assert torch.equal(made["indices"], p["indices"])
        near(DenseCall(case["W"], case["b"])(case["x"]) + method.product(case["x"], p, at), case["y"], case.tolerance)  # type: ignore[attr-defined]
    if "Q" in case:
        near(method.turn(torch.eye(at.out_features).double(), p, at), case["Q"], case.tolerance)  # type: ignore[attr-defined]
    checked(method, case, case["W"], at)


def test_wara_grid() -> None:
    case = Case("wara", 4)
    method = registry.method("wara", form="grid", r=3, alpha=3.0, grid=(4, 6), prefix_tokens=1)
    call = DenseCall(case["W"], case["b"])
    case.agree("y", method.forward(call, case["x"], case.params(), site()))
    gained = registry.method("wara", form="grid", r=3, alpha=3.0, grid=(4, 6), prefix_tokens=1, gains=True)  # through the transforms
    case.agree("y", gained.forward(call, case["x"], case.params() | {"g": torch.ones(4).double()}, site()))


def test_wara_tiny() -> None:
    case = Case("wara", 5)
    method, at = registry.method("wara", form="tiny", r=3, alpha=3.0), site()
    start = moved(method, at, case["W"])
    sign = torch.sign((start["U_r"] * case["U_r"]).sum(0))  # theirs are arbitrary
    near(start["U_r"] * sign, case["U_r"])
    near(start["V_r"] * sign, case["V_r"])
    p = case.params() | {"U_r": case["U_r"], "V_r": case["V_r"]}
    near(method.weight(case["W"], p, at), case["W_eff"], case.tolerance)
    case.agree("y", method.forward(DenseCall(case["W"], case["b"]), case["x"], p, at))


@pytest.mark.parametrize(("index", "r", "K"), [(0, 3, 8), (1, 2, 5)])
def test_nera(index: int, r: int, K: int) -> None:
    case = Case("nera", index)
    method, p = registry.method("nera", r=r, num_knots=K), case.params()
    at = site(out=case["W"].shape[0], inside=case["W"].shape[1])
    assert {k: t.numel() for k, t in method.init(at, Generator()).items()} == {k: t.numel() for k, t in p.items()}
    case.agree("z", method.features(case["x"], p))  # type: ignore[attr-defined]
    case.agree("y", method.forward(DenseCall(case["W"], case["b"]), case["x"], p, at))


@pytest.mark.parametrize("family", ["db1", "db2", "db3", "db4"])
@pytest.mark.parametrize(("out", "inside"), [(12, 20), (11, 15), (9, 18)])
def test_waveft_is_the_peers(family: str, out: int, inside: int) -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(inside, out)).double()
    config = peft.WaveFTConfig(n_frequency=30, wavelet_family=family, target_modules=["0"], init_weights=False)
    layer = peft.get_peft_model(model, config).base_model.model[0]
    layer.waveft_spectrum["default"].data = layer.waveft_spectrum["default"].data.double()
    method, at = registry.method("waveft", n=30, wavelet=family), site(out=out, inside=inside)
    p = method.init(at, Generator()) | {"c": layer.waveft_spectrum["default"].detach()}
    near(method.change(p, at), layer.get_delta_weight("default"))  # type: ignore[attr-defined]


# -- wavelets ---------------------------------------------------------------------------------------------------


def S(n: int, name: str) -> Tensor:
    """The matrix of the transform, entry by entry."""
    low, high = wavelet.filters(name)
    made = torch.zeros(n, n, dtype=torch.float64)
    for k in range(n // 2):
        for j in range(len(low)):
            made[k, (2 * k + j) % n] += low[j]
            made[n // 2 + k, (2 * k + j) % n] += high[j]
    return made


@pytest.mark.parametrize("name", WAVELETS)
def test_filters_have_unit_length_and_vanishing_moments(name: str) -> None:
    low, high = (torch.tensor(taps, dtype=torch.float64) for taps in wavelet.filters(name))
    near(low.sum(), torch.tensor(2.0).double().sqrt(), 1e-14)
    near(low @ low, torch.tensor(1.0).double(), 1e-14)
    for power in range(len(low) // 2):  # what makes them Daubechies'
        near(high @ torch.arange(len(low)).double() ** power, torch.tensor(0.0).double(), 1e-12)


@pytest.mark.parametrize("name", WAVELETS)
@pytest.mark.parametrize("n", [2, 4, 6, 20])
def test_periodic_transform_is_its_orthonormal_matrix(name: str, n: int) -> None:
    matrix, x = S(n, name), draw(3, n)
    near(matrix @ matrix.T, torch.eye(n).double(), 1e-13)
    near(wavelet.analysed(x, name), x @ matrix.T, 1e-13)
    near(wavelet.synthesised(x, name), x @ matrix, 1e-13)
    near(wavelet.synthesised(wavelet.analysed(x.T, name, 0), name, 0), x.T, 1e-13)
    near(wavelet.raised(x[:, : n // 2], name, high=True), x[:, : n // 2] @ matrix[n // 2 :], 1e-13)


@pytest.mark.parametrize("name", WAVELETS)
@pytest.mark.parametrize("n", [5, 8, 15])
def test_padded_transform_is_its_synthesis_matrix_cut(name: str, n: int) -> None:
    low, high = wavelet.filters(name)
    taps, P = len(low), wavelet.padded(n, name)
    assert n + taps - 2 + (n + taps) % 2 == P
    R = torch.zeros(2 * (P // 2 - 1) + taps, P, dtype=torch.float64)
    for k in range(P // 2):
        for j in range(taps):
            R[2 * k + j, k] += low[j]
            R[2 * k + j, P // 2 + k] += high[j]
    trim = (2 * taps - 3) // 2
    cut = R[trim : len(R) - trim]
    cut = cut[(len(cut) - n) // 2 :][:n]
    c, x = draw(3, P), draw(3, n)
    near(wavelet.synthesised_padded(c, n, name), c @ cut.T, 1e-13)
    near(wavelet.analysed_padded(x, name), x @ cut, 1e-13)


# -- WaRA -------------------------------------------------------------------------------------------------------


def dense(method: Method, p: Params, at: Site) -> Tensor:
    return method.weight(torch.zeros(at.out_features, at.in_features).double(), p, at)


@pytest.mark.parametrize("name", WAVELETS)
def test_feature_form_is_the_pipeline_on_a_whole_picture(name: str) -> None:
    """Features × tokens, transformed on both axes, each of the four bands through the same pair, and back."""
    method, at = registry.method("wara", r=3, wavelet=name), site()
    p, X = moved(method, at), draw(20, 10)
    C = S(20, name) @ X @ S(10, name).T
    pair = method.alpha / method.r * p["B_w"] @ p["A_w"]  # type: ignore[attr-defined]
    Y = S(12, name).T @ torch.cat([pair @ C[:10], pair @ C[10:]]) @ S(10, name)
    near(dense(method, p, at) @ X, Y)
    if name == "haar":
        near(dense(method, p, at), torch.kron(pair, torch.eye(2).double()))


def test_ranks_and_counts() -> None:
    at = site(out=24, inside=32)
    for spec, rank, count in (
        ("wara(r=3)", 6, 3 * 28),
        ("wara(r=3, wavelet='db2')", 6, 3 * 28),
        ("wara(form='weight', r=2, wavelet='db2')", 8, 8 * 28),
        ("wara(form='weight', ranks=(3, 0, 1, 2))", 6, 6 * 28),
        ("wara(form='tiny', r=5)", 5, 25),
        ("wara(form='tiny', r=5, coef='diag')", 5, 5),
        ("wara(form='grid', r=3)", 3, 3 * 56),
    ):
        method = veneer.parse(spec)
        p = moved(method, at, draw(24, 32) if method.reads_weight else None)
        assert int(torch.linalg.matrix_rank(dense(method, p, at))) == rank, spec
        assert sum(t.numel() for k, t in p.items() if k not in method.frozen) == count, spec
        L, R = method.low_rank(draw(24, 32), p, at)  # type: ignore[misc]
        near(L @ R, dense(method, p, at))


def test_levels_take_the_smooth_band_apart_again() -> None:
    method, at = registry.method("wara", form="weight", r=2, levels=2, wavelet="db2"), site(out=12, inside=20)
    p = moved(method, at)
    assert p["A_LL2"].shape == (2, 5) and p["B_HL2"].shape == (3, 2) and p["A_LH"].shape == (2, 10) and "A_LL" not in p

    def joined(LL: Tensor, level: str) -> Tensor:
        LH, HL, HH = (p[f"B_{q}{level}"] @ p[f"A_{q}{level}"] for q in ("LH", "HL", "HH"))
        C = torch.cat([torch.cat([LL, LH], 1), torch.cat([HL, HH], 1)])
        return S(len(C), "db2").T @ C @ S(len(C.T), "db2")

    near(dense(method, p, at), method.alpha / 2 * joined(joined(p["B_LL2"] @ p["A_LL2"], "2"), ""))  # type: ignore[attr-defined]


def test_the_smooth_band_alone_gives_smooth_weights() -> None:
    method, at = registry.method("wara", form="weight", ranks=(2, 0, 0, 0), wavelet="db2"), site()
    change = dense(method, moved(method, at), at)
    assert float((S(12, "db2")[6:] @ change).abs().max()) < 1e-12 and float((change @ S(20, "db2")[10:].T).abs().max()) < 1e-12
    assert float(change.abs().max()) > 1e-3


@pytest.mark.parametrize("name", WAVELETS)
@pytest.mark.parametrize("form", ["grid", "tiny_grid"])
def test_a_linear_grid_is_lora_on_the_patches(form: str, name: str) -> None:
    W, at = draw(12, 20), site()
    gained = registry.method("wara", form=form, r=3, wavelet=name, grid=(4, 6), prefix_tokens=2, gains=True)
    plain = registry.method("wara", form=form, r=3, wavelet=name, grid=(4, 6), prefix_tokens=2)
    everywhere = registry.method("wara", form=form, r=3, wavelet=name, grid=(4, 6), prefix_tokens=2, prefix_update=True)
    p = moved(gained, at, W) if form == "tiny_grid" else moved(gained, at)
    p["g"] = torch.ones(4).double()
    x, call = draw(3, 26, 20), DenseCall(W)
    L, R = gained.factors(p, at)  # type: ignore[attr-defined]
    patches = torch.cat([torch.zeros(3, 2, 12).double(), x[:, 2:] @ (L @ R).T], 1)
    for method in (gained, plain):
        near(method.forward(call, x, p, at), call(x) + patches)
        with pytest.raises(Unsupported, match="differs from token to token"):
            attached("wara(form='grid', r=2, prefix_tokens=1)").merge()
    near(everywhere.forward(call, x, p, at), x @ everywhere.weight(W, p, at).T)
    first = site(batch_dim=1)  # tokens first
    near(plain.forward(call, x.transpose(0, 1), p, first).transpose(0, 1), plain.forward(call, x, p, at))


def test_gains_and_nonlinearity_act_on_bands() -> None:
    method = registry.method("wara", form="grid", r=3, alpha=3.0, wavelet="db2", grid=(4, 6), gains=True, act="tanh")
    W, at, x = draw(12, 20), site(), draw(2, 24, 20)
    p = moved(method, at)
    z = torch.einsum("bhwd,rd->bhwr", x.view(2, 4, 6, 20), p["A"])
    c = torch.einsum("ph,qw,bhwr->bpqr", S(4, "db2"), S(6, "db2"), z).tanh()
    bands = [c[:, i : i + 2, j : j + 3] for i in (0, 2) for j in (0, 3)]
    bands = [g * band for g, band in zip(p["g"], bands)]
    c = torch.cat([torch.cat(bands[:2], 2), torch.cat(bands[2:], 2)], 1)
    z = torch.einsum("ph,qw,bpqr->bhwr", S(4, "db2"), S(6, "db2"), c)
    near(method.forward(DenseCall(W), x, p, at), x @ W.T + z.flatten(1, 2) @ p["B"].T)


def attached(spec: str, family: str = "vit") -> Any:
    tuned = veneer.attach(SUBJECTS[family].build(), spec, head=False)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return tuned


def test_wara_refuses_in_one_sentence() -> None:
    assert "in=27 and out=8" in refusal(registry.method("wara"), site(out=8, inside=27))
    assert "multiples of 8" in refusal(registry.method("wara", form="weight", levels=3), site(out=12, inside=20))
    assert "choose r ≤ 12" in refusal(registry.method("wara", form="tiny", r=13), site())
    registry.method("wara", form="tiny", r=2).check(site(out=7, inside=9))
    assert "not the conv" in refusal(registry.method("wara", form="grid"), site(kind="conv"))
    for hyper, part in (
        ({"ranks": (0, 0, 0, 0)}, "four ranks"),
        ({"ranks": 3}, "four ranks"),
        ({"grid": (3, 4)}, "two even numbers"),
        ({"grid": 14}, "two even numbers"),
        ({"wavelet": "db9"}, "'db4'"),
    ):
        with pytest.raises(BadValue, match=part):
            registry.method("wara", **hyper)
    with pytest.raises(BadValue, match=r"5 tokens at .*, 0 of them before the patches, are no grid of 2 × 2"):
        SUBJECTS["vit"].answers(attached("wara(form='grid', r=2)").model)


def test_tiny_is_the_base_at_first_and_keeps_its_basis() -> None:
    model = SUBJECTS["vit"].build()
    before = SUBJECTS["vit"].answers(model)
    tuned = veneer.attach(model, "wara(form='tiny', r=4)", head=False)
    near(SUBJECTS["vit"].answers(model), before)
    assert {k.rpartition("/")[2] for k, _ in tuned.named_parameters()} == {"coef"}
    W = draw(12, 20)
    p = moved(registry.method("wara", form="tiny", r=12), site(), W)
    near(p["U_r"].T @ W @ p["V_r"], torch.diag(torch.linalg.svdvals(W)))
    assert bool((p["U_r"].gather(0, p["U_r"].abs().argmax(0, keepdim=True)) > 0).all())


# -- FourierFT and WaveFT ---------------------------------------------------------------------------------------


def test_fourierft_is_a_sum_of_cosines() -> None:
    method, at = registry.method("fourierft", n=7), site()
    p = moved(method, at)
    i, j = torch.arange(12).double()[:, None], torch.arange(20).double()
    waves = sum(c * torch.cos(2 * math.pi * (i * u / 12 + j * v / 20)) for c, u, v in zip(p["c"], *p["indices"]))
    near(dense(method, p, at), 150 / 240 * waves)  # type: ignore[operator]
    L, R = method.factors(p, at)  # type: ignore[attr-defined]
    near(L @ R, dense(method, p, at))
    assert method.low_rank(draw(12, 20), p, at) is None
    few = registry.method("fourierft", n=5)
    L, R = few.low_rank(draw(12, 20), q := moved(few, at), at)  # type: ignore[misc]
    near(L @ R, dense(few, q, at))


@pytest.mark.parametrize("slug", ["fourierft", "waveft"])
def test_places_are_those_of_the_seed_and_the_shape(slug: str) -> None:
    a, b = (registry.method(slug, n=50, seed=s) for s in (777, 3))
    places = a.init(site(), Generator().manual_seed(1))["indices"]
    assert torch.equal(places, a.init(site("attn.v"), Generator().manual_seed(2))["indices"])
    assert not torch.equal(places, b.init(site(), Generator())["indices"])
    assert len({tuple(pair) for pair in places.T.tolist()}) == 50
    assert "choose n ≤ 240" in refusal(registry.method(slug, n=241), site())
    base = SUBJECTS["vit"].answers(SUBJECTS["vit"].build())
    for start, same in (("zeros", True), ("normal", False)):
        method = registry.method(slug, n=50, start=start)
        tuned = veneer.attach(SUBJECTS["vit"].build(), method, head=False)
        assert torch.allclose(SUBJECTS["vit"].answers(tuned.model), base, atol=1e-9) == same == ("identity" not in method.limits)


@pytest.mark.parametrize("slug", ["fourierft", "waveft"])
def test_thin_product_and_dense_weight_have_the_same_gradients(slug: str) -> None:
    """The dense path's gradient of the coefficients is the transform of the dense gradient, read at their places."""
    for hyper in ({}, {"wavelet": "db3"}, {"use_idwt": False}) if slug == "waveft" else ({},):
        method, at = registry.method(slug, n=9, **hyper), site(out=11, inside=15)
        p, x = moved(method, at), draw(4, 3, 15).requires_grad_()
        p["c"].requires_grad_()
        towards = draw(4, 3, 11)
        thin = method.product(x, p, at)  # type: ignore[attr-defined]
        plain = F.linear(x, method.change(p, at))  # type: ignore[attr-defined]
        near(thin, plain)
        for a, b in zip(gradients(thin, [x, p["c"]], towards), gradients(plain, [x, p["c"]], towards)):
            near(a, b)
        G = torch.einsum("btj,bti->ij", x.detach(), towards)
        if slug == "fourierft":
            found = 150 / 165 * torch.fft.fft2(G).real[p["indices"][0], p["indices"][1]]
        else:
            one = torch.eye(9).double()
            found = torch.stack([(G * method.change(p | {"c": e}, at)).sum() for e in one])  # type: ignore[attr-defined]
        near(gradients(method.product(x, p, at), [p["c"]], towards)[0], found)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["db1", "db2", "db3", "db4"])
def test_a_few_patches_or_a_whole_synthesis_are_one_weight(name: str) -> None:
    few, many = (registry.method("waveft", n=n, wavelet=name) for n in (3, 200))
    at = site(out=13, inside=18)
    p = moved(many, at)
    parts = [{"c": p["c"][i::70], "indices": p["indices"][:, i::70]} for i in range(70)]  # each of at most three
    near(sum(dense(few, part, at) for part in parts), dense(many, p, at))  # type: ignore[arg-type]


def test_the_sparse_product_keeps_the_input_alone() -> None:
    method, at = registry.method("waveft", n=9), site(out=12, inside=20)
    p, x, kept = moved(method, at), draw(50, 20), []
    p["c"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        method.product(x, p, at)  # type: ignore[attr-defined]
    assert all(t.data_ptr() == x.data_ptr() for t in kept if t.numel() >= x.numel())


def test_which_path_follows_from_shapes() -> None:
    wide, narrow = site(out=4096, inside=4096), site(out=384, inside=384)
    assert registry.method("waveft").thin(wide) and not registry.method("waveft").thin(narrow)  # type: ignore[attr-defined]
    assert registry.method("fourierft", n=300).thin(wide) and not registry.method("fourierft").thin(wide)  # type: ignore[attr-defined]


def test_a_haar_coefficient_is_a_patch_and_quadrants_have_their_sides() -> None:
    method, at = registry.method("waveft", n=1, alpha=1.0), site(out=8, inside=12)
    for place, signs in (
        ((1, 2), [[1, 1], [1, 1]]),
        ((1, 8), [[1, 1], [-1, -1]]),
        ((5, 2), [[1, -1], [1, -1]]),
        ((5, 8), [[1, -1], [-1, 1]]),
    ):
        p = {"c": torch.ones(1).double(), "indices": torch.tensor(place)[:, None]}
        expected = torch.zeros(8, 12).double()
        expected[2:4, 4:6] = 0.5 * torch.tensor(signs)
        near(dense(method, p, at), expected)
    bare = registry.method("waveft", n=5, alpha=2.0, use_idwt=False)
    q = moved(bare, at)
    assert torch.equal(dense(bare, q, at)[tuple(q["indices"])], 2 * q["c"]) and int((dense(bare, q, at) != 0).sum()) == 5


@pytest.mark.parametrize("slug", ["fourierft", "waveft"])
def test_places_outside_the_weight_are_refused(slug: str) -> None:
    method, at = registry.method(slug, n=5), site()
    p = moved(method, at)
    method.check_tensors(p, at)
    method.check_tensors({k: torch.stack([t, t]) for k, t in p.items()}, at)  # of a stack of two
    for row, place in ((0, 12), (1, 20), (1, -1), (slice(None), p["indices"][:, 2])):
        wrong = p["indices"].clone()
        wrong[row, 3] = place
        with pytest.raises(BadValue, match="not those of 5 different entries of a 12×20 weight"):
            method.check_tensors(p | {"indices": wrong}, at)


def test_density_is_the_proportional_allotment() -> None:
    """Of a total of n per layer, each layer gets its share of all entries, as other libraries have it."""
    sites = [site(out=768, inside=768)] * 4 + [site(out=3072, inside=768), site(out=768, inside=3072), site(out=8, inside=9)]
    entries = [s.out_features * s.in_features for s in sites]
    method = registry.method("waveft", density=2592 * len(sites) / sum(entries))
    theirs = [max(1, round(e / sum(entries) * (2592 * len(sites)))) for e in entries]
    assert [len(method.init(s, Generator())["c"]) for s in sites] == theirs
    assert [len(registry.method("waveft").init(s, Generator())["c"]) for s in sites[:2]] == [2592, 2592]
    assert [len(registry.method("fourierft").init(s, Generator())["c"]) for s in sites[:2]] == [1000, 1000]


# -- stacked matrices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["wara(r=2)", "fourierft(n=9)", "waveft(n=9, wavelet='db2')", "quantum-adapter(N=2)"])
def test_stacks_of_matrices_are_folded_one_by_one(spec: str) -> None:
    method, at, W = veneer.parse(spec), site(), draw(3, 12, 20)
    each = [moved(method, at) for _ in range(3)]
    together = torch.vmap(lambda w, p: method.fold(w, None, p, at)[0])(W, {k: torch.stack([p[k] for p in each]) for k in each[0]})
    for w, p, folded in zip(W, each, together):
        near(folded, method.weight(w, p, at))


# -- NeRA -------------------------------------------------------------------------------------------------------


def test_hats() -> None:
    knots = torch.linspace(-3, 3, 7).double()[None]
    at_knots = hats.hats(knots.T, knots, torch.ones(1).double())[:, 0]
    near(at_knots, torch.eye(7).double())  # 1 on its own knot, 0 on those one away
    inside = torch.rand(100, 1).double() * 6 - 3
    near(hats.hats(inside, knots, torch.ones(1).double()).sum(-1), torch.ones(100, 1).double())
    assert not hats.hats(torch.tensor([[4.0], [-4.1]]).double(), knots, torch.ones(1).double()).any()


def test_hat_features_are_their_definition_and_keep_only_the_input() -> None:
    x = draw(5, 7, 10).requires_grad_()
    p = [t.requires_grad_() for t in (3 * draw(10, 6), 1 + 0.1 * draw(10), draw(10, 6, 3))]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fast = hats.hat_features(x, *p)
    assert sum(t.numel() for t in kept) == x.numel() + sum(t.numel() for t in p)
    plain, towards = hats.reference(x, *p), draw(5, 7, 3)
    near(fast, plain)
    for a, b in zip(gradients(fast, [x, *p], towards), gradients(plain, [x, *p], towards)):
        near(a, b)
    assert torch.autograd.gradcheck(hats.hat_features, (x, *p))


def test_half_precision_inputs_meet_the_knots_in_full() -> None:
    x = torch.randn(50, 10).half()
    knots, u, C = torch.randn(10, 6), torch.ones(10), torch.randn(10, 6, 3)
    near(hats.hat_features(x, knots, u, C), hats.reference(x.float(), knots, u, C), 0.05)
    assert hats.hat_features(x, knots, u, C).dtype == torch.float32


def test_splines_are_those_of_cox_and_de_boor() -> None:
    G, order, span = 5, 3, 2.5
    t = [-span + (g - order) * 2 * span / G for g in range(G + 2 * order + 1)]

    def B(g: int, p: int, v: float) -> float:
        if p == 0:
            return float(t[g] <= v < t[g + 1])
        return (v - t[g]) / (t[g + p] - t[g]) * B(g, p - 1, v) + (t[g + p + 1] - v) / (t[g + p + 1] - t[g + 1]) * B(g + 1, p - 1, v)

    v = torch.rand(20).double() * 6 * span - 3 * span
    made = bsplines(v, G + order, order, span)
    near(made, torch.tensor([[B(g, order, float(one)) for g in range(G + order)] for one in v], dtype=torch.float64))
    inside = (v.abs() < span).double()
    near(made.sum(-1) * inside, inside)
    assert not bsplines(torch.tensor([4 * span, -4 * span]).double(), G + order, order, span).any()
    base, scale, coef = draw(4, 6), draw(4, 6), draw(4, 6, G + order)
    x = draw(9, 6)
    plain = F.silu(x) @ base.T + torch.einsum("ji,jig,tig->tj", scale, coef, bsplines(x, 8, 3, span))
    near(kan(x, base, scale, coef, span, order), plain)


def test_nera_counts() -> None:
    at = site(out=3072, inside=3072)
    assert sum(t.numel() for t in registry.method("nera", r=64, K=8).init(at, Generator()).values()) == 1_797_121
    spline = registry.method("nera", form="bspline", r=4, G=6, order=2)
    assert sum(t.numel() for t in spline.init(site(), Generator()).values()) == 32 * 4 * (6 + 2 + 2)


def test_nera_starts_at_the_base_or_near_it_and_is_never_merged() -> None:
    at, x, call = site(), draw(2, 5, 20), DenseCall(draw(12, 20), draw(12))
    for method in (registry.method("nera"), registry.method("nera", form="bspline")):
        assert torch.equal(method.forward(call, x, moved(method, at, size=0), at), call(x)) and "identity" not in method.limits
    near_it = registry.method("nera", exact_identity=False)
    gap = (near_it.forward(call, x, moved(near_it, at, size=0), at) - call(x)).abs().max()
    assert 0 < gap < 0.1 and "identity" in near_it.limits
    p = moved(registry.method("nera"), at) | {"alpha": torch.zeros(()).double()}
    assert torch.equal(registry.method("nera").forward(call, x, p, at), call(x))
    with pytest.raises(Unsupported, match="nonlinear"):
        attached("nera(r=2)", "llama").merge()


def test_nera_scales_inputs_seen_into_the_knots() -> None:
    tuned = veneer.attach(SUBJECTS["vit"].build(), "nera(r=2, fit_scale=True)", head=False, batches=[SUBJECTS["vit"].batch(0)])
    for s, _, p in tuned.entries():
        seen: list[Tensor] = []
        hook = tuned.model.get_submodule(s.module).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        SUBJECTS["vit"].answers(tuned.model, 0)
        hook.remove()
        near((seen[0] * p["in_scale"]).abs().flatten(0, -2).amax(0), torch.full((s.in_features,), 3.0).double(), 1e-5)
    with pytest.raises(BadValue, match="batches"):
        veneer.attach(SUBJECTS["vit"].build(), "nera(r=2, fit_scale=True)", head=False)


@pytest.mark.parametrize("form", ["code", "bspline"])
def test_nera_fits_what_lora_cannot(form: str) -> None:
    """y = W x + B sin(π x) with three features of the sines."""
    at, x = site(out=8, inside=6), torch.randn(400, 6)
    W = torch.randn(8, 6)
    y = x @ W.T + torch.sin(math.pi * x) @ torch.randn(6, 3) @ torch.randn(3, 8)
    left = {}
    for method in (registry.method("nera", form=form, r=3, K=13, G=12), registry.method("lora", r=3)):
        p = {k: t.requires_grad_() for k, t in method.init(at, Generator().manual_seed(0)).items()}
        optimiser = torch.optim.Adam(p.values(), 0.03)
        for _ in range(150):
            optimiser.zero_grad()
            loss = F.mse_loss(method.forward(DenseCall(W), x, p, at), y)
            loss.backward()
            optimiser.step()
        left[method.slug] = float(loss.detach())
    assert left["nera"] < 0.5 * left["lora"], left


# -- QuIC -------------------------------------------------------------------------------------------------------


def minor(A: Tensor, k: int, of: Any) -> Tensor:
    sets = list(combinations(range(len(A)), k))
    return torch.stack([torch.stack([of(A[list(I)][:, list(J)]) for J in sets]) for I in sets])


def permanent(A: Tensor) -> Tensor:
    return sum(torch.stack([A[i, j] for i, j in enumerate(order)]).prod() for order in permutations(range(len(A))))  # type: ignore[return-value]


def test_compounds_are_all_minors() -> None:
    A = draw(5, 5)
    of = {"det": torch.det, "perm": permanent, "max": torch.max, "avg": torch.mean}
    for name, function in of.items():
        for k, made in zip(range(1, 6), compounds(A, range(1, 6), name)):
            near(made, minor(A, k, function))
    near(compounds(A, (5,))[0], torch.det(A).view(1, 1))


def test_compounds_of_products_are_products() -> None:
    A, B = draw(2, 6, 6), draw(2, 6, 6)
    for of_both, of_A, of_B in zip(*(compounds(M, (1, 2, 3, 4)) for M in (A @ B, A, B))):
        near(of_both, of_A @ of_B)


@pytest.mark.parametrize("hyper", [{}, {"P": 3}, {"P": 3, "offset": True}, {"N": 2, "block_share": True, "orders": (3, 1)}, {"N": 1}])
def test_outputs_keep_their_lengths_and_weights_their_singular_values(hyper: dict[str, Any]) -> None:
    method, at, W = registry.method("quantum-adapter", **hyper), site(out=35), draw(35, 20)
    p, h = moved(method, at, size=1.0), draw(4, 5, 35)
    Q = method.turn(torch.eye(35).double(), p, at)  # type: ignore[attr-defined]
    near(Q.T @ Q, torch.eye(35).double())
    near(method.turn(h, p, at).norm(dim=-1), h.norm(dim=-1))  # type: ignore[attr-defined]
    near(torch.linalg.svdvals(method.weight(W, p, at)), torch.linalg.svdvals(W))
    near(Q @ method.weight(W, p, at), W)


def test_a_chain_is_one_turn_by_the_product() -> None:
    one, chain, at = registry.method("quantum-adapter", N=2), registry.method("quantum-adapter", N=2, P=3), site(out=23)
    p = moved(chain, at)
    turns = [one.turn(torch.eye(23).double(), {"Theta": T[None]}, at) for T in p["Theta"]]  # type: ignore[attr-defined]
    near(chain.turn(torch.eye(23).double(), p, at), turns[0] @ turns[1] @ turns[2])  # type: ignore[attr-defined]
    shifted = registry.method("quantum-adapter", N=2, P=3, offset=True)
    turns = [Q.roll((i * 23 // 3,) * 2, (0, 1)) for i, Q in enumerate(turns)]
    near(shifted.turn(torch.eye(23).double(), p, at), turns[0] @ turns[1] @ turns[2])  # type: ignore[attr-defined]


def test_only_the_skew_part_acts_and_order_one_is_a_block_rotation() -> None:
    method, at, h = registry.method("quantum-adapter", N=2, orders=(1,)), site(), draw(3, 12)
    p = {"Theta": draw(1, 2, 6, 6).requires_grad_()}
    K = (p["Theta"] - p["Theta"].mT)[0].detach() / 2
    eye = torch.eye(6).double()
    Q = torch.block_diag(*((eye - k) @ torch.linalg.inv(eye + k) for k in K))
    near(method.turn(h, p, at), h @ Q)  # type: ignore[attr-defined]
    method = registry.method("quantum-adapter", N=1, orders=(1, 2))
    p = {"Theta": draw(1, 1, 4, 4).requires_grad_()}
    (g,) = gradients(method.turn(h, p, at), [p["Theta"]], draw(3, 12))  # type: ignore[attr-defined]
    assert float((g + g.mT).abs().max()) < 1e-12 and float(g.abs().max()) > 1e-3


def test_quic_sizes_and_counts() -> None:
    def stored(out: int, **hyper: Any) -> int:
        return registry.method("quantum-adapter", **hyper).init(site(out=out), Generator())["Theta"].numel()

    for out, N, orders, n in ((1024, 1, (1, 2), 44), (768, 3, (1, 2), 22), (11, 1, (1, 2), 4), (7, 1, (1, 2, 3), 3)):
        assert registry.method("quantum-adapter", N=N, orders=orders).base(site(out=out))[1] == n  # type: ignore[attr-defined]
    assert 44 * 43 // 2 == 946 and 44 + 946 == 990 <= 1024
    assert stored(768, N=3) == 1452 and 24 * stored(768, N=3) == 34_848 and 3 * 22 * 21 // 2 == 693
    assert [24 * stored(768, N=8, orders=orders) for orders in ((1,), (1, 2), (1, 2, 3))] == [1_769_472, 32_448, 12_288]
    assert stored(768, N=3, block_share=True, P=2) == 2 * 484


def test_quic_refuses_and_warns_in_one_sentence() -> None:
    assert "choose N ≤ 5" in refusal(registry.method("quantum-adapter", N=8, orders=(1, 2, 3)), site(out=35))
    assert "choose lower orders" in refusal(registry.method("quantum-adapter", orders=(1, 4)), site(out=4))
    registry.method("quantum-adapter", N=5, orders=(1, 2, 3)).check(site(out=35))
    assert "choose offset=False" in refusal(
        registry.method("quantum-adapter", N=1, offset=True), site(kind="conv", out=16, inside=18, kernel=(3, 3), groups=2)
    )
    for orders in ((1, 1), (), (0,), (1.5,), 2):
        with pytest.raises(BadValue, match="orders="):
            registry.method("quantum-adapter", orders=orders)
    with pytest.warns(UserWarning, match="without order 1"):
        registry.method("quantum-adapter", orders=(2,))


def test_quic_starts_at_the_base_where_it_says_so() -> None:
    at, W = site(out=35), draw(35, 20)
    for hyper in ({}, {"orthogonal": False}, {"minors": "perm"}, {"scaling": True, "offset": True, "P": 2}):
        method = registry.method("quantum-adapter", **hyper)
        near(method.weight(W, moved(method, at, size=0), at), W, 1e-15)
        assert "identity" not in method.limits
    for hyper in ({"minors": "max"}, {"minors": "avg"}, {"start": "xavier"}):
        method = registry.method("quantum-adapter", **hyper)
        assert float((method.weight(W, moved(method, at, size=0), at) - W).abs().max()) > 1e-3 and "identity" in method.limits


def test_groups_of_a_convolution_stay_apart() -> None:
    method = registry.method("quantum-adapter", N=1)
    at = site(kind="conv", out=12, inside=18, kernel=(3, 3), groups=2)
    Q = method.turn(torch.eye(12).double(), moved(method, at), at)  # type: ignore[attr-defined]
    assert not Q[:6, 6:].any() and not Q[6:, :6].any() and float((Q[6:, 6:] - Q[:6, :6]).abs().max()) > 1e-3


def test_a_module_is_dropped_whole_and_in_training_only() -> None:
    for orthogonal in (True, False):
        method = registry.method("quantum-adapter", N=2, module_dropout=0.5, scaling=True, orthogonal=orthogonal)
        at, x, call = site(), draw(3, 20), DenseCall(draw(12, 20), draw(12))
        p = moved(method, at)
        turned = method.forward(call, x, p, at)
        call.training = True
        seen = [method.forward(call, x, p, at) for _ in range(40)]
        kept = [torch.allclose(y, turned) for y in seen]
        assert any(kept) and not all(kept)
        assert all(torch.allclose(y, call(x)) for y, k in zip(seen, kept) if not k)
