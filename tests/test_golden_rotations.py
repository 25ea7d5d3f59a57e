"""Rotations, circulant and sparse changes (OFT, BOFT, HRA, RoAd, C3A, SHiRA) against golden numbers, a peer's layers and their own laws."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from test_golden import Case, DenseCall, checked, site
from tiny import SUBJECTS
from torch import Generator, Tensor, nn

import veneer
import veneer.registry as registry
from veneer.errors import BadValue
from veneer.kernels import circulant, sparse
from veneer.method import Method, Params
from veneer.site import Site

peft = pytest.importorskip("peft")


def drawn(method: Method, at: Site, size: float = 0.3) -> Params:
    """Random tensors of the method's shapes in float64; index tensors as they are."""
    made = method.init(at, Generator().manual_seed(0))
    return {k: size * torch.randn(t.shape).double() if t.is_floating_point() else t for k, t in made.items()}


def matrix(method: Method, p: Params, at: Site) -> Tensor:
    """M with W_eff = W Mᵀ."""
    return method.weight(torch.eye(at.in_features).double(), p, site(out=at.in_features, inside=at.in_features)).T


def error(M: Tensor) -> float:
    return float((M.T @ M - torch.eye(len(M)).double()).abs().max())


def near(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=tolerance)


# -- golden numbers ---------------------------------------------------------------------------------------------

CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("oft", 0, {"oft_block_size": 4}),
    ("oft", 1, {"k": 5, "use_cayley_neumann": False}),
    ("oft", 2, {"k": 4, "block_share": True, "use_cayley_neumann": False}),
    ("oft", 3, {"r": 4, "num_cayley_neumann_terms": 7}),
    ("boft", 0, {"k": 5}),
    ("boft", 1, {"k": 4, "n_butterfly_factors": 2}),
    ("hra", 0, {"r": 4}),
    ("hra", 1, {"r": 3}),
    ("road", 0, {"g": 4}),
    ("road", 1, {"variant": "road_2", "group_size": 6}),
    ("road", 2, {"variant": "road_4", "group_size": 12}),
    ("c3a", 0, {"block_size": 4}),
    ("shira", 0, {"r": 1, "random_seed": 5}),
]


@pytest.mark.parametrize(("slug", "index", "hyper"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_weight_bias_and_forward(slug: str, index: int, hyper: dict[str, Any]) -> None:
    case = Case(slug, index)
    method, at = registry.method(slug, **hyper), site(inside=case["W"].shape[1])
    method.check(at)
    made = method.init(at, Generator())
    assert {k: t.shape for k, t in made.items()} == {k: t.shape for k, t in case.params().items()}
    checked(method, case, case["W"], at)
    near(method.fold(case["W"], case["b"], case.params(), at)[0], case["W_eff"], case.tolerance)
    in_training = DenseCall(case["W"], case["b"], training=True)
    near(method.forward(in_training, case["x"], case.params(), at), case["y"], case.tolerance)


def test_shira_draws_the_golden_positions() -> None:
    case = Case("shira", 0)
    assert torch.equal(registry.method("shira", r=1, seed=5).init(site(), Generator())["indices"], case["param.indices"])


# -- a peer's layers --------------------------------------------------------------------------------------------

ROADS = ("road_1", "road_2", "road_4")
LINEAR = (lambda: nn.Linear(16, 24), site(out=24, inside=16))
CONV = (lambda: nn.Conv2d(4, 8, 3), site(kind="conv", out=8, inside=36, kernel=(3, 3)))
TABLE = (lambda: nn.Embedding(10, 8), site(kind="embedding", out=8, inside=10))
NAMES = {"oft": {"oft_R": "Q", "oft_embedding_R": "Q"}, "boft": {"boft_R": "R", "boft_s": "s"}, "hra": {"hra_u": "u"},
         "road": {"road_theta": "theta", "road_alpha": "alpha"}, "c3a": {"c3a_kernel": "w"}, "shira": {"shira_weight": "v"}}  # fmt: skip
PEERS: list[tuple[str, Any, str, dict[str, Any], dict[str, Any]]] = [
    *(("oft", LINEAR, "OFTConfig", {"oft_block_size": 4, "num_cayley_neumann_terms": t}, {"k": 4, "num_cayley_neumann_terms": t})
      for t in (2, 3, 4, 5, 6)),
    ("oft", LINEAR, "OFTConfig", {"oft_block_size": 8, "use_cayley_neumann": False}, {"k": 8, "use_cayley_neumann": False}),
    ("oft", LINEAR, "OFTConfig", {"oft_block_size": 4, "block_share": True}, {"k": 4, "block_share": True}),
    ("oft", LINEAR, "OFTConfig", {"oft_block_size": 4, "coft": True, "eps": 0.1}, {"k": 4, "coft": True, "eps": 0.1}),
    ("oft", LINEAR, "OFTConfig", {"oft_block_size": 4, "coft": True, "eps": 0.1, "block_share": True},
     {"k": 4, "coft": True, "eps": 0.1, "block_share": True}),
    ("oft", CONV, "OFTConfig", {"oft_block_size": 6}, {"k": 6}),
    ("oft", TABLE, "OFTConfig", {"oft_block_size": 4}, {"k": 4}),
    ("boft", LINEAR, "BOFTConfig", {"boft_block_size": 8}, {"k": 8}),
    ("boft", CONV, "BOFTConfig", {"boft_block_size": 4}, {"k": 4}),
    ("hra", LINEAR, "HRAConfig", {"r": 6}, {"r": 6}),
    ("hra", LINEAR, "HRAConfig", {"r": 5, "apply_GS": True}, {"r": 5, "apply_GS": True}),
    ("hra", CONV, "HRAConfig", {"r": 4}, {"r": 4}),
    *(("road", LINEAR, "RoadConfig", {"variant": v, "group_size": 6}, {"variant": v, "group_size": 6}) for v in ROADS),
    ("c3a", LINEAR, "C3AConfig", {"block_size": 8}, {"b": 8}),
    ("c3a", LINEAR, "C3AConfig", {"block_size": 1}, {"b": 1}),
    ("shira", LINEAR, "ShiraConfig", {"r": 3, "random_seed": 7}, {"r": 3, "seed": 7}),
]  # fmt: skip


@pytest.mark.parametrize(("slug", "layer", "config", "theirs", "ours"), PEERS, ids=[f"{p[0]}-{i}" for i, p in enumerate(PEERS)])
def test_merged_weights_are_the_peers(slug: str, layer: Any, config: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    build, at = layer
    holder = nn.Module()
    holder.lin = build().double()
    W = holder.lin.weight.detach().clone()
    b = getattr(holder.lin, "bias", None)
    b = None if b is None else b.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = peft.get_peft_model(holder, getattr(peft, config)(target_modules=["lin"], **theirs))
    method, p = registry.method(slug, **ours), drawn(registry.method(slug, **ours), at)
    for name, parameter in peer.named_parameters():
        if parameter.requires_grad:
            mine = p[next(own for their, own in NAMES[slug].items() if their in name.split("."))]
            parameter.data = mine.clone().reshape(parameter.shape)
    peer.merge_adapter()
    merged = peer.base_model.model.lin.get_base_layer()
    seen = W.T if at.kind == "embedding" else W.flatten(1)
    W_eff, b_eff = method.fold(seen, b, p, at)
    tolerance = 2e-5 if slug == "c3a" else 1e-8 if "eps" in ours or slug == "road" else 1e-10  # it computes those in float32
    near(W_eff, merged.weight.T if at.kind == "embedding" else merged.weight.flatten(1), tolerance)
    if slug == "road":
        near(b_eff, merged.bias, tolerance)
    elif b is not None:
        assert b_eff is b


# -- counts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slug", "hyper", "count"),
    [("c3a", {"b": 8}, 48), ("oft", {"k": 4}, 24), ("boft", {"k": 4, "m": 1}, 88), ("hra", {"r": 4}, 64), ("road", {"group_size": 8}, 24),
     ("road", {"group_size": 8, "variant": "road_2"}, 48), ("road", {"group_size": 8, "variant": "road_4"}, 96), ("shira", {"r": 2}, 80),
     ("oft", {"k": 4, "block_share": True}, 6), ("oft", {"r": 4}, 24)],
)  # fmt: skip
def test_counts_at_16_by_24(slug: str, hyper: dict[str, Any], count: int) -> None:
    made = registry.method(slug, **hyper).init(LINEAR[1], Generator())
    assert sum(t.numel() for k, t in made.items() if k != "indices") == count


# -- rotations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slug", "hyper"),
    [("oft", {"k": 5, "use_cayley_neumann": False}), ("oft", {"r": 2, "block_share": True, "use_cayley_neumann": False}),
     ("boft", {"k": 4, "m": 3}), ("boft", {"k": 8, "m": 1}), ("hra", {"r": 1}), ("hra", {"r": 7}), ("hra", {"r": 8}),
     ("hra", {"r": 6, "apply_GS": True})],
)  # fmt: skip
def test_exact_rotations_keep_lengths_and_angles(slug: str, hyper: dict[str, Any]) -> None:
    at = site(inside=80)
    method = registry.method(slug, **hyper)
    p = drawn(method, at, 1.0)
    p.pop("s", None)
    M = matrix(method, p | ({"s": torch.ones(80, 1).double()} if slug == "boft" else {}), at)
    assert error(M) < 1e-12
    x = torch.randn(3, 80).double()
    near((method.turn(x, p | {"s": torch.ones(1)}, at)) if slug == "boft" else method.turn(x, p, at), x @ M)


@pytest.mark.parametrize("t", [4, 5, 6, 7])
def test_the_series_is_a_rotation_up_to_its_last_term(t: int) -> None:
    """R = Q (I − A^(t−1)) with Q orthogonal, so that RᵀR is (I − A^(t−1))ᵀ(I − A^(t−1)): an error of order ‖A‖^(t−1) at most."""
    at, method = site(inside=6), registry.method("oft", k=6, num_cayley_neumann_terms=t)
    Q = torch.randn(1, 15).double()
    for size in (0.3, 0.03):
        U = torch.zeros(6, 6).double()
        U[tuple(torch.triu_indices(6, 6, 1))] = size * Q[0]
        rest = torch.eye(6).double() - torch.linalg.matrix_power(U - U.T, t - 1)
        R = matrix(method, {"Q": size * Q}, at)
        near(R.T @ R, rest.T @ rest)
        assert error(R) <= 3 * torch.linalg.matrix_norm(U - U.T) ** (t - 1) * (1 + torch.linalg.matrix_norm(U - U.T) ** (t - 1))


def test_the_series_approximates_the_inverse_of_the_exact_rotation() -> None:
    at, Q = site(inside=20), 0.01 * torch.randn(5, 6).double()
    series = matrix(registry.method("oft", k=4, num_cayley_neumann_terms=9), {"Q": Q}, at)
    exact = matrix(registry.method("oft", k=4, use_cayley_neumann=False), {"Q": Q}, at)
    near(series, exact.T)
    assert float((series - exact).abs().max()) > 1e-3


def test_coft_keeps_blocks_near_the_identity_and_passes_gradients() -> None:
    at, W = site(inside=20), torch.randn(12, 20).double()
    p = {"Q": torch.randn(5, 6).double().requires_grad_()}
    kept = registry.method("oft", k=4, coft=True, eps=0.02)
    length = 0.02 / 5**0.5 / 2**0.5  # ‖A‖ = √2 ‖row of Q‖
    inside = {"Q": (p["Q"] / p["Q"].norm(dim=1, keepdim=True) * length).detach().requires_grad_()}
    free, C = registry.method("oft", k=4), torch.randn(12, 20).double()
    near(kept.weight(W, p, at), free.weight(W, inside, at))
    one, other = ((m.weight(W, q, at) * C).sum() for m, q in ((kept, p), (free, inside)))
    near(torch.autograd.grad(one, p["Q"])[0], torch.autograd.grad(other, inside["Q"])[0])
    near(kept.weight(W, {"Q": 1e-3 * inside["Q"]}, at), free.weight(W, {"Q": 1e-3 * inside["Q"]}, at))
    start = {"Q": torch.zeros(5, 6).double().requires_grad_()}
    assert torch.autograd.grad((kept.weight(W, start, at) * C).sum(), start["Q"])[0].isfinite().all()


@pytest.mark.parametrize("share", [False, True])
def test_block_dropout_leaves_out_that_many_blocks_in_training_only(share: bool) -> None:
    at, I = site(out=20, inside=20), torch.eye(20).double()
    method = registry.method("oft", k=4, block_dropout=0.5, block_share=share)
    p = drawn(method, at)
    R = method.forward(DenseCall(I, training=True), I, p, at).unflatten(0, (5, 4))
    still = [torch.equal(R[i, :, 4 * i : 4 * i + 4], torch.eye(4).double()) for i in range(5)]
    assert sum(still) == 2  # ⌊0.5 · 5⌋
    near(method.forward(DenseCall(I), I, p, at), matrix(method, p, at))


def test_butterfly_joins_far_features() -> None:
    """One factor mixes within blocks of k; m factors within runs of k · 2^(m−1)."""
    at = site(inside=32)
    for m in (1, 2, 3):
        method = registry.method("boft", k=4, m=m)
        p = drawn(method, at) | {"s": torch.ones(32, 1).double()}
        run = 4 * 2 ** (m - 1)
        linked = (matrix(method, p, at).abs() > 1e-12).double()
        assert torch.equal(linked, torch.block_diag(*[torch.ones(run, run).double()] * (32 // run)))


def test_pairs_of_equal_mirrors_are_the_identity_and_the_reverse_order_the_inverse() -> None:
    at = site(inside=20)
    start = registry.method("hra", r=6).init(at, Generator().manual_seed(1))["u"].double()
    assert float((matrix(registry.method("hra", r=6), {"u": start}, at) - torch.eye(20).double()).abs().max()) < 1e-12
    u, method = torch.randn(20, 5).double(), registry.method("hra", r=5)
    H = torch.eye(20).double()
    for v in (u / u.norm(dim=0)).T:
        H = H - 2 * H @ torch.outer(v, v)
    near(matrix(method, {"u": u}, at).T, H)
    near(matrix(method, {"u": u.flip(1)}, at).T @ H, torch.eye(20).double())


def test_near_pairs_of_mirrors_turn_half_precision_inputs_by_small_angles() -> None:
    """A rotation by some thousandths comes out of bfloat16 with bfloat16's relative error, not lost in that of its two mirrors."""
    at, method = site(inside=64), registry.method("hra", r=8)
    u = method.init(at, Generator().manual_seed(2))["u"]
    p = {"u": u + 1e-3 * u.norm(dim=0) * torch.randn(u.shape) / 8}
    pieces = {k: t.bfloat16() for k, t in method.pieces(p, at).items()}
    exact = torch.eye(64).double() - matrix(method, {"u": p["u"].double()}, at)
    rounded = pieces["V"].double() @ pieces["K"].double()
    assert float((rounded - exact).norm()) < 0.02 * float(exact.norm())


@pytest.mark.parametrize("variant", ROADS)
def test_road_rotates_if_and_only_if_lengths_are_one(variant: str) -> None:
    at, method = site(out=12, inside=12), registry.method("road", variant=variant, group_size=6)
    p = drawn(method, at, 2.0)
    if variant == "road_2":  # one angle for both features of a pair
        p["theta"] = p["theta"].unflatten(0, (2, 2, 3))[:, :1].expand(2, 2, 3).flatten()
    if variant == "road_4":
        p["theta"] = p["theta"].unflatten(0, (2, 2, 2, 3))[:, :1, :1].expand(2, 2, 2, 3).flatten()
    p["alpha"] = torch.ones_like(p["alpha"])
    assert error(method.weight(torch.eye(12).double(), p, at)) < 1e-12
    p["alpha"] = p["alpha"] + 0.1
    assert error(method.weight(torch.eye(12).double(), p, at)) > 0.1


def test_road_stays_within_the_groups_of_a_convolution() -> None:
    at = site(kind="conv", out=16, inside=36, kernel=(3, 3), groups=4)
    registry.method("road", group_size=4).check(at)
    with pytest.raises(BadValue, match=r"4 outputs of each of the 4 groups.*choose group_size = 4\."):
        registry.method("road", group_size=8).check(at)


# -- additive ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [1, 3, 4, 12])
def test_c3a_is_a_dense_circulant(b: int) -> None:
    at, method = site(out=24, inside=36), registry.method("c3a", b=b)
    w = torch.randn(24 // b, 36 // b, b).double()
    dense = torch.zeros(24, 36).double()
    for i in range(24):
        for j in range(36):
            dense[i, j] = w[i // b, j // b, (j - i) % b] / 36
    near(method.change({"w": w}, at), dense)
    x = torch.randn(2, 3, 36).double()
    near(method.delta(x, {"w": w}, at), x @ dense.T)
    assert torch.linalg.matrix_rank(dense) == 24 or b == 1


def test_c3a_starts() -> None:
    at = site()
    assert not registry.method("c3a", b=4).init(at, Generator())["w"].any()
    method = registry.method("c3a", b=4, start="xavier")
    w = method.init(at, Generator().manual_seed(0))["w"]
    assert 0.5 < float(w.abs().max()) / (6 / 32) ** 0.5 <= 1 and "identity" in method.limits


@pytest.mark.parametrize("b", [1, 5, 8])
def test_circulant_gradients_and_what_they_keep(b: int) -> None:
    x, w = torch.randn(2, 3, 3 * b).double().requires_grad_(), torch.randn(2, 3, b).double().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fast = circulant.circulant_linear(x, w)
    assert [t.data_ptr() for t in kept] == [w.data_ptr(), x.data_ptr()]
    plain, towards = circulant.reference(x, w), torch.randn_like(fast)
    near(fast, plain)
    for mine, theirs in zip(torch.autograd.grad(fast, (x, w), towards), torch.autograd.grad(plain, (x, w), towards)):
        near(mine, theirs)


def test_sparse_gradients_and_what_they_keep() -> None:
    at = registry.method("shira", r=2).init(site(), Generator())["indices"]
    x, v = torch.randn(2, 3, 20).double().requires_grad_(), torch.randn(at.shape[1]).double().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fast = sparse.sparse_linear(x, v, at, 12)
    assert sorted(t.numel() for t in kept) == sorted([x.numel(), v.numel(), at.numel()])
    plain, towards = sparse.reference(x, v, at, 12), torch.randn_like(fast)
    near(fast, plain)
    for mine, theirs in zip(torch.autograd.grad(fast, (x, v), towards), torch.autograd.grad(plain, (x, v), towards)):
        near(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("slug", "hyper"), [("c3a", {"b": 4}), ("shira", {"r": 2})])
def test_half_precision_inputs_give_half_precision_outputs(slug: str, hyper: dict[str, Any], dtype: torch.dtype) -> None:
    at, method = site(), registry.method(slug, **hyper)
    p = {k: t.float().requires_grad_() if t.is_floating_point() else t for k, t in drawn(method, at).items()}
    x = torch.randn(2, 5, 20).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        y = method.delta(x, p, at)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), x.float() @ method.change(p, at).T, rtol=0.02, atol=0.02)
    y.backward(torch.ones_like(y))
    assert x.grad is not None and x.grad.dtype == dtype
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in p.values() if t.is_floating_point())


@pytest.mark.parametrize("mask", ["random", "magnitude", "band"])
def test_shira_changes_its_positions_and_no_others(mask: str) -> None:
    at, method, W = site(), registry.method("shira", r=2, mask=mask), torch.randn(12, 20).double()
    p = method.init(at, Generator())
    if method.reads_weight:
        p = method.init_from_weight(W, None, p, at, Generator())
    p["v"] = torch.randn(64).double()
    row, column = p["indices"]
    flat = row * 20 + column
    assert len(flat) == 64 and bool((flat.diff() > 0).all())
    changed = method.weight(W, p, at) - W
    near(changed[row, column], p["v"])
    assert int((changed != 0).sum()) == 64
    if mask == "magnitude":
        rest = W.clone()
        rest[row, column] = 0
        assert float(rest.abs().max()) <= float(W[row, column].abs().min())
    if mask == "band":
        far = (row + 0.5) / 12 - (column + 0.5) / 20
        assert float(far.abs().max()) < 0.25 and set(row.tolist()) == set(range(12)) and set(column.tolist()) == set(range(20))


@pytest.mark.parametrize("mask", ["random", "magnitude", "band"])
def test_shira_files_keep_the_positions_that_no_seed_gives_again(mask: str, tmp_path: Any) -> None:
    tuned = veneer.attach(SUBJECTS["vit"].build(), registry.method("shira", r=2, mask=mask), head=False)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter))
    tuned.save(tmp_path)
    from safetensors.torch import load_file

    names = {key.rpartition("/")[2] for key in load_file(tmp_path / "adapter.safetensors")}
    assert names == ({"v", "indices"} if mask == "magnitude" else {"v"})
    again = veneer.load(SUBJECTS["vit"].build(), tmp_path)
    assert torch.equal(SUBJECTS["vit"].answers(again.model), SUBJECTS["vit"].answers(tuned.model))
    assert all(key.endswith("/v") for key, _ in again.named_parameters())


# -- embeddings, refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slug", "hyper"), [("oft", {"k": 4}), ("boft", {"k": 4, "m": 2}), ("hra", {"r": 4}), ("road", {"group_size": 4})])
def test_embedding_vectors_are_turned_not_the_vocabulary(slug: str, hyper: dict[str, Any]) -> None:
    at, method = site(kind="embedding", out=8, inside=11), registry.method(slug, **hyper)
    p, table, ids = drawn(method, at), torch.randn(8, 11).double(), torch.randint(11, (3, 5))
    y = method.forward(DenseCall(table), ids, p, at)
    near(y, method.weight(table, p, at).T[ids])
    near(y, method.forward(DenseCall(torch.eye(8).double()), table.T[ids], p, site(out=8, inside=8)))


REFUSED: list[tuple[str, dict[str, Any], Site, str]] = [
    ("oft", {"k": 8}, site(inside=20), r"OFT: k=8 does not cut the 20 features at site into equal blocks; choose k = 5 or 10\."),
    ("oft", {"r": 3}, site(inside=20), r"OFT: r=3 does not cut the 20 features at site .*; choose r = 2 or 4\."),
    ("oft", {"r": 20}, site(inside=20), r"choose r = 10\."),
    ("oft", {"k": 32}, site(kind="embedding", out=24, inside=32), r"k=32 does not cut the 24 features .* choose k = 24\."),
    ("oft", {"k": 2}, site(inside=1), r"choose other targets\."),
    ("boft", {"k": 6}, site(inside=20), r"BOFT: k=6, m=1 do not fit the 20 features at site.*; choose k=5, m=1 or k=4, m=1\."),
    ("boft", {"k": 5, "m": 2}, site(inside=20), r"k be even where m > 1; choose k=2, m=2 or k=10, m=2\."),
    ("boft", {"k": 4, "m": 3}, site(inside=20), r"choose k=2, m=2 or k=10, m=2"),
    ("hra", {"r": 21, "apply_GS": True}, site(inside=20), r"HRA: apply_GS needs r ≤ 20 features, not r=21, at site; lower r\."),
    (
        "road",
        {"group_size": 7},
        site(out=12),
        r"RoAd: group_size=7 is not an even number .* 12 outputs at site; choose group_size = 6 or 12\.",
    ),
    ("road", {"group_size": 4}, site(out=9), r"choose other targets\."),
    ("c3a", {"b": 8}, site(out=12, inside=20), r"C3A: b=8 does not divide in=20 and out=12 at site; choose b = 4\."),
    ("shira", {"r": 8}, site(out=12, inside=20), r"SHiRA: r=8 asks for 256 of the 240 entries at site; choose r ≤ 7\."),
    ("shira", {"r": 1}, site(out=1, inside=20), r"choose other targets\."),
]


@pytest.mark.parametrize(("slug", "hyper", "at", "said"), REFUSED, ids=[f"{r[0]}-{i}" for i, r in enumerate(REFUSED)])
def test_what_does_not_fit_is_refused_with_what_does(slug: str, hyper: dict[str, Any], at: Site, said: str) -> None:
    with pytest.raises(BadValue, match=said):
        registry.method(slug, **hyper).check(at)
